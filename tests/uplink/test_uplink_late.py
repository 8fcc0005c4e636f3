"""An uplink whose gateway is not there yet when it starts."""

from dataclasses import replace
from pathlib import Path

import pytest
import trio
from uplink_fakes import QUICK, FakeGateway, make_context, running

from fxtunnel.kit.certificates import new_authority


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


async def test_a_gateway_that_starts_later_than_we_do_is_soon_found(
    state_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fxrelay.uplink.uplink.ABSENT_CAP_S", 0.05)
    authority = new_authority("test authority")
    gateway = LateGateway(authority, make_context(tmp_path, authority))
    async with running(gateway, state_dir, replace(QUICK, min_backoff_s=0.05, max_backoff_s=30.0)):
        await gateway.wait_controls(1)
        # Uncapped waits would be 0.05 + 0.1 + … + 3.2 s, and the last of them end 3 s after the gateway is there.
        assert gateway.dialled_at[0] - gateway.there_at < 2
    gateway.close()
