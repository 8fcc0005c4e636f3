"""A gateway of several processes, and a look into each."""

import json
from collections.abc import Callable, Mapping
from contextlib import suppress

import psutil

from tests.system.peers import dial, read_exactly
from tests.system.stack import Stack, wait_until

MakeStack = Callable[..., Stack]

NONE: Mapping[str, dict[str, str]] = {}


def gateway_page(stack: Stack) -> dict:
    """What the gateway's status page shows, as soon as it shows anything: on a busy machine that may take a second look."""
    shown: list[str] = []

    def is_shown() -> bool:
        shown[:] = [stack.page("/relays")]
        return bool(shown[0])

    wait_until(is_shown, 60, "the status page")
    return json.loads(shown[0])


def workers(stack: Stack) -> dict[int, dict]:
    """The gateway's processes, as its status page shows them. One that is late with its answer is shown as it was."""
    return {worker["worker"]: worker for worker in gateway_page(stack)["gateway"]["workers"]}


def wait_until_shown(stack: Stack, what: str, count: int) -> None:
    """Until so many are shown in all workers together, of `connections`, say."""
    wait_until(lambda: sum(worker[what] for worker in workers(stack).values()) == count, what=f"{count} {what} in all workers")


def streams(stack: Stack) -> dict[str, int]:
    """The streams of each relay, as the status page shows them."""
    return {relay["relay_id"]: sum(link["streams"] for link in relay["links"]) for relay in gateway_page(stack)["relays"]}


def worker_of(stack: Stack, relay: str) -> int:
    """Which worker has this relay, by the log lines that tell of its control links."""
    found = 0
    for line in (stack.directory / "gateway.log").read_text().splitlines():
        entry = json.loads(line)
        if entry["event"].startswith(f"relay {relay} is here"):
            found = entry["worker"]
    return found


def start(
    make_stack: MakeStack,
    services: dict[str, str],
    relays: int,
    count: int = 2,
    extra: str = "",
    other: Mapping[str, dict[str, str]] = NONE,
) -> Stack:
    """A gateway of so many workers, and so many relays with all these services, but for those that have others."""
    stack = make_stack(*services, extra=extra)
    stack.start_gateway({"FXGATEWAY__TUNNEL__WORKERS": str(count)})
    names = [f"node-{number}" for number in range(relays)]
    daemons = [(name, stack.write_relay_config(name, other.get(name, services)), stack.launch_relay(name)) for name in names]
    for _, _, daemon in daemons:
        daemon.wait_ready()
    stack.wait_for_relays(*names)

    def all_know() -> bool:
        found = workers(stack).values()
        return len(found) == count and all(worker["relays"] + worker["far_relays"] == relays for worker in found)

    wait_until(all_know, 60, "every worker knows every relay")
    return stack


def say(port: int, word: bytes = b"hello") -> None:
    """A client of an echo."""
    with dial(port, 60) as client:
        client.sendall(word)
        assert read_exactly(client, len(word)) == word


def taken(process: psutil.Process, port: int) -> int:
    """Connections to this port that the process has accepted."""
    return sum(bool(connection.raddr) and connection.laddr.port == port for connection in process.net_connections())


def is_worker(process: psutil.Process) -> bool:
    """Whether a child of a gateway runs its program by now."""
    with suppress(psutil.Error):  # it may end between two looks
        return "fxgateway.workers.worker" in process.cmdline()
    return False


def until_gone(pids: list[int], timeout_s: float = 30.0) -> None:
    """Until none of these processes is left."""

    def gone() -> bool:
        return not any(is_alive(pid) for pid in pids)

    wait_until(gone, timeout_s, f"{pids} to end")


def is_alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat", encoding="ascii", errors="replace") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
