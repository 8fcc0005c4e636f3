"""Services at unix sockets, and what a relay will not carry."""

import os
import resource
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import trio
from peers import connect, echo, exchange, pattern, receive_all, refused
from plane import SERVICE, Contexts, open_plane

from fxrelay.delivery.delivery import DeliveryLimits

ROOT = Path(__file__).parents[2]


async def serve_unix(path: Path, task_status: trio.TaskStatus[None]) -> None:
    listener = trio.SocketListener(trio.socket.from_stdlib_socket(_bound(path, 64)))
    await trio.serve_listeners(echo, [listener], task_status=task_status)


def _bound(path: Path, backlog: int) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX)
    sock.bind(str(path))
    sock.listen(backlog)
    return sock


async def test_unix_socket_service(contexts: Contexts, tmp_path: Path) -> None:
    async with open_plane(contexts) as plane:
        await plane.nursery.start(serve_unix, tmp_path / "s")
        await plane.add_relay(str(tmp_path / "s"))
        port = plane.add_door()
        for size in (0, 1, 4_096, 3_000_000):
            assert await exchange(port, pattern(size)) == pattern(size)


async def test_a_unix_socket_service_that_passes_a_descriptor_is_read_to_its_end(contexts: Contexts, tmp_path: Path) -> None:
    """A read stops short at it, as nothing else does that has more to say (unix(7), SCM_RIGHTS)."""
    with _bound(tmp_path / "s", 1) as listener:
        async with open_plane(contexts) as plane:
            await plane.add_relay(str(tmp_path / "s"))
            async with await connect(plane.add_door()) as client:
                await client.send_all(b"x")
                service, _ = await trio.to_thread.run_sync(listener.accept)
                with service:
                    await trio.to_thread.run_sync(service.recv, 1)
                    socket.send_fds(service, [b"a" * 100], [0])
                    service.sendall(b"b" * 100)
                    service.shutdown(socket.SHUT_WR)
                    assert await receive_all(client) == b"a" * 100 + b"b" * 100


async def test_what_a_slow_reader_has_not_taken_counts_as_memory_behind_the_end_too(contexts: Contexts) -> None:
    answer = pattern(16_000_000)

    async def serve(stream: trio.SocketStream) -> None:
        await receive_all(stream)
        await stream.send_all(answer)
        await stream.send_eof()
        await receive_all(stream)

    async with open_plane(contexts) as plane:
        relay = await plane.add_relay(await plane.serve(serve))
        port = plane.add_door()
        async with await connect(port) as client:
            await client.send_eof()
            got = bytearray()
            while not got or relay.far_session.mux.streams:  # until the end has come, and the last bytes wait for a reader
                got += await client.receive_some(65_536)
                await trio.sleep(0.002)  # slower than the tunnel: the kernel's buffers are full
            (here,) = plane.doors[0].clients
            waiting = len(here._pending or b"")
            assert 0 < waiting <= plane.budget.promised_bytes + plane.budget.grown_bytes < 2 * waiting
            moved = here.moved_bytes
            while here.moved_bytes == moved:
                assert got != answer, "what is read has not moved"
                got += await client.receive_some(65_536)
            assert got + await receive_all(client) == answer


async def test_unix_socket_service_with_a_full_queue_is_refused(contexts: Contexts, tmp_path: Path) -> None:
    with _bound(tmp_path / "s", 0), socket.socket(socket.AF_UNIX) as filler:
        filler.connect(str(tmp_path / "s"))
        async with open_plane(contexts) as plane:
            relay = await plane.add_relay(str(tmp_path / "s"))
            await refused(plane.add_door())
            assert relay.desk.counters.refused_by_service == {SERVICE: {"connect-failed": 1}}


async def test_a_unix_socket_that_is_not_there_is_refused(contexts: Contexts, tmp_path: Path) -> None:
    async with open_plane(contexts) as plane:
        relay = await plane.add_relay(str(tmp_path / "nobody"))
        await refused(plane.add_door())
        assert relay.desk.counters.refused_by_service == {SERVICE: {"connect-failed": 1}}


async def test_a_service_without_addresses_is_refused(contexts: Contexts) -> None:
    async with open_plane(contexts) as plane:
        relay = await plane.add_relay()
        await refused(plane.add_door())
        assert relay.desk.counters.refused_by_service == {SERVICE: {"connect-failed": 1}}


async def test_relay_carries_no_more_than_its_limit(contexts: Contexts) -> None:
    async with open_plane(contexts) as plane:
        relay = await plane.add_relay(await plane.serve(echo), limits=DeliveryLimits(streams=3))
        port = plane.add_door()
        streams = [await connect(port) for _ in range(3)]
        with trio.fail_after(10):
            while len(relay.desk.deliveries) < 3:
                await trio.sleep(0.01)
        await refused(port)
        for stream in streams:
            await stream.aclose()
        await plane.quiet()
        assert await exchange(port, b"x") == b"x"


async def test_relay_ends_idle_streams(contexts: Contexts) -> None:
    async with open_plane(contexts) as plane:
        relay = await plane.add_relay(await plane.serve(echo), limits=DeliveryLimits(idle_timeout_s=0.1))
        port = plane.add_door()
        async with await connect(port) as stream:
            for _ in range(4):
                await stream.send_all(b"x")
                await trio.sleep(0.05)
                relay.desk.end_idle()
            assert relay.desk.deliveries
            await trio.sleep(0.2)
            relay.desk.end_idle()
            assert not relay.desk.deliveries


EXHAUSTED = """
    import pathlib, resource, sys, tempfile, trio
    sys.path.insert(0, "tests/engine")
    from peers import connect, echo, exchange, receive_exactly
    from engine_fixtures import make_contexts
    from plane import open_plane
    import os

    with tempfile.TemporaryDirectory() as directory:
        contexts = make_contexts(pathlib.Path(directory))

    async def main():
        async with open_plane(contexts) as plane:
            await plane.add_relay(await plane.serve(echo))
            port = plane.add_door()
            async with await connect(port) as alive:
                await alive.send_all(b"x")
                await receive_exactly(alive, 1)
                door = plane.doors[0]
                waiting = await connect(port)
                await waiting.send_all(b"w")
                await receive_exactly(waiting, 1)
                soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
                import socket
                late = socket.socket()
                late.setblocking(False)
                used = max(int(name) for name in os.listdir("/proc/self/fd")) + 1
                blockers = []
                resource.setrlimit(resource.RLIMIT_NOFILE, (used, hard))
                try:
                    while True:
                        blockers.append(os.dup(0))
                except OSError:
                    pass
                late.connect_ex(("127.0.0.1", port))
                with trio.fail_after(10):
                    while not door._paused:
                        await trio.sleep(0.01)
                turns = 0
                once = plane.reactor.run_once
                def counted(timeout_s):
                    nonlocal turns
                    turns += 1
                    once(timeout_s)
                plane.reactor.run_once = counted
                await alive.send_all(b"still")
                assert await receive_exactly(alive, 5) == b"still"
                await trio.sleep(0.5)
                assert turns < 80, turns
                assert not late.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
                for fd in blockers:
                    os.close(fd)
                resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
                stream = trio.SocketStream(trio.socket.from_stdlib_socket(late))
                await stream.send_all(b"late")
                with trio.fail_after(4):
                    assert await receive_exactly(stream, 4) == b"late"
                await stream.aclose()
                await waiting.aclose()
            assert await exchange(port, b"x") == b"x"
        print("done")

    trio.run(main)
"""


def test_door_pauses_without_descriptors_and_recovers() -> None:
    assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] > 64
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(EXHAUSTED)], cwd=ROOT, env=environ, capture_output=True, text=True, timeout=30, check=False
    )
    assert done.stdout.strip() == "done", done.stderr
    assert "pauses" in done.stderr


async def test_service_that_ends_at_once(contexts: Contexts) -> None:
    async def greets(stream: trio.SocketStream) -> None:
        await stream.send_all(b"bye")

    async with open_plane(contexts) as plane:
        await plane.add_relay(await plane.serve(greets))
        port = plane.add_door()
        for _ in range(30):
            async with await connect(port) as stream:
                assert await receive_all(stream) == b"bye"
