"""System: a node of a cluster is restarted: others never see two nodes with its name, nor none."""

import socket
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.system.cluster import Cluster
from tests.system.peers import say
from tests.system.stack import Stack, wait_until
from tests.system.units import Unit

pytestmark = [pytest.mark.system, pytest.mark.xdist_group("cluster")]

SETTINGS = "publish_s = 0.3\nstale_s = 12\ndown_s = 20\nresync_s = 1"


def close_all(clients: list[socket.socket]) -> None:
    for client in clients:
        client.close()


def test_a_node_is_one_node_while_it_has_two_processes(make_stack: Callable[..., Stack], home: Path) -> None:
    stack = make_stack("desk")
    stack.start_gateway()
    cluster = Cluster(stack, f'store = "sqlite:{home / "cluster.db"}"\n{SETTINGS}')
    unit, clients = None, []
    try:
        cluster.node(2)
        stack.relays["node-2"].stop()
        stack.relays["node-2"].log.write_text("")
        config = str(stack.relay_config("node-2"))
        unit = Unit(["fxrelay.cli", "launch", "--config", config], stack.directory / "node-2.log", stack.directory)
        unit.start()
        cluster.node(3)
        cluster.wait_until_known(["node-2", "node-3"], ["node-2", "node-3"])
        clients, served = cluster.held(8)
        assert set(served) == {"node-2", "node-3"}
        seen = {(cluster.nodes("node-3")["node-2"]["server"]["agent"]["startedAt"], False)}
        for _ in range(2):
            unit.restart()
            before, since = len({started for started, _ in seen}), time.monotonic()
            while time.monotonic() < since + 1.5 or len({started for started, _ in seen}) == before:
                assert time.monotonic() < since + 20, "the new process has not published"
                known = cluster.status("node-3")["cluster"]
                assert known["quarrels"] == [], known
                assert known["nodes"].get("up") == 2, known
                node = cluster.nodes("node-3")["node-2"]["server"]
                seen.add((node["agent"]["startedAt"], bool(node.get("draining"))))
            for client in clients:
                say(client)
        assert {draining for _, draining in seen} == {False}
        later, served = cluster.held(8)
        clients += later
        assert set(served) == {"node-2", "node-3"}
        close_all(clients)
        wait_until(lambda: not unit.left_over(), 30, "the end of the old processes")
        assert cluster.nodes("node-3")["node-2"]["server"].get("draining") is not True
    finally:
        close_all(clients)
        if unit is not None:
            unit.close()
        cluster.close()
    assert "two processes" not in stack.logs()
    assert "fenced" not in stack.logs()
