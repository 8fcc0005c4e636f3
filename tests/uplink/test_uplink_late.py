"""An uplink whose gateway is not there yet when it starts."""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path

import pytest
import trio
from uplink_fakes import OFFERS, QUICK, RELAY_ID, FakeFactory, FakeGateway, LongestWaits, make_context, running

from fxrelay.uplink.dial import Dialler, Unanswered, Unreachable
from fxrelay.uplink.identity import Identity
from fxrelay.uplink.ports import UplinkConfig
from fxrelay.uplink.redial_backoff import ABSENT_CAP_S, RECENT_CAP_S, RECENT_S
from fxrelay.uplink.uplink import Uplink, UplinkEnvironment
from fxtunnel.codes import Refusal
from fxtunnel.errors import PeerRefused, TunnelError
from fxtunnel.kit.certificates import new_authority
from fxtunnel.kit.tokens import new_key
from fxtunnel.model import GatewayId, InstanceId


class LateGateway(FakeGateway):
    """Nobody listens at its address for the first seconds."""

    AWAY_S = 3.3
    there_at = 0.0

    async def serve(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
        self.port = listener.socket.getsockname()[1]
        await listener.aclose()
        task_status.started()
        await trio.sleep(self.AWAY_S)
        self.there_at = trio.current_time()
        await super().serve()


class GatewayBehindABalancer(LateGateway):
    """Something else takes connections at its address for the first seconds, and hangs up."""

    async def serve(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        async with trio.open_nursery() as nursery:
            (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
            self.port = listener.socket.getsockname()[1]
            nursery.start_soon(trio.serve_listeners, trio.aclose_forcefully, [listener])
            task_status.started()
            await trio.sleep(self.AWAY_S)
            nursery.cancel_scope.cancel()
        self.there_at = trio.current_time()
        await super(LateGateway, self).serve()


@pytest.mark.parametrize(
    ("kind", "cap"), [(LateGateway, "ABSENT_CAP_S"), (GatewayBehindABalancer, "RECENT_CAP_S")], ids=["nobody listens", "hung up on"]
)
async def test_a_gateway_that_starts_later_than_we_do_is_soon_found(
    state_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: type[LateGateway], cap: str
) -> None:
    for name in ("ABSENT_CAP_S", "RECENT_CAP_S"):
        monkeypatch.setattr(f"fxrelay.uplink.redial_backoff.{name}", 0.05 if name == cap else 30.0)
    authority = new_authority("test authority")
    gateway = kind(authority, make_context(tmp_path, authority))
    async with running(gateway, state_dir, replace(QUICK, min_backoff_s=0.05, max_backoff_s=30.0)):
        await gateway.wait_controls(1)
        # Uncapped waits would be 0.05 + 0.1 + … + 3.2 s, and the last of them end 3 s after the gateway is there.
        assert gateway.dialled_at[0] - gateway.there_at < 2
    gateway.close()


class Enrolled(Identity):
    """One that every gateway knows."""

    async def is_enrolled(self, gateway_id: GatewayId) -> bool:
        await trio.lowlevel.checkpoint()
        return True


async def dials_of(
    gateway: FakeGateway, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: Callable[[], TunnelError]
) -> list[float]:
    """When an uplink dials in its first ten minutes, as each dial fails at once, and chance is at its most unfavourable."""
    dialled_at: list[float] = []

    async def dial(*_: object) -> None:
        dialled_at.append(trio.current_time() - began_at)
        await trio.lowlevel.checkpoint()
        raise failure()

    monkeypatch.setattr(Dialler, "dial", dial)
    identity = Enrolled(RELAY_ID, InstanceId("0" * 32), tmp_path, new_key())
    uplink = Uplink(gateway.file, identity, OFFERS, FakeFactory(), UplinkConfig(), UplinkEnvironment(LongestWaits()))
    began_at = trio.current_time()
    with trio.move_on_after(600):
        await uplink.run()
    return dialled_at


@pytest.mark.parametrize(
    ("failure", "early_cap_s"),
    [
        (partial(Unreachable, "refused"), ABSENT_CAP_S),
        (partial(Unanswered, "hung up"), RECENT_CAP_S),
        (partial(TunnelError, "no answer in time"), math.inf),
        (partial(PeerRefused, Refusal.DRAINING, "not yet"), math.inf),
    ],
    ids=["nobody listens", "hung up on", "silence", "refused"],
)
async def test_a_gateway_is_looked_for_often_for_two_minutes_unless_it_may_be_there(
    autojump_clock: object,
    gateway: FakeGateway,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    failure: Callable[[], TunnelError],
    early_cap_s: float,
) -> None:
    dialled_at = await dials_of(gateway, tmp_path, monkeypatch, failure)
    waits = [(at, later - at) for at, later in pairwise(dialled_at)]
    early = [wait_s for at, wait_s in waits if at < RECENT_S]
    late = [wait_s for at, wait_s in waits if at >= RECENT_S]
    assert [round(wait_s, 3) for wait_s in early[:3]] == [0.25, 0.5, 1.0]
    assert max(early) == pytest.approx(min(early_cap_s, 30.0))
    assert late[-1] == pytest.approx(30.0)
