"""Task: which worker a relay's connection belongs to, decided before TLS; and what the workers must agree on about relays."""

import contextlib
import logging
import socket
from typing import Final

import trio

from fxgateway.tunnels.hello_peek import peek_client_hello
from fxgateway.tunnels.peer_processes import AcceptedConnection
from fxgateway.tunnels.ports import Departures
from fxgateway.tunnels.pre_auth_queue import TooBusy
from fxgateway.tunnels.registry import Registry
from fxgateway.tunnels.succession import COME_AGAIN, Lines
from fxgateway.workers.channel import Message
from fxgateway.workers.parent_line import ParentLine
from fxgateway.workers.peers import Peers
from fxgateway.workers.pending_calls import NoAnswer
from fxgateway.workers.worker_relays import AllRelays
from fxtunnel.codes import Refusal
from fxtunnel.errors import PeerRefused, TunnelClosed
from fxtunnel.model import InstanceId, RelayId
from fxtunnel.protocol.alpn import ALPN_DATA, ALPN_WORKER

logger = logging.getLogger(__name__)

_WORKER: Final = ALPN_WORKER.encode()
_DATA: Final = ALPN_DATA.encode()
RETRY_AFTER_S: Final = 1.0
MAX_PASSED: Final = 256
"""Connections that other workers have passed on and that wait to be served here."""


class RelayDispatch:
    """Implements `PeerProcesses`.

    A connection that names a worker goes there, unread: a ClientHello is not encrypted, and is only peeked at. A control link that names
    no worker, or one that does not serve now, goes to the worker with the fewest relays, rather than wait for a process to start.
    """

    def __init__(self, line: ParentLine, peers: Peers, registry: Registry, relays: AllRelays, number: int) -> None:
        self.worker = str(number)
        self.lines = Lines()
        self._line = line
        self._peers = peers
        self._registry = registry
        self._relays = relays
        self._number = number
        self._is_accepting = True
        self._accepted, self._received_accepted = trio.open_memory_channel[AcceptedConnection](MAX_PASSED)

    @property
    def is_named(self) -> bool:
        """See `PeerProcesses`."""
        return self.lines.is_named

    @property
    def earlier(self) -> tuple[str, ...]:
        """See `PeerProcesses`."""
        return self.lines.earlier

    async def keeps(self, passed: AcceptedConnection) -> bool:
        """See `PeerProcesses`."""
        hello = await peek_client_hello(passed.sock)
        if hello is None:
            return True  # our TLS handshake will tell the peer what is wrong
        if self.lines.pass_on(passed, hello):
            return False
        named = next((_number(protocol) for protocol in hello.alpn if protocol.startswith(_WORKER)), None)
        is_data = _DATA in hello.alpn
        if named is None and is_data:
            return True
        is_led = named is not None and (named == self._number or self._peers.serves(named))
        if is_led and named is not None:
            number = named
        else:
            number, passed.counts_as_relay = await self._place(named or 0, is_data=is_data)
        channel = self._peers.channels.get(number)
        if channel is None:
            return True
        try:
            copy = passed.sock.dup()  # the caller closes its own
        except OSError as exc:  # no descriptors are left
            raise TooBusy(COME_AGAIN) from exc
        facts = {"ip": passed.ip, "address": passed.remote_address, "counts_as_relay": passed.counts_as_relay}
        if channel.has_room and channel.send({"op": "guest", **facts}, [copy]):
            passed.counts_as_relay = False
            return False
        copy.close()
        return not is_led

    async def wait_passed(self) -> AcceptedConnection:
        """See `PeerProcesses`."""
        return await self._received_accepted.receive()

    async def take_returning(self) -> None:
        """Have what later processes pass on to us served like what other workers do. Until cancelled."""
        while True:
            await self._accepted.send(await self.lines.receive())

    def welcome(self, message: Message, sockets: list[socket.socket]) -> None:
        """Another worker passes a connection on to us. Hangs up if nobody here can take it soon: the relay dials again."""
        for sock in sockets[:1]:
            if not self._is_accepting:
                sock.close()
                continue
            try:
                self._accepted.send_nowait(
                    AcceptedConnection(sock, message["ip"], message["address"], counts_as_relay=message["counts_as_relay"])
                )
            except trio.WouldBlock:
                sock.close()

    def stop_accepting(self) -> None:
        """Hang up on what others still pass on to us: who dials again reaches our successor."""
        self._is_accepting = False
        with contextlib.suppress(trio.WouldBlock):
            while True:
                self._received_accepted.receive_nowait().sock.close()

    def was_no_relay(self) -> None:
        """See `PeerProcesses`."""
        self._line.channel.send({"op": "unplace"})

    async def claim(self, relay_id: RelayId, instance: InstanceId, departures: Departures) -> int:
        """See `PeerProcesses`: the parent knows. From here on a fence finds the instance in the registry."""
        try:
            epoch = int((await self._ask_for_name(relay_id, instance, departures))["epoch"])
        except NoAnswer as exc:
            raise PeerRefused(Refusal.TOO_MANY, f"the gateway cannot take relays now: {exc}", retry_after_s=RETRY_AFTER_S) from exc
        if not epoch:
            raise PeerRefused(Refusal.TOO_MANY, "the gateway has no room for another relay", retry_after_s=RETRY_AFTER_S)
        if (gone := self._registry.overtaken(relay_id, instance, epoch)) is not None:  # the name has been given on meanwhile
            raise TunnelClosed(*gone)
        self._relays.expect(relay_id)
        return epoch

    async def _ask_for_name(self, relay_id: RelayId, instance: InstanceId, departures: Departures) -> Message:
        leaving = {earlier: [departure.deadline_s, departure.hands_over] for earlier, departure in departures.items()}
        try:
            return await self._line.ask("claim", relay=relay_id, instance=instance, departures=leaving)
        except BaseException:
            self._relays.expect(relay_id)  # the parent may have granted the name all the same, and has to hear that it was not taken up
            self._registry.on_change()
            raise

    async def _place(self, named: int, *, is_data: bool) -> tuple[int, bool]:
        """The worker it belongs to, and whether it already counts as a relay there."""
        try:
            answer = await self._line.ask("place", named=named, is_data=is_data)
        except NoAnswer:
            return self._number, False
        return int(answer["worker"]), bool(answer["counts"])


def _number(protocol: bytes) -> int:
    digits = protocol.removeprefix(_WORKER)
    return int(digits) if digits.isdigit() and len(digits) <= 4 else 0
