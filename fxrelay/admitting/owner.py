"""Task: the administrator's own answer to who may have what: a Python function or an executable, run as balancing scripts are.

It gets {"user", "groups", "service", "node", "client", "trace"} as a dict, or as JSON on stdin. It lets in by returning True or
{"allow": true}, or by printing `allow`. Everything else keeps out, whatever goes wrong included; {"allow": false, "reason": "…"} or
`deny: …` say why, for the log.
"""

import json
import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final, Protocol

from fxrelay.balance.entries import verify_file
from fxrelay.balance.script_input import ScriptInput
from fxrelay.balance.workers import Workers

logger = logging.getLogger(__name__)

MAX_REASON_CHARS: Final = 200


@dataclass(frozen=True, slots=True)
class OwnerQuery:
    """Who wants what. `user` is the ticket's, empty without one; `node` the one that was asked for, or else the one that was found.
    `client` is the address.
    """

    user: str
    groups: tuple[str, ...]
    service: str
    node: str
    client: str
    trace: str


class Owner(Protocol):
    """The administrator's own rule for who may have what."""

    async def why_not(self, question: OwnerQuery) -> str | None:
        """None if the user may have it; otherwise a reason for the log. Raises nothing; safe to cancel."""


@dataclass(frozen=True, slots=True)
class ScriptOwner:
    """Implements `Owner` with what `owner = "…"` names."""

    name: str
    kind: str
    spec: str
    workers: Workers

    async def why_not(self, question: OwnerQuery) -> str | None:
        """See `Owner`."""
        answer = await self.workers.call(f"owner-{self.kind}", self.spec, ScriptInput(json.dumps(asdict(question)), ()))
        if answer.get("log"):
            logger.info("%s says: %s", self.name, answer["log"])
        match answer.get("kind"):
            case "value":
                return _of_value(answer.get("value"))
            case "output":
                return _of_output(str(answer.get("text", "")))
            case _:
                logger.warning("%s failed, so nobody is let in: %s: %s", self.name, answer.get("name"), answer.get("detail"))
                return f"{self.name} failed: {answer.get('name')}"


def owner_of(spec: str, workers: Workers, directory: Path) -> ScriptOwner:
    """What `spec` (python:MODULE:FUNCTION or exec:FILE, beside the configuration) names.

    Raises:
        ValueError: there is no such thing, or others could change it.
    """
    kind, _, rest = spec.partition(":")
    if kind == "python":
        module, _, function = rest.partition(":")
        if not module or not function.isidentifier():
            raise ValueError(f"expected python:MODULE:FUNCTION, found {spec!r}")
        return ScriptOwner(spec, kind, rest, workers)
    if kind != "exec" or not rest:
        raise ValueError(f"expected python:MODULE:FUNCTION or exec:FILE, found {spec!r}")
    path = directory / rest
    verify_file(path, kind)
    return ScriptOwner(spec, kind, str(path), workers)


def _of_value(value: object) -> str | None:
    if value is True:
        return None
    if isinstance(value, dict):
        return None if value.get("allow") is True else _reason(value.get("reason"))
    return _reason(None)


def _of_output(text: str) -> str | None:
    answer = text.strip()
    if answer == "allow":
        return None
    word, _, reason = answer.partition(":")
    return _reason(reason.strip() if word.strip() == "deny" else None)


def _reason(found: object) -> str:
    text = found if isinstance(found, str) and found else "the owner script does not allow it"
    return "".join(char if char.isprintable() else " " for char in text[:MAX_REASON_CHARS])
