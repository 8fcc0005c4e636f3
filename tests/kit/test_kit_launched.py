"""What a daemon and its launcher say to each other: whose turn it is, that nobody follows, and which sockets are kept."""

import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import cast

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from fxgateway.doors.door import DoorConfig, DoorRelays
from fxgateway.doors.doors import Doors
from fxgateway.routing.admission import Admission
from fxgateway.workers.shared_listeners import SharedListeners
from fxtunnel.engine.reactor import Reactor
from fxtunnel.kit.listeners import Inherited, ListenError, bound_address, kept_name, listen
from fxtunnel.kit.notify import END, GO, PREPARED, Notifier
from fxtunnel.kit.process import follow_launcher
from fxtunnel.kit.settings import Address
from fxtunnel.model import ServiceName
from tests.ports import free_port


@pytest.fixture
def link() -> Iterator[tuple[socket.socket, Notifier]]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    theirs.setblocking(False)
    notifier = Notifier(launcher=theirs)
    yield ours, notifier
    ours.close()
    notifier.close()


async def test_a_daemon_waits_for_its_turn_and_goes_with_its_launcher(link: tuple[socket.socket, Notifier]) -> None:
    ours, notifier = link
    stop = trio.Event()
    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:

            async def follow() -> None:
                await nursery.start(follow_launcher, notifier, stop.set)
                begun.set()

            begun = trio.Event()
            nursery.start_soon(follow)
            await wait_all_tasks_blocked()
            assert ours.recv(100) == PREPARED.encode()
            assert not begun.is_set()
            ours.send(GO)
            await begun.wait()
            ours.send(GO)
            await wait_all_tasks_blocked()
            assert not stop.is_set()
            ours.close()
            await stop.wait()


async def test_the_last_daemon_hears_that_nobody_follows(link: tuple[socket.socket, Notifier]) -> None:
    ours, notifier = link
    inherited, stop = Inherited({}, notifier), trio.Event()
    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:
            ours.send(GO)
            await nursery.start(follow_launcher, notifier, stop.set)
            assert inherited.is_handed_on
            ours.send(END)
            # SIGTERM may have been heard before: whoever asks now gets the answer.
            assert not inherited.is_handed_on
            ours.close()
            await stop.wait()
            assert not inherited.is_handed_on


async def test_a_launcher_that_is_gone_before_our_turn_ends_us(link: tuple[socket.socket, Notifier]) -> None:
    ours, notifier = link
    stop = trio.Event()
    ours.close()
    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:
            await nursery.start(follow_launcher, notifier, stop.set)
            await stop.wait()


def test_what_is_bound_is_kept_until_it_is_forgotten(link: tuple[socket.socket, Notifier], tmp_path: Path) -> None:
    ours, notifier = link
    inherited = Inherited({}, notifier)
    with listen(Address(path=tmp_path / "s"), inherited):
        name = kept_name(f"unix:{tmp_path / 's'}")
        data, ancillary, _, _ = ours.recvmsg(4096, socket.CMSG_SPACE(4))
        assert data == f"FDSTORE=1\nFDNAME={name}".encode()
        os.close(memoryview(ancillary[0][2]).cast("i")[0])
        inherited.forget("unix:/elsewhere")
        inherited.forget(f"unix:{tmp_path / 's'}")
        assert ours.recv(4096) == f"FDSTOREREMOVE=1\nFDNAME={name}".encode()


def _of_doors(inherited: Inherited, addresses: list[Address]) -> None:
    doors = Doors(cast(Reactor, None), cast(DoorRelays, None), cast(Admission, None))
    doors.apply([DoorConfig(str(address), address, ServiceName("s")) for address in addresses], inherited)


def _of_workers(inherited: Inherited, addresses: list[Address]) -> None:
    listening = SharedListeners(inherited)
    try:
        listening.open(addresses[0], addresses[1:])
    finally:
        listening.close()


@pytest.mark.parametrize("open_all", [_of_doors, _of_workers])
def test_a_start_that_fails_leaves_what_was_kept_for_the_next_one(
    link: tuple[socket.socket, Notifier], open_all: Callable[[Inherited, list[Address]], None]
) -> None:
    ours, notifier = link
    tunnel, kept, taken = listen(Address.parse("127.0.0.1:0")), listen(Address.parse("127.0.0.1:0")), socket.socket()
    taken.bind(("127.0.0.1", 0))
    addresses = [bound_address(tunnel), bound_address(kept), Address.parse(f"127.0.0.1:{free_port()}"), bound_address(taken)]
    with tunnel, kept, taken:
        sockets = {str(address): sock.dup() for address, sock in zip(addresses, (tunnel, kept), strict=False)}
        with pytest.raises(ListenError):
            open_all(Inherited(sockets, notifier, sockets), addresses)
    fresh = kept_name(str(addresses[2]))
    data, ancillary, _, _ = ours.recvmsg(4096, socket.CMSG_SPACE(4))
    os.close(memoryview(ancillary[0][2]).cast("i")[0])
    assert data == f"FDSTORE=1\nFDNAME={fresh}".encode()
    ours.setblocking(False)
    assert ours.recv(4096) == f"FDSTOREREMOVE=1\nFDNAME={fresh}".encode()
    with pytest.raises(BlockingIOError):
        ours.recv(4096)
