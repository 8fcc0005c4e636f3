"""Pure: failover of a client: which relay its stream is opened on next, after one that refused, redirected or was lost."""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Final, Generic, Literal, NamedTuple, Protocol, TypeVar

from fxgateway.routing.offers import Candidate, Forward, Reject, RejectReason
from fxtunnel.model import RelayId, ServiceName, is_name
from fxtunnel.protocol.opening import MAX_AVOIDED

MAX_ATTEMPTS: Final = 8
"""Streams opened for one client, at most; a cluster whose relays all refuse or redirect should not keep the gateway busy."""
MAX_HOPS: Final = 8
"""How often one client may be passed on between processes, whose tables may disagree for a moment."""


class LocalCandidate(Candidate, Protocol):
    """A relay whose tunnel ends in this process."""

    @property
    def is_remote(self) -> Literal[False]:
        """Always false."""

    @property
    def first_step(self) -> "FailoverState":
        """`FailoverState.after_first_step` to it: one for all clients, of which most never take another step."""


class RemoteCandidate(Candidate, Protocol):
    """A relay whose tunnel ends in another process of this gateway."""

    @property
    def is_remote(self) -> Literal[True]:
        """Always true."""


N = TypeVar("N", bound=LocalCandidate)
F = TypeVar("F", bound=RemoteCandidate)


class Offers(Protocol[N, F]):
    """Who offers what."""

    def decide(self, service: ServiceName, tried: Collection[RelayId] = ()) -> Forward[N] | Forward[F] | Reject:
        """See `OfferTable`."""


class Relays(Protocol[N, F]):
    """The relays that are there now."""

    @property
    def offers(self) -> Offers[N, F]:
        """Who offers what."""

    def named(self, relay_id: RelayId) -> N | F | None:
        """A relay by its name, if it could take a stream."""


class FailoverState(NamedTuple):
    """How far a client has got. A tuple, since one is made for every stream; it goes along to another process as it is."""

    asked: tuple[RelayId, ...] = ()
    """Relays that were asked because they offer the service. If there is a `target`, the last of them redirected to it."""
    target: RelayId | None = None
    avoid: tuple[RelayId, ...] = ()
    """Targets of redirects that have failed."""
    attempts: int = 0
    hops: int = 0
    """Times it was passed on."""
    asks_again: bool = False
    """Ask the last of `asked` next, if it is still there: the target it named has failed, or another process has chosen it."""

    @classmethod
    def after_first_step(cls, relay_id: RelayId) -> "FailoverState":
        """Of a client that has asked this relay, and no other one."""
        return cls((relay_id,), attempts=1)

    @property
    def via(self) -> RelayId | None:
        """The relay whose REDIRECT leads to the next one."""
        return self.asked[-1] if self.target is not None else None

    def refused(self) -> "FailoverState":
        """The relay that was asked cannot serve it: go back to the one that redirected there, or on to the next that offers the service."""
        if self.target is None:
            return self
        return self._replace(target=None, avoid=(*self.avoid, self.target), asks_again=True)

    def redirected(self, relay: str) -> "FailoverState":
        """The relay that was asked names another one."""
        # PROTOCOL.md, 6: a REDIRECT that cannot be followed counts as a REFUSE, whichever relay it comes from.
        if self.target is None and is_name(relay) and relay not in self.avoid and len(self.avoid) < MAX_AVOIDED:
            return self._replace(target=RelayId(relay))
        return self.refused()

    def lost(self) -> "FailoverState":
        """The link to the relay that was asked is lost. The relay has not refused, and may have another link by now."""
        return self.unasked() if self.target is None else self.refused()

    def unasked(self) -> "FailoverState":
        """The relay has never seen the OPEN: it may be asked again as if for the first time."""
        return self._replace(asked=self.asked[:-1]) if self.target is None else self


class OpenOn(NamedTuple, Generic[N]):
    """Open the stream on this relay. If that fails: `failover.refused()`. A tuple, as `FailoverState` is."""

    relay: N
    failover: FailoverState


@dataclass(frozen=True, slots=True)
class PassOn(Generic[F]):
    """Pass the client with `failover` to the process that has this relay. If that process does not take it, go on with `otherwise`."""

    relay: F
    failover: FailoverState
    otherwise: FailoverState


@dataclass(frozen=True, slots=True)
class GiveUp:
    """Nobody serves it."""

    reason: RejectReason
    failover: FailoverState


Step = OpenOn[N] | PassOn[F] | GiveUp


def next_step(failover: FailoverState, service: ServiceName, relays: Relays[N, F]) -> Step[N, F]:
    """The next step: to the redirect's target, back to the relay that redirected last, or to the best one that was not asked yet.

    The `failover` in the answer includes that step.
    """
    while failover.attempts < MAX_ATTEMPTS:
        asked, target, avoid, attempts, hops, asks_again = failover
        relay: N | F | None = None
        if target is not None:
            relay = relays.named(target) if target != asked[-1] else None
            if relay is None:
                failover = failover.refused()
                continue
        elif asks_again:
            relay = relays.named(asked[-1])
        if relay is None:
            decision = relays.offers.decide(service, asked)
            if isinstance(decision, Reject):
                return GiveUp(decision.reason, failover)
            relay = decision.relay
            if not relay.is_remote and not attempts and not hops:
                return OpenOn(relay, relay.first_step)
            asked = (*asked, relay.relay_id)
        then = FailoverState(asked, target, avoid, attempts + 1, hops)
        if not relay.is_remote:
            return OpenOn(relay, then)
        if hops < MAX_HOPS:
            return PassOn(relay, FailoverState(asked, target, avoid, attempts, hops + 1, target is None), then.refused())
        failover = then.refused()
    return GiveUp(RejectReason.TOO_MANY_ATTEMPTS, failover)
