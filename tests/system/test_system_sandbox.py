"""System: a gateway in its sandbox (R27): it can open and call nothing that it does not need, and everything it needs still works."""

import json
import os
import signal
import socket
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest

from fxtunnel.kit.landlock import ABI_NETWORK, ABI_SCOPES, supported_abi
from tests.ports import free_port
from tests.system.peers import Service, is_served
from tests.system.stack import STOP_S, Stack, wait_until

ABI = supported_abi()
pytestmark = [
    pytest.mark.system,
    pytest.mark.xdist_group("sandbox"),
    pytest.mark.skipif(not ABI_NETWORK <= ABI, reason=f"this kernel offers Landlock ABI {ABI}; {ABI_NETWORK} is needed"),
]

BURGLAR = textwrap.dedent(
    """
    import ctypes, errno, json, os, platform, signal, socket, sys, threading

    def call(number, *arguments):
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.syscall(number, *arguments) < 0:
            raise OSError(ctypes.get_errno(), "")

    def fast_open_of_many(address):
        number = {"x86_64": 307, "aarch64": 269}[platform.machine()]
        with socket.socket() as sock:
            call(number, sock.fileno(), None, 0, socket.MSG_FASTOPEN)

    def attempt(what):
        try:
            what()
        except OSError as exc:
            return errno.errorcode[exc.errno]
        return "done"

    def tries():
        address, path = ("127.0.0.1", int(os.environ["BURGLAR_PORT"])), os.environ["BURGLAR_SOCKET"]
        IP, STREAM, UDP = socket.AF_INET, socket.SOCK_STREAM, socket.SOCK_DGRAM
        return {
            "connect": attempt(lambda: socket.create_connection(address, 2).close()),
            "connect in a send": attempt(lambda: socket.socket().sendto(b"x", socket.MSG_FASTOPEN, address)),
            "connect in a message": attempt(lambda: socket.socket().sendmsg([b"x"], [], socket.MSG_FASTOPEN, address)),
            "connect in many messages": attempt(lambda: fast_open_of_many(address)),
            "multipath": attempt(lambda: socket.socket(IP, STREAM, 262).connect(address)),
            "SCTP": attempt(lambda: socket.socket(IP, STREAM, socket.IPPROTO_SCTP)),
            "UDP": attempt(lambda: socket.socket(IP, UDP).sendto(b"x", address)),
            "UDP, IPv6": attempt(lambda: socket.socket(socket.AF_INET6, UDP | socket.SOCK_NONBLOCK)),
            "raw": attempt(lambda: socket.socket(IP, socket.SOCK_RAW, socket.IPPROTO_ICMP)),
            "packets": attempt(lambda: socket.socket(socket.AF_PACKET, UDP)),
            "unix socket": attempt(lambda: socket.socket(socket.AF_UNIX).connect(path)),
            "unix datagram": attempt(lambda: socket.socket(socket.AF_UNIX, UDP).sendto(b"x", path + ".datagrams")),
            "ring": attempt(lambda: call(425, 1, ctypes.create_string_buffer(256))),
            "read": attempt(lambda: open("/etc/passwd").close()),
            "read of another process": attempt(lambda: open(f"/proc/{os.getppid()}/environ").close()),
            "list": attempt(lambda: os.listdir("/etc")),
            "write": attempt(lambda: open(os.environ["BURGLAR_FILE"], "w").close()),
            "run": attempt(lambda: os.execv("/bin/true", ["true"])),
            "signal": attempt(lambda: os.kill(os.getppid(), 0)),
            "bind": attempt(lambda: socket.socket().bind(("127.0.0.1", 0))),
            "read of itself": attempt(lambda: open("/proc/self/stat").close()),
        }

    def burgle(number, frame):
        found = {"main": tries()}
        def inside():
            found["thread"] = tries()
        thread = threading.Thread(target=inside)
        thread.start()
        thread.join()
        sys.stdout.write(json.dumps(found) + chr(10))
        sys.stdout.flush()

    signal.signal(signal.SIGUSR1, burgle)
    """
)
"""What somebody could try who runs code in the gateway: as sitecustomize.py, at SIGUSR1."""

FRESH = ("env",)
"""An interpreter of its own: what is imported only later must be within reach."""
CONNECTIONS = ("connect", "connect in a send", "connect in a message", "connect in many messages", "multipath", "SCTP")
SOCKETS = ("UDP", "UDP, IPv6", "raw", "packets", "unix socket", "ring")
LOST = dict.fromkeys((*CONNECTIONS, *SOCKETS, "read", "read of another process", "list", "write", "run"), "EACCES")
KEPT = {"bind": "done", "read of itself": "done", "unix datagram": "done"}


@pytest.fixture
def break_in(home: Path) -> Callable[[Stack], dict[str, dict[str, str]]]:
    """Start a gateway that has somebody in it, and let him try."""
    (home / "burglar").mkdir()
    (home / "burglar" / "sitecustomize.py").write_text(BURGLAR)

    def burgle(stack: Stack) -> dict[str, dict[str, str]]:
        at = str(home / "burgled")
        with (
            socket.create_server(("127.0.0.1", 0)) as listener,
            socket.create_server(at, family=socket.AF_UNIX),
            socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as datagrams,
        ):
            datagrams.bind(f"{at}.datagrams")
            env = {
                "PYTHONPATH": os.pathsep.join([str(home / "burglar"), *filter(None, [os.environ.get("PYTHONPATH")])]),
                "BURGLAR_PORT": str(listener.getsockname()[1]),
                "BURGLAR_SOCKET": at,
                "BURGLAR_FILE": str(home / "left behind"),
            }
            gateway = stack.start_gateway(env=env)
            gateway.signal(signal.SIGUSR1)
            found: dict[str, dict[str, str]] = json.loads(gateway.process.stdout.readline())
            return found

    return burgle


def test_whoever_breaks_in_can_open_and_call_nothing(make_stack: Callable[..., Stack], break_in: Callable[[Stack], dict]) -> None:
    stack = make_stack("echo")
    found = break_in(stack)
    expected = LOST | KEPT | ({"signal": "EPERM"} if ABI >= ABI_SCOPES else {"signal": "done"})
    assert found == {"main": expected, "thread": expected}
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
    wait_until(lambda: (logs / "access.log").stat().st_size > 0, 10, "a line in the access log")
    (logs / "access.log").rename(logs / "access.log.1")
    other = free_port()
    stack.doors = {"echo": other}
    stack.write_gateway_config()
    fresh = stack.directory / "server.pem.new"
    fresh.write_text((stack.directory / "server.pem").read_text())
    fresh.rename(stack.directory / "server.pem")
    stack.gateway.signal(signal.SIGHUP)
    wait_until(lambda: is_served(other), 10, "the new door")
    wait_until(lambda: (logs / "access.log").exists() and (logs / "access.log").stat().st_size > 0, 10, "a line in the new access log")

    # Revoked by another process, which replaces relays.json.
    stack.gateway_cli("revoke", "node-a")
    wait_until(lambda: not is_served(other), 10, "the relay gone")


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
    wait_until(lambda: "out of reach since the start" in stack.logs(), 10, "a word about the sandbox")
    stack.gateway_config.write_text(stack.gateway_config.read_text() + f'[sandbox]\nread = ["{elsewhere}"]\n')
    stack.gateway.stop()
    stack.start_gateway(prefix=FRESH)
    stack.gateway.signal(signal.SIGHUP)
    wait_until(lambda: "reloaded" in stack.logs(), 10, "the reload")
