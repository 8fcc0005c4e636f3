"""System: configurations that are wrong, or change while the daemons run; and the end of both daemons."""

import json
import os
import re
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from fxtunnel.kit.certificates import issue_server_certificate, load_authority
from fxtunnel.kit.files import write_secret
from tests.ports import free_port
from tests.system.peers import Outcome, Service, dial, exchanges, how_it_ends, is_refused, is_served, payload, say, visit
from tests.system.stack import Daemon, Stack, cli, slowness, wait_until

pytestmark = [pytest.mark.system, pytest.mark.xdist_group("config")]


def events(daemon: Daemon) -> list[str]:
    return [json.loads(line)["event"] for line in daemon.log.read_text().splitlines()]


def reload(daemon: Daemon, words: str = "reloaded") -> str:
    """SIGHUP, and what the daemon then says of it."""
    before = len(events(daemon))
    daemon.signal(signal.SIGHUP)
    found: list[str] = []

    def said() -> bool:
        found[:] = [event for event in events(daemon)[before:] if words in event]
        return bool(found)

    wait_until(said, 60, f"a line with {words!r}")
    return found[0]


@pytest.fixture
def stack(make_stack: Callable[..., Stack], echo_service: Service) -> Stack:
    stack = make_stack("echo", extra="[limits]\ndrain_s = 5\n")
    stack.start_gateway()
    stack.start_relay("node-a", {"echo": echo_service.target}, "[limits]\ndrain_s = 5\n")
    return stack


def test_a_reload_that_is_asked_for_too_early_comes_after_the_start(make_stack: Callable[..., Stack]) -> None:
    """SIGHUP ends a process that has not said what it wants with it."""
    stack = make_stack("echo")
    daemon = stack.launch_gateway(prefix=("env",))
    wait_until(lambda: blocks(daemon.pid, signal.SIGHUP), 20, "the process reads its configuration")
    daemon.signal(signal.SIGHUP)
    daemon.wait_ready()
    wait_until(lambda: any("reloaded" in event for event in events(daemon)), 60, "it has reloaded")
    assert not blocks(daemon.pid, signal.SIGHUP)
    assert daemon.stop() == 0


def test_a_gateway_that_stops_does_not_open_its_doors_again(stack: Stack) -> None:
    """As when logs are rotated meanwhile. Whoever came in then would be cut off a moment later."""
    gateway = stack.gateway
    assert gateway is not None
    with dial(stack.doors["echo"]) as client:
        say(client, b"before")
        gateway.signal(signal.SIGTERM)
        wait_until(lambda: is_refused(stack.doors["echo"]), what="the door is closed")
        assert "is stopping" in reload(gateway, "reload")
        assert is_refused(stack.doors["echo"])
        say(client, b"the last word")
    assert gateway.wait(60) == 0


def blocks(pid: int, number: int) -> bool:
    (mask,) = (line.split()[1] for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("SigBlk:"))
    return bool(int(mask, 16) >> (number - 1) & 1)


@pytest.mark.parametrize("command", ["run", "check"])
def test_every_problem_of_a_configuration_at_once(make_stack: Callable[..., Stack], command: str) -> None:
    stack = make_stack("echo", extra='[limits]\nconections = 5\ndrain_s = "soon"\n[surprise]\nx = 1\n')
    answer = stack.gateway_cli(command, check=False)
    assert answer.returncode == 2
    lines = answer.stderr.splitlines()
    assert len(lines) == 3
    for line, key in zip(sorted(lines), ("limits.conections", "limits.drain_s", "surprise"), strict=True):
        assert line.startswith(f"fxgateway: {stack.gateway_config}: {key}: "), line
    assert answer.stdout == ""


def test_every_problem_of_a_relay_at_once(make_stack: Callable[..., Stack]) -> None:
    stack = make_stack("echo")
    stack.write_relay_config("node-a", {"bad name": "nowhere"}, "[log]\nlevel = 7\n")
    answer = stack.relay_cli("node-a", "run", check=False)
    assert answer.returncode == 2
    keys = [line.split(": ")[2] for line in sorted(answer.stderr.splitlines())]
    assert keys == ["log.level", "service[0].name", "service[0].target"], answer.stderr


def test_a_file_that_others_can_read_is_refused_with_the_command_that_helps(make_stack: Callable[..., Stack]) -> None:
    stack = make_stack("echo")
    stack.write_relay_config("node-a", {"echo": "127.0.0.1:9"})
    for path, ask in (
        (stack.directory / "node-a" / "gateway.json", lambda: stack.relay_cli("node-a", "run", check=False)),
        (stack.directory / "server.key", lambda: stack.gateway_cli("run", check=False)),
    ):
        path.chmod(0o644)
        answer = ask()
        assert answer.returncode == 2
        (line,) = answer.stderr.splitlines()
        assert f"chmod 600 {path}" in line
        path.chmod(0o600)


def test_an_address_in_use_is_one_line(stack: Stack) -> None:
    text = stack.gateway_config.read_text()
    other = stack.directory / "other.toml"
    for taken, free in ((stack.doors["echo"], (stack.tunnel_port, stack.admin_port)), (stack.tunnel_port, (stack.doors["echo"],))):
        changed = text
        for port in free:
            changed = changed.replace(f'listen = "127.0.0.1:{port}"', f'listen = "127.0.0.1:{free_port()}"')
        other.write_text(changed)
        answer = cli(["fxgateway.cli", "run", "--config", str(other)], check=False)
        assert answer.returncode == 1
        (line,) = (line for line in answer.stderr.splitlines() if not line.startswith("{"))
        assert f"cannot listen on 127.0.0.1:{taken}: it is in use" in line
    assert is_served(stack.doors["echo"])


def test_missing_files_are_named(make_stack: Callable[..., Stack]) -> None:
    stack = make_stack("echo")
    (stack.directory / "server.pem").unlink()
    answer = stack.gateway_cli("run", check=False)
    assert (answer.returncode, len(answer.stderr.splitlines())) == (2, 1)
    assert "server.pem" in answer.stderr
    answer = cli(["fxrelay.cli", "run", "--config", str(stack.directory / "none.toml")], check=False)
    assert (answer.returncode, len(answer.stderr.splitlines())) == (2, 1)


def test_init_overwrites_nothing(make_stack: Callable[..., Stack]) -> None:
    stack = make_stack("echo")
    before = {path: path.read_bytes() for path in stack.directory.iterdir()}
    answer = cli(["fxgateway.cli", "init", "--dir", str(stack.directory), "--public-url", "wss://127.0.0.1:1"], check=False)
    assert answer.returncode == 2
    assert "--force" in answer.stderr
    assert {path: path.read_bytes() for path in stack.directory.iterdir()} == before
    assert {path.name for path in before if path.stat().st_mode & 0o077} <= {"gateway.toml", "ca.pem", "server.pem"}


def test_the_environment_goes_before_the_file(make_stack: Callable[..., Stack], echo_service: Service) -> None:
    stack = make_stack("echo")
    port = free_port()
    gateway = stack.start_gateway(env={"FXGATEWAY__DOOR__0__LISTEN": f"127.0.0.1:{port}"})
    assert f"echo on 127.0.0.1:{port}" in gateway.ready_line
    stack.start_relay("node-a", {"echo": echo_service.target})
    assert is_served(port)


def test_a_reload_adds_and_removes_a_door_and_a_service(stack: Stack, echo_service: Service) -> None:
    old_port = stack.doors["echo"]
    with dial(old_port) as client:
        say(client)
        stack.doors = {"second": free_port()}
        stack.write_gateway_config()
        reload(stack.gateway)
        stack.write_relay_config("node-a", {"second": echo_service.target}, "[limits]\ndrain_s = 5\n")
        reload(stack.relays["node-a"])
        wait_until(lambda: is_served(stack.doors["second"]), 20, "the new service at the new door")
        with pytest.raises(ConnectionRefusedError):
            dial(old_port)
        say(client, b"a live stream is not touched")
        client.shutdown(socket.SHUT_WR)
        assert client.recv(1) == b""


def test_a_refused_reload_leaves_the_access_log_where_it_was(make_stack: Callable[..., Stack], echo_service: Service) -> None:
    stack = make_stack("echo")
    before = stack.directory / "before.log"
    stack.gateway_extra = f'[log]\naccess = "{before}"\n'
    stack.write_gateway_config()
    gateway = stack.start_gateway()
    stack.start_relay("node-a", {"echo": echo_service.target})
    with socket.create_server(("127.0.0.1", 0)) as taken:
        text = stack.gateway_config.read_text().replace("before.log", "after.log")
        stack.gateway_config.write_text(f'{text}[[door]]\nlisten = "127.0.0.1:{taken.getsockname()[1]}"\nservice = "x"\n')
        assert "in use" in reload(gateway, "reload refused")

    def is_written_to() -> bool:
        assert is_served(stack.doors["echo"])
        return before.stat().st_size > 0

    wait_until(is_written_to, what="a line where it was")


def test_a_bad_new_configuration_is_refused_whole(stack: Stack) -> None:
    text = stack.gateway_config.read_text()
    new_port = free_port()
    door = f'[[door]]\nlisten = "127.0.0.1:{new_port}"\nservice = "echo"\n'
    with dial(stack.doors["echo"]) as client, socket.create_server(("127.0.0.1", 0)) as taken:
        stack.gateway_config.write_text(f"{text}{door}[nonsense]\n")
        assert "nonsense" in reload(stack.gateway, "reload refused")
        stack.gateway_config.write_text(f'{text}{door}[[door]]\nlisten = "127.0.0.1:{taken.getsockname()[1]}"\nservice = "x"\n')
        assert "in use" in reload(stack.gateway, "reload refused")
        stack.gateway_config.write_text(text.replace('"server.pem"', '"gone.pem"') + 'x = ["')
        reload(stack.gateway, "reload refused")
        with pytest.raises(ConnectionRefusedError):
            dial(new_port)
        say(client)
    assert is_served(stack.doors["echo"])
    config = stack.relay_config("node-a")
    config.write_text(config.read_text() + "[nonsense]\n")
    assert "nonsense" in reload(stack.relays["node-a"], "reload refused")
    assert is_served(stack.doors["echo"])
    stack.gateway_config.write_text(text + door)
    reload(stack.gateway)
    assert is_served(new_port)


@pytest.mark.parametrize("victim", ["gateway", "relay"])
def test_a_drain_lets_streams_finish(make_stack: Callable[..., Stack], swap_service: Service, victim: str) -> None:
    extra = "[limits]\ndrain_s = 60\n"
    stack = make_stack("swap", extra=extra)
    stack.start_gateway()
    stack.start_relay("node-a", {"swap": swap_service.target}, extra)
    crowd = exchanges(stack.doors["swap"], 20, 1_000_000, rate_bytes_per_s=200_000)
    wait_until(lambda: swap_service.accepted == 20, 20, "all streams open")
    daemon = stack.gateway if victim == "gateway" else stack.relays["node-a"]
    daemon.signal(signal.SIGTERM)
    wait_until(lambda: any("stopping" in event for event in events(daemon)), 20, "the drain")
    assert crowd.running
    try:
        end, _ = visit(stack.doors["swap"])
    except ConnectionRefusedError:
        end = "refused"
    assert end == ("refused" if victim == "gateway" else "reset")
    assert crowd.outcomes() == [Outcome.RIGHT] * 20
    assert daemon.wait() == 0


@pytest.mark.parametrize("victim", ["gateway", "relay"])
def test_a_drain_resets_what_does_not_finish(stack: Stack, victim: str) -> None:
    daemon = stack.gateway if victim == "gateway" else stack.relays["node-a"]
    with dial(stack.doors["echo"]) as client:
        say(client)
        began = time.monotonic()
        daemon.signal(signal.SIGTERM)
        time.sleep(0.5)
        say(client, b"still served")
        end, _ = how_it_ends(client, 20)  # for ever, if nobody ended it
        took_s = time.monotonic() - began
        assert end == "reset"
        assert took_s > 4
    assert daemon.wait() == 0


def test_without_streams_both_end_at_once(make_stack: Callable[..., Stack], echo_service: Service) -> None:
    stack = make_stack("echo", extra="[limits]\ndrain_s = 600\n")
    stack.start_gateway()
    stack.start_relay("node-a", {"echo": echo_service.target}, "[limits]\ndrain_s = 600\n")
    for daemon in (stack.relays["node-a"], stack.gateway):
        assert daemon.stop() == 0  # long before drain_s is over


def test_a_relay_is_back_soon_after_the_gateway_was_restarted(stack: Stack) -> None:
    assert stack.gateway.stop() == 0
    began = time.monotonic()
    stack.start_gateway()
    stack.wait_for_relays("node-a", timeout_s=60)
    assert time.monotonic() - began < 8 * slowness()
    assert is_served(stack.doors["echo"])


def test_a_reload_names_what_waits_for_a_restart_and_takes_a_certificate_by_another_name_at_once(
    make_stack: Callable[..., Stack],
) -> None:
    stack = make_stack("echo")
    stack.start_gateway()
    ends = re.compile(r"^fxgateway_certificate_expires_timestamp_seconds (\S+)", re.MULTILINE)
    before = float(ends.findall(stack.page("/metrics"))[0])
    authority = load_authority((stack.directory / "ca.pem").read_text(), (stack.directory / "ca.key").read_bytes())
    certificate, key = issue_server_certificate(authority, ["127.0.0.1"], valid_days=5)
    (stack.directory / "next.pem").write_text(certificate)
    write_secret(stack.directory / "next.key", key)
    config = stack.gateway_config
    config.write_text(config.read_text().replace("[tunnel]\n", '[tunnel]\ncertificate = "next.pem"\nkey = "next.key"\n'))
    reload(stack.gateway)
    assert not [event for event in events(stack.gateway) if "next restart" in event]
    assert float(ends.findall(stack.page("/metrics"))[0]) < before
    assert "next.pem ends on" in stack.gateway_cli("check").stderr
    extra = (
        '[limits]\nmemory_bytes = "64MiB"\nopen_timeout_s = 9\n[liveness]\ndead_after_s = 9\n[resume]\nhold_s = 9\nreplay_bytes = "8MiB"\n'
    )
    config.write_text(config.read_text() + extra)
    waiting = "changed, but not before the next restart: liveness.dead_after_s, resume.hold_s, limits.memory_bytes"
    for _ in range(2):  # it waits still
        assert reload(stack.gateway, "next restart") == waiting


def test_the_pages_and_commands_of_a_running_pair(stack: Stack) -> None:
    with dial(stack.doors["echo"]) as client:
        say(client, bytes(payload(1, 1000)))
        assert stack.page("/healthz")
        assert stack.page("/readyz")
        assert "fxgateway_" in stack.page("/metrics")
        (relay,) = stack.status()["relays"]
        assert (relay["relay_id"], relay["state"], relay["services"]) == ("node-a", "up", ["echo"])
        assert "node-a" in stack.gateway_cli("relays").stdout
        status = json.loads(stack.relay_cli("node-a", "status", "--json").stdout)
        assert status["uplinks"][0]["state"] == "up"
        assert status["services"][0]["streams"] == 1
        assert "echo" in stack.relay_cli("node-a", "status").stdout
    assert stack.gateway_cli("check").returncode == 0
    assert stack.relay_cli("node-a", "check").returncode == 0


def test_state_files_are_private(stack: Stack) -> None:
    state = stack.directory / "node-a" / "state"
    paths: list[Path] = [state, *state.iterdir(), stack.directory / "relays.json", stack.directory / "gateway.json"]
    assert [path.name for path in paths if os.stat(path).st_mode & 0o077] == []
