"""System: relays that are not let in, each told in one line what to do. What heals is tried again; the rest ends with exit code 1."""

import json
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.system.peers import Service, dial, how_it_ends, read_exactly
from tests.system.stack import Daemon, Stack, cli, slowness, wait_until

pytestmark = [pytest.mark.system, pytest.mark.xdist_group("refusals")]

REVOKED_WITHIN_S = 5.0


@pytest.fixture(scope="module")
def stack(make_shared_stack: Callable[..., Stack], echo_service: Service) -> Stack:
    stack = make_shared_stack("echo")
    stack.start_gateway()
    stack.start_relay("node-a", {"echo": echo_service.target})
    return stack


def errors(daemon: Daemon) -> list[str]:
    return [line["event"] for line in map(json.loads, daemon.log.read_text().splitlines()) if line["level"] in ("error", "warning")]


def ends_with(stack: Stack, name: str, env: dict[str, str] | None = None) -> str:
    """Start this relay, which will not be let in: it exits with 1 and leaves one line."""
    daemon = stack.launch_relay(name, env)
    assert daemon.wait() == 1
    (line,) = errors(daemon)
    return line


def patched(directory: Path, code: str) -> dict[str, str]:
    """An environment in which every Python process runs this first."""
    directory.mkdir()
    (directory / "sitecustomize.py").write_text(code)
    return {"PYTHONPATH": f"{directory}:{Path(__file__).parents[2]}"}


def invite(stack: Stack, name: str) -> None:
    path = stack.directory / name / "gateway.json"
    path.unlink()
    stack.gateway_cli("invite", "--out", str(path))


def test_a_revoked_relay_is_gone_within_seconds_and_can_be_let_in_again(make_stack: Callable[..., Stack], echo_service: Service) -> None:
    stack = make_stack("echo")
    stack.start_gateway()
    relay = stack.start_relay("node-a", {"echo": echo_service.target})
    with dial(stack.doors["echo"]) as client:
        client.sendall(b"hello")
        assert read_exactly(client, 5) == b"hello"
        stack.gateway_cli("revoke", "node-a")
        end, took_s = how_it_ends(client, 60)
        assert end == "reset"
        assert took_s < REVOKED_WITHIN_S * slowness()
    assert relay.wait() == 1
    assert (
        "has revoked relay node-a; to let it in again, run fxgateway forget node-a on the gateway, then fxgateway invite"
        in errors(relay)[-1]
    )
    assert stack.live_relays() == {}
    relay.log.unlink()
    assert "revoked" in ends_with(stack, "node-a")
    stack.gateway_cli("forget", "node-a")
    relay.log.unlink()
    invite(stack, "node-a")
    stack.start_relay("node-a")
    with dial(stack.doors["echo"]) as client:
        client.sendall(b"again")
        assert read_exactly(client, 5) == b"again"


def test_a_token_that_has_expired(stack: Stack) -> None:
    stack.write_relay_config("expired", {"echo": "127.0.0.1:9"})
    identities = stack.directory / "relays.json"
    content = json.loads(identities.read_text())
    path = stack.directory / "expired" / "gateway.json"
    enrolment = json.loads(path.read_text())
    for holder in (*content["tokens"], enrolment["enrolment"]):
        holder["expires_unix"] = int(time.time()) - 3600
    identities.write_text(json.dumps(content))
    path.write_text(json.dumps(enrolment))
    line = ends_with(stack, "expired")
    assert "expired" in line
    assert "fxgateway invite" in line
    stack.gateway_cli("invite", "--out", str(stack.directory / "fresh.json"))
    shutil.move(stack.directory / "fresh.json", stack.directory / "gateway.json")


def test_a_token_of_nobody(stack: Stack) -> None:
    stack.write_relay_config("stranger", {"echo": "127.0.0.1:9"})
    path = stack.directory / "stranger" / "gateway.json"
    content = json.loads(path.read_text())
    content["enrolment"]["token"] = content["enrolment"]["token"][:-4] + "AAAA"
    path.write_text(json.dumps(content))
    line = ends_with(stack, "stranger")
    assert "fxgateway invite" in line


def test_the_wrong_authority(stack: Stack) -> None:
    cli(["fxgateway.cli", "init", "--dir", str(stack.directory / "other"), "--public-url", f"wss://127.0.0.1:{stack.cutter.port}"])
    stack.write_relay_config("misled", {"echo": "127.0.0.1:9"})
    shutil.copy(stack.directory / "other" / "gateway.json", stack.directory / "misled" / "gateway.json")
    line = ends_with(stack, "misled")
    assert "certificate" in line
    assert "fxgateway invite" in line


def test_a_name_that_is_taken(stack: Stack) -> None:
    stack.write_relay_config("thief", {"echo": "127.0.0.1:9"})
    config = stack.relay_config("thief")
    config.write_text(config.read_text().replace('id = "thief"', 'id = "node-a"'))
    line = ends_with(stack, "thief")
    assert "fxgateway forget node-a" in line
    stack.wait_for_relays("node-a")


def test_a_protocol_of_another_version(stack: Stack) -> None:
    stack.write_relay_config("future", {"echo": "127.0.0.1:9"})
    env = patched(stack.directory / "v2", "import fxtunnel.control.messages as m\nm.PROTOCOL_VERSION = 2\n")
    line = ends_with(stack, "future", env)
    assert "speaks version 1 of the protocol, this relay version 2; update" in line


def test_a_wrong_clock_is_named_and_heals(stack: Stack) -> None:
    stack.write_relay_config("late", {"echo": "127.0.0.1:9"})
    shift = stack.directory / "shift"
    shift.touch()
    env = patched(
        stack.directory / "clock",
        f"import pathlib, time\nreal = time.time\ntime.time = lambda: real() - 600 * pathlib.Path({str(shift)!r}).exists()\n",
    )
    daemon = stack.launch_relay("late", env)
    wait_until(lambda: bool(errors(daemon)), 30, "a line about the clock")
    first = errors(daemon)[0]
    assert re.search(r"clock is (59\d|60\d) s behind", first), first
    assert daemon.process.poll() is None
    shift.unlink()
    daemon.wait_ready()


def test_a_gateway_that_is_not_there_is_waited_for(make_stack: Callable[..., Stack], echo_service: Service) -> None:
    stack = make_stack("echo")
    stack.write_relay_config("node-a", {"echo": echo_service.target})
    relay = stack.launch_relay("node-a")
    wait_until(lambda: bool(errors(relay)), 30, "a line about the gateway")
    assert relay.process.poll() is None
    stack.start_gateway()
    relay.wait_ready()


def test_something_else_than_a_gateway_answers(make_stack: Callable[..., Stack], echo_service: Service) -> None:
    stack = make_stack("echo")
    stack.write_relay_config("node-a", {"echo": echo_service.target})
    path = stack.directory / "node-a" / "gateway.json"
    content = json.loads(path.read_text())
    content["urls"] = [f"wss://{echo_service.target}"]
    path.write_text(json.dumps(content))
    relay = stack.launch_relay("node-a")
    wait_until(lambda: bool(errors(relay)), 30, "a line about TLS")
    assert "TLS" in errors(relay)[0]
    assert relay.process.poll() is None
