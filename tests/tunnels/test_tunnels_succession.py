"""Processes of a gateway that follow each other: who names an earlier one gets there, unread; who names nobody is served."""

import array
import contextlib
import os
import socket
import ssl
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import pytest
import trio

from fxgateway.tunnels.peer_processes import AcceptedConnection
from fxgateway.tunnels.pre_auth_queue import TooBusy
from fxgateway.tunnels.succession import Succession
from fxtunnel.kit.listeners import LINE_NAME, Inherited
from fxtunnel.kit.notify import Notifier

HELD_AT_MOST = 400
"""Connections on a line that is not read (LINE_BYTES)."""


@dataclass
class Row:
    """Two processes, and the launcher of the later one."""

    earlier: Succession
    later: Succession
    launcher: socket.socket
    end_earlier: trio.CancelScope


@asynccontextmanager
async def launched() -> AsyncIterator[tuple[socket.socket, Notifier]]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    for end in (ours, theirs):
        end.setblocking(False)
    with ours, theirs:
        yield ours, Notifier(launcher=theirs)


@asynccontextmanager
async def in_a_row() -> AsyncIterator[Row]:
    async with launched() as (first, notifier), launched() as (second, successor), trio.open_nursery() as nursery:
        earlier, later, scope = Succession("p1"), Succession("p2"), trio.CancelScope()
        assert not earlier.is_named

        async def run_earlier(task_status: trio.TaskStatus[None]) -> None:
            with scope:
                await earlier.run(Inherited({}, notifier), task_status=task_status)

        await nursery.start(run_earlier)
        assert earlier.is_named
        name, line = kept(first)
        assert name == f"{LINE_NAME}p1"
        await nursery.start(later.run, Inherited({}, successor, lines={"p1": line}))
        name, own = kept(second)
        assert name == f"{LINE_NAME}p2"
        with own:
            yield Row(earlier, later, second, scope)
        nursery.cancel_scope.cancel()


def kept(launcher: socket.socket) -> tuple[str, socket.socket]:
    """What was given to keep, and its name."""
    data, ancillary, _, _ = launcher.recvmsg(4096, socket.CMSG_SPACE(4))
    (fd,) = array.array("i", ancillary[0][2])
    line = socket.socket(fileno=fd)
    line.setblocking(False)
    return data.decode().partition("FDNAME=")[2], line


@contextlib.contextmanager
def knocking(alpn: str) -> Iterator[tuple[socket.socket, AcceptedConnection]]:
    """A connection that has said its ClientHello: the peer, and what was accepted."""
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.set_alpn_protocols([alpn])
    with contextlib.suppress(ssl.SSLWantReadError):
        context.wrap_bio(incoming, outgoing).do_handshake()
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as peer:
        accepted, address = server.accept()
        with accepted:
            accepted.setblocking(False)
            peer.sendall(outgoing.read())
            yield peer, AcceptedConnection.fresh(accepted, address)


async def test_who_names_an_earlier_process_gets_there_unread() -> None:
    async with in_a_row() as row:
        with trio.fail_after(20), knocking("fx-process/p1/http/1.1") as (peer, passed):
            assert not await row.later.keeps(passed)
            passed.sock.close()
            there = await row.earlier.wait_passed()
            with there.sock:
                host, port = peer.getsockname()
                assert (there.ip, there.remote_address) == (host, f"{host}:{port}")
                assert there.sock.recv(5, socket.MSG_PEEK)[:1] == b"\x16"
                there.sock.send(b"hello")
                assert peer.recv(5) == b"hello"


@pytest.mark.parametrize(
    "alpn", ["http/1.1", "fx-data/1", "fx-process/p2/http/1.1", "fx-process/p3/fx-data/1", "fx-process/", "fx-worker/1"]
)
async def test_everybody_else_is_served_here(alpn: str) -> None:
    async with in_a_row() as row:
        with trio.fail_after(20), knocking(alpn) as (_, passed):
            assert await row.later.keeps(passed)


async def test_a_line_that_nobody_reads_holds_so_many() -> None:
    async with in_a_row() as row:
        held, is_full = 0, False
        with trio.fail_after(30), knocking("fx-process/p1/fx-data/1") as (_, passed):
            while not is_full and held < HELD_AT_MOST:
                try:
                    assert not await row.later.keeps(passed)
                    held += 1
                except TooBusy:
                    is_full = True
        assert is_full
        assert held > 20
        files = len(os.listdir("/proc/self/fd"))
        for _ in range(held):
            with trio.fail_after(20):
                (await row.earlier.wait_passed()).sock.close()
        assert len(os.listdir("/proc/self/fd")) == files


async def test_who_has_hung_up_meanwhile_is_passed_over() -> None:
    async with in_a_row() as row:
        with knocking("fx-process/p1/fx-data/1") as (peer, passed):
            assert not await row.later.keeps(passed)
            peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            peer.close()
        with knocking("fx-process/p1/fx-data/1") as (peer, passed):
            assert not await row.later.keeps(passed)
            with trio.fail_after(20):
                there = await row.earlier.wait_passed()
            with there.sock as sock:
                assert sock.getpeername() == peer.getsockname()


async def test_a_process_that_has_ended_is_forgotten() -> None:
    async with in_a_row() as row:
        row.end_earlier.cancel()
        with trio.fail_after(20):
            await trio.lowlevel.wait_readable(row.launcher)
        assert row.launcher.recv(4096) == f"FDSTOREREMOVE=1\nFDNAME={LINE_NAME}p1".encode()
        assert not row.earlier.is_named
        with trio.fail_after(20), knocking("fx-process/p1/http/1.1") as (_, passed):
            assert await row.later.keeps(passed)


async def test_without_a_launcher_nobody_follows() -> None:
    async with trio.open_nursery() as nursery:
        alone = Succession("p1")
        await nursery.start(alone.run, Inherited({}, Notifier()))
        assert not alone.is_named
        nursery.cancel_scope.cancel()
