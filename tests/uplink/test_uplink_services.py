"""Telling a gateway which services there are, when they change and when there are many."""

from pathlib import Path

import pytest
import trio
from uplink_fakes import OFFERS, QUICK, RELAY_ID, FakeFactory, FakeGateway, running, until

from fxrelay.uplink.identity import load_identity
from fxrelay.uplink.uplink import Uplink
from fxtunnel.control.messages import Services
from fxtunnel.errors import LocalProtocolError
from fxtunnel.model import Offer, ServiceName


async def test_services_that_change_while_a_link_is_made_are_told_on_it(gateway: FakeGateway, state_dir: Path) -> None:
    changed = (Offer(ServiceName("ssh")), Offer(ServiceName("web")))
    async with running(gateway, state_dir) as it:
        await until(lambda: it.is_carrying)
        gateway.holds_welcome = trio.Event()
        gateway.cut_control()
        await until(lambda: len(gateway.hellos) == 2)
        it.uplink.update_services(changed)
        assert gateway.hellos[1].services != changed
        gateway.holds_welcome.set()
        await until(lambda: Services(services=changed) in gateway.heard)


async def test_more_services_than_a_message_holds_are_not_tried_for_ever(gateway: FakeGateway, state_dir: Path) -> None:
    many = tuple(Offer(ServiceName(f"service-{n:050d}")) for n in range(300))
    async with running(gateway, state_dir) as it:
        await it.started.wait()
        with pytest.raises(LocalProtocolError):
            it.uplink.update_services(many)
        await gateway.wait_controls(1)
        gateway.cut_control()
        await gateway.wait_controls(2)
        assert gateway.hellos[1].services == OFFERS
        gateway.holds_welcome = trio.Event()
        gateway.cut_control()
        await until(lambda: len(gateway.hellos) == 3)
        with pytest.raises(LocalProtocolError):  # without a link, too
            it.uplink.update_services(many)
        gateway.holds_welcome.set()
    uplink = Uplink(gateway.file, await load_identity(state_dir, RELAY_ID), many, FakeFactory(), QUICK)
    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            await nursery.start(gateway.serve)
            with pytest.raises(LocalProtocolError):
                await uplink.run()
            nursery.cancel_scope.cancel()
