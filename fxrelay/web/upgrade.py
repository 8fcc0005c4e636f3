"""Task: a connection after a 101: the pump carries it or, where this relay terminates TLS, two tasks do."""

import socket
from typing import Final

import trio

from fxrelay.delivery.delivery import SERVICE_NOTSENT_BYTES, Delivery, DeliveryDesk
from fxrelay.delivery.services import AnyService
from fxrelay.web.client import ClientGone, ClientSide
from fxrelay.web.exchange import CutOff
from fxrelay.web.link import ServiceLink
from fxtunnel.engine.stream import TunnelStream
from fxtunnel.protocol.byte_queue import ByteQueue
from fxtunnel.protocol.opening import Opening

COPY_BYTES: Final = 65_536


class UpgradedDelivery(Delivery):
    """A delivery that is connected already. Client bytes that have arrived meanwhile go to the service first."""

    __slots__ = ("ended",)

    def __init__(self, desk: DeliveryDesk, sock: socket.socket, service: AnyService, opening: Opening) -> None:
        super().__init__(desk, sock, service, (), opening)
        self.ended = trio.Event()
        self._connecting = False
        if sock.family == socket.AF_UNIX:
            self.reads_short()
        else:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, SERVICE_NOTSENT_BYTES)

    def carry(self, tunnel: TunnelStream, client: ClientSide) -> None:
        """Take the stream over from the tasks."""
        early, self._fin_wanted = tunnel.give_back(client.scanner.take_rest())
        self._pending = ByteQueue(early)
        self.desk.deliveries.add(self)
        self.join(tunnel.session, tunnel.stream)
        self.start()

    def released(self) -> None:
        """See `Splice`."""
        super().released()
        self.ended.set()


async def copy_both_ways(client: ClientSide, link: ServiceLink, idle_s: float) -> None:
    """Carry bytes between a service and a client whose TLS is terminated here, until the service ends its side.

    The client's end is passed on to the service. The other way round that is not possible: this TLS cannot be half-closed.

    Raises:
        ClientGone, CutOff: one of them broke off, or nothing moved for `idle_s`.
    """
    failures: list[Exception] = []
    with trio.CancelScope() as idle:

        def moved() -> None:
            idle.deadline = trio.current_time() + idle_s

        async def inward() -> None:
            data = client.scanner.take_rest()
            try:
                while True:
                    if data:
                        await link.send(data)
                        moved()
                    data = bytes(await client.stream.receive_some(COPY_BYTES))
                    if not data:
                        await link.send_eof()
                        return
                    client.bytes_in += len(data)
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                failures.append(ClientGone("broke the connection"))
                nursery.cancel_scope.cancel()

        async def outward() -> None:
            data = link.scanner.take_rest()
            try:
                while True:
                    if data:
                        await client.send(data)
                        moved()
                    data = await link.receive()
                    if not data:
                        break
            except trio.BrokenResourceError:
                failures.append(CutOff("the service broke the connection"))
            except ClientGone as exc:
                failures.append(exc)
            nursery.cancel_scope.cancel()

        moved()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(inward)
            nursery.start_soon(outward)
    if idle.cancelled_caught:
        raise CutOff("nothing moved for too long")
    if failures:
        raise failures[0]
