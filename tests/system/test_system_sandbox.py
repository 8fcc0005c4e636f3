"""System: a gateway in its sandbox (R27): it can open and call nothing that it does not need, and everything it needs still works."""

import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from fxtunnel.kit.landlock import ABI_NETWORK
from tests.ports import free_port
from tests.system.burglar import ABI, KEPT, LOST, burglar_in
from tests.system.peers import Service, is_served
from tests.system.stack import STOP_S, Stack, wait_until

pytestmark = [
    pytest.mark.system,
    pytest.mark.xdist_group("sandbox"),
    pytest.mark.skipif(not ABI_NETWORK <= ABI, reason=f"this kernel offers Landlock ABI {ABI}; {ABI_NETWORK} is needed"),
]

FRESH = ("env",)
"""An interpreter of its own: what is imported only later must be within reach."""


def test_whoever_breaks_in_can_open_and_call_nothing(make_stack: Callable[..., Stack], home: Path) -> None:
    stack = make_stack("echo")
    with burglar_in(home) as burglar:
        found = burglar.let_loose(stack.start_gateway(env=burglar.env).pid)
    assert found == {"main": LOST | KEPT, "thread": LOST | KEPT}
    assert f"sandbox: in force (Landlock ABI {ABI})" in stack.logs()
    assert "sandbox: in force (seccomp)" in stack.logs()


def test_switched_off_it_is_no_sandbox(make_stack: Callable[..., Stack], home: Path) -> None:
    stack = make_stack("echo", extra='[sandbox]\nmode = "off"\n')
    stack.start_gateway(prefix=FRESH)
    assert "sandbox: off" in stack.logs()


def test_everything_that_a_running_gateway_does_still_works(make_stack: Callable[..., Stack], echo_service: Service, home: Path) -> None:
    logs = home / "logs"
    logs.mkdir()
    stack = make_stack("echo", extra=f'[log]\naccess = "{logs}/access.log"\n[sandbox]\nmode = "required"\n')
    stack.start_gateway(prefix=FRESH)
    stack.start_relay("node-a", {"echo": echo_service.target})  # enrols: relays.json is written
    stack.wait_for_relays("node-a")
    assert is_served(stack.doors["echo"])
    assert "process_resident_memory_bytes" in stack.page("/metrics")
    assert "process_open_fds" in stack.page("/metrics")

    # Rotated logs, another door, and a renewed certificate, as a reload finds them.
    wait_until(lambda: (logs / "access.log").stat().st_size > 0, 60, "a line in the access log")
    (logs / "access.log").rename(logs / "access.log.1")
    other = free_port()
    stack.doors = {"echo": other}
    stack.write_gateway_config()
    fresh = stack.directory / "server.pem.new"
    fresh.write_text((stack.directory / "server.pem").read_text())
    fresh.rename(stack.directory / "server.pem")
    stack.gateway.signal(signal.SIGHUP)
    wait_until(lambda: is_served(other), 60, "the new door")
    wait_until(lambda: (logs / "access.log").exists() and (logs / "access.log").stat().st_size > 0, 60, "a line in the new access log")

    # Revoked by another process, which replaces relays.json.
    stack.gateway_cli("revoke", "node-a")
    wait_until(lambda: not is_served(other), 60, "the relay gone")


def test_what_was_left_in_the_state_directory_is_not_run_by_a_successor_that_starts_there(make_stack: Callable[..., Stack]) -> None:
    stack = make_stack("echo")
    (stack.directory / "click.py").write_text("raise SystemExit('imported what was left here')\n")
    command = [Path(sys.executable).with_name("fxgateway"), "launch", "--config", stack.gateway_config]
    with subprocess.Popen(command, cwd=stack.directory, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as launched:
        try:
            launched.stdout.readline()  # it is ready, or has ended
            launched.terminate()
            _, stderr = launched.communicate(timeout=STOP_S)
        finally:
            launched.kill()
    assert "imported" not in stderr
    assert launched.returncode == 0


def test_a_socket_with_a_path_is_taken_over_from_the_dead_only(make_stack: Callable[..., Stack], home: Path) -> None:
    """Nothing connects in there: whether the process that made it still lives is found out in another way."""
    path = home / "door.sock"
    stack = make_stack("echo", extra=f'[[door]]\nlisten = "unix:{path}"\nservice = "echo"\n[sandbox]\nmode = "required"\n')
    for _ in range(2):  # the second finds what the first left behind
        stack.start_gateway(prefix=FRESH).process.kill()
        stack.gateway.process.wait(STOP_S)
        assert path.is_socket()
    path.unlink()
    with socket.create_server(str(path), family=socket.AF_UNIX), socket.socket(socket.AF_UNIX) as client:
        assert stack.launch_gateway(prefix=FRESH).process.wait(STOP_S) == 1
        assert f"unix:{path}" in stack.logs()
        client.connect(str(path))


def test_a_reload_that_would_need_more_says_so(make_stack: Callable[..., Stack], home: Path) -> None:
    stack = make_stack("echo")
    stack.start_gateway(prefix=FRESH)
    elsewhere = home / "elsewhere"
    elsewhere.mkdir(mode=0o700)
    for name in ("server.pem", "server.key"):
        (elsewhere / name).write_bytes((stack.directory / name).read_bytes())
        (elsewhere / name).chmod(0o600)
    text = stack.gateway_config.read_text()
    stack.gateway_config.write_text(
        text + f'[[certificate]]\ncertificate = "{elsewhere}/server.pem"\nkey = "{elsewhere}/server.key"\n',
    )
    stack.gateway.signal(signal.SIGHUP)
    wait_until(lambda: "out of reach since the start" in stack.logs(), 60, "a word about the sandbox")
    stack.gateway_config.write_text(stack.gateway_config.read_text() + f'[sandbox]\nread = ["{elsewhere}"]\n')
    stack.gateway.stop()
    stack.start_gateway(prefix=FRESH)
    stack.gateway.signal(signal.SIGHUP)
    wait_until(lambda: "reloaded" in stack.logs(), 60, "the reload")
