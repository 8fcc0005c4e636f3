"""Server objects from a store that anyone may have written to."""

import json
from typing import Any

import pytest
from cluster_fakes import server_text
from hypothesis import given, settings
from hypothesis import strategies as st

from fxrelay.cluster.plain_json import MAX_DEPTH, read_json
from fxrelay.cluster.server import MAX_METRICS_BYTES, MAX_SERVER_BYTES, MAX_SERVICES, MAX_STATIC_BYTES, BadServer, parse_server


def nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


CORE = set(json.loads(server_text()))
OTHERS = [
    "hostname",
    "address",
    "sessions",
    "logins",
    "loadavg",
    "cpu",
    "availmem",
    "uptime",
    "weight",
    "maxSessions",
    "disable",
    "draining",
]
FIELDS = [*sorted(CORE), *OTHERS, "forceIndirect", "services", "staticData", "metrics", "extra"]
ODD = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from([10**400, -1, 1 << 52, "login", "a"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["name", "port", "gatewayId", "instanceId", "x"]), inner),
    max_leaves=6,
)


def test_what_is_said_is_read() -> None:
    server = parse_server(
        server_text(
            sessions=3,
            loadavg=[0.5, 1, 2],
            cpu=12.5,
            availmem=1 << 34,
            disable=["login"],
            maxSessions=3,
            services=[{"name": "desk", "proto": "tcp", "port": 5901}, {"name": "local", "port": 0}],
            agent={"tunnels": [{"gatewayId": "gw1"}, {"gatewayId": "gw2"}]},
            staticData={"sessions": 0},
            later={"unknown": True},
        )
    )
    assert (server.server_id, server.instance, server.sessions, server.load1, server.cpu) == ("a", "i1", 3, 0.5, 12.5)
    assert server.services == {"desk": 5901, "local": 0}
    assert server.gateways == {"gw1", "gw2"}
    assert server.max_sessions == 3
    assert server.weight == 100
    assert server.document()["later"] == {"unknown": True}
    assert server.document() is not server.document()


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"serverId": "a/b"}, "serverId"),
        ({"serverId": None}, "serverId"),
        ({"sessions": -1}, "sessions"),
        ({"sessions": True}, "sessions"),
        ({"sessions": 1.0}, "sessions"),
        ({"sessions": 10**20}, "sessions"),
        ({"cpu": 10**400}, "cpu"),
        ({"cpu": "1"}, "cpu"),
        ({"loadavg": [-1]}, "loadavg"),
        ({"loadavg": "1"}, "loadavg"),
        ({"hostname": "a\nb"}, "hostname"),
        ({"hostname": "a" * 257}, "hostname"),
        ({"disable": ["all"]}, "disable"),
        ({"disable": "login"}, "disable"),
        ({"draining": 1}, "draining"),
        ({"agent": {"ended": 1}}, "ended"),
        ({"services": [{"name": "x", "port": 65_536}]}, "services"),
        ({"services": [1]}, "services"),
        ({"services": [{"name": "x"}] * (MAX_SERVICES + 1)}, "services"),
        ({"staticData": {"a": "x" * MAX_STATIC_BYTES}}, "staticData"),
        ({"metrics": {"a": "x" * MAX_METRICS_BYTES}}, "metrics"),
        ({"metrics": []}, "metrics"),
        ({"extra": "x" * MAX_SERVER_BYTES}, "longer"),
        ({"extra": float("nan")}, "NaN"),
        ({"extra": float("-inf")}, "Infinity"),
        ({"extra": nested(MAX_DEPTH + 1)}, "nested"),
        ({"extra": "\ud800"}, "UTF-16"),
        ({"agent": {"tunnels": [{"gatewayId": "gw"}] * 65}}, "tunnels"),
        ({"agent": {"tunnels": ["gw"]}}, "tunnels"),
        ({"instance": "?"}, "instanceId"),
    ],
)
def test_a_wrong_field_is_named(fields: dict[str, Any], told: str) -> None:
    with pytest.raises(BadServer, match=told):
        parse_server(server_text(**fields))


@pytest.mark.parametrize("text", ["", "[]", "null", "{", "x", "[" * 100_000, "\ud800", '{"a":"\ud800"}', "1" * 5000, "{}", '{"agent":1}'])
def test_what_is_no_server_object_is_refused(text: str) -> None:
    with pytest.raises(BadServer):
        parse_server(text)


def test_a_number_too_large_for_others_is_refused() -> None:
    with pytest.raises(BadServer, match="too large"):
        parse_server(server_text(extra=0).replace('"extra": 0', '"extra": 1e999'))


@pytest.mark.parametrize("depth", range(900, 1000, 7))
def test_depth_near_pythons_own_limit_is_refused(depth: int) -> None:
    with pytest.raises(BadServer, match="nested"):
        parse_server(server_text(disable=0).replace('"disable": 0', f'"disable": {"[" * depth}{"]" * depth}'))


def test_length_is_counted_in_bytes() -> None:
    text = json.dumps(json.loads(server_text(extra="é" * (MAX_SERVER_BYTES // 2))), ensure_ascii=False)
    assert len(text) < MAX_SERVER_BYTES
    with pytest.raises(BadServer, match="longer"):
        parse_server(text)


@settings(max_examples=400, deadline=None)
@given(st.dictionaries(st.sampled_from(FIELDS), ODD, max_size=6))
def test_hostile_fields_raise_nothing_else(fields: dict[str, Any]) -> None:
    whole = json.loads(server_text()) | fields
    try:
        server = parse_server(json.dumps(whole))
    except BadServer:
        return
    assert json.loads(json.dumps(server.document(), allow_nan=False)) == server.document()
    json.dumps(server.document(), ensure_ascii=False).encode()


@settings(max_examples=300, deadline=None)
@given(st.text() | st.binary().map(lambda data: data.decode(errors="surrogateescape")) | st.text('{}[]",:\\ud8 1', max_size=60))
def test_hostile_text_raises_nothing_else(text: str) -> None:
    with pytest.raises(BadServer):
        parse_server(text)


def test_depth_is_counted_exactly() -> None:
    assert read_json(json.dumps(nested(MAX_DEPTH))) == nested(MAX_DEPTH)
    with pytest.raises(ValueError, match="nested"):
        read_json(json.dumps(nested(MAX_DEPTH + 1)))
    assert len(read_json(json.dumps([[]] * 100))) == 100
