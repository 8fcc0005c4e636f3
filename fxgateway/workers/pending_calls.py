"""Task: questions over a line, and their answers."""

import itertools
from typing import Any, Final

import trio

from fxgateway.workers.channel import Channel, Message
from fxtunnel.errors import FxError

ANSWER_S: Final = 4.0
"""Shorter than the 5 s in which a relay has to be authenticated (limits.hello_timeout_s)."""


class NoAnswer(FxError):
    """The other process does not answer; what was asked may or may not have happened."""


class _Pending:
    __slots__ = ("answer", "came", "channel")

    def __init__(self, channel: Channel) -> None:
        self.channel = channel
        self.came = trio.Event()
        self.answer: Message | None = None


class PendingCalls:
    """The questions that have not been answered yet, on any number of lines."""

    def __init__(self) -> None:
        self._numbers = itertools.count(1)
        self._pending: dict[int, _Pending] = {}

    async def ask(self, channel: Channel, what: str, within_s: float = ANSWER_S, **fields: Any) -> Message:
        """Ask, and wait for the answer. After a cancellation the other process may still act on the question.

        Raises:
            NoAnswer: the line is broken or full, or no answer came within `within_s`.
        """
        number = next(self._numbers)
        pending = self._pending[number] = _Pending(channel)
        try:
            if channel.send({"op": what, "n": number, **fields}):
                with trio.move_on_after(within_s):
                    await pending.came.wait()
        finally:
            del self._pending[number]
        if pending.answer is None:
            raise NoAnswer(f"worker {channel.number} does not answer" if channel.number else "the parent process does not answer")
        return pending.answer

    def answered(self, message: Message) -> None:
        """An answer has come."""
        pending = self._pending.get(message["n"])
        if pending is not None:
            pending.answer = message
            pending.came.set()

    def gone(self, channel: Channel) -> None:
        """Nothing will be answered on this line any more."""
        for pending in self._pending.values():
            if pending.channel is channel:
                pending.came.set()
