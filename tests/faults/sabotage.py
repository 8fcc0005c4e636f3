"""Makes the n-th wait of chosen tasks raise what nobody there expects: a bug, or a machine that is out of something.

A task and all the tasks below it count as one tree. Each tree waits for its n-th resumption, whichever of its tasks that is, and gets
one of FAULTS there, as if what it was waiting for had raised it. With n = 1, 2, … until no tree has that many, every await is hit that
the tree goes through.
"""

import errno
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import outcome
import pytest
import trio

from fxtunnel.errors import leaves

Fault = Callable[[], Exception]

FAULTS: tuple[Fault, ...] = (
    lambda: RecursionError("too deep"),
    lambda: UnicodeDecodeError("ascii", b"\xff", 0, 1, "not ASCII"),
    lambda: OSError(errno.EIO, "out of order"),
    lambda: ExceptionGroup("several", [ValueError("odd")]),
    lambda: MemoryError(),
)
TRIO_RELIES_ON = frozenset({"_nested_child_finished", "acquire", "acquire_on_behalf_of"})
"""Waits inside trio that raise nothing but Cancelled: of a nursery for its tasks, of a lock that is the task's already."""
TRIO_CLOSES = ["_run_handler", "aclose_forcefully"]
"""What trio.serve_listeners does after our handler."""
LIMIT = 400
"""More waits than any of the scenarios has."""


@dataclass(eq=False)
class Tree:
    """A root task and what it has started."""

    root: trio.lowlevel.Task
    fault: Exception
    where: str = ""
    steps: int = 0
    is_over: bool = False


@dataclass(eq=False)
class Sabotage(trio.abc.Instrument):
    """Hits the trees whose root's coroutine is named in `roots`; the first gets the first fault, the next one the next."""

    nth: int
    roots: frozenset[str]
    faults: Sequence[Fault] = FAULTS
    trees: list[Tree] = field(default_factory=list)
    _tree_of: dict[trio.lowlevel.Task, Tree] = field(default_factory=dict)
    _begun: set[trio.lowlevel.Task] = field(default_factory=set)

    @property
    def hit(self) -> list[Tree]:
        return [tree for tree in self.trees if tree.where]

    @property
    def is_over(self) -> bool:
        return all(tree.is_over for tree in self.trees)

    def task_spawned(self, task: trio.lowlevel.Task) -> None:
        tree = None
        if task.parent_nursery is not None:
            tree = self._tree_of.get(task.parent_nursery.parent_task)
        if tree is None and task.coro.__qualname__ in self.roots:
            tree = Tree(task, self.faults[len(self.trees) % len(self.faults)]())
            self.trees.append(tree)
        if tree is not None:
            self._tree_of[task] = tree

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        tree = self._tree_of.get(task)
        if tree is None:
            return
        if task not in self._begun:  # its first step: it has not waited for anything
            self._begun.add(task)
            return
        names = [frame.f_code.co_name for frame, _ in task.iter_await_frames()]
        if TRIO_RELIES_ON & set(names) or names[:2] == TRIO_CLOSES:
            return
        tree.steps += 1
        if tree.steps == self.nth:
            tree.where = _where(task)
            task._next_send = outcome.Error(tree.fault)

    def task_exited(self, task: trio.lowlevel.Task) -> None:
        tree = self._tree_of.get(task)
        if tree is not None and tree.root is task:
            tree.is_over = True


def _where(task: trio.lowlevel.Task) -> str:
    """The innermost line of ours that waits."""
    found = ""
    for frame, line in task.iter_await_frames():
        name = frame.f_code.co_filename
        if "/fxtunnel/" in name or "/fxgateway/" in name or "/fxrelay/" in name or not found:
            found = f"{name.rpartition('/')[2]}:{line} {frame.f_code.co_qualname}"
    return found


@contextmanager
def sabotage(nth: int, *roots: str, faults: Sequence[Fault] = FAULTS) -> Iterator[Sabotage]:
    """For as long as the block lasts, or until the test ends it."""
    instrument = Sabotage(nth, frozenset(roots), faults)
    trio.lowlevel.add_instrument(instrument)
    try:
        yield instrument
    finally:
        trio.lowlevel.remove_instrument(instrument)


def lines_about(fault: BaseException, caplog: pytest.LogCaptureFixture) -> list[logging.LogRecord]:
    """The log's lines that show this fault with its traceback."""
    culprits = {id(leaf) for leaf in (leaves(fault) if isinstance(fault, BaseExceptionGroup) else [fault])}
    return [
        record
        for record in caplog.records
        if record.exc_info and record.exc_info[1] is not None and culprits & {id(exc) for exc in _all_of(record.exc_info[1])}
    ]


def _all_of(exc: BaseException) -> list[BaseException]:
    """The exception, its parts, and what it was raised for."""
    found: list[BaseException] = []
    todo: list[BaseException | None] = [exc]
    while todo:
        one = todo.pop()
        if one is None or any(one is other for other in found):
            continue
        found.append(one)
        todo += [one.__cause__, one.__context__]
        if isinstance(one, BaseExceptionGroup):
            todo += one.exceptions
    return found
