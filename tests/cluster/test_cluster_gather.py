"""Everything a node says about itself, from a real configuration, as the others read it."""

import json
import os
from pathlib import Path
from typing import Any

import psutil
import pytest
import trio
from cluster_fakes import FakeStore, FakeTransporter, NoThreads, make_publisher

from fxrelay.cluster.gather import Gatherer, local_ends, published_services
from fxrelay.cluster.members import Ages
from fxrelay.cluster.programs import ProgramBounds
from fxrelay.cluster.server import MAX_SERVER_BYTES, parse_server
from fxrelay.cluster.view import ClusterView
from fxrelay.settings import RelaySettings, load

BOUNDS = ProgramBounds(timeout_s=20.0)
CONFIG = """
[relay]
id = "me"
address = "127.0.0.1"

[cluster]
publish_s = 10
force_indirect = true

[node]
static_data = {group = "cad", sessions = 0}
weight = 50
max_sessions = 7
pool = "p1"
enable_reservations = true
EXTRA

[[service]]
name = "everywhere"
port = 5901

[[service]]
name = "here"
port = 5902
nodes = ["other", "me"]

[[service]]
name = "elsewhere"
port = 5903
nodes = ["other"]

[[service]]
name = "target"
target = "localhost:5904"

[[service]]
name = "remote"
target = "192.0.2.1:5905"

[[service]]
name = "named"
target = "host.invalid:5906"

[[service]]
name = "socket"
target = "unix:/run/x.sock"
"""


def settings(tmp_path: Path, extra: str = "", more: str = "") -> RelaySettings:
    path = tmp_path / "relay.toml"
    path.write_text(CONFIG.replace("EXTRA", extra) + more)
    return load(path, {})


async def published(facts: Any) -> str:
    """The text that goes out for these facts."""
    transporter = FakeTransporter()

    async def measure() -> Any:
        return facts

    view = ClusterView(Ages(), trio.current_time)
    publisher = make_publisher(FakeStore(), transporter, view, NoThreads(), measure)
    async with trio.open_nursery() as nursery:
        await nursery.start(publisher.run)
        nursery.cancel_scope.cancel()
    assert publisher.last_error == ""
    return transporter.said[0][1]


async def test_what_is_gathered_is_what_the_others_read(tmp_path: Path) -> None:
    (tmp_path / "static-data.json").write_text('{"gpu": true}')
    gatherer = Gatherer(settings(tmp_path), {"METADATA_SITE": "north"}, BOUNDS)
    facts = await gatherer.measure()
    server = parse_server(await published(facts))
    assert server.server_id == "me"
    assert server.services == {"everywhere": 5901, "here": 5902, "target": 5904, "remote": 5905, "named": 5906, "socket": 0}
    assert (server.address, server.weight, server.max_sessions) == ("127.0.0.1", 50, 7)
    assert (server.enable_reservations, server.force_indirect, server.draining, server.disable) == (True, True, False, frozenset())
    assert server.total_bytes == psutil.virtual_memory().total
    document = server.document()
    assert document["staticData"] == {"group": "cad", "sessions": 0, "gpu": True}
    assert document["sessions"] == server.sessions, "static data is no core field"
    assert document["metadata"] == {"SITE": "north", "site": "north"}
    assert (document["serverPool"], document["metrics"], document["metricErrors"]) == ("p1", {}, {})
    assert len(document["loadavg"]) == 3
    assert {"cpu", "freemem", "availmem", "uptime", "loggedInUsers", "logins", "uniqueUserLogins", "hostname"} <= set(document)
    json.dumps(facts, allow_nan=False)


async def test_services_say_how_they_are_carried(tmp_path: Path) -> None:
    assert published_services(settings(tmp_path))[0] == {"name": "everywhere", "proto": "tcp", "port": 5901}


async def test_only_services_of_this_machine_count_as_its_sessions(tmp_path: Path) -> None:
    assert local_ends(settings(tmp_path)) == {("", 5901), ("", 5902), ("", 5904)}


async def test_a_node_that_is_played_counts_connections_to_its_own_address(tmp_path: Path) -> None:
    (tmp_path / "relay.toml").write_text(
        '[relay]\nid = "n2"\naddress = "127.0.0.2"\n[[service]]\nname = "desk"\nport = 5901\nhost = "127.0.0.2"\n'
        '[[service]]\nname = "web"\nport = 80\n'
    )
    assert local_ends(load(tmp_path / "relay.toml", {})) == {("127.0.0.2", 5901), ("", 80)}


async def test_metrics_run_beside_and_are_published(tmp_path: Path) -> None:
    directory = tmp_path / "metrics.d"
    directory.mkdir(mode=0o755)
    for name, body in (("queue", "echo 3"), ("slow", "sleep 600")):
        (directory / name).write_text(f"#!/bin/sh\n{body}\n")
        (directory / name).chmod(0o755)
    gatherer = Gatherer(settings(tmp_path), os.environ, BOUNDS)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(gatherer.run)
        with trio.fail_after(30):
            while (await gatherer.measure())["metrics"].get("queue") != 3:
                await trio.sleep(0.02)
        began = trio.current_time()
        assert (await gatherer.measure())["metrics"] == {"queue": 3, "slow": None}
        assert trio.current_time() - began < 15, "not held up by the slow one"
        nursery.cancel_scope.cancel()


async def test_a_new_configuration_holds_at_once_and_keeps_what_is_known(tmp_path: Path) -> None:
    for name, value in (("metrics.d", 1), ("other.d", 2)):
        (tmp_path / name).mkdir(mode=0o755)
        (tmp_path / name / "m").write_text(f"#!/bin/sh\necho {value}\n")
        (tmp_path / name / "m").chmod(0o755)
    gatherer = Gatherer(settings(tmp_path), {}, BOUNDS)

    async def until_metric(value: int) -> None:
        with trio.fail_after(30):
            while (await gatherer.measure())["metrics"].get("m") != value:
                await trio.sleep(0.02)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(gatherer.run)
        await until_metric(1)
        gatherer.reconfigure(settings(tmp_path, 'sessions = "exec:none"', '[[service]]\nname = "new"\nport = 5999\n'))
        facts = await gatherer.measure()
        assert facts["metrics"] == {"m": 1}
        assert facts["services"][-1]["name"] == "new"
        assert facts["sessionErrors"] == ["cannot be examined: No such file or directory"]
        gatherer.reconfigure(settings(tmp_path, 'metrics_dir = "other.d"'))
        await until_metric(2)
        nursery.cancel_scope.cancel()


def long_list(directory: Path) -> Path:
    program = directory / "sessions"
    program.write_text(f"#!/bin/sh\ncat <<E\n{json.dumps([{'owner': 'u' * 1000}] * 50)}\nE\n")
    program.chmod(0o755)
    return program


async def test_everything_at_its_largest_is_still_published(tmp_path: Path) -> None:
    (tmp_path / "static-data.json").write_text(json.dumps({"x": "y" * 16_000}))
    program = long_list(tmp_path)
    names = "".join(f'[[service]]\nname = "{number:064}"\nport = {number + 1}\n' for number in range(400))
    config = settings(tmp_path, f'sessions = "exec:{program}"', names)
    gatherer = Gatherer(config, {"METADATA_A": "x" * 4_000}, BOUNDS)
    facts = {**await gatherer.measure()}
    assert facts["sessions"] == 50
    assert len(facts["services"]) == 256
    assert facts["leftOut"] == ["sessionList"]
    text = await published(facts)
    assert len(text) < MAX_SERVER_BYTES
    assert parse_server(text).sessions == 50


async def test_a_machine_that_does_not_say_is_no_reason_to_fall_silent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    gatherer = Gatherer(settings(tmp_path), {}, BOUNDS)
    before = await gatherer.measure()

    def broken() -> None:
        raise OSError("no /proc")

    monkeypatch.setattr(psutil, "virtual_memory", broken)
    for _ in range(2):
        assert (await gatherer.measure())["totalmem"] == before["totalmem"]
    assert len(caplog.records) == 1
