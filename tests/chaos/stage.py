"""Where faults are played: real daemons, services and clients as processes of their own, and what is asked of them meanwhile."""

import json
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any, Self, TypeVar

import psutil

from examples.cutter import Cutter
from tests.chaos.figures import Outcome, today
from tests.chaos.load import End, Order
from tests.ports import free_port
from tests.system.peers import is_served
from tests.system.stack import Stack, wait_until

ANSWER_S = 90.0
MIB = 1 << 20
LIVELY = "[liveness]\nheartbeat_s = 1\ndead_after_s = 3\n"
LIVELY_RELAY = "[liveness]\ndead_after_s = 3\n"


class Scale(Enum):
    """How much of a fault is played: all of it, or what guards the main branch in a few seconds."""

    SHORT = "short"
    FULL = "full"


T = TypeVar("T")
Show = Callable[[str, float], None]
"""Told what goes on, and how much of the fault is over (0 to 1)."""


class Unplayable(Exception):
    """This machine lacks what the fault needs; says what."""


@dataclass(frozen=True, slots=True)
class Fault:
    """`expected` is one line for people; `run` adds figures with their bounds, and raises AssertionError for what has no figure."""

    name: str
    expected: str
    run: Callable[["Stage", Outcome], None]


class Helper:
    """A process of `tests.chaos.load`, or of another module that talks as it does."""

    def __init__(self, arguments: list[str], log: Path, module: str = "tests.chaos.load") -> None:
        self._log = log
        self._lines: list[str] = []
        with log.open("ab") as errors:
            self.process = subprocess.Popen(
                [sys.executable, "-m", module, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True
            )
        self.told = self.heard()

    def heard(self, timeout_s: float = ANSWER_S) -> dict[str, Any]:
        """The next line it says."""
        lines: list[str] = []
        reader = threading.Thread(target=lambda: lines.append(self.process.stdout.readline()), daemon=True)
        reader.start()
        reader.join(timeout_s)
        if not lines or not lines[0]:
            raise AssertionError(f"the load says nothing (exit {self.process.poll()}): {self._log.read_text()[-2000:]}")
        return json.loads(lines[0])

    def ask(self, word: str = "?", timeout_s: float = ANSWER_S) -> dict[str, Any]:
        """Say a word, and what it answers."""
        self.process.stdin.write(word + "\n")
        self.process.stdin.flush()
        return self.heard(timeout_s)

    def close(self) -> None:
        """End it."""
        self.process.kill()
        self.process.wait()
        with suppress(BrokenPipeError):  # what it was to be told last
            self.process.stdin.close()
        self.process.stdout.close()


class Load(Helper):
    """Clients that check every byte."""

    def __init__(self, order: Order, log: Path) -> None:
        super().__init__(["clients", json.dumps(asdict(order))], log)
        self.streams = order.streams

    @property
    def running(self) -> int:
        """Streams that have begun."""
        return self.ask()["running"]

    @property
    def moving(self) -> int:
        """Streams in mid-transfer: something has arrived, and not all."""
        return self.ask()["moving"]

    def wait_running(self, count: int | None = None) -> None:
        """Until so many have begun, all by default."""
        wait_until(lambda: self.running >= (count or self.streams), 60, "streams in transfer")

    def wait_moving(self, count: int) -> None:
        """Until so many are in mid-transfer."""
        wait_until(lambda: self.moving >= count, 60, "streams in mid-transfer")

    def finish(self) -> dict[str, Any]:
        """Let what runs be the last; the whole tally."""
        return self.ask("finish")


class Straight(Cutter):
    """In a cutter's place: relays dial the gateway itself, and are refused as soon as nobody listens there."""

    def __init__(self, port: int) -> None:
        self.port = port

    def start(self, target_port: int) -> None:
        """Nothing is between."""

    def close(self) -> None:
        """Nothing was."""


@dataclass
class Stage:
    """Everything one fault has started; ended when the block ends, and the logs looked through."""

    scale: Scale
    show: Show
    minutes: float = 20.0
    directory: Path = field(default_factory=lambda: Path(tempfile.mkdtemp(prefix="fx-")))
    stacks: list[Stack] = field(default_factory=list)
    _exits: ExitStack = field(default_factory=ExitStack)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        try:
            for stack in self.stacks:
                stack.stop()
        finally:
            self._exits.close()
            shutil.rmtree(self.directory, ignore_errors=True)

    def pick(self, short: T, full: T) -> T:
        """What the scale asks for."""
        return short if self.scale is Scale.SHORT else full

    def later(self, close: Callable[[], object]) -> None:
        """Call it in the end."""
        self._exits.callback(close)

    def stack(self, *services: str, extra: str = "") -> Stack:
        """A gateway's directory with a door for each service; nothing runs yet."""
        return self._add({service: free_port() for service in services}, extra, Cutter(), free_port())

    def straight(self, *services: str, extra: str = "") -> Stack:
        """As `stack`, with nothing between relays and gateway."""
        port = free_port()
        return self._add({service: free_port() for service in services}, extra, Straight(port), port)

    def _add(self, doors: dict[str, int], extra: str, between: Cutter, tunnel_port: int) -> Stack:
        stack = Stack(self.directory / f"s{len(self.stacks)}", doors, extra, between, tunnel_port)
        self.stacks.append(stack)
        return stack

    def services(self, *wanted: str) -> tuple[Helper, list[str]]:
        """Services of these kinds (`swap`, `echo`, `source`), or `host:port=kind`; and their addresses."""
        entries = [entry if "=" in entry else f"127.0.0.1:0={entry}" for entry in wanted]
        helper = Helper(["serve", *entries], self.directory / "services.log")
        self.later(helper.close)
        return helper, helper.told["targets"]

    def load(self, port: int, streams: int, **more: Any) -> Load:
        """Clients at a door."""
        load = Load(Order(port, streams, **more), self.directory / "load.log")
        self.later(load.close)
        return load

    def plain(self, *, extra: str = LIVELY, relay: str = LIVELY_RELAY, env: dict[str, str] | None = None) -> "Plain":
        """A gateway, a relay, and services swap and echo. `env`: more of the daemons' environment."""
        services, (swap, echo) = self.services("swap", "echo")
        stack = self.stack("swap", "echo", extra=extra)
        stack.start_gateway(env)
        stack.start_relay("node-a", {"swap": swap, "echo": echo}, relay, env)
        stack.wait_for_relays("node-a")
        return Plain(stack, services)

    def check_logs(self) -> None:
        """No error of ours, whatever happened."""
        for stack in self.stacks:
            text = stack.logs()
            assert "Traceback" not in text, text[text.index("Traceback") - 500 :][:3000]


@dataclass(frozen=True, slots=True)
class Plain:
    """The simplest stack."""

    stack: Stack
    services: Helper

    @property
    def swap(self) -> int:
        """The door of `swap`."""
        return self.stack.doors["swap"]

    @property
    def echo(self) -> int:
        """The door of `echo`."""
        return self.stack.doors["echo"]


def judge(outcome: Outcome, tally: dict[str, Any], services: Helper, *, lost: str = "= 0", title: str = "") -> None:
    """The figures that every load has: none of its streams may have ended wrongly; `lost` bounds those that were reset."""
    problems = services.ask()["problems"]
    ends = tally["ends"]
    if problems:
        outcome.error = "; ".join(problems)
    outcome.add(f"{title}streams right", ends.get(End.RIGHT, 0), "> 0" if lost == "= 0" else "")
    outcome.add(f"{title}reset in transfer", ends.get(End.RESET, 0), lost)
    outcome.add(f"{title}wrong bytes", ends.get(End.WRONG, 0), "= 0")
    outcome.add(f"{title}clean ends too early", ends.get(End.CUT_SHORT, 0) + len(problems), "= 0")
    outcome.add(f"{title}stuck", ends.get(End.STUCK, 0), "= 0")


def served_again_s(port: int, limit_s: float = 60.0) -> float:
    """Seconds until a new client gets its echo."""
    began = time.monotonic()
    wait_until(lambda: is_served(port), limit_s, "a new client served")
    return time.monotonic() - began


@contextmanager
def timed() -> Iterator[Callable[[], float]]:
    """Seconds since the block began."""
    began = time.monotonic()
    yield lambda: time.monotonic() - began


@dataclass(frozen=True, slots=True)
class Usage:
    """What a process holds."""

    files: int
    threads: int
    rss_bytes: int
    cpu_s: float


def usage(pid: int) -> Usage:
    """Now."""
    process = psutil.Process(pid)
    times = process.cpu_times()
    return Usage(process.num_fds(), process.num_threads(), process.memory_info().rss, times.user + times.system)


def play(fault: Fault, scale: Scale, show: Show, minutes: float = 20.0) -> Outcome:
    """One fault from beginning to end. What goes wrong is in the outcome; Unplayable is raised."""
    outcome = Outcome(fault.name, fault.expected, date=today(), short=scale is Scale.SHORT)
    began = time.monotonic()
    try:
        with Stage(scale, show, minutes) as stage:
            fault.run(stage, outcome)
            stage.check_logs()
    except (AssertionError, OSError, EOFError) as exc:
        outcome.error = f"{type(exc).__name__}: {exc}"[:2000]
    outcome.took_s = round(time.monotonic() - began, 1)
    return outcome
