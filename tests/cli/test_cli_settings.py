"""gateway.toml and relay.toml: defaults, bounds, every problem at once, the environment."""

from ipaddress import IPv4Network
from pathlib import Path

import pytest
from cli_samples import GATEWAY_TOML, RELAY_TOML, Write
from pydantic import BaseModel

import fxgateway.settings
import fxrelay.settings
from fxgateway.settings import GatewaySettings, gateway_id_of, split_public_url
from fxrelay.settings import RelaySettings
from fxtunnel.control.messages import Hello, encode
from fxtunnel.errors import ConfigError
from fxtunnel.model import InstanceId, Offer, ServiceName


def problems_of(load: object, path: Path, environ: dict[str, str] | None = None) -> dict[str, str]:
    with pytest.raises(ConfigError) as caught:
        load(path, environ or {})
    assert all(p.file == str(path) for p in caught.value.problems)
    return {p.key: p.message for p in caught.value.problems}


def test_gateway_minimum_and_defaults(gateway_toml: Write) -> None:
    path = gateway_toml('[tunnel]\nlisten = "0.0.0.0:8443"\npublic_url = "wss://gw.example.com:8443"\n')
    settings = fxgateway.settings.load(path, {})
    assert settings.doors == ()
    assert str(settings.admin.listen) == "127.0.0.1:9101"
    assert settings.tunnel.public_host == "gw.example.com"
    assert settings.tunnel.key == path.parent / "server.key"
    assert settings.tunnel.identities_path == path.parent / "relays.json"
    assert settings.tunnel.gateway_id == gateway_id_of("wss://gw.example.com:8443")
    assert settings.limits.memory_bytes == 256 << 20
    assert IPv4Network("127.0.0.0/8") in settings.limits.exempt_sources
    assert settings.liveness.dead_after_s == 10.0


@pytest.mark.parametrize(
    ("written", "meant"), [("off", "off"), ("stderr", "stderr"), ("a.log", "{here}/a.log"), ("/var/a.log", "/var/a.log")]
)
def test_the_access_log_is_beside_the_file_too(gateway_toml: Write, written: str, meant: str) -> None:
    path = gateway_toml(f'[tunnel]\nlisten = "0.0.0.0:8443"\npublic_url = "wss://gw:1"\n[log]\naccess = "{written}"\n')
    assert fxgateway.settings.load(path, {}).log.access == meant.format(here=path.parent)


def test_relay_minimum_and_defaults(relay_toml: Write) -> None:
    path = relay_toml(RELAY_TOML)
    settings = fxrelay.settings.load(path, {})
    assert settings.relay.state_dir == path.parent / "state"
    assert settings.relay.status_address.path is not None
    assert Path(settings.relay.status_address.path) == path.parent / "state" / "status.sock"
    assert settings.gateways[0].file == path.parent / "gateway.json"
    assert (settings.services[0].name, settings.services[0].protocol) == ("ssh", "tcp")
    assert settings.resume.replay_bytes == 16 << 20
    # Paths that are defaults are beside the file, whether their section is written or not.
    assert settings.node.static_data_file == path.parent / "static-data.json"
    assert settings.node.environment_file == path.parent / "fastx.env"
    assert settings.node.metrics_dir == path.parent / "metrics.d"
    assert fxrelay.settings.load(relay_toml(RELAY_TOML + "[node]\nweight = 1\n"), {}).node.metrics_dir == path.parent / "metrics.d"


def test_every_problem_of_a_gateway_toml_is_reported(gateway_toml: Write) -> None:
    path = gateway_toml("""
[tunnel]
listen = "nonsense"
public_url = "https://gw"
colour = "blue"
[[door]]
listen = "127.0.0.1:2222"
service = "no spaces allowed"
[[door]]
listen = "127.0.0.1:2222"
service = "ssh"
name = "d"
[[door]]
listen = "127.0.0.1:2223"
service = "ssh"
name = "d"
[limits]
connections = 0
memory_bytes = "1MiB"
idle_timeout_s = "soon"
exempt_sources = ["10.0.0.0/33"]
[liveness]
heartbeat_s = 6
dead_after_s = 11
[nonsense]
x = 1
""")
    found = problems_of(fxgateway.settings.load, path)
    text = "\n".join(f"{key}: {message}" for key, message in found.items())
    assert len(found) == 12, text
    for word in (
        "tunnel.listen", "public_url", "colour", "service", "connections", "memory_bytes", "idle_timeout_s", "exempt_sources",
        "dead_after_s", "nonsense", "door[0] already listens on 127.0.0.1:2222", "door[1] is already named 'd'",
    ):  # fmt: skip
        assert word in text, text


def test_every_problem_of_a_relay_toml_is_reported(relay_toml: Write) -> None:
    path = relay_toml("""
[relay]
id = "node a"
links = 99
[[gateway]]
file = "gateway.json"
proxy = "socks5://user:hunter2@proxy:1"
[[gateway]]
file = "gateway.json"
[[service]]
name = "ssh"
protocol = "udp"
target = "nowhere"
[[service]]
name = "ssh"
target = "127.0.0.1:23"
[liveness]
min_backoff_s = 5
max_backoff_s = 1
""")
    found = problems_of(fxrelay.settings.load, path)
    text = "\n".join(f"{key}: {message}" for key, message in found.items())
    assert len(found) == 8, text
    for word in (
        "relay.id", "links", "proxy", "protocol", "target", "max_backoff_s",
        "gateway[0] already has file 'gateway.json'", "service[0] already has name 'ssh'",
    ):  # fmt: skip
        assert word in text, text
    assert "hunter2" not in text


def test_more_services_than_a_gateway_can_be_told_of_are_refused(relay_toml: Write) -> None:
    def services(count: int) -> str:
        return "".join(f'[[service]]\nname = "service-{n:05d}"\ntarget = "127.0.0.1:22"\n' for n in range(count))

    alone = '[relay]\nid = "node-a"\n'
    base = alone + '[[gateway]]\nfile = "gateway.json"\n'
    assert len(fxrelay.settings.load(relay_toml(base + services(300)), {}).services) == 300
    assert len(fxrelay.settings.load(relay_toml(alone + services(400)), {}).services) == 400
    found = problems_of(fxrelay.settings.load, relay_toml(base + services(400)))
    assert list(found) == ["service"]
    assert "400 services with such names are too many" in found["service"]
    most = tuple(Offer(ServiceName(f"service-{n:05d}"), "http") for n in range(fxrelay.settings.SERVICES_BYTES // 43))
    encode(Hello(version="1" * 64, instance=InstanceId("i" * 64), services=most, caps=("c" * 64,) * 8))  # raises if it is too long


def test_a_relay_without_a_gateway_only_reports(relay_toml: Write) -> None:
    assert fxrelay.settings.load(relay_toml('[relay]\nid = "a"\n'), {}).gateways == ()


POOL = '[relay]\nid = "a"\naddress = "10.0.0.7"\n[[service]]\nname = "desk"\n'


@pytest.mark.parametrize(
    ("text", "key", "words"),
    [
        (POOL, "service[0]", "either `target`"),
        (POOL + 'target = "127.0.0.1:0"\n', "service[0]", "port 0"),
        (POOL + 'port = 5901\ntarget = "127.0.0.1:5901"\n', "service[0]", "either `target`"),
        (POOL + 'target = "127.0.0.1:5901"\nnodes = ["b"]\n', "service[0]", "only for a pool"),
        (POOL + 'port = 5901\nnodes = ["no name"]\n', "service[0].nodes", "a name"),
        (POOL + 'port = 5901\nproxy_protocol = "v3"\n', "service[0].proxy_protocol", "v1"),
        ('[relay]\nid = "a"\naddress = "node-7"\n', "relay.address", "an IP address"),
        ('[relay]\nid = "a"\n[cluster]\nstore = "mysql:x"\n', "cluster.store", "sqlite:PATH"),
        ('[relay]\nid = "a"\n[cluster]\nstore = "sqlite:x"\nbroker = "broker.json"\n', "cluster.broker", "keep one"),
        ('[relay]\nid = "a"\n[cluster]\npaths = ["local", "local"]\n', "cluster.paths", "twice"),
        ('[relay]\nid = "a"\n[cluster]\nnetworks = ["10.0.0.1/8"]\n', "cluster.networks", "host bits"),
        ('[relay]\nid = "a"\n[node]\nsessions = "guess"\n', "node.sessions", "exec:FILE"),
        ('[relay]\nid = "a"\n[node]\nmetrics = {queue = "nothing"}\n', "node.metrics", "module:function"),
    ],
)
def test_pools_and_clusters_are_checked(relay_toml: Write, text: str, key: str, words: str) -> None:
    problems = problems_of(fxrelay.settings.load, relay_toml(text))
    found = {where: message for where, message in problems.items() if where.startswith(key)}
    assert found, problems
    assert any(words in message for message in found.values()), problems


@pytest.mark.parametrize(
    ("text", "key", "words"),
    [
        ('[[door]]\nlisten = "127.0.0.1:1"\n', "door[0]", "expected `service`"),
        ('[[door]]\nlisten = "127.0.0.1:1"\nkind = "telnet"\nservice = "s"\n', "door[0].kind", "tcp"),
        ('[[door]]\nlisten = "127.0.0.1:1"\nkind = "sni"\n', "door[0]", "leads nowhere"),
        ('[[door]]\nlisten = "127.0.0.1:1"\nkind = "sni"\nservice = "s"\nssh = "x"\n', "door[0]", "only for a door of kind auto"),
        ('[[route]]\nhost = "a:443"\nservice = "s"\n', "route[0].host", "without a port"),
        ('[[route]]\nhost = "a.*"\nservice = "s"\n', "route[0].host", "NAME"),
        ('[[route]]\nhost = "ä.example.com"\nservice = "s"\n', "route[0].host", "ASCII"),
        ('[[route]]\nhost = "a"\npath = "x"\nservice = "s"\n', "route[0].path", "begins with /"),
        ('[[route]]\nhost = "a"\npath = "/?x"\nservice = "s"\n', "route[0].path", "query"),
        ('[[route]]\nhost = "A"\nservice = "s"\n[[route]]\nhost = "a"\npath = "/"\nservice = "t"\n', "route[1]", "already has"),
    ],
)
def test_doors_and_routes_are_checked(gateway_toml: Write, text: str, key: str, words: str) -> None:
    tunnel = '[tunnel]\nlisten = "0.0.0.0:8443"\npublic_url = "wss://gw.example.com:8443"\n'
    problems = problems_of(fxgateway.settings.load, gateway_toml(tunnel + text))
    assert words in problems[key], problems


def test_the_tunnel_and_admin_addresses_clash_too(gateway_toml: Write) -> None:
    path = gateway_toml(GATEWAY_TOML.replace("127.0.0.1:0", "127.0.0.1:7000"))
    assert "\n".join(problems_of(fxgateway.settings.load, path).values()).count("tunnel already listens on 127.0.0.1:7000") == 2


def test_the_environment_goes_before_the_file(gateway_toml: Write, relay_toml: Write) -> None:
    environ = {
        "FXGATEWAY__TUNNEL__LISTEN": "127.0.0.1:7001",
        "FXGATEWAY__DOOR__0__LISTEN": "127.0.0.1:7002",
        "FXGATEWAY__LIMITS__MEMORY_BYTES": "64MiB",
        "FXGATEWAY__RESUME__ENABLED": "false",
        "FXGATEWAY_CONFIG": "elsewhere.toml",
        "FXRELAY__SERVICE__0__TARGET": "127.0.0.1:7003",
    }
    gateway = fxgateway.settings.load(gateway_toml(GATEWAY_TOML), environ)
    assert [str(address) for _, address in gateway.listens()] == ["127.0.0.1:7001", "127.0.0.1:7002", "127.0.0.1:0"]
    assert gateway.doors[0].service == "ssh"
    assert gateway.limits.memory_bytes == 64 << 20
    assert not gateway.resume.enabled
    relay = fxrelay.settings.load(relay_toml(RELAY_TOML), environ)
    assert str(relay.services[0].target) == "127.0.0.1:7003"


def test_a_wrong_value_in_the_environment_is_a_problem(gateway_toml: Write) -> None:
    environ = {"FXGATEWAY__LIMITS__CONNECTIONS": "many", "FXGATEWAY__LIMITS__TYPO": "1"}
    assert len(problems_of(fxgateway.settings.load, gateway_toml(GATEWAY_TOML), environ)) == 2


@pytest.mark.parametrize(
    ("text", "expected"),
    [('"64MiB"', 64 << 20), ('"33554432"', 32 << 20), ("33554432", 32 << 20), ('"1 GiB"', 1 << 30), ('"32768KiB"', 32 << 20)],
)
def test_sizes(gateway_toml: Write, text: str, expected: int) -> None:
    settings = fxgateway.settings.load(gateway_toml(f"{GATEWAY_TOML}[limits]\nmemory_bytes = {text}\n"), {})
    assert settings.limits.memory_bytes == expected


@pytest.mark.parametrize("text", ['"64MB"', '"-1"', '"1.5GiB"', '"31MiB"', "1.5", '""', '"9999999999999999GiB"', "nan", "true"])
def test_wrong_sizes(gateway_toml: Write, text: str) -> None:
    path = gateway_toml(f"{GATEWAY_TOML}[limits]\nmemory_bytes = {text}\n")
    assert list(problems_of(fxgateway.settings.load, path)) == ["limits.memory_bytes"]


@pytest.mark.parametrize("value", ["inf", "nan", "-1", "16"])
def test_times_are_finite_and_bounded(gateway_toml: Write, value: str) -> None:
    path = gateway_toml(f"{GATEWAY_TOML}[liveness]\ndead_after_s = {value}\n")
    assert list(problems_of(fxgateway.settings.load, path)) == ["liveness.dead_after_s"]


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("wss://gw.example.com:8443", ("gw.example.com", 8443)),
        ("wss://gw.example.com", ("gw.example.com", 443)),
        ("wss://[2001:db8::1]:1/", ("2001:db8::1", 1)),
        ("wss://127.0.0.1:9", ("127.0.0.1", 9)),
    ],
)
def test_public_urls(url: str, expected: tuple[str, int]) -> None:
    assert split_public_url(url) == expected


@pytest.mark.parametrize(
    "url",
    [
        "", "gw:1", "ws://gw:1", "https://gw:1", "wss://", "wss://:1", "wss://gw:0", "wss://gw:99999", "wss://gw:x", "wss://gw:1/p", "wss://gw:1?q",
        "wss://u@gw:1", "wss://g w:1", "wss://-gw:1", "wss://[::1", "wss://[fe80::1%25eth0]:1", 'wss://g"w:1', "wss://gw:1#f", "wss://g\nw:1",
    ],
)  # fmt: skip
def test_wrong_public_urls(url: str) -> None:
    with pytest.raises(ValueError, match="expected wss://"):
        split_public_url(url)


def test_a_proxy_password_is_not_shown(relay_toml: Write) -> None:
    path = relay_toml(RELAY_TOML.replace('file = "gateway.json"', 'file = "gateway.json"\nproxy = "http://user:hunter2@proxy:3128"'))
    settings = fxrelay.settings.load(path, {})
    assert "hunter2" not in repr(settings)
    assert settings.gateways[0].proxy is not None
    assert "hunter2" in settings.gateways[0].proxy.get_secret_value()


def test_settings_cannot_be_changed(gateway_toml: Write) -> None:
    settings = fxgateway.settings.load(gateway_toml(GATEWAY_TOML), {})
    with pytest.raises(ValueError, match="frozen"):
        settings.limits.connections = 1


@pytest.mark.parametrize("model", [GatewaySettings, RelaySettings])
def test_every_key_says_what_it_is_for(model: type[BaseModel]) -> None:
    seen = 0
    todo: list[type[BaseModel]] = [model]
    while todo:
        for name, field in todo.pop().model_fields.items():
            seen += 1
            assert field.description, name
            assert field.description.endswith("."), name
            inner = getattr(field.annotation, "__args__", (field.annotation,))[0]
            if isinstance(inner, type) and issubclass(inner, BaseModel):
                todo.append(inner)
    assert seen > 25
