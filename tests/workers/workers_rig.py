"""A gateway of several processes, and a look into each."""

import json
from collections.abc import Callable, Mapping

import psutil

from tests.system.peers import dial, read_exactly
from tests.system.stack import Stack, wait_until

MakeStack = Callable[..., Stack]

NONE: Mapping[str, dict[str, str]] = {}


def workers(stack: Stack) -> dict[int, dict]:
    """The gateway's processes, as its status page shows them; empty while it shows nothing."""
    return {
        worker["worker"]: worker for worker in json.loads(stack.page("/relays") or '{"gateway": {"workers": []}}')["gateway"]["workers"]
    }


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
        workers = json.loads(stack.page("/relays") or '{"gateway": {"workers": []}}')["gateway"]["workers"]
        return len(workers) == count and all(worker["relays"] + worker["far_relays"] == relays for worker in workers)

    wait_until(all_know, what="every worker knows every relay")
    return stack


def say(port: int, word: bytes = b"hello") -> None:
    """A client of an echo."""
    with dial(port) as client:
        client.sendall(word)
        assert read_exactly(client, len(word)) == word


def taken(process: psutil.Process, port: int) -> int:
    """Connections to this port that the process has accepted."""
    return sum(bool(connection.raddr) and connection.laddr.port == port for connection in process.net_connections())


def until_gone(pids: list[int], timeout_s: float = 10.0) -> None:
    """Until none of these processes is left."""

    def gone() -> bool:
        return not any(_is_alive(pid) for pid in pids)

    wait_until(gone, timeout_s, f"{pids} to end")


def _is_alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat", encoding="ascii", errors="replace") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
