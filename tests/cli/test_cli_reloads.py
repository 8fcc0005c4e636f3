"""What a reload takes up, and what it names as waiting for a restart: every key of either daemon is one or the other."""

from pathlib import Path
from typing import TypeVar

import pytest

import fxgateway.settings
from fxgateway.settings import GatewaySettings
from fxrelay.settings import RelaySettings, load, take_up
from fxtunnel.kit.sections import Section, WholeFile

Settings = TypeVar("Settings", bound=WholeFile)
AT_ONCE = {
    *("service", "log.level", "log.style", "log.access"),
    *("node.static_data", "node.static_data_file", "node.environment_file", "node.metrics_dir", "node.metrics", "node.sessions"),
    *("node.max_sessions", "node.weight", "node.pool", "node.enable_reservations"),
    *("limits.streams_per_link", "limits.streams", "limits.connect_timeout_s", "limits.idle_timeout_s", "limits.head_timeout_s"),
    *("limits.keep_alive_s", "limits.stall_timeout_s", "limits.drain_s", "limits.handover_s"),
    *("cluster.paths", "cluster.force_indirect", "cluster.networks", "resume.hold_s", "resume.replay_bytes"),
}
"""Also what counts from the next new session on (docs/dos.md, What a reload changes)."""
AT_RESTART = {
    *("relay.id", "relay.state_dir", "relay.status", "relay.links", "relay.address", "gateway", "limits.memory_bytes", "resume.enabled"),
    *("liveness.dial_timeout_s", "liveness.min_backoff_s", "liveness.max_backoff_s", "liveness.dead_after_s"),
    *("cluster.store", "cluster.broker", "cluster.publish_s", "cluster.stale_s", "cluster.down_s", "cluster.resync_s"),
    *("cluster.forget_after_s", "cluster.lease_s", "cluster.on_lost_lease", "cluster.script_timeout_s", "cluster.script_memory_bytes"),
}


GATEWAY_AT_ONCE = {
    *("door", "route", "certificate", "log.level", "log.style", "log.access", "tunnel.certificate", "tunnel.key"),
    *(f"limits.{key}" for key in fxgateway.settings.LimitSettings.model_fields if key != "memory_bytes"),
    "resume.replay_bytes",
}
GATEWAY_AT_RESTART = {
    *("tunnel.listen", "tunnel.public_url", "tunnel.ca", "tunnel.state_dir", "tunnel.gateway_id", "tunnel.workers", "admin.listen"),
    *("sandbox.mode", "sandbox.read", "liveness.heartbeat_s", "liveness.dead_after_s", "resume.enabled", "resume.hold_s"),
    "limits.memory_bytes",
}


def keys(model: type[WholeFile] = RelaySettings) -> dict[str, tuple[str, str]]:
    """Every key of a file as it is written, with the names it has in the model: a section's, and the key's or an empty one."""
    found = {}
    for name, field in model.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, Section):
            found |= {f"{name}.{key}": (name, key) for key in kind.model_fields}
        else:
            found[str(field.alias)] = (name, "")
    return found


@pytest.fixture
def running(tmp_path: Path) -> RelaySettings:
    path = tmp_path / "relay.toml"
    path.write_text('[relay]\nid = "node-a"\nstate_dir = "state"\n')
    return load(path, {})


@pytest.fixture
def running_gateway(tmp_path: Path) -> GatewaySettings:
    path = tmp_path / "gateway.toml"
    path.write_text('[tunnel]\nlisten = "127.0.0.1:8443"\npublic_url = "wss://127.0.0.1:8443"\n')
    return fxgateway.settings.load(path, {})


def changed(settings: Settings, name: str, key: str) -> Settings:
    """With a value that nobody has."""
    value = getattr(settings, name).model_copy(update={key: object()}) if key else (object(),)
    return settings.model_copy(update={name: value})


def test_of_every_key_it_is_known_when_it_counts() -> None:
    assert keys().keys() == AT_ONCE | AT_RESTART
    assert not AT_ONCE & AT_RESTART


@pytest.mark.parametrize("written", sorted(AT_ONCE))
def test_what_counts_at_once_is_taken_up_and_not_named(running: RelaySettings, written: str) -> None:
    fresh = changed(running, *keys()[written])
    assert take_up(running, fresh) == (fresh, [])


@pytest.mark.parametrize("written", sorted(AT_RESTART))
def test_what_waits_for_a_restart_is_named_and_stays(running: RelaySettings, written: str) -> None:
    fresh = changed(running, *keys()[written])
    assert take_up(running, fresh) == (running, [written if "." in written else f"[[{written}]]"])


def test_what_waits_does_not_keep_the_rest_of_its_section(running: RelaySettings) -> None:
    limits = running.limits.model_copy(update={"memory_bytes": 64 << 20, "streams": 7})
    taken, waiting = take_up(running, running.model_copy(update={"limits": limits}))
    assert waiting == ["limits.memory_bytes"]
    assert (taken.limits.streams, taken.limits.memory_bytes) == (7, running.limits.memory_bytes)


def test_of_every_key_of_a_gateway_it_is_known_when_it_counts() -> None:
    assert keys(GatewaySettings).keys() == GATEWAY_AT_ONCE | GATEWAY_AT_RESTART
    assert not GATEWAY_AT_ONCE & GATEWAY_AT_RESTART


@pytest.mark.parametrize("written", sorted(GATEWAY_AT_ONCE | GATEWAY_AT_RESTART))
def test_what_a_gateway_takes_up_and_what_waits(running_gateway: GatewaySettings, written: str) -> None:
    fresh = changed(running_gateway, *keys(GatewaySettings)[written])
    waits = written in GATEWAY_AT_RESTART
    assert fxgateway.settings.take_up(running_gateway, fresh) == (running_gateway if waits else fresh, [written] if waits else [])
