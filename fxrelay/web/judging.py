"""Task: what to do with a request, before any of it is sent: who asks, which node it needs, and what the gate says."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Final

import trio

from fxrelay.delivery.services import AnyService, PoolService
from fxrelay.web.access import RequestRecord
from fxrelay.web.exchange import REPEATABLE
from fxrelay.web.forwarding import Onward, Origin, request_onward, wanted_upgrade
from fxrelay.web.heads import RequestHead
from fxrelay.web.ports import Allow, RequestFacts, RequestGate, WebRules
from fxrelay.web.reaching import NodePreference
from fxrelay.web.request_auth import RequestAuth, Shown
from fxrelay.web.targets import NodePath, Target, is_served, read_target, split_node_path
from fxtunnel.kit.answers import Refused
from fxtunnel.model import RelayId
from fxtunnel.protocol.opening import Opening

_NOTHING_SAID: Final = Allow()


@dataclass(frozen=True, slots=True)
class Asked:
    """A request that may be served."""

    head: RequestHead
    target: Target
    onward: Onward
    wish: NodePreference
    facts: RequestFacts
    shown: Shown | None
    passed: Allow


class Judge:
    """Judges the requests of one connection."""

    def __init__(
        self,
        rules: WebRules,
        service: AnyService,
        opening: Opening,
        origin: Origin,
        only: RelayId | None,
        own_id: RelayId,
        auth: RequestAuth | None,
    ) -> None:
        self._rules = rules
        self._is_pool = isinstance(service, PoolService)
        self._opening = opening
        self._origin = origin
        self._only = only
        self._own_id = own_id
        self._auth = auth

    def judge(self, head: RequestHead, visit: RequestRecord) -> Asked:
        """What to do with a request; notes in `visit` what it is.

        Raises:
            BadHead, Refused: nothing.
        """
        rules = self._rules
        target = read_target(head)
        visit.method = head.method.decode("ascii", "replace")
        visit.host = target.host
        visit.path = target.path.partition(b"?")[0].decode("ascii", "replace")
        if not is_served(target.host, rules.hosts):
            raise Refused(421, "WrongHost", "This service does not go by that name.")
        if rules.max_body_bytes and (head.length or 0) > rules.max_body_bytes:
            raise Refused(413, "TooLarge", "The request's body is larger than this service takes.")
        shown = self._identified(head, target)
        if shown is not None:
            visit.user = shown.caller.user
            head, target = shown.head, replace(target, path=shown.path)
        upgrade = wanted_upgrade(head)
        again = head.method in REPEATABLE and not head.has_body
        onward, wish = Onward(target.path, upgrade=upgrade), NodePreference(self._only, is_repeatable=again)
        if self._is_pool:
            named = split_node_path(target.path) if rules.node_paths else None
            if named is not None:
                onward = Onward(named.path, named.prefix, upgrade)
                wish = NodePreference(self._named(named), is_repeatable=again)
            elif self._only is None and rules.affinity is not None:
                wish = NodePreference(may=rules.affinity.node_of(head), is_repeatable=again)
        if self._auth is not None and shown is not None:
            only = self._auth.bind(shown.caller, wish.must if self._is_pool else self._own_id)
            wish = replace(wish, must=only) if self._is_pool else wish
        return Asked(head, target, onward, wish, self._facts(head, target, wish, visit), shown, _NOTHING_SAID)

    def wire(self, asked: Asked) -> bytes:
        """The request's head for the service."""
        rules = self._rules
        own_host = self._opening.host or rules.name
        return request_onward(
            asked.head, asked.target, self._origin, asked.onward, trusts_forwarded=rules.trusts_forwarded, own_host=own_host
        )

    def _identified(self, head: RequestHead, target: Target) -> Shown | None:
        """Who asks, where not everybody may. Raises Refused."""
        if not self._rules.is_guarded:
            return None
        if self._auth is None:
            raise Refused(503, "NoService", "The service is not available at the moment.", detail="nobody here admits anyone")
        return self._auth.identify(head, target.path, time.time())

    def _facts(self, head: RequestHead, target: Target, wish: NodePreference, visit: RequestRecord) -> RequestFacts:
        inner = target.path
        if self._rules.node_paths and split_node_path(inner) is not None:
            inner = b"/" + b"".join(inner.split(b"/", 3)[3:])
        return RequestFacts(
            self._rules.name,
            visit.trace,
            self._opening.client,
            head.method,
            target.path,
            target.host,
            head.fields,
            wish.must or wish.may,
            wish.must is not None,
            inner,
            self._origin.scheme == "https",
            visit.user,
        )

    def _named(self, path: NodePath) -> RelayId:
        if path.node is None or (self._only is not None and path.node != self._only):
            raise Refused(404, "NoSuchNode", "This service has no node of that name.")
        return path.node


async def admitted(gate: RequestGate, asked: Asked) -> Asked:
    """The request as the gate lets it pass: perhaps to one node, and to none that is closed to it. Safe to cancel.

    Raises:
        Refused: not at all.
    """
    passed, wish = await gate.admit(asked.facts), asked.wish
    if passed.node is not None:
        wish = NodePreference(passed.node, is_repeatable=wish.is_repeatable)
    elif wish.must in passed.closed:
        raise Refused(403, "Reserved", "This node is reserved for another user.")
    elif wish.may in passed.closed:
        wish = NodePreference(is_repeatable=wish.is_repeatable)
    return replace(asked, wish=wish, passed=passed)


@contextmanager
def watched(passed: Allow, scope: trio.CancelScope) -> Iterator[None]:
    """While the block runs, the connection ends when what it leads to has to."""
    if passed.watch is None:
        yield
        return
    unwatch = passed.watch(scope.cancel)
    try:
        yield
    finally:
        unwatch()
