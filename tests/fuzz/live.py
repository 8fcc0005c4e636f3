"""Malformed frames on the links of running daemons: a relay that lies to a gateway, and a gateway that lies to a relay.

Both are enrolled and welcomed; then each of their links carries frames until the other side closes it, and the next one begins. An honest
relay, its gateway and its client share the daemons with them.
"""

import contextlib
import json
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import trio
from trio_websocket import ConnectionClosed

from fxrelay.uplink.control_link import control_hello, open_control_link
from fxrelay.uplink.datalink import open_data_link
from fxrelay.uplink.dial import Dialler
from fxrelay.uplink.enrol import enrol
from fxrelay.uplink.gateway_file import GatewayFile, GatewayUrl, load_gateway_file
from fxrelay.uplink.identity import Identity, load_identity
from fxrelay.uplink.ports import UplinkConfig
from fxtunnel.control.messages import Hello as ControlHello
from fxtunnel.control.messages import Load, encode
from fxtunnel.control.upgrade import CONTROL_PATH, open_websocket
from fxtunnel.kit.certificates import new_authority
from fxtunnel.kit.files import write_secret
from fxtunnel.kit.tls import TlsStream
from fxtunnel.model import Offer, RelayId, ServiceName
from fxtunnel.protocol import frames
from fxtunnel.protocol.alpn import ALPN_HTTP
from fxtunnel.protocol.hello import Hello, Welcome
from tests.fuzz.cases import odd_json
from tests.fuzz.peers import CODES, TAGS, mutated, noise, odd_frame
from tests.ports import free_port
from tests.system.peers import Service, dial, echo, read_exactly
from tests.system.stack import Stack

sys.path.insert(0, str(Path(__file__).parents[1] / "uplink"))

import trio.lowlevel
from uplink_fakes import FakeGateway, make_context, session_id

MAX_GROWTH_BYTES = 10 << 20
WARM_UP = 0.2
"""Of the frames: until then pools and tables get the size they keep."""
BURST = 4
MAX_BURSTS = 50
"""On one link; one that takes so much is closed by us."""
SLOW_S = 5.0
LINES_PER_WINDOW = 21 * 20
"""Of the log: twenty kinds of lines, each at most 21 times in ten seconds."""


@dataclass
class Findings:
    """What came of it."""

    frames: int = 0
    ends: Counter[str] = field(default_factory=Counter)
    growth_bytes: dict[str, int] = field(default_factory=dict)
    log_lines: int = 0
    max_log_lines: int = 0
    echoes: int = 0
    took_s: float = 0.0


Report = Callable[[int], None]


def attack(total: int, seed: int, report: Report = lambda frames: None) -> Findings:
    """Send so many frames in all, a quarter to each kind of link. Raises AssertionError when a daemon or its honest client was hurt."""
    findings = Findings()
    began = time.monotonic()
    with _stand() as stand:
        rng = random.Random(seed)
        quarter = total // 4
        for name, run in (("gateway data", _data_links), ("gateway control", _control_links), ("relay", _lying_gateway)):
            amount = 2 * quarter if name == "relay" else quarter
            trio.run(run, stand, rng, findings, amount, report)
            stand.check()
        findings.growth_bytes = stand.growth()
        findings.echoes = stand.echoes
        findings.took_s = time.monotonic() - began
        findings.log_lines = stand.stack.logs().count("\n")
        findings.max_log_lines = int(LINES_PER_WINDOW * (findings.took_s / 10 + 1)) * 2
        bugs = [line for line in stand.stack.logs().splitlines() if "Traceback" in line]
        assert not bugs, bugs[0]
    assert findings.log_lines <= findings.max_log_lines, findings
    assert max(findings.growth_bytes.values()) <= MAX_GROWTH_BYTES, findings
    return findings


class _Stand:
    """The daemons, and the honest client that goes through both."""

    def __init__(self, directory: Path, service: Service) -> None:
        self.authority = new_authority("a gateway that lies")
        self.lying_port = free_port()
        self.context = make_context(directory, self.authority, "127.0.0.1")
        self.stack = Stack(directory / "s", {"echo": free_port(), "evil": free_port()})
        self.echoes = 0
        self._base: dict[str, int] = {}
        try:
            self._start(service)
        except BaseException:
            self.stack.stop()
            raise

    def _start(self, service: Service) -> None:
        self.stack.start_gateway()
        home = self.stack.write_relay_config(
            "node-a",
            {"echo": service.target},
            '[liveness]\nmin_backoff_s = 0.01\nmax_backoff_s = 0.02\n[[gateway]]\nfile = "lying.json"\n',
        ).parent
        lying = FakeGateway(self.authority, self.context)
        text = (home / "gateway.json").read_text()
        write_secret(home / "lying.json", _lying_file(text, self.lying_port, lying.file.gateway_id, self.authority.cert_pem))
        self.stack.start_relay("node-a")
        self.client = dial(self.stack.doors["echo"])

    def close(self) -> None:
        self.client.close()
        self.stack.stop()

    def check(self) -> None:
        """The honest stream goes on, and so do the daemons."""
        for daemon in (self.stack.gateway, self.stack.relays["node-a"]):
            assert daemon is not None
            assert daemon.process.poll() is None, daemon.log.read_text()[-4000:]
        word = self.echoes.to_bytes(8, "big")
        self.client.sendall(word)
        assert read_exactly(self.client, 8) == word
        self.echoes += 1

    def settled(self) -> None:
        """From here on memory is counted."""
        self._base = self._base or self._used()

    def growth(self) -> dict[str, int]:
        return {name: used - self._base[name] for name, used in self._used().items()}

    def _used(self) -> dict[str, int]:
        pids = {"gateway": self.stack.gateway.pid, "relay": self.stack.relays["node-a"].pid}
        return {name: psutil.Process(pid).memory_info().rss for name, pid in pids.items()}


@contextlib.contextmanager
def _stand() -> Iterator[_Stand]:
    directory = Path(tempfile.mkdtemp(prefix="fx-"))
    service = Service(echo)
    try:
        stand = _Stand(directory, service)
        try:
            yield stand
        finally:
            stand.close()
    finally:
        service.close()
        shutil.rmtree(directory, ignore_errors=True)


def _lying_file(text: str, port: int, gateway_id: str, ca_pem: str) -> bytes:
    fields = json.loads(text)
    fields |= {"gateway_id": gateway_id, "urls": [f"wss://127.0.0.1:{port}"], "ca": ca_pem}
    return json.dumps(fields).encode()


@dataclass
class _Relay:
    """A relay that the gateway trusts, as far as it goes."""

    dialler: Dialler
    url: GatewayUrl
    gateway: GatewayFile
    identity: Identity
    hello: ControlHello

    def bearer(self, binding: str) -> str:
        return self.identity.assertion(self.gateway.gateway_id, binding, time.time())


async def _enrolled(stand: _Stand, name: str) -> _Relay:
    directory = stand.stack.directory / name
    gateway = load_gateway_file(stand.stack.directory / "gateway.json")
    identity = await load_identity(directory, RelayId(name))
    dialler = Dialler(gateway.ca_pem, None, timeout_s=SLOW_S, dead_after_s=SLOW_S)
    await enrol(dialler, gateway.urls[0], gateway, identity, time.time)
    hello = control_hello(identity, (Offer(ServiceName("evil")),), ("resume",))
    return _Relay(dialler, gateway.urls[0], gateway, identity, hello)


async def _data_links(stand: _Stand, rng: random.Random, findings: Findings, amount: int, report: Report) -> None:
    relay = await _enrolled(stand, "evil-data")
    sent = 0
    async with (
        open_control_link(relay.dialler, relay.url, relay.gateway, relay.hello, relay.bearer, UplinkConfig()) as link,
        trio.open_nursery() as nursery,
    ):
        nursery.start_soon(link.run, lambda: Load(streams=0), lambda deadline_s: None)
        number = 0
        while sent < amount:
            sock, _ = await open_data_link(relay.dialler, relay.url, Hello(await link.ticket(None), None, 0, caps=relay.hello.caps))
            client = dial(stand.stack.doors["evil"]) if number % 4 == 0 else None  # gives the link a stream
            sent += await _flood(TlsStream(sock), rng, findings, "gateway data", answers=True)
            if client is not None:
                client.close()
            number += 1
            if number % 20 == 0:
                stand.check()
                report(sent)
            if sent > amount * WARM_UP:
                stand.settled()
        nursery.cancel_scope.cancel()
    findings.frames += sent


async def _control_links(stand: _Stand, rng: random.Random, findings: Findings, amount: int, report: Report) -> None:
    relay = await _enrolled(stand, "evil-control")
    sent = 0
    number = 0
    while sent < amount:
        stream = TlsStream(await relay.dialler.dial(relay.url, ALPN_HTTP))
        before = sent
        try:
            async with trio.open_nursery() as nursery:
                headers = {"Authorization": f"Bearer {relay.bearer(stream.socket.binding())}"}
                ws = await open_websocket(nursery, stream, relay.url.authority, CONTROL_PATH, headers)
                if rng.random() < 0.8:
                    await ws.send_message(encode(relay.hello))
                for _ in range(MAX_BURSTS):
                    sent += 1
                    if rng.random() < 0.7:
                        await ws.send_message(odd_json(rng).decode("utf-8", "replace"))
                    else:
                        await stream.send_all(_odd_websocket_frame(rng))
                    await trio.lowlevel.checkpoint()
                nursery.cancel_scope.cancel()
        except* (trio.BrokenResourceError, trio.ClosedResourceError, trio.BusyResourceError, ConnectionClosed):
            pass
        await trio.aclose_forcefully(stream)
        findings.ends["gateway control: closed by us" if sent - before == MAX_BURSTS else "gateway control: closed by the gateway"] += 1
        number += 1
        if number % 20 == 0:
            stand.check()
            report(sent)
    findings.frames += sent


def _odd_websocket_frame(rng: random.Random) -> bytes:
    """RFC 6455, 5.2: a masked frame of some opcode, whole or broken."""
    payload = rng.choice((rng.randbytes(rng.randrange(60)), odd_json(rng)[:120]))
    head = bytes((rng.choice((0x81, 0x82, 0x01, 0x00, 0x80, 0x88, 0x89, 0x8A, 0xF1, 0x83)), 0x80 | len(payload)))
    raw = head + bytes(4) + payload
    return mutated(rng, raw) if rng.random() < 0.7 else raw


async def _flood(stream: TlsStream, rng: random.Random, findings: Findings, name: str, *, answers: bool) -> int:
    """Send until the other side closes; how many frames that took."""
    sent = 0
    closed = False

    async def drain() -> None:
        nonlocal closed
        with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            while await stream.receive_some():
                pass
        closed = True

    with trio.move_on_after(SLOW_S) as scope:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(drain)
            for _ in range(MAX_BURSTS):
                with contextlib.suppress(trio.BrokenResourceError):
                    await stream.send_all(b"".join(_frame(rng, answers) for _ in range(BURST)))
                sent += BURST
                await trio.sleep(0.0005)
                if closed:
                    break
            nursery.cancel_scope.cancel()
    findings.ends[f"{name}: {'stuck' if scope.cancelled_caught else 'closed by the peer' if closed else 'closed by us'}"] += 1
    await trio.aclose_forcefully(stream)
    return sent


def _frame(rng: random.Random, answers: bool) -> bytes:
    """Something malformed; or for a change what could be right, so that it does not always end at once."""
    choice = rng.random()
    if choice < 0.35:
        raw = odd_frame(rng)
        # A gateway that says goodbye for good is believed: the relay would never dial it again.
        return raw if answers or raw[0] != frames.GOAWAY else noise(rng)
    if choice < 0.4:
        return noise(rng)
    stream_id = rng.randrange(1, 4)
    lawful = [frames.encode_u64(frames.PING, 1), frames.encode_reset(stream_id, rng.choice(CODES)), frames.encode_credit(stream_id, 9)]
    if answers:
        lawful += [frames.encode_accept(stream_id, 65_536), frames.encode_refuse(stream_id, rng.choice(CODES), "x")]
    else:
        lawful += [frames.encode_open(stream_id, 65_536, TAGS), frames.encode(frames.DATA, stream_id, b"x" * 50)]
    raw = rng.choice(lawful)
    return mutated(rng, raw) if choice < 0.8 else raw


class _Liar(FakeGateway):
    """Welcomes everyone, and then sends what no gateway sends."""

    def __init__(self, stand: _Stand, rng: random.Random, findings: Findings) -> None:
        super().__init__(stand.authority, stand.context)
        self.port = stand.lying_port
        self.sent = 0
        self._rng = rng
        self._findings = findings
        self.data = lambda hello: Welcome(hello.session or session_id(rng.getrandbits(100)), received=0)

    async def _handle(self, stream: trio.SocketStream) -> None:
        with contextlib.suppress(Exception):
            await super()._handle(stream)

    async def _control(self, channel: object, websocket: object, peer: TlsStream) -> None:
        async def lie() -> None:
            with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError, ConnectionClosed):
                await trio.sleep(0.3)  # long enough for some data links
                for _ in range(MAX_BURSTS):
                    self.sent += 1
                    if self._rng.random() < 0.7:
                        text = odd_json(self._rng).decode("utf-8", "replace")
                        await websocket.send_message(text.replace("fenced", "shutdown"))
                    else:
                        await peer.send_all(_odd_websocket_frame(self._rng).replace(b"fenced", b"shut"))
                self._findings.ends["relay control: closed by us"] += 1
                return
            self._findings.ends["relay control: closed by the relay"] += 1

        async with trio.open_nursery() as nursery:
            nursery.start_soon(lie)
            await super()._control(channel, websocket, peer)

    async def _data_link(self, peer: TlsStream) -> None:
        await super()._data_link(peer)
        if self.data_links:
            self.sent += await _flood(TlsStream(self.data_links.pop()), self._rng, self._findings, "relay data", answers=False)


async def _lying_gateway(stand: _Stand, rng: random.Random, findings: Findings, amount: int, report: Report) -> None:
    async with trio.open_nursery() as nursery:
        liar = _Liar(stand, rng, findings)
        await nursery.start(liar.serve)
        before, since = 0, trio.current_time()
        while liar.sent < amount:
            await trio.sleep(0.1)
            stand.check()
            report(liar.sent)
            if liar.sent > before:
                before, since = liar.sent, trio.current_time()
            assert trio.current_time() - since < 30, f"the relay does not come back:\n{stand.stack.logs()[-3000:]}"
        nursery.cancel_scope.cancel()
        liar.close()
    findings.frames += liar.sent
