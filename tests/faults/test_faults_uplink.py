"""R10: an exception at every await of a relay's way up. The uplink lives, and comes up again by itself."""

import contextlib
import logging
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.lowlevel
from sabotage import FAULTS, lines_about, sabotage
from uplink_fakes import FakeGateway, Running, make_context, running, until

from fxtunnel.control.messages import Welcome
from fxtunnel.kit.certificates import new_authority

AUTHORITY = new_authority("test authority")
ROOTS = ("Slot.run", "Uplink._keep_control_link")
LIVES_S = 0.05
WAITS = (*range(1, 31), *range(31, 50, 3))
"""Later ones are heartbeats, which repeat."""


class PatientGateway(FakeGateway):
    """A relay that breaks off is no surprise. Beats often, so that heartbeats are hit as well, and is patient when the machine is slow."""

    def welcome(self, **changes: Any) -> Welcome:
        return super().welcome(heartbeat_s=0.1, **changes)

    async def _handle(self, stream: trio.SocketStream) -> None:
        with contextlib.suppress(Exception):
            await super()._handle(stream)


async def test_a_fault_at_every_await_of_an_uplink(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.WARNING)
    for module in ("fxtunnel.control.channel", "fxrelay.uplink.uplink"):
        monkeypatch.setattr(f"{module}.GOODBYE_S", 0.02)
    monkeypatch.setattr("fxrelay.uplink.redial_backoff.FLAP_CAP_S", 0.02)
    context = make_context(tmp_path, AUTHORITY)
    hits = 0
    for nth in WAITS:
        with sabotage(nth, *ROOTS) as done:  # as many uplinks as faults, with two such tasks each: both get each fault

            async def one(number: int, nth: int = nth) -> None:
                gateway = PatientGateway(AUTHORITY, context)
                async with running(gateway, tmp_path / f"{nth}-{number}") as it:
                    await use(it)

            async with trio.open_nursery() as nursery:
                for number in range(len(FAULTS)):
                    nursery.start_soon(one, number)
                    await trio.lowlevel.checkpoint()
        hits += len(done.hit)
        for tree in done.hit:
            assert len(lines_about(tree.fault, caplog)) <= 1, tree.where
        caplog.clear()
    assert hits > 20 * len(FAULTS)


async def use(it: Running) -> None:
    """Up, cut, and up again."""
    gateway = it.gateway
    await until(lambda: it.is_carrying)
    it.session.cut()
    await until(lambda: it.is_carrying and bool(gateway.controls))
    cut_control(gateway)
    await trio.sleep(LIVES_S)
    await until(lambda: it.is_carrying and it.uplink.statistics().state.value == "up")
    before = len(gateway.controls)
    cut_control(gateway)
    await gateway.wait_controls(before + 1)
    assert not it.ended.is_set()


def cut_control(gateway: FakeGateway) -> None:
    with contextlib.suppress(OSError):  # it broke off by itself
        gateway.cut_control()
