"""The placer as the daemon runs it: the reactor owns the thread, and its callbacks wake and cancel the tasks of its guest."""

import socket
from contextlib import closing
from typing import Any, cast

import pytest
import trio
from delivery_rig import ScriptedChooser, Spec

from fxrelay.delivery.delivery import DeliveryDesk, DeliveryLimits
from fxrelay.delivery.placing import Placer
from fxrelay.delivery.services import Endpoint, PoolService, ServiceTable
from fxtunnel.codes import Code
from fxtunnel.engine.reactor import Reactor
from fxtunnel.model import ServiceName
from fxtunnel.protocol.opening import Opening

SERVICE = ServiceName("s")


class NotingStream:
    """What a stream was told."""

    def __init__(self) -> None:
        self.endpoint: Any = None
        self.told: list[object] = []
        self.closed = False
        self.accepted = False
        self.bytes_in = self.bytes_out = self.send_credit = 0

    def accept(self) -> None:
        self.told.append("accept")

    def refuse(self, code: Code, text: str) -> None:
        self.told.append(code)

    def reset(self, code: Code) -> None:
        self.told.append(code)


@pytest.mark.parametrize("ending", ["accepted", "refused", "gone", "late"])
def test_a_placing_in_guest_mode(ending: str) -> None:
    reactor = Reactor()
    stream = NotingStream()
    chooser = ScriptedChooser(Spec("a", is_local=True))
    chooser.hangs = ending in ("gone", "late")
    told: list[object] = []

    async def main() -> None:
        placer = Placer(chooser)
        desk = DeliveryDesk(reactor, ServiceTable(), DeliveryLimits(place_timeout_s=0.1 if ending == "late" else 5.0), placer)
        with closing(socket.create_server(("127.0.0.1", 0))) as listener:
            address = listener.getsockname()
            if ending == "refused":
                listener.close()
            pool = PoolService(SERVICE, *address, (Endpoint(socket.AF_INET, address),))
            desk.services.replace([pool])
            async with trio.open_nursery() as nursery:
                await nursery.start(placer.run)
                # From the reactor, not from a task: that is where an OPEN comes from.
                reactor.call_later(0, lambda: desk.on_open(cast(Any, None), cast(Any, stream), Opening(SERVICE)))
                with trio.fail_after(5):
                    while not chooser.asked:
                        await trio.sleep(0.005)
                    if ending == "gone":
                        reactor.call_later(0, lambda: stream.endpoint.on_reset(Code.CANCELLED))
                    while placer.placings or not (stream.told or chooser.cancelled):
                        await trio.sleep(0.005)
                told.extend(stream.told)
                desk.abort_all()
                nursery.cancel_scope.cancel()
        assert not desk.deliveries

    try:
        reactor.host_trio(main)
    finally:
        reactor.close()
    assert told == {"accepted": ["accept"], "refused": [Code.CONNECT_FAILED], "gone": [], "late": [Code.CONNECT_TIMEOUT]}[ending]
    assert [claim.released for claim in chooser.claims] == [1] * len(chooser.claims)
