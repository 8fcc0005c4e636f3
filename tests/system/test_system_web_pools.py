"""HTTP pools over several nodes, WebSockets, TLS at the relay, reload and the logs, with real daemons."""

import contextlib
import http.client
import http.server
import json
import os
import re
import signal
import socket
import ssl
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio
import trio_websocket
import trustme

from tests.system.cluster import Cluster
from tests.system.peers import dial
from tests.system.stack import wait_until

pytestmark = [pytest.mark.system, pytest.mark.xdist_group("cluster")]
TIMES = "publish_s = 0.5\nstale_s = 20\ndown_s = 40\nresync_s = 1"


class WebNode:
    """An HTTP server on a node's address that answers with its address and the path it was asked for; and a WebSocket at /ws."""

    def __init__(self, address: str, port: int) -> None:
        self.address = address
        self._token: trio.lowlevel.TrioToken | None = None
        self._ready = threading.Event()
        self._scope: trio.CancelScope | None = None
        self._thread = threading.Thread(target=trio.run, args=(self._serve, port), daemon=True)
        self._thread.start()
        assert self._ready.wait(10)

    def close(self) -> None:
        if self._token is not None and self._scope is not None:
            with contextlib.suppress(trio.RunFinishedError):
                trio.from_thread.run_sync(self._scope.cancel, trio_token=self._token)
        self._thread.join(10)

    async def _serve(self, port: int) -> None:
        self._token = trio.lowlevel.current_trio_token()
        async with trio.open_nursery() as nursery:
            self._scope = nursery.cancel_scope
            listeners = await trio.open_tcp_listeners(port, host=self.address)
            nursery.start_soon(trio.serve_listeners, self._one, listeners)
            self._ready.set()

    async def _one(self, stream: trio.SocketStream) -> None:
        with contextlib.suppress(trio.BrokenResourceError):
            data = bytearray()
            async for more in stream:
                data += more
                while b"\r\n\r\n" in data:
                    head, _, rest = bytes(data).partition(b"\r\n\r\n")
                    if b"Upgrade: websocket" in head:
                        await self._echo(stream, bytes(data))
                        return
                    data = bytearray(rest)
                    body = f"{self.address} {head.split()[1].decode()}".encode()
                    await stream.send_all(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))

    async def _echo(self, stream: trio.SocketStream, head: bytes) -> None:
        class Again(trio.abc.Stream):
            def __init__(self) -> None:
                self.head = head

            async def send_all(self, data: bytes) -> None:
                await stream.send_all(data)

            async def wait_send_all_might_not_block(self) -> None:
                await stream.wait_send_all_might_not_block()

            async def receive_some(self, max_bytes: int | None = None) -> bytes:
                if self.head:
                    first, self.head = self.head, b""
                    return first
                return await stream.receive_some(max_bytes)

            async def aclose(self) -> None:
                await stream.aclose()

        async with trio.open_nursery() as nursery:
            request = await trio_websocket.wrap_server_stream(nursery, Again())
            async with await request.accept() as socket_:
                with contextlib.suppress(trio_websocket.ConnectionClosed):
                    await socket_.send_message(self.address)
                    while True:
                        await socket_.send_message(await socket_.get_message())


@pytest.fixture(scope="module")
def pool(make_shared_stack, tmp_path_factory) -> Iterator[Cluster]:
    """Three nodes with a web server each; one relay has the tunnel, the others are reached directly."""
    stack = make_shared_stack("site")
    stack.start_gateway()
    cluster = Cluster(stack, f'store = "sqlite:{tmp_path_factory.mktemp("store") / "cluster.db"}"\n{TIMES}', service="site")
    nodes = [WebNode(f"127.0.0.{number}", cluster.port) for number in (2, 3, 4)]
    service = 'protocol = "http"\nnode_paths = true\naffinity = {cookie = "fxnode"}\nbalance = ["builtin:round-robin"]'
    for number in (2, 3, 4):
        extra = "[log]\naccess = true\n" if number == 2 else ""
        cluster.node(number, gateway=number == 2, service=service, serve=False, extra=extra)
    cluster.wait_until_known(["node-2", "node-3", "node-4"], ["node-2"])
    yield cluster
    for node in nodes:
        node.close()


def get(port: int, path: str, **headers: str) -> tuple[int, str, http.client.HTTPResponse]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=15)
    with contextlib.closing(connection):
        connection.request("GET", path, headers=headers)
        answer = connection.getresponse()
        return answer.status, answer.read().decode(), answer


def test_nodes_by_choice_cookie_and_path(pool: Cluster) -> None:
    port = pool.stack.doors["site"]
    cookies: dict[str, str] = {}
    for _ in range(6):
        status, body, answer = get(port, "/")
        assert status == 200, body
        cookies[body.split()[0]] = str(answer.getheader("Set-Cookie")).partition(";")[0]
    assert set(cookies) == {"127.0.0.2", "127.0.0.3", "127.0.0.4"}
    for address, cookie in cookies.items():
        for _ in range(3):
            status, body, answer = get(port, "/x", Cookie=cookie)
            assert (status, body, answer.getheader("Set-Cookie")) == (200, f"{address} /x", None)
    for number in (2, 3, 4):
        assert get(port, f"/node/node-{number}/a?b=c")[1] == f"127.0.0.{number} /node/node-{number}/a?b=c"
        assert get(port, f"/rnode/node-{number}/a?b=c")[1] == f"127.0.0.{number} /a?b=c"
    for path in ("/node/node-9/", "/rnode/127.0.0.3/", f"/node/127.0.0.3:{pool.port}/"):
        status, body, _ = get(port, path, Accept="application/json")
        assert (status, json.loads(body)["error"]["name"]) == (404, "NoSuchNode")

    def accesses() -> list[dict]:
        log = (pool.stack.directory / "node-2.log").read_text()
        return [json.loads(line) for line in log.splitlines() if '"fxrelay.access"' in line]

    wait_until(lambda: len(accesses()) >= 6 + 9 + 6 + 3, what="a line for each")  # not rate-limited
    lines = accesses()
    assert len(lines) == 6 + 9 + 6 + 3
    (last,) = [line for line in lines if line["path"] == "/rnode/node-4/a"]
    assert (last["method"], last["status"], last["node"], last["way"], last["why"]) == ("GET", 200, "node-4", "direct", "")
    assert last["client"].startswith("127.0.0.1:")
    assert last["bytes_out"] == len("127.0.0.4 /a?b=c")
    assert 0 <= last["first_byte_ms"] <= last["duration_ms"]
    key = pool.stack.directory / "node-2" / "state" / "cookies.key"
    assert key.stat().st_mode & 0o777 == 0o600


def test_a_websocket_to_a_node_of_ones_choice(pool: Cluster) -> None:
    port = pool.stack.doors["site"]

    def streams() -> int:
        return pool.status("node-2")["services"][0]["streams"]

    async def talk() -> None:
        with trio.fail_after(20):
            async with trio_websocket.open_websocket_url(f"ws://127.0.0.1:{port}/rnode/node-3/ws") as link:
                assert await link.get_message() == "127.0.0.3"
                for size in (1, 1_000, 300_000):
                    await link.send_message(os.urandom(size).hex())
                    assert len(await link.get_message()) == size * 2
                assert streams() == 1
                pool.stack.cutter.cut()  # a cut tunnel is no end for what was upgraded
                await link.send_message("still there")
                assert await link.get_message() == "still there"

    wait_until(lambda: streams() == 0, what="those who came before gone")
    trio.run(talk)
    wait_until(lambda: streams() == 0, what="no stream left")


def test_tls_at_the_relay_and_a_new_certificate(make_stack, home: Path) -> None:
    stack = make_stack("site")
    stack.start_gateway()
    handler = type("Quiet", (http.server.BaseHTTPRequestHandler,), {"do_GET": _say_scheme, "log_message": lambda *_: None})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    authority = trustme.CA()
    trust = ssl.create_default_context()
    authority.configure_trust(trust)

    def issue() -> None:
        issued = authority.issue_cert("site.example")
        (home / "cert.pem").write_bytes(issued.cert_chain_pems[0].bytes())
        (home / "key.pem").write_bytes(issued.private_key_pem.bytes())
        (home / "key.pem").chmod(0o600)

    def serial() -> str:
        sock = socket.create_connection(("127.0.0.1", stack.doors["site"]), timeout=10)
        with trust.wrap_socket(sock, server_hostname="site.example") as tls:
            tls.sendall(b"GET / HTTP/1.1\r\nHost: site.example\r\nConnection: close\r\n\r\n")
            data = b""
            while more := tls.recv(4096):
                data += more
            assert data.endswith(b"https"), data
            return str(tls.getpeercert()["serialNumber"])

    issue()
    service = (
        f'[[service]]\nname = "site"\nprotocol = "http"\ntarget = "127.0.0.1:{server.server_port}"\nhosts = ["site.example"]\n'
        f'tls = {{cert = "{home}/cert.pem", key = "{home}/key.pem"}}\n'
    )
    relay = stack.start_relay("a", {}, extra=service)
    before = serial()
    issue()
    relay.signal(signal.SIGHUP)
    wait_until(lambda: serial() != before, what="the new certificate")
    (home / "key.pem").write_text("nonsense")
    relay.signal(signal.SIGHUP)
    wait_until(lambda: "reload refused" in relay.log.read_text(), what="a word about the key")
    assert serial() != before
    assert stack.relay_cli("a", "check", check=False).returncode != 0
    issue()
    assert stack.relay_cli("a", "check", check=False).returncode == 0
    server.shutdown()
    server.server_close()


def _say_scheme(self: http.server.BaseHTTPRequestHandler) -> None:
    body = str(self.headers["X-Forwarded-Proto"]).encode()
    self.send_response(200)
    self.send_header("Content-Length", str(len(body)))
    self.end_headers()
    self.wfile.write(body)


def test_a_drain_lets_a_download_finish(make_stack, home: Path) -> None:
    stack = make_stack("site")
    stack.start_gateway()
    go_on = threading.Event()
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        sock, _ = listener.accept()
        with sock:
            sock.recv(65_536)
            sock.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhalf")
            go_on.wait(20)
            sock.sendall(b" more")
            sock.recv(10)

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    target = f"127.0.0.1:{listener.getsockname()[1]}"
    relay = stack.start_relay("a", {}, extra=f'[[service]]\nname = "site"\nprotocol = "http"\ntarget = "{target}"\n')
    with dial(stack.doors["site"], 15) as busy, dial(stack.doors["site"], 15) as idle:
        busy.sendall(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
        found = b""
        while not found.endswith(b"half"):
            found += busy.recv(4096)
        wait_until(lambda: stack.relay_status("a")["services"][0]["streams"] == 2, what="both at the relay")
        relay.signal(signal.SIGTERM)
        assert idle.recv(10) == b""
        go_on.set()
        while more := busy.recv(4096):
            found += more
        assert found.endswith(b"half more")
    assert relay.wait() == 0
    thread.join(10)
    listener.close()
    assert re.search(r'"event":', stack.logs())
