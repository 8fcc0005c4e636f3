"""R10: an exception at every await of what keeps workers alive and in step. The other workers do not notice, and no process is left."""

import contextlib
import logging
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import trio
from click.testing import CliRunner
from sabotage import FAULTS, LIMIT, lines_about, sabotage

from fxgateway.cli import main
from fxgateway.settings import load
from fxgateway.workers import child as child_module
from fxgateway.workers import parent as parent_module
from fxgateway.workers.channel import Channel, Message
from fxgateway.workers.child import Child, SpawnPayload
from fxgateway.workers.parent import Parent
from fxtunnel.engine.reactor import Reactor
from fxtunnel.errors import FxError
from fxtunnel.kit import process
from fxtunnel.kit.notify import Notifier

STAND_IN = """
import json, os, socket, sys
line = socket.socket(fileno=int(sys.argv[1]))
line.setblocking(True)
data = b""
with open(f"{sys.argv[2]}/{os.getpid()}", "w", buffering=1) as told:
    while packet := line.recv(65536):
        data += packet[1:]
        if packet[:1] == b"\\0":
            message, data = json.loads(data), b""
            print(message["op"], file=told)
            if message["op"] == "begin":
                line.send(b'\\0{"op": "prepared"}')
            elif message["op"] == "go":
                line.send(b'\\0{"op": "ready"}')
            elif message["op"] == "stop":
                line.send(b'\\0{"op": "closed"}')
                break
            elif "n" in message:
                line.send(b"\\0" + json.dumps({"op": "answer", "n": message["n"], "problems": []}).encode())
"""
"""A process that says what a worker says, and is there in no time. What it is told is in a file that is called as its pid."""


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Every process that is started. One that is hit while it is made, or not waited for, is dropped: it is waited for here."""
    made: list[subprocess.Popen[bytes]] = []

    class Kept(subprocess.Popen[bytes]):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            made.append(self)

    monkeypatch.setattr(subprocess, "Popen", Kept)
    yield made
    for each in made:
        each.kill()
        each.wait()


@pytest.fixture
def told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, made: list[subprocess.Popen[bytes]]) -> Path:
    """Workers are stand-ins; the folder of what they were told."""
    script, folder, open_process = tmp_path / "stand_in.py", tmp_path / "told", trio.lowlevel.open_process
    script.write_text(STAND_IN)
    folder.mkdir()

    async def opening(command: list[str], **options: object) -> trio.Process:
        return await open_process([sys.executable, "-E", "-S", str(script), command[-1], str(folder)], **options)  # as trio has it

    monkeypatch.setattr(trio.lowlevel, "open_process", opening)
    monkeypatch.setattr(child_module, "FIRST_BACKOFF_S", 0.01)
    monkeypatch.setattr(child_module, "LOOK_S", 0.02)
    monkeypatch.setattr(process, "PAUSE_S", 0.01)
    return folder


@pytest.fixture
def reactor() -> Iterator[Reactor]:
    reactor = Reactor()
    yield reactor
    reactor.close()


def stand_ins() -> list[psutil.Process]:
    """Those that run."""
    found: list[psutil.Process] = []
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.NoSuchProcess):  # it may end between two looks
            if child.status() != psutil.STATUS_ZOMBIE and "stand_in" in str(child.cmdline()):
                found.append(child)
    return found


async def until(condition: Callable[[], bool]) -> None:
    with trio.fail_after(60):
        while not condition():
            await trio.sleep(0.005)


class Home:
    """A parent of one."""

    def __init__(self, reactor: Reactor) -> None:
        self.reactor = reactor
        self.child = Child(1, self, self)
        self.begun: list[int] = []
        self.died_ = 0

    def payload(self, number: int) -> SpawnPayload:
        return SpawnPayload({"op": "begin"}, [])

    def introduce(self, child: Child) -> None:
        self.begun.append(child.pid)

    def died(self, child: Child) -> None:
        self.died_ += 1

    def on_message(self, channel: Channel, message: Message, sockets: list[socket.socket]) -> None:
        if message["op"] == "prepared":
            self.child.take_turn()
        elif message["op"] == "ready":
            self.child.became_ready()

    def on_gone(self, channel: Channel) -> None:
        pass

    async def live(self) -> None:
        """The worker is ready, is killed twice, and is told to stop. FxError if it does not start."""
        async with trio.open_nursery() as nursery:
            await nursery.start(self.child.run)
            for _ in range(2):
                await until(lambda: self.child.is_ready)
                await trio.sleep(0.05)  # is watched
                before = self.child.pid
                if before:
                    os.kill(before, signal.SIGKILL)
                await until(lambda before=before: self.child.is_ready and self.child.pid != before)
            self.child.stop()


async def test_a_worker_is_kept_alive(reactor: Reactor, told: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR)
    starts, fails, places = 0, 0, set()
    for nth in range(1, LIMIT):
        home = Home(reactor)
        fault = FAULTS[nth % len(FAULTS)]
        with sabotage(nth, "Child.run", faults=[fault]) as done:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(reactor.run_in_task)
                try:
                    await home.live()
                    starts += 1
                except* FxError:  # it did not start
                    fails += 1
                nursery.cancel_scope.cancel()
        where = [tree.where for tree in done.hit]
        places.update(place.rpartition(" ")[2] for place in where)
        assert home.died_ == len(home.begun), where
        assert len(home.begun) <= (4 if "_report" in str(where) else 3), where  # what is only not watched lives
        await until(lambda: not stand_ins())
        assert all(len(lines_about(tree.fault, caplog)) <= 1 for tree in done.hit), where
        caplog.clear()
        if not done.hit:
            break
    assert starts > 10
    assert fails <= 4  # at the first start, which an administrator sees
    assert places >= {"Child._live_after", "Child._start", "Child._watch"}


async def test_a_reload_fails_for_all_or_for_none(
    reactor: Reactor, told: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO)
    for name, value in (("TUNNEL__LISTEN", "127.0.0.1:0"), ("ADMIN__LISTEN", "127.0.0.1:0"), ("TUNNEL__WORKERS", "2")):
        monkeypatch.setenv(f"FXGATEWAY__{name}", value)
    monkeypatch.setattr(parent_module, "settle", lambda: None)
    monkeypatch.setattr(parent_module.logs, "configure", lambda *_: None)
    folder = tmp_path / "gw"
    made = CliRunner().invoke(main, ["init", "--dir", str(folder), "--public-url", "wss://127.0.0.1:8443"])
    assert made.exit_code == 0, made.output
    path = folder / "gateway.toml"
    hits = 0
    for nth in range(1, LIMIT):
        parent = Parent(reactor, load(path, os.environ), path, Notifier())
        with sabotage(nth, "Reloads.run", faults=[FAULTS[nth % len(FAULTS)]]) as done:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(reactor.run_in_task)
                async with trio.open_nursery() as serving:
                    serving.start_soon(parent.serve)
                    await until(lambda parent=parent: bool(parent._facts.listening))
                    killed = 0
                    for _ in range(2):  # one of them is hit
                        killed += await reload(parent, caplog)
                        # Who was killed may still look as if it were there; the next reload would have it started once more.
                        await until(lambda parent=parent, killed=killed: sum(parent._facts.restarts.values()) >= killed)
                        await until(lambda parent=parent: all(knows_what_holds(told, child) for child in parent._children.values()))
                    assert sum(parent._facts.restarts.values()) <= 1, done.hit
                    parent._stop.set()
                nursery.cancel_scope.cancel()
        hits += len(done.hit)
        await until(lambda: not stand_ins())
        if not done.hit:
            break
    assert hits > 10


def knows_what_holds(told: Path, child: Child) -> bool:
    """Whatever it has prepared for has been done, or given up."""
    if not child.is_ready or not child.pid:
        return False
    orders = (told / str(child.pid)).read_text().split()
    return orders.count("prepare") == orders.count("commit") + orders.count("abandon")


async def reload(parent: Parent, caplog: pytest.LogCaptureFixture) -> int:
    """Ask for it until it is done with, or was refused; how many workers it has killed."""
    caplog.clear()
    parent._reloads.ask()
    await until(lambda: any(word in caplog.text for word in ("reloaded", "refused", "the reload failed", "waiting for reloads failed")))
    killed = caplog.text.count("is started again: ")
    caplog.clear()
    return killed
