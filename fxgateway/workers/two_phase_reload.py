"""Task: a reload in two phases: every worker does all that can fail, then all workers switch, or none does."""

import logging
import socket
from collections.abc import Collection, Mapping
from typing import Final

import trio

from fxgateway.workers.channel import Message
from fxgateway.workers.child import Child, send_sockets
from fxgateway.workers.pending_calls import NoAnswer, PendingCalls
from fxtunnel.errors import ConfigError, ConfigProblem

logger = logging.getLogger(__name__)

PREPARE_S: Final = 30.0
"""For a worker to read certificates and keys, and to open its access log, on a slow disk."""


class TwoPhaseReload:
    """The workers' part of a reload."""

    def __init__(self, children: Collection[Child], calls: PendingCalls) -> None:
        self._children = children
        self._calls = calls

    async def prepare(self, fields: Message, opened: Mapping[str, socket.socket]) -> list[Child]:
        """Have every worker that serves prepare for the configuration in `fields`. Returns those, for `commit`. Safe to cancel.

        The caller keeps its own copies of the sockets.

        Raises:
            ConfigError: a worker cannot use the configuration. All of them have dropped it, and nothing has changed.
        """
        problems: list[ConfigProblem] = []
        refusals: dict[str, list[int]] = {}
        """The numbers of the workers by the problem they report, since mostly all report the same."""
        prepared: list[Child] = []

        async def prepare(child: Child) -> None:
            channel = child.channel
            if channel is None or not child.is_ready:
                return
            prepared.append(child)
            send_sockets(channel, list(opened.items()))
            try:
                answer = await self._calls.ask(channel, "prepare", PREPARE_S, **fields)
            except NoAnswer as exc:
                problems.append(ConfigProblem(str(fields["config"]), "", str(exc)))
            else:
                for text in answer["problems"]:
                    refusals.setdefault(text, []).append(child.number)

        try:
            async with trio.open_nursery() as nursery:
                for child in self._children:
                    nursery.start_soon(prepare, child)
            problems += [ConfigProblem(_of_workers(numbers), "", text) for text, numbers in refusals.items()]
            if problems:
                raise ConfigError(problems)
        except BaseException:
            for child in prepared:
                if child.channel is not None:
                    child.channel.send({"op": "abandon"})
            raise
        return prepared

    async def commit(self, prepared: Collection[Child]) -> None:
        """Have the prepared workers switch. A worker that cannot be told, or was not there, is restarted with the new configuration."""

        async def commit(child: Child) -> None:
            if child.channel is not None:
                try:
                    await self._calls.ask(child.channel, "commit", PREPARE_S)
                except NoAnswer:
                    child.start_again("it has not taken the new configuration")
                except Exception:
                    logger.exception("it cannot be told whether worker %d has taken the new configuration", child.number)
                    child.start_again("it may not have taken the new configuration")

        async with trio.open_nursery() as nursery:
            for child in self._children:
                if child in prepared:
                    nursery.start_soon(commit, child)
                else:
                    child.start_again("it was not there for the reload")


def _of_workers(numbers: list[int]) -> str:
    return f"worker {numbers[0]}" if len(numbers) == 1 else f"workers {', '.join(map(str, sorted(numbers)))}"
