"""System: a second process of a daemon that runs already. It ends with one line, and nobody else has heard of it."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.system.cluster import Cluster
from tests.system.peers import Service, dial, say
from tests.system.stack import Stack, wait_until

pytestmark = [pytest.mark.system, pytest.mark.xdist_group("cluster")]

SELDOM = "publish_s = 60\nstale_s = 200\ndown_s = 400\nresync_s = 1"
"""So seldom that nothing would put right soon what another process has said."""


@pytest.mark.parametrize("status", ["status.sock", "other.sock"])
def test_a_relay_that_runs_already(make_stack: Callable[..., Stack], home: Path, echo_service: Service, status: str) -> None:
    stack = make_stack("echo")
    stack.start_gateway()
    cluster = Cluster(stack, f'store = "sqlite:{home / "cluster.db"}"\n{SELDOM}', service="desk")
    extra = f'[[service]]\nname = "echo"\nprotocol = "tcp"\ntarget = "{echo_service.target}"\n'
    try:
        name = cluster.node(2, service=extra)
        other = cluster.node(3)
        cluster.wait_until_known([name], [other])
        before = cluster.nodes(name)[name]
        with dial(stack.doors["echo"]) as client:
            say(client, b"before")
            config = stack.relay_config(name)
            twin = config.with_name("twin.toml")
            twin.write_text(config.read_text().replace('state_dir = "state"', f'state_dir = "state"\nstatus = "{status}"'))
            second = stack.launch_twin(name, twin)
            assert second.wait() == 1
            say(client, b"after")
        after = cluster.nodes(name)[name]
        assert after["server"]["agent"]["instanceId"] == before["server"]["agent"]["instanceId"]
        assert (after["state"], after["rivals"], after["server"].get("draining")) == ("up", [], None)
        assert cluster.status(other)["cluster"]["quarrels"] == []
        assert stack.live_relays()[name]["epoch"] == 1
        wait_until(lambda: stack.believed(other, name)["state"] == "up", what="the node is believed to be up")
    finally:
        cluster.close()
    assert f"state: process {stack.relays[name].pid} uses it already" in second.log.read_text().splitlines()[-1]
