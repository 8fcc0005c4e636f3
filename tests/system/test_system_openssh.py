"""System: OpenSSH's own ssh and scp, through a door, to OpenSSH's own sshd."""

import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.system.servers import Ssh, file_digest, random_file, ssh_server, wait_for_size
from tests.system.stack import Stack

pytestmark = [pytest.mark.system, pytest.mark.xdist_group("openssh")]

GIB = 1 << 30
LOGINS = 200
AT_ONCE = 25


@pytest.fixture(scope="module")
def ssh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ssh]:
    with ssh_server(tmp_path_factory.mktemp("ssh") / "sshd") as server:
        yield server


@pytest.fixture(scope="module")
def stack(ssh: Ssh, make_shared_stack: Callable[..., Stack]) -> Stack:
    stack = make_shared_stack("ssh")
    stack.start_gateway()
    stack.start_relay("node-a", {"ssh": f"127.0.0.1:{ssh.port}"})
    return stack


@pytest.fixture
def big(tmp_path: Path) -> Iterator[Path]:
    """Where large files go; they are gone when the test is over."""
    yield tmp_path
    for path in tmp_path.iterdir():
        path.unlink()


def run(*arguments: str, input_bytes: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(arguments, input=input_bytes, capture_output=True, timeout=120, check=False)


def test_a_command_runs_and_its_exit_code_comes_back(stack: Stack, ssh: Ssh) -> None:
    options = ssh.options(stack.doors["ssh"])
    answer = run("ssh", *options, ssh.login, "cat; exit 7", input_bytes=b"through the tunnel")
    assert (answer.returncode, answer.stdout, answer.stderr) == (7, b"through the tunnel", b"")


def test_ssh_goes_through_ssh(stack: Stack, ssh: Ssh) -> None:
    jump = " ".join(["ssh", *ssh.options(stack.doors["ssh"]), "-W", f"127.0.0.1:{ssh.port}", ssh.login])
    answer = run("ssh", *ssh.options(ssh.port), "-o", f"ProxyCommand={jump}", ssh.login, "echo twice")
    assert (answer.returncode, answer.stdout) == (0, b"twice\n"), answer.stderr


@pytest.mark.slow
def test_two_hundred_logins(stack: Stack, ssh: Ssh) -> None:
    with ThreadPoolExecutor(AT_ONCE) as pool:
        logins = [pool.submit(run, "ssh", *ssh.options(stack.doors["ssh"]), ssh.login, "true") for _ in range(LOGINS)]
        answers = [login.result() for login in logins]
    assert [(a.returncode, a.stderr) for a in answers if a.returncode] == []


@pytest.mark.slow
def test_a_gigabyte_survives_three_cuts(stack: Stack, ssh: Ssh, big: Path) -> None:
    source, copy = big / "source", big / "copy"
    expected = random_file(source, GIB)
    scp = subprocess.Popen(
        ["scp", "-q", *ssh.options(stack.doors["ssh"]), f"{ssh.login}:{source}", str(copy)],
        stdin=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    with scp:
        for quarter in range(1, 4):
            wait_for_size(copy, GIB // 4 * quarter, scp, 120)
            assert stack.cutter.cut() >= 1
        _, errors = scp.communicate(timeout=180)
    assert (scp.returncode, errors) == (0, b"")
    assert file_digest(copy) == expected
    (relay,) = stack.live_relays().values()
    assert sum(link["resumed"] for link in relay["links"]) >= 3


@pytest.mark.slow
def test_an_upload_survives_a_cut(stack: Stack, ssh: Ssh, big: Path) -> None:
    source, copy = big / "source", big / "copy"
    size_bytes = GIB // 4
    expected = random_file(source, size_bytes)
    scp = subprocess.Popen(
        ["scp", "-q", *ssh.options(stack.doors["ssh"]), str(source), f"{ssh.login}:{copy}"],
        stdin=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    with scp:
        wait_for_size(copy, size_bytes // 2, scp, 120)
        assert stack.cutter.cut() >= 1
        _, errors = scp.communicate(timeout=180)
    assert (scp.returncode, errors) == (0, b"")
    assert file_digest(copy) == expected
