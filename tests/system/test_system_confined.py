"""System: the daemons within what the shipped units leave them: the same system calls, the same /proc, no capabilities."""

import json
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fxtunnel.kit.landlock import supported_abi
from tests.system import confinement
from tests.system.peers import Service, dial, say
from tests.system.stack import Stack, wait_until
from tests.system.units import Unit

WHY_NOT = confinement.why_not()
pytestmark = [
    pytest.mark.system,
    pytest.mark.xdist_group("systemd"),
    pytest.mark.skipif(bool(WHY_NOT), reason=f"a unit's confinement cannot be had here: {WHY_NOT}"),
]

UNITS = Path(__file__).parents[2] / "deploy" / "systemd"
STRANGE = "192.0.2.1:9"
"""TEST-NET-1 (RFC 5737): whether the address is this machine's is looked up; nothing is ever sent there."""
FILES = {
    "choose.js": "function (input) { return input.servers; }",
    "choose.sh": "#!/bin/sh\nnice -n 1 cat >/dev/null\necho node-a\n",
    "choices.py": "def choose(question):\n    return question['servers']\n\n\ndef queue():\n    return 7\n",
    "sessions.sh": '#!/bin/sh\necho \'[{"owner": "ann"}]\'\n',
    "metrics.d/jobs.sh": "#!/bin/sh\necho 5\n",
}
DENIED = textwrap.dedent(
    """
    import errno, json, mmap, os, socket

    def attempt(what):
        try:
            what()
        except OSError as exc:
            return errno.errorcode[exc.errno]
        return "done"

    print(json.dumps({
        "chown": attempt(lambda: os.chown(".", 0, 0)),
        "memory to write and execute": attempt(lambda: mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)),
        "packets": attempt(lambda: socket.socket(socket.AF_PACKET, socket.SOCK_RAW)),
        "real time": attempt(lambda: os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))),
        "low port": attempt(lambda: socket.create_server(("127.0.0.1", 99))),
    }))
    """
)


def confined(program: str) -> tuple[str, ...]:
    return (sys.executable, confinement.__file__, str(UNITS / f"{program}.service"))


@pytest.fixture
def start_unit(home: Path) -> Iterator[Callable[..., Unit]]:
    units: list[Unit] = []

    def start(program: str, command: str, config: Path, log: Path) -> Unit:
        units.append(Unit([f"{program}.cli", command, "--config", str(config)], log, home, prefix=confined(program)))
        units[-1].start()
        return units[-1]

    yield start
    for unit in reversed(units):
        unit.close()


@pytest.mark.parametrize("program", ["fxgateway", "fxrelay"])
def test_what_the_unit_denies_is_denied_in_these_tests(program: str) -> None:
    """Without this the others would show nothing."""
    told = subprocess.run([*confined(program), sys.executable, "-c", DENIED], capture_output=True, text=True, timeout=60, check=False)
    assert told.returncode == 0, told.stderr
    assert json.loads(told.stdout) == {
        "chown": "EPERM",
        "memory to write and execute": "EPERM",
        "packets": "EAFNOSUPPORT",
        "real time": "EPERM",
        "low port": "EACCES",
    }


@pytest.mark.parametrize(("command", "workers"), [("launch", "1"), ("run", "2")])
def test_a_gateway_serves_within_its_unit(
    make_stack: Callable[..., Stack],
    start_unit: Callable[..., Unit],
    echo_service: Service,
    monkeypatch: pytest.MonkeyPatch,
    command: str,
    workers: str,
) -> None:
    extra = '[log]\naccess = "access.log"\n'
    if supported_abi():
        extra += '[sandbox]\nmode = "required"\n'
    stack = make_stack("echo", extra=extra)
    monkeypatch.setenv("FXGATEWAY__TUNNEL__WORKERS", workers)
    gateway = start_unit("fxgateway", command, stack.gateway_config, stack.directory / "gateway.log")
    monkeypatch.delenv("FXGATEWAY__TUNNEL__WORKERS")
    stack.start_relay("node-a", {"echo": echo_service.target})
    stack.wait_for_relays("node-a")
    with dial(stack.doors["echo"]) as client:
        say(client)
    gateway.reload()
    gateway.restart()
    stack.wait_for_relays("node-a")
    with dial(stack.doors["echo"]) as client:
        say(client)
    assert "fxgateway_memory_bytes" in stack.page("/metrics")
    for log in ("Traceback", "EPERM", "Operation not permitted"):
        assert log not in gateway.log.read_text()


def test_a_relay_does_all_its_work_within_its_unit(
    make_stack: Callable[..., Stack], start_unit: Callable[..., Unit], echo_service: Service, home: Path
) -> None:
    """Pools with scripts of every kind, metrics, counted sessions, what the machine says of itself, and a restart."""
    services = ("js", "py", "sh", "both")
    stack = make_stack(*services)
    stack.start_gateway()
    port = int(echo_service.target.rpartition(":")[2])
    balance = {"js": "js:choose.js", "py": "python:choices:choose", "sh": "exec:choose.sh"}
    pools = "".join(
        f'[[service]]\nname = "{name}"\nhost = "127.0.0.1"\nport = {port}\nbalance = ["{entry}", "builtin:fewest-sessions"]\n'
        for name, entry in balance.items()
    )
    config = stack.write_relay_config("node-a", {"both": echo_service.target, "strange": STRANGE})
    config.write_text(
        config.read_text()
        + pools
        + f'[cluster]\nstore = "sqlite:{home / "cluster.db"}"\npublish_s = 0.5\n'
        + '[node]\nsessions = "exec:sessions.sh"\nmetrics = {queue = "choices:queue"}\n'
    )
    for name, text in FILES.items():
        path = config.parent / name
        path.parent.mkdir(mode=0o700, exist_ok=True)
        path.write_text(text)
        path.chmod(0o700)
    relay = start_unit("fxrelay", "launch", config, stack.directory / "node-a.log")
    for _ in ("started", "restarted"):
        stack.wait_for_relays("node-a")
        for name in services:
            with dial(stack.doors[name]) as client:
                say(client)

        def told() -> dict:
            (node,) = json.loads(stack.relay_cli("node-a", "nodes", "--json").stdout)
            return node["server"]

        wait_until(lambda: told().get("metrics") == {"jobs": 5, "queue": 7}, what=f"metrics: {told()}")
        assert told()["totalmem"] > 0
        assert told()["sessionList"] == [{"owner": "ann"}]
        relay.restart()
    for wrong in ("Traceback", "Operation not permitted", "not supported"):
        assert wrong not in relay.log.read_text()
