"""Port: what a balancing decision is made of: who asks, among which servers, what each entry of the chain said, and what came of it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Protocol, runtime_checkable

from fxrelay.cluster.server import ServerObject
from fxtunnel.model import RelayId


class Action(StrEnum):
    """Why a server is wanted. The words are those scripts get."""

    LOGIN = "user/login"
    START = "session/start"


@dataclass(frozen=True, slots=True)
class Request:
    """What is asked for. Before a login `user` is what the client claims, and proves nothing.

    `claims` are the login's claims, on START only. `data` is what came with the request; secrets are taken out before a script sees it.
    """

    action: Action
    service: str
    user: str = ""
    sessions: Sequence[Mapping[str, Any]] = ()
    claims: Mapping[str, Any] = field(default_factory=dict)
    groups: Sequence[str] = ()
    is_manager: bool = False
    is_admin: bool = False
    data: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Candidate:
    """A server that may be chosen, with the placements on their way to it that it does not count yet."""

    server: ServerObject
    in_flight: int = 0
    load_sessions: int = field(init=False)
    """Sessions it has or is about to have."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "load_sessions", self.server.sessions + self.in_flight)

    @property
    def server_id(self) -> RelayId:
        """Its id."""
        return self.server.server_id


@dataclass(frozen=True, slots=True)
class Chosen:
    """This one."""

    server_id: RelayId


@dataclass(frozen=True, slots=True)
class Narrowed:
    """Let the next entry choose among these; none at all ends in an error."""

    server_ids: tuple[RelayId, ...]


@dataclass(frozen=True, slots=True)
class Passed:
    """No opinion: the next entry gets what this one got."""


@dataclass(frozen=True, slots=True)
class Failed:
    """The chain stops. `name` and `message` may be shown to a user; `detail` (a stack, stderr) is for the log only.

    `is_refusal`: the script says no, which is an answer; otherwise it, or what it was told, did not do here, and may do at another relay.
    """

    name: str
    message: str
    detail: str = ""
    is_refusal: bool = False


Verdict = Chosen | Narrowed | Passed | Failed


class Environment(Protocol):
    """What an entry may ask for besides its input."""

    @property
    def local_id(self) -> RelayId:
        """This relay."""

    async def next_number(self, counter: str) -> int:
        """The next number of a counter that all relays of the cluster share: 1, 2, 3. This relay's own numbers while the store is away."""


class ChainEntry(Protocol):
    """One entry of a chain."""

    @property
    def name(self) -> str:
        """As the configuration writes it: `builtin:fewest-sessions`."""

    async def choose(self, request: Request, candidates: Sequence[Candidate], environment: Environment) -> Verdict:
        """Decide, pass, or narrow down. Leaves its arguments alone. Whatever goes wrong is a `Failed`: it raises nothing."""


class Cancellable(Protocol):
    """Something that was asked for and is not told yet."""

    def cancel(self) -> None:
        """Nobody wants to be told any more. May be repeated, also after it was told."""


@runtime_checkable
class ReactorEntry(Protocol):
    """An entry that can be asked from the reactor."""

    def ask(
        self, request: Request, candidates: Sequence[Candidate], environment: Environment, then: Callable[[Verdict], None]
    ) -> Cancellable | None:
        """As `ChainEntry.choose`, but `then` is called with the verdict, later. None: it cannot be asked like this now."""


@dataclass(frozen=True, slots=True)
class Dropped:
    """A server that was not asked about, and the filter's word for why: not-in-pool, stale, draining, login-disabled, full, …"""

    server_id: RelayId
    reason: str


@dataclass(frozen=True, slots=True)
class Step:
    """What one entry did. `seconds` is wall time."""

    entry: str
    candidates: int
    verdict: Verdict
    seconds: float


@dataclass(frozen=True, slots=True)
class Decision:
    """What came of a request: exactly one of `server_id` and `failure`; with everything needed to explain it."""

    server_id: RelayId | None
    failure: Failed | None
    dropped: tuple[Dropped, ...]
    steps: tuple[Step, ...]
