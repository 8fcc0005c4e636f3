"""The admin pages and the relay's status pages: what they say, that Prometheus can read them, that nothing can be changed."""

import json
from collections.abc import Awaitable, Callable
from dataclasses import replace

import pytest
from prometheus_client.parser import text_string_to_metric_families
from starlette.applications import Starlette

from fxgateway.admin.pages import DoorStatus, RelayStatus, Totals, make_app
from fxrelay.admin import view as relay_view
from fxrelay.admin.pages import make_app as make_relay_app
from fxtunnel.engine.status import LinkStatus

HOSTILE = 'x"\n\x1b[31m{}\\'
UP = LinkStatus("a" * 32, True, 3, 12.5, 100, 200, 1)
HELD = LinkStatus("b" * 32, False, 2, None, 10, 20, 0)


class GatewayFake:
    def __init__(self) -> None:
        self.is_ready = True
        self.relay_list = [
            RelayStatus("node-b", "i2", 1, "up", "192.0.2.7:4711", 5.0, ("db",), ()),
            RelayStatus("node-a", "i1", 7, "up", "192.0.2.8:4712", 61.5, ("ssh", "db"), (UP, HELD)),
        ]
        self.looks = 0

    def relays(self) -> list[RelayStatus]:
        self.looks += 1
        return self.relay_list

    def doors(self) -> list[DoorStatus]:
        return [DoorStatus(HOSTILE, "0.0.0.0:2222", "ssh", 4, 90, {"no-relay": 3, "door-full": 1}, 1000, 2000)]

    def ready(self) -> tuple[bool, list[str]]:
        return self.is_ready, [] if self.is_ready else ["draining"]

    def totals(self) -> Totals:
        return Totals("gw-1", "0.1.0", 12.0, ("0.0.0.0:2222",), 5, 99, 1, 1 << 20, 256 << 20, {"revoked": 2})


class RelayFake:
    def uplinks(self) -> list[relay_view.UplinkStatus]:
        link = LinkStatus("a" * 32, True, 3, 12.5, 100, 200, 1)
        up = relay_view.UplinkStatus("gw-1", "wss://gw:1", "up", 7, 61.5, None, "", 2, (link,))
        # The same gateway by another road, and one without links.
        return [up, replace(up, state="waiting", links=()), replace(up, gateway_id="gw-2", state="failed", last_error=HOSTILE, links=())]

    def services(self) -> list[relay_view.ServiceStatus]:
        return [relay_view.ServiceStatus("ssh", "tcp", "127.0.0.1:22", 3, 9, {"connect-failed": 2}, {"redirect": 5})]

    def reservations(self) -> relay_view.ReservationStatus:
        return relay_view.ReservationStatus(3, 2, {"desk": 4}, {"committed": 5}, {"reserved": 6}, "")

    def node(self, name: str) -> relay_view.NodeStatus | None:
        return relay_view.NodeStatus(name, "up", 3, 2, 1, ("gw-1",), ("login",), "anna") if name == "node-b" else None

    def cluster(self) -> relay_view.ClusterStatus:
        return relay_view.ClusterStatus(
            store_down_s=2.5,
            live=True,
            synced=True,
            last_error="",
            nodes={"up": 3, "stale": 1, "down": 0},
            quarrels=("node-b",),
            switched_off={"node-c": ("drain",)},
            in_flight=4,
            updates={"applied": 9},
            published=2,
            decisions=7,
            failures={"NoServerSelected": 1},
        )

    def totals(self) -> relay_view.Totals:
        return relay_view.Totals("node-a", "i1", "0.1.0", 12.0, 3, 9, 1, 1 << 20, 256 << 20)


async def fetch(app: Starlette, path: str, method: str = "GET") -> tuple[int, dict[str, str], str]:
    """One request straight into the application."""
    sent: list[dict[str, object]] = []

    async def receive() -> dict[str, object]:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: dict[str, object]) -> None:
        sent.append(message)

    call: Callable[..., Awaitable[None]] = app
    scope = {
        "type": "http",
        "http_version": "1.1",
        "method": method,
        "path": path,
        "raw_path": path.encode(),
        "root_path": "",
        "scheme": "http",
    }
    await call({**scope, "query_string": b"", "headers": [(b"host", b"gw")], "server": ("gw", 80), "client": ("::1", 1)}, receive, send)
    headers = {k.decode(): v.decode() for k, v in sent[0]["headers"]}
    return int(sent[0]["status"]), headers, b"".join(m.get("body", b"") for m in sent[1:]).decode()


def samples(text: str) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    found = {}
    for family in text_string_to_metric_families(text):
        assert family.documentation, family.name
        for sample in family.samples:
            key = (sample.name, frozenset(sample.labels.items()))
            assert key not in found, key
            found[key] = sample.value
    return found


def value(text: str, name: str, **labels: str) -> float:
    return samples(text)[name, frozenset(labels.items())]


async def test_health_and_readiness() -> None:
    view = GatewayFake()
    app = make_app(view)
    assert (await fetch(app, "/healthz"))[0::2] == (200, "ok\n")
    status, _, body = await fetch(app, "/readyz")
    assert (status, json.loads(body)) == (200, {"ready": True, "reasons": []})
    view.is_ready = False
    status, _, body = await fetch(app, "/readyz")
    assert (status, json.loads(body)) == (503, {"ready": False, "reasons": ["draining"]})
    assert (await fetch(app, "/healthz"))[0] == 200


@pytest.mark.parametrize("make", [lambda: make_app(GatewayFake()), lambda: make_relay_app(RelayFake())], ids=["gateway", "relay"])
async def test_whoever_asks_with_curl_has_the_next_prompt_on_a_line_of_its_own(make: Callable[[], Starlette]) -> None:
    app = make()
    for path in ("/healthz", "/readyz", "/metrics", "/relays", "/status", "/drain", "/nodes/node-b", "/nodes/other", "/no/such/page"):
        _, headers, body = await fetch(app, path)
        assert body == body.rstrip("\n") + "\n", path
        assert int(headers["content-length"]) == len(body.encode()), path
    status, headers, body = await fetch(app, "/healthz", "PUT")
    assert (status, body) == (405, "Method Not Allowed\n")
    assert "GET" in headers["allow"]


async def test_relays_json() -> None:
    status, headers, body = await fetch(make_app(GatewayFake()), "/relays")
    found = json.loads(body)
    assert (status, headers["content-type"], headers["cache-control"]) == (200, "application/json", "no-store")
    assert [relay["relay_id"] for relay in found["relays"]] == ["node-a", "node-b"]
    assert found["relays"][0]["links"][0]["rtt_ms"] == 12.5
    assert found["doors"][0]["refused"] == {"no-relay": 3, "door-full": 1}
    assert found["gateway"]["listening"] == ["0.0.0.0:2222"]


async def test_gateway_metrics_are_read_when_asked() -> None:
    view = GatewayFake()
    app = make_app(view)
    assert view.looks == 0
    status, headers, text = await fetch(app, "/metrics")
    assert status == 200
    assert headers["content-type"].startswith("text/plain; version=0.0.4")
    door = {"door": HOSTILE, "service": "ssh"}
    assert value(text, "fxgateway_door_connections", **door) == 4
    assert value(text, "fxgateway_door_accepted_total", **door) == 90
    assert value(text, "fxgateway_door_refused_total", **door, reason="door-full") == 1
    assert value(text, "fxgateway_relay_streams", relay="node-a") == 5
    assert value(text, "fxgateway_relay_rtt_seconds", relay="node-a") == 0.0125
    assert value(text, "fxgateway_relay_links", relay="node-a", state="held") == 1
    assert value(text, "fxgateway_relay_up", relay="node-b") == 0
    assert value(text, "fxgateway_relays", state="up") == 2
    assert value(text, "fxgateway_relays_refused_total", reason="revoked") == 2
    assert value(text, "fxgateway_ready") == 1
    assert ("fxgateway_relay_rtt_seconds", frozenset({("relay", "node-b")})) not in samples(text)
    view.relay_list.clear()
    _, _, later = await fetch(app, "/metrics")
    assert value(later, "fxgateway_relays", state="up") == 0
    assert "node-a" not in later
    assert view.looks == 2


async def test_no_address_of_a_peer_becomes_a_label() -> None:
    _, _, text = await fetch(make_app(GatewayFake()), "/metrics")
    assert "192.0.2." not in text
    assert "a" * 32 not in text


async def test_relay_pages() -> None:
    app = make_relay_app(RelayFake())
    assert (await fetch(app, "/healthz"))[0] == 200
    found = json.loads((await fetch(app, "/status"))[2])
    assert [uplink["gateway_id"] for uplink in found["uplinks"]] == ["gw-1", "gw-1", "gw-2"]
    assert found["relay"]["relay_id"] == "node-a"
    assert found["services"][0]["target"] == "127.0.0.1:22"
    status, _, text = await fetch(app, "/nodes/node-b")
    assert (status, json.loads(text)["placements"], json.loads(text)["switched_off"]) == (200, 1, ["login"])
    assert (await fetch(app, "/nodes/node-c"))[0] == 404
    _, _, text = await fetch(app, "/metrics")
    assert value(text, "fxrelay_uplink_up", gateway="gw-1") == 1
    assert value(text, "fxrelay_uplink_up", gateway="gw-2") == 0
    assert value(text, "fxrelay_uplink_attempts_total", gateway="gw-1") == 4
    assert value(text, "fxrelay_service_refused_total", service="ssh", reason="connect-failed") == 2
    assert value(text, "fxrelay_info", version="0.1.0", relay="node-a") == 1
    assert value(text, "fxrelay_service_paths_total", service="ssh", path="redirect") == 5
    assert value(text, "fxrelay_cluster_nodes", state="stale") == 1
    assert value(text, "fxrelay_store_up") == 0
    assert value(text, "fxrelay_cluster_quarrels") == 1
    assert value(text, "fxrelay_placements") == 4
    assert value(text, "fxrelay_reservation_events_total", event="committed") == 5
    assert value(text, "fxrelay_reservations_rejected_total", reason="reserved") == 6
    assert value(text, "fxrelay_reservation_waiting", service="desk") == 4
    assert value(text, "fxrelay_reserved_servers") == 3
    assert value(text, "fxrelay_decision_failures_total", reason="NoServerSelected") == 1


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH"])
async def test_nothing_can_be_written(method: str) -> None:
    for app in (make_app(GatewayFake()), make_relay_app(RelayFake())):
        for path in ("/healthz", "/metrics"):
            assert (await fetch(app, path, method))[0] == 405
    assert (await fetch(make_app(GatewayFake()), "/nothing"))[0] == 404


def test_two_apps_do_not_share_a_registry() -> None:
    make_app(GatewayFake())
    make_app(GatewayFake())
    make_relay_app(RelayFake())
