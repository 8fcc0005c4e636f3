"""Scripts that are asked from the reactor: the same decisions without a task, lists that are only edited, processes that go wrong."""

import errno
import os
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import trio
from balance_samples import PATIENCE_S, Bench, ids, no_threads, open_bench, server_text

from fxrelay.balance.chain import builtin
from fxrelay.balance.chooser import Balancing, PoolChooser
from fxrelay.balance.environment import ClusterEnvironment
from fxrelay.balance.filters import Pool
from fxrelay.balance.model import ChainEntry
from fxrelay.balance.path_rules import PathRules
from fxrelay.balance.script_process import ScriptProcess
from fxrelay.balance.workers import PROCESSES, ScriptLimits
from fxrelay.cluster.members import Ages
from fxrelay.cluster.ports import SERVERS, Message
from fxrelay.cluster.threads import Threads
from fxrelay.cluster.view import ClusterView
from fxrelay.delivery.ports import Node, NoNode, Wanted
from fxtunnel.engine.reactor import Reactor
from fxtunnel.model import GatewayId, RelayId, ServiceName

pytestmark = pytest.mark.xdist_group("balance-workers")
DESK = ServiceName("desk")
WANTED = Wanted(DESK, "192.0.2.1:5", GatewayId("gw"), "t1")
SHOWS = "(i) => { throw new Error(i.servers.map((s) => s.serverId + s.sessions + (s.inflight ? '+' + s.inflight : '')).join()) }"


class NullListener:
    """A store that does nothing."""

    def add(self, counter: str, amount: int) -> int:
        return amount


class Desk:
    """A chooser whose scripts are asked from a reactor."""

    def __init__(self, bench: Bench, reactor: Reactor) -> None:
        self.bench = bench
        self.view = ClusterView(Ages(), time.monotonic)
        self.view.store_said(1_000_000)
        self.seq = 1
        path_rules = PathRules(RelayId("a"), ("local", "redirect", "direct"), force_indirect=False, networks=(), address="10.0.0.1")
        environment = ClusterEnvironment(RelayId("a"), NullListener(), Threads())  # as much of it as is used
        self.chooser = PoolChooser(self.view, path_rules, environment, lambda event, placement: None, "i" * 40)
        bench.scripts.use_reactor(reactor)
        for number, name in enumerate("abcd"):
            self.hear(name, sessions=number)
        for number in range(20):  # among few, all are read anew for one that changes
            self.hear(f"x{number}", disable=["start"])

    def use(self, *chain: ChainEntry) -> None:
        self.chooser.reconfigure({DESK: Balancing(Pool("desk"), chain)})

    def hear(self, name: str, **fields: Any) -> None:
        self.seq += 1
        self.view.hear(Message(SERVERS, server_text(name, seq=self.seq, gateways=["gw"], **fields)))

    async def soon(self, meanwhile: Callable[[], None] = lambda: None) -> Node | NoNode | None:
        """What `choose_soon` says, which must be possible."""
        told = list[Node | NoNode | None]()
        asking = self.chooser.choose_soon(WANTED, told.append)
        assert asking is not None
        assert not told
        meanwhile()
        await until(lambda: bool(told))
        asking.cancel()
        (answer,) = told
        return answer

    async def shown(self) -> str:
        answer = await self.soon()
        assert isinstance(answer, NoNode)
        return answer.message

    def processes(self) -> list[int]:
        found = list[int]()
        for child in psutil.Process().children():
            with suppress(psutil.NoSuchProcess):  # it may end between two looks
                if "worker_main" in " ".join(child.cmdline()):
                    found.append(child.pid)
        return found


async def until(is_so: Callable[[], bool]) -> None:
    with trio.fail_after(PATIENCE_S):
        while not is_so():
            await trio.sleep(0.005)


@asynccontextmanager
async def open_desk(directory: Path, timeout_s: float = 20.0) -> AsyncIterator[Desk]:
    reactor = Reactor()
    try:
        async with open_bench(directory, ScriptLimits(timeout_s=timeout_s)) as bench, trio.open_nursery() as nursery:
            nursery.start_soon(reactor.run_in_task)
            yield Desk(bench, reactor)
            bench.scripts.close()
            nursery.cancel_scope.cancel()
    finally:
        reactor.close()


async def warm(desk: Desk) -> None:
    told = list[Any]()
    assert desk.chooser.choose_soon(WANTED, told.append) is None, "a process is started by a task"
    answer = await desk.chooser.choose(WANTED, frozenset())
    if isinstance(answer, Node):
        answer.claim.release()
    assert not told


async def test_what_is_asked_from_the_reactor_is_what_a_task_would_ask(tmp_path: Path) -> None:
    pytest.importorskip("_quickjs")
    async with open_desk(tmp_path) as desk:
        desk.use(desk.bench.js(SHOWS))
        await warm(desk)
        assert await desk.shown() == "a0,b1,c2,d3"
        desk.hear("c", sessions=9)
        assert await desk.shown() == "a0,b1,c9,d3", "only what has changed was sent"
        desk.hear("bb", sessions=5)
        desk.hear("d", sessions=4, disable=["start"])
        assert await desk.shown() == "a0,b1,bb5,c9"
        desk.hear("d", sessions=4)
        claims = [desk.chooser._claim(RelayId("bb")) for _ in range(2)]
        assert await desk.shown() == "a0,b1,bb7+2,c9,d4"
        for claim in claims:
            claim.release()
        assert await desk.shown() == "a0,b1,bb5,c9,d4"
        answer = await desk.chooser.choose(WANTED, frozenset([RelayId("b")]))
        assert isinstance(answer, NoNode)
        assert answer.message == "a0,bb5,c9,d4", "a list that is not kept goes beside it"
        desk.hear("a", sessions=6)
        assert await desk.shown() == "a6,b1,bb5,c9,d4"
        assert (desk.bench.workers.started, desk.chooser.decisions) == (1, 8)
        assert desk.chooser.failures == {"Error": 8}


async def test_a_chain_goes_on_after_a_script(tmp_path: Path) -> None:
    pytest.importorskip("_quickjs")
    async with open_desk(tmp_path) as desk:
        few = builtin("fewest-sessions", "desk")
        assert few is not None
        first = desk.bench.js("(i) => i.servers.filter((s) => s.sessions > 0)")
        desk.use(first, desk.bench.js("(i) => i.servers.slice(1).reverse()", "2.js"), few)
        await warm(desk)
        answer = await desk.soon()
        assert isinstance(answer, Node)
        assert (answer.server_id, len(desk.view.in_flight)) == ("c", 1)
        answer.claim.release()

        def leave() -> None:
            desk.hear("c", sessions=2, disable=["start"])
            assert desk.chooser.choose_soon(WANTED, lambda _: None) is None, "this one sees it, and finds no process"

        answer = await desk.soon(leave)
        assert isinstance(answer, Node)
        assert answer.server_id == "d", "the other takes no starts any more when the second script is asked"
        answer.claim.release()
        desk.use(desk.bench.js("(i) => 'c'", "3.js"))
        answer = await desk.soon()
        assert isinstance(answer, NoNode)
        assert answer.name == "UnknownServer"


async def test_processes_that_the_reactor_cannot_listen_to_are_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with open_desk(tmp_path) as desk:
        desk.bench.write("site_rules.py", "def choose(input): return 'c'\n")
        desk.use(desk.bench.entry("python:site_rules:choose"))

        def fail(*_: object) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # fs.epoll.max_user_watches

        for _ in range(PROCESSES + 1):
            await warm(desk)
            with monkeypatch.context() as patch:
                patch.setattr(Reactor, "register", fail)
                assert desk.chooser.choose_soon(WANTED, lambda _: None) is None
        await warm(desk)
        answer = await desk.soon()
        assert isinstance(answer, Node)
        answer.claim.release()
        assert len(desk.processes()) == 1


async def test_of_a_list_with_full_servers_retries_and_what_an_entry_left_over_only_edits_travel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("_quickjs")
    sent: list[int] = []
    pack = ScriptProcess.pack

    def noted(worker: ScriptProcess, servers: Any) -> bytes:
        packed = pack(worker, servers)
        sent.append(len(packed))
        return packed

    monkeypatch.setattr(ScriptProcess, "pack", noted)
    async with open_desk(tmp_path) as desk:
        for number in range(300):
            desk.hear(f"n{number:03}", sessions=50)
        few = "(i) => i.servers.filter((s) => s.sessions < 50).reverse()"
        desk.use(desk.bench.js(few), desk.bench.js("(i) => {}", "2.js"), desk.bench.js(SHOWS, "3.js"))
        await warm(desk)
        assert len(sent) == 3
        assert (sent[0] > 30_000, max(sent[1:]) < 100) == (True, True)
        sent.clear()
        assert await desk.shown() == "d3,c2,b1,a0"
        desk.hear("c", sessions=2, maxSessions=2)
        assert await desk.shown() == "d3,b1,a0"
        desk.hear("b", sessions=1, maxSessions=2)
        assert await desk.shown() == "d3,b1,a0"
        assert max(sent) < 600, "no list of three hundred, but the text of c and then of b"
        sent.clear()
        claim = desk.chooser._claim(RelayId("b"))
        assert await desk.shown() == "d3,a0", "the one on its way fills it"
        other = desk.chooser._claim(RelayId("d"))
        claim.release()
        assert await desk.shown() == "d4+1,b1,a0"
        other.release()
        answer = await desk.chooser.choose(WANTED, frozenset(ids("a", "b")))
        assert isinstance(answer, NoNode)
        assert answer.message == "d3"
        assert max(sent) < 100
        sent.clear()

        def change() -> None:
            desk.hear("d", sessions=7)
            desk.hear("aa", sessions=1)
            assert desk.chooser.choose_soon(WANTED, lambda _: None) is None, "this one sees it, and finds no process"

        answer = await desk.soon(change)
        assert isinstance(answer, NoNode)
        assert answer.message == "d7,b1,a0", "those that the first left over, as they are when the second is asked"
        assert desk.bench.workers.started == 1


async def test_executables_and_python_functions_are_asked_as_well(tmp_path: Path) -> None:
    async with open_desk(tmp_path) as desk:
        desk.bench.write("mine.py", "def choose(given):\n    return given['servers'][2]['serverId']\n", 0o644)
        for entry in (desk.bench.sh("cat > /dev/null; echo c"), desk.bench.entry("python:mine:choose")):
            desk.use(entry)
            await warm(desk)
            answer = await desk.soon()
            assert isinstance(answer, Node)
            assert answer.server_id == "c"
            answer.claim.release()


HANGS = "import time, os, signal, socket\ndef choose(given):\n    if len(given['servers']) > 4:\n        {}\n    return ''\n"


@pytest.mark.parametrize(
    ("body", "name"),
    [
        ("signal.signal(signal.SIGALRM, signal.SIG_IGN); time.sleep(60)", "ScriptTimeout"),
        ("os.write(2, b'my last words'); os._exit(3)", "ScriptDied"),
        ("import sys; socket.socket(fileno=int(sys.argv[1])).detach(); os.write(int(sys.argv[1]), b'x' * 99); time.sleep(9)", "BadReturn"),
    ],
)
async def test_a_process_that_goes_wrong_is_replaced(tmp_path: Path, body: str, name: str, caplog: pytest.LogCaptureFixture) -> None:
    async with open_desk(tmp_path, timeout_s=0.5) as desk:
        desk.bench.write("mine.py", HANGS.format(body), 0o644)
        desk.use(desk.bench.entry("python:mine:choose"))
        await warm(desk)
        (first,) = desk.processes()
        desk.hear("e")
        answer = await desk.soon()
        assert isinstance(answer, NoNode)
        assert (answer.name, "t1" in answer.text) == (name, True)
        if name == "ScriptDied":
            assert "my last words" in caplog.text
        await until(lambda: first not in desk.processes())
        assert desk.chooser.choose_soon(WANTED, lambda _: None) is None, "none is warm"


async def test_who_gives_up_kills_the_process(tmp_path: Path) -> None:
    async with open_desk(tmp_path) as desk:
        desk.bench.write("mine.py", HANGS.format("time.sleep(60)"), 0o644)
        desk.use(desk.bench.entry("python:mine:choose"))
        await warm(desk)
        (first,) = desk.processes()
        desk.hear("e")
        told = list[Any]()
        asking = desk.chooser.choose_soon(WANTED, told.append)
        assert asking is not None
        assert desk.chooser.choose_soon(WANTED, told.append) is None, "it has one process, which is busy"
        asking.cancel()
        asking.cancel()
        await until(lambda: first not in desk.processes())
        assert (told, len(desk.view.in_flight)) == ([], 0)


async def test_without_a_thread_a_script_that_goes_wrong_is_answered_for_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with open_desk(tmp_path) as desk:
        desk.bench.write("mine.py", HANGS.format("os._exit(3)"), 0o644)
        desk.use(desk.bench.entry("python:mine:choose"))
        await warm(desk)
        (first,) = desk.processes()
        desk.hear("e")
        with no_threads(monkeypatch):
            answer = await desk.soon()
            assert isinstance(answer, NoNode)
            assert answer.name == "ScriptDied"
            assert first not in desk.processes()
        answer = await desk.chooser.choose(WANTED, frozenset())
        assert isinstance(answer, NoNode)
        assert answer.name == "ScriptDied"


async def test_without_a_thread_who_gives_up_kills_the_process_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with open_desk(tmp_path) as desk:
        desk.bench.write("mine.py", HANGS.format("time.sleep(60)"), 0o644)
        desk.use(desk.bench.entry("python:mine:choose"))
        await warm(desk)
        (first,) = desk.processes()
        desk.hear("e")
        asking = desk.chooser.choose_soon(WANTED, lambda _: None)
        assert asking is not None
        with no_threads(monkeypatch):
            asking.cancel()
        assert first not in desk.processes()


async def test_closing_ends_a_process_that_was_asked(tmp_path: Path) -> None:
    async with open_desk(tmp_path) as desk:
        desk.bench.write("mine.py", HANGS.format("time.sleep(60)"), 0o644)
        desk.use(desk.bench.entry("python:mine:choose"))
        await warm(desk)
        desk.hear("e")
        assert desk.chooser.choose_soon(WANTED, lambda _: None) is not None
        desk.bench.scripts.close()
        assert desk.processes() == []
