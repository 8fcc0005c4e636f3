"""Task: connections of relays, before TLS: to which worker each belongs, and what all workers must agree on."""

import logging
import socket
from typing import Final

import trio

from fxgateway.tunnels.colleagues import Passed
from fxgateway.workers.asking import NoAnswer
from fxgateway.workers.crew import Crew
from fxtunnel.codes import Refusal
from fxtunnel.errors import PeerRefused
from fxtunnel.kit.client_hello import MAX_RECORDS_BYTES, ClientHello, NeedMore, NotTls, read_client_hello
from fxtunnel.model import InstanceId, RelayId
from fxtunnel.protocol.alpn import ALPN_DATA, ALPN_WORKER

logger = logging.getLogger(__name__)

_WORKER: Final = ALPN_WORKER.encode()
_DATA: Final = ALPN_DATA.encode()
LOOK_AGAIN_S: Final = 0.02
"""Between two looks at a hello that has come in part. Hellos come whole, but for those who try."""
RETRY_AFTER_S: Final = 1.0


class Guests:
    """Implements `Colleagues`.

    A connection that names a worker goes there, unread: a ClientHello is in the clear, and is only looked at. A control link that names
    none, or one that does not serve now, goes where the fewest relays are: it would have to wait for a process to start.
    """

    def __init__(self, crew: Crew, number: int) -> None:
        self.worker = str(number)
        self._crew = crew
        self._number = number

    async def keeps(self, passed: Passed) -> bool:
        """See `Colleagues`."""
        hello = await _look_at_hello(passed.sock)
        if hello is None:
            return True  # TLS says what is wrong with it
        named = next((_number(protocol) for protocol in hello.alpn if protocol.startswith(_WORKER)), None)
        is_data = _DATA in hello.alpn
        if named is None and is_data:
            return True
        is_led = named is not None and (named == self._number or self._crew.serves(named))
        if is_led and named is not None:
            number = named
        else:
            number, passed.counts_as_relay = await self._place(named or 0, is_data=is_data)
        channel = self._crew.peers.get(number)
        if channel is None:
            return True
        copy = passed.sock.dup()  # the caller closes its own
        facts = {"ip": passed.ip, "address": passed.remote_address, "counts_as_relay": passed.counts_as_relay}
        if channel.has_room and channel.send({"op": "guest", **facts}, [copy]):
            passed.counts_as_relay = False
            return False
        copy.close()
        return not is_led

    async def wait_passed(self) -> Passed:
        """See `Colleagues`."""
        return await self._crew.received_passed.receive()

    def was_no_relay(self) -> None:
        """See `Colleagues`."""
        self._crew.parent.send({"op": "unplace"})

    async def first_use(self, jti: str, exp_unix: float, now_unix: float) -> bool:
        """See `Colleagues`: the parent remembers. Without its answer an assertion counts as used."""
        try:
            return bool((await self._crew.ask("first_use", jti=jti, exp_unix=exp_unix))["is_first"])
        except NoAnswer as exc:
            raise PeerRefused(Refusal.TOO_MANY, f"the gateway cannot look at assertions now: {exc}", retry_after_s=RETRY_AFTER_S) from exc

    async def claim(self, relay_id: RelayId, instance: InstanceId) -> int:
        """See `Colleagues`: the parent knows."""
        try:
            epoch = await self._crew.claim(relay_id, instance)
        except NoAnswer as exc:
            raise PeerRefused(Refusal.TOO_MANY, f"the gateway cannot take relays now: {exc}", retry_after_s=RETRY_AFTER_S) from exc
        if not epoch:
            raise PeerRefused(Refusal.TOO_MANY, "the gateway has no room for another relay", retry_after_s=RETRY_AFTER_S)
        return epoch

    async def _place(self, named: int, *, is_data: bool) -> tuple[int, bool]:
        """Where it shall go, and whether it counts as a relay there."""
        try:
            answer = await self._crew.ask("place", named=named, is_data=is_data)
        except NoAnswer:
            return self._number, False
        return int(answer["worker"]), bool(answer["counts"])


async def _look_at_hello(sock: socket.socket) -> ClientHello | None:
    """The hello, as soon as it is there; None for what is none."""
    while True:
        await trio.lowlevel.wait_readable(sock)
        try:
            data = sock.recv(MAX_RECORDS_BYTES, socket.MSG_PEEK)
        except BlockingIOError:
            continue
        except OSError:
            return None
        match read_client_hello(data):
            case NeedMore() if data:
                await trio.sleep(LOOK_AGAIN_S)
            case ClientHello() as hello:
                return hello
            case NeedMore() | NotTls():
                return None


def _number(protocol: bytes) -> int:
    digits = protocol.removeprefix(_WORKER)
    return int(digits) if digits.isdigit() and len(digits) <= 4 else 0
