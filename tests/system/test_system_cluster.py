"""System: pools over several nodes: who serves whom, by which path, and what happens when nodes, services and stores go away."""

import contextlib
import json
import signal
import sqlite3
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fxrelay.cluster.ports import MAX_DOCUMENT_BYTES, PLACEMENTS
from fxrelay.cluster.sqlite_bus import SqliteTransporter
from tests.system.cluster import NAME_BYTES, Cluster, MakeCluster
from tests.system.peers import dial, how_it_ends, read_exactly
from tests.system.stack import Stack, cli, wait_until
from tests.system.test_system_config import events, reload

pytestmark = [pytest.mark.system, pytest.mark.xdist_group("cluster")]

FAST = "publish_s = 0.5\nstale_s = 3\ndown_s = 6\nresync_s = 1"
PATIENT = "publish_s = 0.5\nstale_s = 20\ndown_s = 40\nresync_s = 1"
"""On a busy machine no node that lives is late by so much."""


@pytest.fixture
def make_cluster(make_stack: Callable[..., Stack], home: Path) -> Iterator[MakeCluster]:
    """`make_cluster(settings="", ages=PATIENT)`: a gateway that runs, and no node yet. The store is one SQLite file."""
    made: list[Cluster] = []

    def make(settings: str = "", ages: str = PATIENT) -> Cluster:
        stack = make_stack("desk")
        stack.start_gateway()
        made.append(Cluster(stack, f'store = "sqlite:{home / "cluster.db"}"\n{ages}\n{settings}'))
        return made[-1]

    yield make
    for cluster in made:
        cluster.close()


def close_all(clients: list) -> None:
    for client in clients:
        client.close()


def test_sessions_spread_over_nodes_by_every_path(make_cluster: MakeCluster) -> None:
    cluster = make_cluster()
    names = [cluster.node(number, gateway=number < 4) for number in (2, 3, 4)]
    cluster.wait_until_known(names, names[:2])
    clients, served = cluster.held(30, names[:2])
    try:
        share = Counter(served)
        assert set(share) == set(names)
        # Ten each; a count that a node takes while clients come in can have some of them twice, the longer it takes the more.
        assert all(4 <= count <= 16 for count in share.values()), share
        paths: Counter[str] = Counter()
        for name in names[:2]:
            (service,) = cluster.status(name)["services"]
            paths.update(service["paths"])
        assert paths["direct"] == share["node-4"], paths
        assert paths["local"] == share["node-2"] + share["node-3"], paths  # after a REDIRECT as well
        assert paths["redirect"] >= 3, paths
        for number, client in enumerate(clients):
            client.sendall(b"word %d" % number)
            assert read_exactly(client, len(b"word %d" % number)) == b"word %d" % number
    finally:
        close_all(clients)


def counted(cluster: Cluster) -> dict[str, int]:
    return {name: node["server"]["sessions"] for name, node in cluster.nodes("node-2").items()}


def paths_taken(cluster: Cluster, names: list[str]) -> Counter[str]:
    """How often relays have chosen each path; a redirected stream is local as well, where it is served."""
    taken: Counter[str] = Counter()
    for name in names:
        taken.update(cluster.status(name)["services"][0]["paths"])
    taken["local"] -= taken["redirect"]
    return taken


def test_sessions_that_end_are_told_at_once_whatever_their_path(make_cluster: MakeCluster) -> None:
    cluster = make_cluster(ages="publish_s = 300\nstale_s = 900\ndown_s = 1800\nresync_s = 1")
    names = [cluster.node(number, gateway=number < 4) for number in (2, 3, 4)]
    cluster.wait_until_known(names, names)
    left = Counter(dict.fromkeys(names, 0))
    by_path = defaultdict(list)
    for _ in range(12):
        before = paths_taken(cluster, names[:2])
        (client,), (name,) = cluster.held(1)
        (path,) = paths_taken(cluster, names[:2]) - before
        by_path[path].append((client, name))
        left[name] += 1
    try:
        for name in names:
            cluster.stack.relays[name].signal(signal.SIGHUP)  # after which a node says how it is
        wait_until(lambda: counted(cluster) == left, 30, "all sessions in the store")
        for path in ("direct", "local", "redirect"):
            for client, name in by_path[path]:
                client.close()
                left[name] -= 1
            assert by_path[path]
            wait_until(lambda: counted(cluster) == left, 30, f"the ends of sessions whose path was {path}")
    finally:
        close_all([client for found in by_path.values() for client, _ in found])


def test_a_node_without_a_tunnel_is_not_reached_when_connections_must_be_indirect(make_cluster: MakeCluster) -> None:
    cluster = make_cluster("force_indirect = true")
    names = [cluster.node(2), cluster.node(3), cluster.node(4, gateway=False)]
    cluster.wait_until_known(names, names[:2])
    clients, served = cluster.held(12)
    close_all(clients)
    assert set(served) == set(names[:2])


def test_a_reload_changes_the_ways_to_other_nodes(make_cluster: MakeCluster) -> None:
    cluster = make_cluster()
    names = [cluster.node(2, service='balance = ["builtin:round-robin"]'), cluster.node(3, gateway=False)]
    cluster.wait_until_known(names, names[:1])
    wait_until(lambda: {cluster.who_serves() for _ in range(4)} == set(names), 20, "both serve")
    config = cluster.stack.relay_config("node-2")
    written = config.read_text()
    config.write_text(written.replace("[cluster]", "[cluster]\nforce_indirect = true"))
    reload(cluster.stack.relays["node-2"])
    assert {cluster.who_serves() for _ in range(6)} == {"node-2"}
    extra = '[limits]\nmemory_bytes = "64MiB"\nstreams = 99\n[resume]\nenabled = false\n[liveness]\ndead_after_s = 9\n'
    config.write_text(written.replace("[cluster]", "[cluster]\nlease_s = 20") + extra)
    waiting = "not before the next restart: cluster.lease_s, limits.memory_bytes, resume.enabled, liveness.dead_after_s"
    assert waiting in reload(cluster.stack.relays["node-2"], "restart")
    wait_until(lambda: {cluster.who_serves() for _ in range(4)} == set(names), 20, "both serve again")
    assert not any("force_indirect" in event for event in events(cluster.stack.relays["node-2"]))


def test_a_node_whose_service_is_gone_costs_the_client_nothing(make_cluster: MakeCluster) -> None:
    cluster = make_cluster()
    names = [cluster.node(2), cluster.node(3), cluster.node(4, gateway=False)]
    cluster.wait_until_known(names, names[:2])
    cluster.services.pop("node-4").close()
    cluster.services.pop("node-3").close()
    assert {cluster.who_serves() for _ in range(10)} == {"node-2"}


def test_drain_and_disable_are_heard_at_once_and_undone(make_cluster: MakeCluster) -> None:
    cluster = make_cluster()
    names = [cluster.node(2), cluster.node(3)]
    cluster.wait_until_known(names, names)
    cluster.stack.relay_cli("node-2", "drain", "node-3")
    wait_until(lambda: {cluster.who_serves() for _ in range(4)} == {"node-2"}, 20, "nothing new on node-3")
    cluster.stack.relay_cli("node-2", "enable", "node-3")
    wait_until(lambda: "node-3" in {cluster.who_serves() for _ in range(4)}, 20, "node-3 back")
    cluster.stack.relay_cli("node-3", "disable", "node-2", "--start")
    wait_until(lambda: {cluster.who_serves() for _ in range(4)} == {"node-3"}, 20, "no new sessions on node-2")
    assert cluster.nodes("node-3")["node-2"]["disabled"] == ["start"]
    refused = cluster.stack.relay_cli("node-2", "drain", "no-such-node", check=False)
    assert refused.returncode == 1
    assert "node-2" in refused.stderr


def test_a_node_that_is_stopped_is_shown_as_ended_at_once(make_cluster: MakeCluster) -> None:
    cluster = make_cluster()
    names = [cluster.node(2), cluster.node(3, gateway=False)]
    cluster.wait_until_known(names, names[:1])
    assert cluster.stack.relays["node-3"].stop() == 0
    assert cluster.nodes("node-2")["node-3"]["state"] == "ended"
    shown = next(line for line in cluster.stack.relay_cli("node-2", "nodes").stdout.splitlines() if "node-3" in line)
    assert (" ended " in shown, " up " in shown) == (True, False)


def test_a_node_that_dies_gets_stale_and_then_down(make_cluster: MakeCluster) -> None:
    cluster = make_cluster(ages=FAST)
    names = [cluster.node(2), cluster.node(3, gateway=False)]
    cluster.wait_until_known(names, names[:1])
    cluster.stack.relays["node-3"].kill()
    wait_until(lambda: cluster.nodes("node-2")["node-3"]["state"] == "down", 15, "node-3 down in the store")
    # The command looks at the store's clock, the relay counts from when it heard the last word.
    wait_until(lambda: cluster.status("node-2")["cluster"]["nodes"]["down"] == 1, 15, "node-3 down for node-2")
    assert {cluster.who_serves() for _ in range(4)} == {"node-2"}


def test_a_pool_of_named_nodes_and_of_static_data(make_cluster: MakeCluster) -> None:
    cluster = make_cluster()
    gpu = '\n[node]\nstatic_data = {group = "gpu", sessions = 0}'
    names = [
        cluster.node(2, service='nodes = ["node-3", "node-4"]\nwhere = {group = "gpu"}'),
        cluster.node(3, gateway=False, extra=gpu),
        cluster.node(4, gateway=False),
    ]
    cluster.wait_until_known(names, names[:1])
    assert {cluster.who_serves() for _ in range(6)} == {"node-3"}
    explained = cluster.stack.relay_cli("node-2", "pick", "desk", "--explain").stdout
    assert "node-4" in explained
    assert "static-data-differs" in explained
    assert "not-in-pool" in explained
    assert explained.strip().endswith("node-3")


def test_scripts_choose_and_their_errors_refuse(make_cluster: MakeCluster) -> None:
    pytest.importorskip("quickjs")
    cluster = make_cluster()
    script = cluster.stack.directory / "choose.js"
    script.write_text('function (input) { return input.servers.filter(s => s.staticData.group === "cad"); }')
    chain = f'balance = ["js:{script}", "builtin:fewest-sessions"]'
    names = [
        cluster.node(2, service=chain),
        cluster.node(3, gateway=False, extra='\n[node]\nstatic_data = {group = "cad"}'),
    ]
    cluster.wait_until_known(names, names[:1])
    assert {cluster.who_serves() for _ in range(4)} == {"node-3"}
    script.write_text('function (input) { throw new Error("closed for today"); }')

    def is_refused() -> bool:
        try:
            with dial(cluster.stack.doors["desk"]) as client:
                return how_it_ends(client, 10)[0] == "reset"
        except ConnectionResetError:
            return True

    wait_until(is_refused, 20, "the script's error")
    wait_until(lambda: "closed for today" in (cluster.stack.directory / "node-2.log").read_text(), what="the script's words in the log")


@pytest.mark.parametrize(("thrown", "times"), [("Error", 1), ("TypeError", 2)])
def test_what_a_script_refuses_is_asked_once_and_what_fails_at_every_relay(make_cluster: MakeCluster, thrown: str, times: int) -> None:
    pytest.importorskip("quickjs")
    cluster = make_cluster()
    script = cluster.stack.directory / "choose.js"
    script.write_text(f'function (input) {{ throw new {thrown}("closed for today"); }}')
    names = [cluster.node(number, service=f'balance = ["js:{script}"]') for number in (2, 3)]
    cluster.wait_until_known(names, names)

    def refusals() -> Counter[str]:
        found: Counter[str] = Counter()
        for name in names:
            for refused in cluster.status(name)["services"]:
                found.update(refused["refused"])
        return found

    clients = 5
    for _ in range(clients):
        with contextlib.suppress(ConnectionResetError), dial(cluster.stack.doors["desk"]) as client:
            assert how_it_ends(client, 20)[0] == "reset"
    wait_until(lambda: refusals().total() >= clients * times, what="all refused")
    assert refusals() == {"forbidden" if times == 1 else "connect-failed": clients * times}
    assert cluster.stack.logs().count(f"{thrown}: closed for today; ") == clients * times


def test_the_service_learns_the_clients_address(make_cluster: MakeCluster) -> None:
    cluster = make_cluster()
    names = [cluster.node(2, service='proxy_protocol = "v1"'), cluster.node(3, gateway=False, service='proxy_protocol = "v1"')]
    cluster.wait_until_known(names, names[:1])
    with contextlib.ExitStack() as stack:
        ports = set()
        for _ in range(6):
            client = stack.enter_context(dial(cluster.stack.doors["desk"], 10))
            ports.add(client.getsockname()[1])
            read_exactly(client, NAME_BYTES)
        door = cluster.stack.doors["desk"]
        wait_until(lambda: sum(len(service.heads) for service in cluster.services.values()) == 6, 20, "six headers")
        heads = [head for service in cluster.services.values() for head in service.heads]
        told = {int(head.split()[4]) for head in heads}
        assert told == ports, (heads, door)


def test_two_processes_with_one_id_are_reported_and_the_newer_wins(make_cluster: MakeCluster, home: Path) -> None:
    cluster = make_cluster()
    names = [cluster.node(2), cluster.node(3, gateway=False)]
    cluster.wait_until_known(names, names[:1])
    twin = home / "twin"
    twin.mkdir(mode=0o700)
    text = cluster.stack.relay_config("node-3").read_text()
    (twin / "relay.toml").write_text(text.replace('state_dir = "state"', f'state_dir = "{twin / "state"}"'))
    other = cluster.stack.launch_twin("node-3", twin / "relay.toml")
    try:
        wait_until(lambda: cluster.status("node-2")["cluster"]["quarrels"] == ["node-3"], 30, "the quarrel seen")
        # A command reads the store once, where only one of them stands.
        wait_until(lambda: len(cluster.nodes("node-2")["node-3"]["rivals"]) == 1, 20, "the quarrel in the store")
        assert "2 processes call themselves node-3" in cluster.stack.relay_cli("node-2", "nodes").stderr
    finally:
        other.kill()
    log = cluster.stack.directory / "node-2.log"
    wait_until(lambda: "two processes call themselves node-3" in log.read_text(), what="the quarrel in the log")


def test_what_no_member_would_have_written_is_dropped_and_counted(make_cluster: MakeCluster, home: Path) -> None:
    cluster = make_cluster()
    names = [cluster.node(2)]
    cluster.wait_until_known(names, names)
    with contextlib.closing(sqlite3.connect(home / "cluster.db")) as database, database:
        for key, text in (("bad", b"{"), ("huge", b"x" * (MAX_DOCUMENT_BYTES + 1))):
            database.execute("INSERT INTO documents (collection, key, updated_ms, body) VALUES ('servers', ?, 1, ?)", (key.encode(), text))
    with contextlib.closing(SqliteTransporter(home / "cluster.db")) as transporter:
        transporter.publish(PLACEMENTS, '{"event": "placed"}')

    def all_counted() -> bool:
        updates = cluster.status("node-2")["cluster"]["updates"]
        return all(updates[what] for what in ("malformed", "malformed-message", "malformed-document"))

    wait_until(all_counted, 20, "all three counted")
    assert 'fxrelay_cluster_updates_total{outcome="malformed-document"}' in cluster.metrics("node-2")
    assert cluster.who_serves() == "node-2"


def store(cluster: Cluster, command: str, *arguments: str) -> None:
    """`fxrelay store COMMAND …` with node-2's configuration."""
    cli(["fxrelay.cli", "store", command, "--config", str(cluster.stack.relay_config("node-2")), *arguments])


def test_export_and_import_of_the_store(make_cluster: MakeCluster, home: Path) -> None:
    cluster = make_cluster()
    cluster.node(2)
    cluster.stack.relay_cli("node-2", "drain", "node-2")
    store(cluster, "export", str(home / "out"))
    lines = (home / "out" / "controls-store.db").read_text().splitlines()
    assert [json.loads(line)["_id"] for line in lines] == ["node-2"]
    cluster.stack.relay_cli("node-2", "enable", "node-2")
    assert cluster.nodes("node-2")["node-2"]["drained"] is False
    store(cluster, "import", "--dry-run", str(home / "out"))
    assert cluster.nodes("node-2")["node-2"]["drained"] is False
    store(cluster, "import", str(home / "out"))
    assert cluster.nodes("node-2")["node-2"]["drained"] is True
