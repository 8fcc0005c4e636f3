"""Bodies on their way to a service: passed on as they come, slow or large, and what is wrong with them."""

from contextlib import suppress

import pytest
import trio
from peers import connect, pattern, receive_all, reset
from plane import SERVICE, Contexts, Plane, open_plane
from web_rig import OK, add_web_relay, ask, read_head, statuses

from fxrelay.web.ports import WebRules
from fxrelay.web.upload import Upload


async def web(plane: Plane, service: object, rules: WebRules | None = None) -> int:
    """A door to an HTTP service; its port."""
    await add_web_relay(plane, await plane.serve(service), rules)
    return plane.add_door()


class Wakings(trio.abc.Instrument):
    """How often a task of an exchange was woken."""

    count = 0

    def task_scheduled(self, task: trio.lowlevel.Task) -> None:
        self.count += "until_over" in task.name


async def test_a_body_that_comes_a_byte_at_a_time_wakes_nobody(contexts: Contexts) -> None:
    async with open_plane(contexts) as plane:
        got = bytearray()

        async def service(stream: trio.SocketStream) -> None:
            _, rest = await read_head(stream)
            got.extend(rest)
            while len(got) < 100:
                got.extend(await stream.receive_some())
            await stream.send_all(OK)

        port = await web(plane, service)
        async with await connect(port) as stream:
            await stream.send_all(b"POST / HTTP/1.1\r\nHost: a\r\nConnection: close\r\nContent-Length: 100\r\n\r\n.")
            with trio.fail_after(5):
                while not got:
                    await trio.sleep(0.01)
            wakings = Wakings()
            trio.lowlevel.add_instrument(wakings)
            for number in range(90):
                await stream.send_all(bytes((number,)))
                await trio.sleep(0.002)
            with trio.fail_after(5):
                while len(got) < 91:
                    await trio.sleep(0.01)
            trio.lowlevel.remove_instrument(wakings)
            assert wakings.count < 10  # those that came while the task was still busy with the ones before
            await stream.send_all(b"the end..")
            assert (await receive_all(stream)).endswith(b"ok")
        assert got == b"." + bytes(range(90)) + b"the end.."


async def test_what_is_wrong_with_a_body_that_is_passed_on(contexts: Contexts) -> None:
    async with open_plane(contexts) as plane:

        async def service(stream: trio.SocketStream) -> None:
            with suppress(trio.BrokenResourceError):
                while await stream.receive_some():
                    pass

        port = await web(plane, service, WebRules(SERVICE, max_body_bytes=50))
        for head, more, status in (
            (b"Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n", b"no size\r\n", 400),
            (b"Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n", b"40\r\n" + b"x" * 64, 413),
            (b"Content-Length: 20\r\n\r\nhello", b"!", 408),
        ):
            async with await connect(port) as stream:
                await stream.send_all(b"POST / HTTP/1.1\r\nHost: a\r\n" + head)
                await trio.sleep(0.05)
                await stream.send_all(more)
                with trio.fail_after(5):
                    assert statuses(await receive_all(stream)) == [status]


async def test_an_upload_to_a_service_that_reads_slowly_is_whole(contexts: Contexts) -> None:
    async with open_plane(contexts) as plane:
        body = pattern(3_000_000)

        async def service(stream: trio.SocketStream) -> None:
            _, rest = await read_head(stream)
            got = bytearray(rest)
            while len(got) < len(body):
                await trio.sleep(0.001)
                got += await stream.receive_some(65_536)
            assert got == body
            await stream.send_all(OK)

        port = await web(plane, service)
        head = b"POST / HTTP/1.1\r\nHost: a\r\nConnection: close\r\nContent-Length: %d\r\n\r\n" % len(body)
        assert (await ask(port, head + body)).endswith(b"ok")


async def test_a_service_that_stops_reading_an_upload_is_not_waited_for(contexts: Contexts) -> None:
    async with open_plane(contexts) as plane:
        gone = trio.Event()

        async def service(stream: trio.SocketStream) -> None:
            await read_head(stream)
            try:
                await gone.wait()
            finally:
                reset(stream)

        port = await web(plane, service, WebRules(SERVICE, response_timeout_s=0.5))
        async with await connect(port) as stream, trio.open_nursery() as nursery:
            body = bytes(8 << 20)  # more than all buffers on the way take
            head = b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n" % len(body)

            @nursery.start_soon
            async def upload() -> None:
                with suppress(trio.BrokenResourceError):
                    await stream.send_all(head + body)

            with trio.fail_after(10):
                assert statuses((await read_head(stream))[0]) == [504]
            gone.set()
            nursery.cancel_scope.cancel()


async def test_an_answer_before_the_bodys_task_is_woken_keeps_the_connection(contexts: Contexts, monkeypatch: pytest.MonkeyPatch) -> None:
    """The body is passed on in a callback; whose task runs first after that is nobody's business."""
    async with open_plane(contexts) as plane:
        heads = []

        async def service(stream: trio.SocketStream) -> None:
            while len(heads) < 2:
                head, got = await read_head(stream)
                heads.append(head)
                while len(got) < 6:
                    got += await stream.receive_some()
                await stream.send_all(OK)

        port = await web(plane, service)
        woken_at_once = Upload._end

        def woken_late(upload: Upload) -> None:
            upload._is_over = True
            plane.reactor.call_later(0.2, lambda: woken_at_once(upload))

        monkeypatch.setattr(Upload, "_end", woken_late)
        async with await connect(port) as stream:
            await stream.send_all(b"PUT / HTTP/1.1\r\nHost: a\r\nContent-Length: 6\r\n\r\nfir")
            await trio.sleep(0.1)
            await stream.send_all(b"st.PUT /2 HTTP/1.1\r\nHost: a\r\nConnection: close\r\nContent-Length: 6\r\n\r\nsec")
            await trio.sleep(0.1)
            await stream.send_all(b"ond")
            with trio.fail_after(5):
                received = await receive_all(stream)
        assert statuses(received) == [200, 200]
        assert received.lower().count(b"connection: close") == 1
