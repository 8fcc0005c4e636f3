"""Task: what an administrator writes in `balance = [...]`, made into entries of a chain."""

import logging
import os
import stat
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Final

import trio

from fxrelay.balance import builtins
from fxrelay.balance.answers import Answer
from fxrelay.balance.candidates import CandidateList, CandidateSubset
from fxrelay.balance.chain import builtin
from fxrelay.balance.model import Cancellable, Candidate, ChainEntry, Environment, Failed, Request, Verdict
from fxrelay.balance.script_input import ScriptInput, offered_input, script_input
from fxrelay.balance.verdicts import verdict_of, verdict_of_output
from fxrelay.balance.workers import ScriptLimits, Workers
from fxtunnel.errors import ConfigError, ConfigProblem
from fxtunnel.model import RelayId

if TYPE_CHECKING:
    from fxtunnel.engine.reactor import Reactor

logger = logging.getLogger(__name__)

DEFAULT: Final = "builtin:fewest-sessions"
_FASTX4_NAMES: Final = {"fewest": "fewest-sessions", "memory": "most-available-memory", "roundrobin": "round-robin"}
_FORBIDDEN_BITS: Final = stat.S_IWGRP | stat.S_IWOTH


@dataclass(frozen=True, slots=True)
class Script:
    """An entry that runs in a script process: `kind` is js, exec or python; `spec` a file, or module:function."""

    name: str
    kind: str
    spec: str
    workers: Workers

    async def choose(self, request: Request, candidates: Sequence[Candidate], environment: Environment) -> Verdict:
        """See `ChainEntry`."""
        await trio.lowlevel.checkpoint()  # choosing the candidates took its time: streams first
        # A whole list of the filter's goes on changing meanwhile.
        listed = candidates.without(()) if isinstance(candidates, CandidateList) else candidates
        given, known, offered = self._given(request, listed, environment)
        return self._verdict(await self.workers.call(self.kind, self.spec, given, offered), known)

    def ask(
        self, request: Request, candidates: Sequence[Candidate], environment: Environment, then: Callable[[Verdict], None]
    ) -> Cancellable | None:
        """See `ReactorEntry`."""
        given, known, offered = self._given(request, candidates, environment)
        return self.workers.ask(self.kind, self.spec, given, offered, lambda answer: then(self._verdict(answer, known)))

    def _given(
        self, request: Request, candidates: Sequence[Candidate], environment: Environment
    ) -> tuple[ScriptInput, Container[RelayId], CandidateList | CandidateSubset | None]:
        """The script's input, the candidates it is about, and the list from which its process knows them; None: all are sent."""
        if isinstance(candidates, CandidateList | CandidateSubset):
            return offered_input(request, candidates, environment.local_id), candidates.ids(), candidates
        known = frozenset([candidate.server.server_id for candidate in candidates])
        return script_input(request, candidates, environment.local_id), known, None

    def _verdict(self, answer: Answer, known: Container[RelayId]) -> Verdict:
        if answer.get("log"):
            logger.info("balancing script %s says: %s", self.name, answer["log"])
        match answer.get("kind"):
            case "value":
                return verdict_of(answer.get("value"), known)
            case "output":
                return verdict_of_output(str(answer.get("text", "")), known)
            case _:
                name, message, detail = (str(answer.get(key, "")) for key in ("name", "message", "detail"))
                return Failed(name or "Error", message, detail, answer.get("kind") == "refused")


class Scripts:
    """Makes chains, and owns the processes their scripts run in. `config_path` is the file that names the scripts; they are beside it."""

    def __init__(self, limits: ScriptLimits, config_path: Path) -> None:
        self._config_path = config_path
        self._directory = config_path.absolute().parent
        self._workers = Workers(limits, self._directory)

    async def run(self) -> None:
        """Keep the processes until cancelled, then end them."""
        try:
            await trio.sleep_forever()
        finally:
            self.close()

    def use_reactor(self, reactor: "Reactor") -> None:
        """Streams may be decided in its thread from now on."""
        self._workers.reactor = reactor

    def close(self) -> None:
        """End the processes. May be repeated."""
        self._workers.close()

    def chain(self, specs: Sequence[str], service: str, environ: Mapping[str, str]) -> tuple[ChainEntry, ...]:
        """The entries that `specs` name, for a service's chain; without any, what LOAD_BALANCER says (FastX 4), or the default.

        Raises:
            ConfigError: with everything that is wrong with them.
        """
        problems: list[str] = []
        entries = []
        for spec in chain_meant(specs, environ):
            try:
                entries.append(self._entry(spec, service))
            except ValueError as exc:
                problems.append(str(exc))
        if problems:
            raise ConfigError([ConfigProblem(str(self._config_path), f"service {service}: balance", text) for text in problems])
        return tuple(entries)

    def _entry(self, spec: str, service: str) -> ChainEntry:
        kind, _, rest = spec.partition(":")
        if kind == "builtin":
            found = builtin(rest, service)
            if found is None:
                raise ValueError(f"there is no {spec!r}; built in are {', '.join(builtins.NAMES)}")
            return found
        if kind == "python":
            module, _, function = rest.partition(":")
            if not module or not function.isidentifier():
                raise ValueError(f"expected python:MODULE:FUNCTION, found {spec!r}")
            return Script(spec, kind, rest, self._workers)
        if kind not in ("js", "exec") or not rest:
            raise ValueError(f"expected builtin:NAME, js:FILE, exec:FILE or python:MODULE:FUNCTION, found {spec!r}")
        path = self._directory / rest
        if kind == "js" and find_spec("quickjs") is None:
            raise ValueError(f"{spec} needs a JavaScript engine: pip install quickjs-ng")
        verify_file(path, kind)
        return Script(spec, kind, str(path), self._workers)


def chain_meant(specs: Sequence[str], environ: Mapping[str, str]) -> tuple[str, ...]:
    """`specs`; without any, the FastX 4 way: LOAD_BALANCER=custom and LOAD_BALANCER_SCRIPT=/path, or the name of a built-in one."""
    if specs:
        return tuple(specs)
    name = environ.get("LOAD_BALANCER", "").strip().lower().replace("_", "-").replace(" ", "-")
    if not name:
        return (DEFAULT,)
    if name == "custom":
        return (f"exec:{environ.get('LOAD_BALANCER_SCRIPT', '')}",)
    return (f"builtin:{_FASTX4_NAMES.get(name.replace('-', ''), name)}",)


def verify_file(path: Path, kind: str) -> None:
    """Look at a script: nobody else may change it, and it can be run. Raises ValueError."""
    try:
        facts = path.stat()
    except OSError as exc:
        raise ValueError(f"{path}: {exc.strerror or exc}") from exc
    if not stat.S_ISREG(facts.st_mode):
        raise ValueError(f"{path}: is not a file")
    if facts.st_uid not in (0, os.geteuid()):
        raise ValueError(f"{path}: belongs to another user than root and this one")
    if facts.st_mode & _FORBIDDEN_BITS:
        raise ValueError(f"{path}: others may change it; run: chmod go-w {path}")
    if kind == "exec" and not os.access(path, os.X_OK):
        raise ValueError(f"{path}: is not executable; run: chmod +x {path}")
