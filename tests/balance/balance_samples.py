"""Servers, requests and an environment to balance with, and the real script processes in a directory of their own."""

import json
import os
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import trio

from fxrelay.balance.chain import decide
from fxrelay.balance.entries import Script, Scripts
from fxrelay.balance.filters import Pool
from fxrelay.balance.model import Action, Candidate, ChainEntry, Decision, Failed, Request, Verdict
from fxrelay.balance.workers import ScriptLimits, Workers
from fxrelay.cluster.members import Member, MemberState
from fxrelay.cluster.server import ServerObject, parse_server
from fxtunnel.model import RelayId

GB = 1 << 30
LOGIN = Request(Action.LOGIN, "desk", "ann")
START = Request(Action.START, "desk", "ann")
DESK = Pool("desk")
PATIENCE_S = 30.0


def server_text(server_id: str = "a", **fields: Any) -> str:
    agent = {"instanceId": f"i-{server_id}", "startedAt": 1, "tunnels": [{"gatewayId": each} for each in fields.pop("gateways", ())]}
    services = [{"name": "desk", "port": 5901}]
    return json.dumps({"serverId": server_id, "seq": 1, "measuredAt": 2_000, "agent": agent, "services": services} | fields)


def server(server_id: str = "a", **fields: Any) -> ServerObject:
    return parse_server(server_text(server_id, **fields))


def candidate(server_id: str = "a", in_flight: int = 0, **fields: Any) -> Candidate:
    return Candidate(server(server_id, **fields), in_flight)


def candidates(*server_ids: str) -> list[Candidate]:
    return [candidate(server_id) for server_id in server_ids]


def member(
    server_id: str = "a",
    state: MemberState = MemberState.UP,
    *,
    is_drained: bool = False,
    disabled: frozenset[str] = frozenset(),
    **fields: Any,
) -> Member:
    return Member(server(server_id, **fields), state, 0.0, is_drained, disabled)


def ids(*server_ids: str) -> tuple[RelayId, ...]:
    return tuple(map(RelayId, server_ids))


class Here:
    """An environment with a counter of its own."""

    def __init__(self, local_id: str = "a") -> None:
        self.local_id = RelayId(local_id)
        self.counters: dict[str, int] = {}

    async def next_number(self, counter: str) -> int:
        await trio.lowlevel.checkpoint()
        self.counters[counter] = self.counters.get(counter, 0) + 1
        return self.counters[counter]


@dataclass
class Says:
    """An entry that always says the same, and keeps what it was asked."""

    verdict: Verdict
    name: str = "says"

    def __post_init__(self) -> None:
        self.asked: list[list[str]] = []
        self.requests: list[Request] = []

    async def choose(self, request: Request, candidates: Sequence[Candidate], environment: Any) -> Verdict:
        await trio.lowlevel.checkpoint()
        self.requests.append(request)
        self.asked.append([candidate.server_id for candidate in candidates])
        return self.verdict


@contextmanager
def no_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No thread can be started, as at a limit of tasks or of memory, and none is idle."""

    def fails(*_: object) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr("trio._core._thread_cache.THREAD_CACHE", SimpleNamespace(start_thread_soon=fails))
        yield


class Bench:
    """Scripts in a directory, and decisions made with them."""

    def __init__(self, directory: Path, limits: ScriptLimits) -> None:
        self.directory = directory
        self.scripts = Scripts(limits, directory / "site.toml")

    @property
    def workers(self) -> Workers:
        entry = self.entry("python:none:none")
        assert isinstance(entry, Script)
        return entry.workers

    def write(self, name: str, text: str | bytes, mode: int = 0o755) -> Path:
        path = self.directory / name
        path.write_bytes(text.encode() if isinstance(text, str) else text)
        path.chmod(mode)
        return path

    def js(self, text: str, name: str = "choose.js") -> ChainEntry:
        self.write(name, text, 0o644)
        return self.entry(f"js:{name}")

    def sh(self, text: str, name: str = "choose.sh") -> ChainEntry:
        self.write(name, f"#!/bin/sh\n{text}\n")
        return self.entry(f"exec:{name}")

    def entry(self, spec: str) -> ChainEntry:
        (entry,) = self.scripts.chain([spec], "desk", {})
        return entry

    async def ask(self, entry: ChainEntry, request: Request = LOGIN, among: Sequence[Candidate] | None = None) -> Verdict:
        with trio.fail_after(PATIENCE_S):
            return await entry.choose(request, candidates("a", "b") if among is None else among, Here())

    async def decide(self, *entries: ChainEntry, among: Sequence[Candidate] | None = None) -> Decision:
        with trio.fail_after(PATIENCE_S):
            return await decide(entries, LOGIN, candidates("a", "b") if among is None else among, (), Here())


@asynccontextmanager
async def open_bench(directory: Path, limits: ScriptLimits | None = None) -> AsyncIterator[Bench]:
    bench = Bench(directory, limits or ScriptLimits(timeout_s=20.0))
    try:
        yield bench
    finally:
        bench.scripts.close()


def failed(verdict: Verdict) -> Failed:
    assert isinstance(verdict, Failed), verdict
    return verdict


def is_running(pid: int) -> bool:
    """Whether there is such a process, other than one that has ended and waits to be collected."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


async def eventually(condition: Callable[[], bool], wait_s: float = PATIENCE_S) -> None:
    with trio.fail_after(wait_s):
        while not condition():
            await trio.sleep(0.02)


def worker_pids(parent: int | None = None) -> set[int]:
    """Script processes that a process has started."""
    found = set()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                ppid = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                command = (entry / "cmdline").read_bytes()
            except OSError:
                continue
            if ppid == (parent or os.getpid()) and b"worker_main" in command and is_running(int(entry.name)):
                found.add(int(entry.name))
    return found
