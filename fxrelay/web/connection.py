"""Task: one client's HTTP connection from its first byte to its last: requests in their order, each to its node."""

import logging
from dataclasses import dataclass, replace
from typing import Final

import trio

from fxrelay.delivery.delivery import DeliveryDesk
from fxrelay.delivery.ports import Wanted
from fxrelay.delivery.services import AnyService, PoolService
from fxrelay.web.access import Visit
from fxrelay.web.access import logger as access_log
from fxrelay.web.affinity import CookieAffinity
from fxrelay.web.client import ClientGone, ClientSide
from fxrelay.web.exchange import REPEATABLE, CutOff, Exchange, Order, StaleLink
from fxrelay.web.express import Express, Handed, Plan, Served, Terms
from fxrelay.web.forwarding import Onward, Origin, request_onward, wanted_upgrade
from fxrelay.web.heads import BadHead, RequestHead, ResponseHead, parse_request
from fxrelay.web.link import ServiceLink
from fxrelay.web.ports import NodeChooser, Pass, RequestFacts, RequestGate, WebLimits, WebRules
from fxrelay.web.reaching import Held, Reacher, Wish
from fxrelay.web.secure import HandshakeFailed, end_tls
from fxrelay.web.targets import NodePath, Target, is_served, read_target, split_node_path
from fxrelay.web.upgrade import UpgradedDelivery, copy_both_ways
from fxtunnel.codes import Code
from fxtunnel.engine.stream import TunnelStream
from fxtunnel.kit.answers import Refused, render
from fxtunnel.model import GatewayId, RelayId
from fxtunnel.protocol.opening import Opening

logger = logging.getLogger(__name__)

_NAMES: Final = {405: "MethodNotAllowed", 408: "Timeout", 414: "TooLong", 431: "TooLarge", 501: "NotImplemented", 505: "Version"}


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What all connections of a relay share."""

    desk: DeliveryDesk
    chooser: NodeChooser
    limits: WebLimits
    gate: RequestGate | None
    given_back: set["WebConnection"]
    """Those whose stream the pump carries by now."""


@dataclass(frozen=True, slots=True)
class Asked:
    """A request that may be served."""

    head: RequestHead
    target: Target
    onward: Onward
    wish: Wish
    facts: RequestFacts


class WebConnection:
    """Serves one stream. `run` it once; `scope` ends it."""

    def __init__(
        self, around: Surroundings, tunnel: TunnelStream, service: AnyService, rules: WebRules, opening: Opening, only: RelayId | None
    ) -> None:
        self.tunnel = tunnel
        self.scope = trio.CancelScope()
        self.is_draining = False
        self.is_given_back = False
        self.service_name = rules.name
        self._around = around
        self._service = service
        self._rules = rules
        self._opening = opening
        self._only = only
        self._client: ClientSide | None = None
        self._express: Express | None = None
        wanted = Wanted(rules.name, opening.client, GatewayId(""), opening.trace)
        self._reacher = Reacher(around.desk, around.chooser, service, opening, wanted)
        is_tls = rules.tls is not None or opening.scheme in ("https", "tls")
        self._origin = Origin.of(opening.client, "https" if is_tls else "http")
        self._visit = self._new_visit()
        tunnel.on_broken = self.scope.cancel

    async def run(self) -> None:
        """Serve until the client or the service ends the connection, or somebody cancels `scope`. Raises nothing but Cancelled."""
        in_order = False
        try:
            with self.scope:
                await self._serve()
                in_order = True
        except (ClientGone, CutOff) as exc:
            logger.debug("an HTTP connection ended: %s (trace %s)", exc, self._opening.trace)
        except HandshakeFailed as exc:
            logger.info("a client of service %s: %s (trace %s)", self._rules.name, exc, self._opening.trace)
            in_order = True
        except Exception:
            logger.exception("an HTTP connection failed (trace %s)", self._opening.trace)
        finally:
            if in_order:
                self.tunnel.end()
            elif not self.is_given_back:
                self.tunnel.reset(self.tunnel.broken or Code.CANCELLED)
            if self._express is not None:
                self._express.stop()
            self._reacher.close()

    def drain(self) -> None:
        """End when the request that is being answered is; at once, if there is none."""
        self.is_draining = True
        if self._client is not None:
            self._client.stop_waiting()
        if self._express is not None:
            self._express.drain()

    async def _serve(self) -> None:
        limits, stream = self._around.limits, self.tunnel
        tls = None
        if self._rules.tls is not None:
            tls = await end_tls(stream, self._rules.tls, limits.head_timeout_s)
        self._client = client = ClientSide(tls or stream, limits)
        if tls is None and self._around.gate is None:
            self._express = self._new_express(client)
        keeps_on, is_first = True, True
        while keeps_on and not self.is_draining:
            handed = Handed() if self._express is None or is_first else await self._express.wait()
            if handed.unsent:
                await client.send(handed.unsent)
            if handed.is_over:
                break
            if handed.unsent:
                continue
            self._visit = self._new_visit()
            try:
                raw = handed.raw or await client.next_head(is_first=is_first)
            except BadHead as exc:
                await self._answer_alone(_refusal(exc), None, keeps_on=False)
                break
            if raw is None:
                break
            is_first = False
            self._visit = self._new_visit()
            keeps_on = await self._answer(raw, handed)
        if tls is not None and not self.is_given_back:
            with trio.move_on_after(limits.head_timeout_s):
                await tls.aclose()

    def _new_express(self, client: ClientSide) -> Express:
        rules, limits = self._rules, self._around.limits
        has_node_paths = rules.node_paths and isinstance(self._service, PoolService)
        terms = Terms(self._plan, self._served, has_node_paths, rules.response_timeout_s, limits.keep_alive_s)
        return Express(self._around.desk.reactor, self.tunnel, client, self._reacher, terms)

    def _plan(self, raw: bytes) -> Plan | None:
        """What holds for all requests with the fields of this one, if they can be served without a task."""
        try:
            head = parse_request(raw)
            asked = self._judge(head)
        except (BadHead, Refused):
            return None
        node = asked.wish.must or asked.wish.may
        if head.has_body or asked.onward.upgrade or (node is None and isinstance(self._service, PoolService)):
            return None
        wire = self._wire(asked)
        return Plan(head, asked.target.host, wire[wire.index(b"\r\n") :], node, _keeps_alive(head))

    def _served(self, served: Served) -> None:
        """From the reactor: a request was answered."""
        if not access_log.isEnabledFor(logging.INFO):
            return
        visit = Visit(self._opening.trace, self._rules.name, self._opening.client, served.began)
        visit.method, visit.host = served.method.decode(), served.plan.host
        visit.path = served.path.partition(b"?")[0].decode()
        visit.status, visit.node, visit.way = served.status, served.link.node or "", served.link.way
        visit.bytes_out, visit.first_byte_at = served.body_bytes, self._around.desk.reactor.now
        visit.log(visit.first_byte_at)

    async def _answer(self, raw: bytes, handed: Handed) -> bool:
        """Serve one request. Returns whether there may be another."""
        head, visit = None, self._visit
        visit.began -= handed.waited_s
        begun = (handed.link, handed.waited_s) if handed.link is not None else None
        try:
            try:
                head = parse_request(raw)
                return await self._forward(head, begun)
            except BadHead as exc:
                await self._answer_alone(_refusal(exc), head, keeps_on=False)
            except Refused as exc:
                # Bytes behind a request for an upgrade are not a request, and what is left of a body neither.
                keeps_on = head is not None and not head.has_body and head.get(b"upgrade") is None and _keeps_alive(head)
                await self._answer_alone(exc, head, keeps_on=keeps_on)
                return keeps_on
            return False
        except (ClientGone, CutOff) as exc:
            visit.why = str(exc)
            if isinstance(exc, CutOff):
                logger.warning("a response of service %s was cut off: %s (trace %s)", self._rules.name, exc, visit.trace)
            raise
        except trio.Cancelled:
            visit.why = visit.why or ("broke the connection" if self.tunnel.broken is not None else "ended by this relay")
            raise
        finally:
            visit.log(trio.current_time())

    async def _forward(self, head: RequestHead, begun: tuple[ServiceLink, float] | None) -> bool:
        """`begun`: the request was sent on this link, so many seconds ago."""
        asked = self._judge(head)
        visit, rules, gate = self._visit, self._rules, self._around.gate
        if gate is not None:
            asked = await _admitted(gate, asked)
        wire = self._wire(asked)
        with Held() as held:
            while True:
                link, is_chosen = (begun[0], False) if begun is not None else await self._reacher.reach(asked.wish, held)
                visit.node, visit.way = link.node or "", link.way
                cookies: tuple[bytes, ...] = ()
                if is_chosen and isinstance(rules.affinity, CookieAffinity) and link.node is not None:
                    cookies = (rules.affinity.set_cookie(link.node, secure=self._origin.scheme == "https"),)

                async def answered(found: ResponseHead, node: RelayId | None = link.node) -> None:
                    if gate is not None:
                        await gate.answered(asked.facts, node, found.status, found.fields)

                order = Order(
                    head,
                    wire,
                    asked.onward.upgrade,
                    _keeps_alive(head) and not self.is_draining,
                    rules.response_timeout_s,
                    rules.max_body_bytes,
                    cookies,
                    answered if gate is not None else None,
                )
                waited_s, begun = begun[1] if begun is not None else None, None
                try:
                    return await self._exchange(link, order, waited_s)
                except StaleLink:
                    continue  # it has been taken out; a fresh one cannot be stale

    def _wire(self, asked: Asked) -> bytes:
        """The request's head for the service."""
        own_host = self._opening.host or self._rules.name
        trusts = self._rules.trusts_forwarded
        return request_onward(asked.head, asked.target, self._origin, asked.onward, trusts_forwarded=trusts, own_host=own_host)

    async def _exchange(self, link: ServiceLink, order: Order, waited_s: float | None) -> bool:
        assert self._client is not None
        is_kept = False
        try:
            exchange = Exchange(self._client, link, order, self._visit)
            outcome = await (exchange.run() if waited_s is None else exchange.resume(waited_s))
            if outcome.switched:
                is_kept = True
                await self._switch(link, outcome.switched)
                return False
            if outcome.keeps_link:
                link.is_used = is_kept = True
                self._reacher.keep(link)
            return outcome.keeps_client and not self.is_draining
        finally:
            if not is_kept:
                link.abort()

    def _judge(self, head: RequestHead) -> Asked:
        """What to do with a request, before anybody is asked and anything is sent.

        Raises:
            BadHead, Refused: nothing.
        """
        rules, visit = self._rules, self._visit
        target = read_target(head)
        visit.method = head.method.decode("ascii", "replace")
        visit.host = target.host
        visit.path = target.path.partition(b"?")[0].decode("ascii", "replace")
        if not is_served(target.host, rules.hosts):
            raise Refused(421, "WrongHost", "This service does not go by that name.")
        if rules.max_body_bytes and (head.length or 0) > rules.max_body_bytes:
            raise Refused(413, "TooLarge", "The request's body is larger than this service takes.")
        upgrade = wanted_upgrade(head)
        again = head.method in REPEATABLE and not head.has_body
        onward, wish = Onward(target.path, upgrade=upgrade), Wish(self._only, is_repeatable=again)
        if isinstance(self._service, PoolService):
            named = split_node_path(target.path) if rules.node_paths else None
            if named is not None:
                onward = Onward(named.path, named.prefix, upgrade)
                wish = Wish(self._named(named), is_repeatable=again)
            elif self._only is None and rules.affinity is not None:
                wish = Wish(may=rules.affinity.node_of(head), is_repeatable=again)
        path, host = target.path, target.host
        facts = RequestFacts(rules.name, visit.trace, self._opening.client, head.method, path, host, head.fields, wish.must or wish.may)
        return Asked(head, target, onward, wish, facts)

    def _named(self, path: NodePath) -> RelayId:
        if path.node is None or (self._only is not None and path.node != self._only):
            raise Refused(404, "NoSuchNode", "This service has no node of that name.")
        return path.node

    async def _switch(self, link: ServiceLink, wire: bytes) -> None:
        """The service agreed to the upgrade: tell the client, and carry what comes."""
        client, visit, tunnel = self._client, self._visit, self.tunnel
        assert client is not None
        visit.status, visit.upgraded, visit.first_byte_at = 101, True, trio.current_time()
        try:
            await client.send(wire + link.scanner.take_rest())
            if client.stream is not tunnel:
                before = client.bytes_out
                try:
                    await copy_both_ways(client, link, self._around.desk.limits.idle_timeout_s)
                finally:
                    visit.bytes_in, visit.bytes_out = client.bytes_in, client.bytes_out - before
                link.close()
                return
        except BaseException:
            link.abort()
            raise
        link.unwatch()
        delivery = UpgradedDelivery(self._around.desk, link.sock, self._service, self._opening)
        before_in, before_out = tunnel.stream.bytes_in, tunnel.stream.bytes_out
        delivery.carry(tunnel, client)
        self.is_given_back = True
        self._around.given_back.add(self)
        try:
            await delivery.ended.wait()
        finally:
            delivery.fail(Code.SHUTDOWN)
            visit.bytes_in, visit.bytes_out = tunnel.stream.bytes_in - before_in, tunnel.stream.bytes_out - before_out

    async def _answer_alone(self, refused: Refused, head: RequestHead | None, *, keeps_on: bool) -> None:
        """An answer of our own."""
        visit, client = self._visit, self._client
        assert client is not None
        visit.status, visit.why = refused.status, refused.name
        if refused.status >= 500:
            logger.warning(
                "service %s answers %d %s: %s (trace %s)",
                self._rules.name,
                refused.status,
                refused.name,
                refused.detail or refused.message,
                visit.trace,
            )
        answer = render(refused, visit.trace, (head.get(b"accept") or b"") if head is not None else b"")
        is_old = head is not None and head.version == b"1.0"
        connection = b"Connection: close\r\n" if not keeps_on else b"Connection: keep-alive\r\n" if is_old else b""
        body = b"" if head is not None and head.method == b"HEAD" else answer.body
        await client.send(answer.head + connection + b"\r\n" + body)
        visit.bytes_out = len(body)
        if head is None:
            visit.log(trio.current_time())

    def _new_visit(self) -> Visit:
        opening = self._opening
        return Visit(opening.trace, self._rules.name, opening.client, trio.current_time())


async def _admitted(gate: RequestGate, asked: Asked) -> Asked:
    passed: Pass = await gate.admit(asked.facts)
    if passed.node is None:
        return asked
    return replace(asked, wish=Wish(passed.node, is_repeatable=asked.wish.is_repeatable))


def _keeps_alive(head: RequestHead) -> bool:
    """Whether the client means to go on after the response (RFC 9112, 9.3)."""
    tokens = head.tokens(b"connection")
    return b"close" not in tokens if head.version == b"1.1" else b"keep-alive" in tokens


def _refusal(bad: BadHead) -> Refused:
    text = str(bad)
    return Refused(bad.status, _NAMES.get(bad.status, "BadRequest"), f"{text[:1].upper()}{text[1:]}.")
