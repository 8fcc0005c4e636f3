"""Pure: the one family of errors. Expected outcomes (no route, over quota) are values, not errors."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from fxtunnel.codes import Code, Refusal

E = TypeVar("E", bound=BaseException)


class FxError(Exception):
    """Anything this product raises on purpose. `str()` is one line for a person: what is wrong and what to do."""


@dataclass(frozen=True, slots=True)
class ConfigProblem:
    """One wrong thing in a configuration: where it is and what was expected there."""

    file: str
    key: str
    message: str

    def __str__(self) -> str:
        where = f"{self.file}: {self.key}" if self.key else self.file
        return f"{where}: {self.message}"


class ConfigError(FxError):
    """The configuration cannot be used. Print every problem and exit 2; on reload keep the old one."""

    def __init__(self, problems: Sequence[ConfigProblem]) -> None:
        self.problems = tuple(problems)
        super().__init__("; ".join(str(p) for p in self.problems))

    @classmethod
    def one(cls, file: object, key: str, message: str) -> "ConfigError":
        """An error with a single problem."""
        return cls([ConfigProblem(str(file), key, message)])


class TunnelError(FxError):
    """Something went wrong between gateway and relay."""


class LocalProtocolError(TunnelError):
    """We broke the protocol's rules: a bug of ours. Let it fly."""


class RemoteProtocolError(TunnelError):
    """The peer broke the protocol's rules. Close the session or connection with `code`."""

    def __init__(self, code: Code, message: str) -> None:
        self.code = code
        super().__init__(message)


class TunnelClosed(TunnelError):
    """The tunnel is gone. Release what hung on it; a relay dials again."""

    def __init__(self, code: Code, message: str = "", *, by_peer: bool = False) -> None:
        self.code = code
        self.by_peer = by_peer
        super().__init__(message or code.label)


class PeerRefused(TunnelError):
    """The gateway said no. `refusal.is_final` tells whether to try again, `retry_after_s` when."""

    def __init__(self, refusal: Refusal, message: str, *, retry_after_s: float = 0.0) -> None:
        self.refusal = refusal
        self.retry_after_s = retry_after_s
        super().__init__(message)


class StoreError(FxError):
    """The cluster's store cannot be used now. Go on with what is known, try again, and say so in status."""


class TransporterError(FxError):
    """Changes do not get through at once. Subscribe again and read the store again."""


class ScriptError(FxError):
    """A balancing script or a metric of the administrator failed. `name` is what users may see; `detail` is for the log only."""

    def __init__(self, name: str, message: str, detail: str = "") -> None:
        self.name = name
        self.message = message
        self.detail = detail
        super().__init__(f"{name}: {message}")


class NodeError(FxError):
    """A service or node cannot be reached. Try the next candidate."""


def leaves(group: BaseExceptionGroup[E]) -> list[E]:
    """The errors in a group and in the groups within it."""
    found: list[E] = []
    for exc in group.exceptions:
        found += leaves(exc) if isinstance(exc, BaseExceptionGroup) else [exc]
    return found
