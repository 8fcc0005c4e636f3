"""System: a gateway of several processes in its sandbox: every worker, those that are started later too, and the parent in its own."""

import json
import os
import signal
import ssl
import textwrap
from contextlib import ExitStack
from pathlib import Path

import pytest
from workers_rig import MakeStack, say, start, worker_of, workers

from fxtunnel.kit.certificates import issue_server_certificate, load_authority
from fxtunnel.kit.files import write_secret
from fxtunnel.kit.landlock import ABI_NETWORK
from tests.ports import free_port
from tests.system.burglar import ABI, CONNECTIONS, KEPT, LOST, OTHERS, SOCKETS, burglar_in
from tests.system.peers import Service, dial, is_served
from tests.system.stack import STOP_S, Stack, wait_until

pytestmark = [
    pytest.mark.system,
    pytest.mark.xdist_group("workers"),
    pytest.mark.skipif(not ABI_NETWORK <= ABI, reason=f"this kernel offers Landlock ABI {ABI}; {ABI_NETWORK} is needed"),
]

REQUIRED = '[sandbox]\nmode = "required"\n'
TWO = {"FXGATEWAY__TUNNEL__WORKERS": "2"}
LOST_BY_PARENT = dict.fromkeys((*CONNECTIONS, *SOCKETS, "write"), "EACCES") | OTHERS
LEFT_TO_PARENT = KEPT | dict.fromkeys(("read", "list", "run"), "done")
if os.geteuid() == 0:
    LOST_BY_PARENT["read of another process"] = "done"  # CAP_PERFMON goes before Landlock there; its memory stays closed
WITHOUT_FILTER = textwrap.dedent(
    """
    import platform, sys
    if sys.orig_argv[-2].startswith("WHO"):
        platform.machine = lambda: "riscv64"
    """
)
"""As sitecustomize.py: an architecture for which there is no filter, in the processes whose last argument but one begins so."""


def killed_and_back(stack: Stack, number: int) -> int:
    """Kill a worker; the process id of its successor, which serves."""
    before = workers(stack)[number]
    os.kill(before["pid"], signal.SIGKILL)

    def is_back() -> bool:
        now = workers(stack).get(number, before)
        return now["up"] and now["pid"] != before["pid"]

    wait_until(is_back, 30, f"worker {number} again")
    return int(workers(stack)[number]["pid"])


def threads_without_filter(pid: int) -> list[str]:
    statuses = [path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/status")]
    assert len(statuses) > 1
    return [text for text in statuses if "\nSeccomp:\t2\n" not in text or "\nNoNewPrivs:\t1\n" not in text]


def test_whoever_breaks_into_a_worker_can_open_and_call_nothing(make_stack: MakeStack, home: Path) -> None:
    stack = make_stack("echo")
    expected = {"main": LOST | KEPT, "thread": LOST | KEPT}
    with burglar_in(home) as burglar:
        gateway = stack.start_gateway(TWO | burglar.env)
        for worker in workers(stack).values():
            assert burglar.let_loose(worker["pid"]) == expected
            assert threads_without_filter(worker["pid"]) == []
        assert burglar.let_loose(killed_and_back(stack, 1)) == expected
        with_files = {"main": LOST_BY_PARENT | LEFT_TO_PARENT, "thread": LOST_BY_PARENT | LEFT_TO_PARENT}
        assert burglar.let_loose(gateway.pid) == with_files
    told = [json.loads(line) for line in stack.logs().splitlines()]
    assert [line.get("worker", 0) for line in told if "sandbox: in force (seccomp)" in line["event"]].count(1) == 2
    files = {
        (line.get("worker", 0), line["event"].split(": ")[2].split(",")[0]) for line in told if "sandbox: in force (Land" in line["event"]
    }
    assert files == {(0, "changing files beyond those named"), (1, "files beyond those named"), (2, "files beyond those named")}


def test_in_their_sandbox_workers_serve_and_are_reloaded_as_far_as_it_reaches(
    make_stack: MakeStack, echo_service: Service, home: Path
) -> None:
    port, near, far = free_port(), home / "near", home / "far"
    logs = home / "logs"
    logs.mkdir()
    sandbox = f'[log]\naccess = "{logs}/access.log"\n{REQUIRED}read = ["{near}"]\n'
    near.mkdir(mode=0o700)
    far.mkdir(mode=0o700)
    stack = start(make_stack, {"echo": echo_service.target}, relays=2, extra=sandbox)
    gateway, good = stack.gateway, stack.gateway_config.read_text()
    assert gateway is not None
    assert len({worker_of(stack, name) for name in ("node-0", "node-1")}) == 2
    with ExitStack() as clients:
        for client in [clients.enter_context(dial(stack.doors["echo"])) for _ in range(20)]:
            client.sendall(b"!")
            assert client.recv(1) == b"!"

        def all_serve() -> bool:
            return all(worker["relays"] == 1 and worker["connections"] > 0 for worker in workers(stack).values())

        wait_until(all_serve, what="clients at both workers")

    def reload(certificates: Path, done: str) -> list[str]:
        """Add a door with the certificate of that directory; what is told until a line with `done`."""
        authority = load_authority((stack.directory / "ca.pem").read_text(), (stack.directory / "ca.key").read_bytes())
        certificate, key = issue_server_certificate(authority, [f"{certificates.name}.example"])
        (certificates / "new.pem").write_text(certificate)
        write_secret(certificates / "new.key", key)
        files = f'certificate = "{certificates}/new.pem"\nkey = "{certificates}/new.key"\n'
        stack.gateway_config.write_text(f'{good}[[door]]\nlisten = "127.0.0.1:{port}"\nkind = "https"\nservice = "echo"\n{files}')
        before = len(gateway.log.read_text().splitlines())
        gateway.signal(signal.SIGHUP)

        def told() -> list[str]:
            return [json.loads(line)["event"] for line in gateway.log.read_text().splitlines()[before:]]

        wait_until(lambda: any(done in event for event in told()), what=done)
        return told()

    refused = reload(far, "reload refused")
    assert len([event for event in refused if "reload refused" in event]) == 1, refused
    assert f"workers 1, 2: sandbox: sandbox.read: out of reach since the start: {far}/new.pem, {far}/new.key;" in " ".join(refused)
    with pytest.raises(ConnectionRefusedError):
        dial(port)
    said = f"reloaded {stack.gateway_config}"
    assert reload(near, said).count(said) >= 1
    wait_until(lambda: names_of(stack, port) == {"near.example"}, what="the certificate at every worker")
    # Successors begin with that, within their own reach.
    for number in (1, 2):
        killed_and_back(stack, number)
    stack.wait_for_relays("node-0", "node-1", timeout_s=30)
    for _ in range(20):
        say(stack.doors["echo"])
    assert names_of(stack, port) == {"near.example"}
    assert "reload refused" in " ".join(reload(far, "reload refused"))
    reload(near, said)
    wait_until(lambda: (logs / "access.log").stat().st_size > 0, what="lines in the access log")
    stack.gateway_cli("revoke", "node-0")
    stack.gateway_cli("revoke", "node-1")
    wait_until(lambda: not is_served(stack.doors["echo"]), what="the relays gone")


def test_a_reload_does_not_lead_out_of_it_and_says_so_each_time(make_stack: MakeStack) -> None:
    stack = make_stack("echo", extra=REQUIRED)
    gateway = stack.start_gateway(TWO)
    stack.gateway_config.write_text(stack.gateway_config.read_text().replace("required", "off"))
    for reloads in (1, 2):
        gateway.signal(signal.SIGHUP)
        wait_until(
            lambda reloads=reloads: stack.logs().count('"reloaded ') == 3 * reloads, what="the reload of both workers and the parent"
        )
        assert stack.logs().count("changed, but not before the next restart: sandbox.mode") == reloads
    assert stack.logs().count("(seccomp)") == 3
    killed_and_back(stack, 2)
    assert stack.logs().count("(seccomp)") == 4


def names_of(stack: Stack, port: int) -> set[str]:
    """Whose certificates a door shows to some clients."""
    context = ssl.create_default_context(cafile=str(stack.directory / "ca.pem"))
    context.check_hostname = False
    found = set()
    for _ in range(10):
        with context.wrap_socket(dial(port)) as client:
            found |= {name for kind, name in client.getpeercert()["subjectAltName"]}
    return found


@pytest.mark.parametrize(
    ("who", "code", "words"),
    [
        ("fxgateway.workers.worker", 1, "this worker ends: sandbox: sandbox.mode: there is no filter of system calls for riscv64"),
        ("--config", 2, "fxgateway: sandbox: sandbox.mode: there is no filter of system calls for riscv64"),
    ],
)
def test_a_process_that_cannot_do_what_is_required_does_not_start(
    make_stack: MakeStack, home: Path, who: str, code: int, words: str
) -> None:
    (home / "sitecustomize.py").write_text(WITHOUT_FILTER.replace("WHO", who))
    stack = make_stack("echo", extra=REQUIRED)
    gateway = stack.launch_gateway({**TWO, "PYTHONPATH": os.pathsep.join([str(home), os.environ.get("PYTHONPATH", "")])})
    assert gateway.process.wait(STOP_S) == code
    assert words in stack.logs()
    assert ("did not start (exit code 1)" in stack.logs()) is (code == 1)
    assert "Traceback" not in stack.logs()
