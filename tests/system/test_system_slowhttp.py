"""slowhttptest: slow heads, slow bodies and slow readers leave a service behind us as reachable as it is without us."""

import csv
import re
import resource
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.ports import free_port
from tests.system.conftest import MakeStack
from tests.system.servers import need, nginx_server, program, random_file
from tests.system.stack import Stack

pytestmark = [pytest.mark.system, pytest.mark.xdist_group("web")]
CONNECTIONS = 200
SECONDS = 13
PROBE_S = 10
"""A probe that is not answered for so long, on a busy machine, finds nobody there."""
ATTACKS = {
    "slow heads": ("-H", "-i", "1", "-x", "8"),
    "slow bodies": ("-B", "-i", "1", "-s", "8192", "-x", "8"),
    "slow readers": ("-X", "-w", "512", "-y", "1024", "-n", "1", "-z", "32", "-k", "3"),
}


@pytest.fixture(scope="module")
def site(make_shared_stack: MakeStack, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Stack, dict[str, int]]]:
    need("slowhttptest", "nginx")
    home = tmp_path_factory.mktemp("slow")
    with nginx_server(home / "n", "error_page 405 =200 $uri;") as (port, files):
        random_file(files / "large", 1 << 20)
        door = free_port()
        stack: Stack = make_shared_stack("web", extra=f'[[door]]\nlisten = "127.0.0.1:{door}"\nkind = "http"\nservice = "web"\n')
        stack.start_gateway()
        stack.start_relay("a", {}, extra=f'[[service]]\nname = "web"\nprotocol = "http"\ntarget = "127.0.0.1:{port}"\n')
        yield stack, {"direct": port, "relay": stack.doors["web"], "both": door}


def verdict(port: int, attack: str, home: Path) -> tuple[bool, int]:
    """Whether the service was there for a probe all the time, and how many connections the attack held at most."""
    home.mkdir()
    arguments = [
        program("slowhttptest"),
        "-c",
        str(CONNECTIONS),
        "-r",
        "200",
        "-l",
        str(SECONDS),
        "-p",
        str(PROBE_S),
        "-g",
        "-o",
        str(home / "out"),
    ]
    url = f"http://127.0.0.1:{port}/large"
    done = subprocess.run([*arguments, *ATTACKS[attack], "-u", url], capture_output=True, text=True, timeout=60, cwd=home, check=False)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr
    with (home / "out.csv").open(newline="") as file:
        rows = [row for row in csv.reader(file) if row and row[0].strip().isdigit()]
    assert rows, re.sub(r"\x1b\[[0-9;]*m", "", done.stdout)[-1000:]
    return all(int(row[4]) > 0 for row in rows), max(int(row[3]) for row in rows)


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_service_is_there_all_the_time(site: tuple[Stack, dict[str, int]], attack: str, tmp_path: Path) -> None:
    assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] > 2 * CONNECTIONS + 100
    stack, ports = site
    with ThreadPoolExecutor(len(ports)) as pool:
        found = dict(zip(ports, pool.map(lambda way: verdict(ports[way], attack, tmp_path / way), ports), strict=True))
    assert {way: was_there for way, (was_there, _) in found.items()} == dict.fromkeys(ports, True)
    assert min(held for _, held in found.values()) > CONNECTIONS // 2, f"no attack at all: {found}"
    assert '"level": "error"' not in stack.logs()
