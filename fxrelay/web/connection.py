"""Task: one client's HTTP connection from its first byte to its last: requests in order, each sent to its node."""

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import trio

from fxrelay.admitting.stream_admission import StreamAdmission
from fxrelay.delivery.delivery import DeliveryDesk
from fxrelay.delivery.identity import identity_of
from fxrelay.delivery.ports import Wanted
from fxrelay.delivery.services import AnyService, PoolService
from fxrelay.web.access import RequestRecord
from fxrelay.web.access import logger as access_log
from fxrelay.web.affinity import CookieAffinity
from fxrelay.web.client import ClientGone, ClientSide
from fxrelay.web.exchange import CutOff, Exchange, Order, StaleLink
from fxrelay.web.fast_path import FastPath, FastPathRules, Handed, Served
from fxrelay.web.forwarding import Origin
from fxrelay.web.heads import BadHead, RequestHead, ResponseHead, parse_request
from fxrelay.web.holding import WholeSender, answer_whole, read_whole, while_there
from fxrelay.web.judging import Asked, Judge, admitted, watched
from fxrelay.web.link import ServiceLink
from fxrelay.web.planning import Plan, plan_for
from fxrelay.web.ports import HeldRequest, NodeChooser, RequestGate, Unable, WebLimits, WebRules
from fxrelay.web.reaching import Held, Reacher
from fxrelay.web.request_auth import RequestAuth
from fxrelay.web.secure import HandshakeFailed, HandshakeTurns, end_tls
from fxrelay.web.upgrade import UpgradedDelivery, copy_both_ways
from fxtunnel.codes import Code
from fxtunnel.engine.stream import TunnelStream
from fxtunnel.kit.answers import NAMES, Refused, render
from fxtunnel.kit.sources import source_of
from fxtunnel.model import GatewayId, RelayId
from fxtunnel.protocol.opening import Opening

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What all connections of a relay share."""

    desk: DeliveryDesk
    chooser: NodeChooser
    limits: WebLimits
    gate: RequestGate | None
    given_back: set["WebConnection"]
    """Connections whose stream has been given back to the pump, after an upgrade."""
    own_id: RelayId
    admission: StreamAdmission | None
    handshakes: HandshakeTurns


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
        self._client: ClientSide | None = None
        self._fast_path: FastPath | None = None
        wanted = Wanted(rules.name, opening.client, GatewayId(""), opening.trace)
        self._reacher = Reacher(around.desk, around.chooser, service, opening, wanted)
        is_tls = rules.tls is not None or opening.scheme in ("https", "tls")
        self._origin = Origin.of(opening.client, "https" if is_tls else "http")
        self._auth = self._new_entrance() if rules.is_guarded else None
        self._gate = around.gate if around.gate is not None and around.gate.concerns(rules.name) else None
        self._judge = Judge(rules, service, opening, self._origin, only, around.own_id, self._auth)
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
                self.tunnel.stream.accept()  # no FIN before it
                self.tunnel.end()
            elif not self.is_given_back:
                self.tunnel.reset(self.tunnel.broken or Code.CANCELLED)
            if self._fast_path is not None:
                self._fast_path.stop()
            self._reacher.close()
            if self._auth is not None:
                self._auth.close()

    def drain(self) -> None:
        """End after the request that is being answered; at once, if there is none."""
        self.is_draining = True
        if self._client is not None:
            self._client.stop_waiting()
        if self._fast_path is not None:
            self._fast_path.drain()

    async def _serve(self) -> None:
        limits, stream = self._around.limits, self.tunnel
        tls = None
        if self._rules.tls is not None:
            source = source_of(identity_of(self._opening.client))
            tls = await end_tls(stream, self._rules.tls, limits.head_timeout_s, self._around.handshakes, source)
        self._client = client = ClientSide(tls or stream, limits)
        if tls is None and self._gate is None and not self._rules.is_guarded:
            self._fast_path = self._new_fast_path(client)
        keeps_on, is_first = True, True
        while keeps_on and not self.is_draining:
            handed = Handed() if self._fast_path is None or is_first else await self._fast_path.wait()
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
                try:
                    await self._answer_alone(_refusal(exc), None, keeps_on=False)
                finally:
                    self._visit.log(trio.current_time())
                break
            if raw is None:
                break
            is_first = False
            self._visit = self._new_visit()
            keeps_on = await self._answer(raw, handed)
        if tls is not None and not self.is_given_back:
            with trio.move_on_after(limits.head_timeout_s):
                await tls.aclose()

    def _new_fast_path(self, client: ClientSide) -> FastPath:
        rules, limits = self._rules, self._around.limits
        has_node_paths = rules.node_paths and isinstance(self._service, PoolService)
        terms = FastPathRules(self._plan, self._served, has_node_paths, rules.response_timeout_s, limits.keep_alive_s)
        return FastPath(self._around.desk.reactor, self.tunnel, client, self._reacher, terms)

    def _plan(self, raw: bytes) -> Plan | None:
        return plan_for(raw, self._judge, self._new_visit(), is_pool=isinstance(self._service, PoolService))

    def _served(self, served: Served) -> None:
        """From the reactor: a request was answered."""
        if not access_log.isEnabledFor(logging.INFO):
            return
        visit = RequestRecord(self._opening.trace, self._rules.name, self._opening.client, served.began)
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
                if self._left_to_another(exc):
                    return False
                # What follows a request for an upgrade, or is left of a body, must not be read as the next request.
                keeps_on = head is not None and not head.has_body and head.get(b"upgrade") is None and head.keeps_alive
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
        """Send one request to its node, and the answer back. `begun`: it was sent on this link already, that many seconds ago."""
        visit, rules, gate = self._visit, self._rules, self._gate
        asked = self._judge.judge(head, visit)
        if asked.shown is not None:
            self._reacher.for_user(asked.shown.caller.user, asked.shown.caller.groups)
        if gate is not None:
            asked = await admitted(gate, asked)
            if self._auth is not None:
                self._auth.count_for(asked.passed.user)
        if asked.passed.held is not None:
            return await self._hold(head, asked, asked.passed.held)
        assert self._client is not None
        self._client.accept()
        head = asked.head
        wire = self._judge.wire(asked)
        with Held() as held, watched(asked.passed, self.scope):
            while True:
                link, is_chosen = (begun[0], False) if begun is not None else await self._reacher.reach(asked.wish, held)
                visit.node, visit.way = link.node or "", link.way
                await self._use(asked, link)

                async def answered(found: ResponseHead, node: RelayId | None = link.node) -> Sequence[bytes]:
                    return await gate.answered(asked.facts, node, found.status, found.fields) if gate is not None else ()

                order = Order(
                    head,
                    wire,
                    asked.onward.upgrade,
                    head.keeps_alive and not self.is_draining,
                    rules.response_timeout_s,
                    rules.max_body_bytes,
                    self._new_cookies(asked, link.node if is_chosen else None),
                    answered if gate is not None else None,
                )
                waited_s, begun = begun[1] if begun is not None else None, None
                try:
                    return await self._exchange(link, order, waited_s)
                except StaleLink:
                    continue  # that link has been taken out of the idle ones; a fresh one cannot be stale

    def _new_cookies(self, asked: Asked, chosen: RelayId | None) -> tuple[bytes, ...]:
        """The cookies that the answer brings: one for a node that was `chosen` just now, and the pass for a ticket."""
        affinity, passes, shown, secure = self._rules.affinity, self._rules.passes, asked.shown, self._origin.scheme == "https"
        cookies: tuple[bytes, ...] = ()
        if chosen is not None and isinstance(affinity, CookieAffinity):
            cookies = (affinity.set_cookie(chosen, secure=secure),)
        if shown is not None and shown.is_new and passes is not None:
            cookies = (*cookies, passes.set_cookie(shown.caller, time.time(), secure=secure))
        return cookies

    async def _use(self, asked: Asked, link: ServiceLink) -> None:
        """Ask what can only be asked once the node is known. Aborts the link and raises Refused if the answer is no."""
        if self._auth is not None and asked.shown is not None:
            try:
                await self._auth.use(asked.shown.caller, link.node or self._around.own_id)
            except BaseException:
                link.abort()
                raise

    async def _hold(self, head: RequestHead, asked: Asked, held: HeldRequest) -> bool:
        """Serve a request that is held whole until somebody has decided about it; returns whether there may be another."""
        client, visit = self._client, self._visit
        assert client is not None
        body = await read_whole(client, head, held.max_body_bytes)
        visit.bytes_in = len(body)
        sender = WholeSender(self._reacher, head, partial(self._wire_of, asked), body, self._rules.response_timeout_s)
        sender.visit, sender.before = visit, client.accept
        try:
            reply = await while_there(client, lambda: held.run(body, sender))
        except Refused as exc:
            if self._left_to_another(exc):
                return False
            keeps_client = head.keeps_alive and not self.is_draining
            await self._answer_alone(exc, head, keeps_on=keeps_client)
            return keeps_client
        keeps_client, is_given = head.keeps_alive and not self.is_draining, False
        try:
            visit.status, visit.first_byte_at = reply.answer.status, trio.current_time()
            await client.send(answer_whole(head, reply, keeps_client=keeps_client))
            visit.bytes_out, is_given = len(reply.answer.body), True
        finally:
            if not is_given:
                reply.undone()
        return keeps_client

    def _left_to_another(self, refused: Refused) -> bool:
        """REFUSE the stream if this relay cannot decide and has not accepted it yet, so that the gateway asks another. Whether it did."""
        stream = self.tunnel.stream
        if not isinstance(refused, Unable) or stream.accepted:
            return False
        self._visit.why = refused.name
        text = f"{refused.detail} (trace {self._opening.trace})"
        logger.warning("service %s leaves a client to another relay: %s", self._rules.name, text)
        self._around.desk.turn_down(stream, self._service, Code.BUSY, text)
        return True

    def _wire_of(self, asked: Asked, head: RequestHead) -> bytes:
        return self._judge.wire(replace(asked, head=head))

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

    async def _switch(self, link: ServiceLink, wire: bytes) -> None:
        """The service has agreed to the upgrade: tell the client, and carry bytes both ways until the end."""
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
        """Send an answer of our own."""
        visit, client = self._visit, self._client
        assert client is not None
        visit.status, visit.why = refused.status, refused.name
        if refused.status >= 500:
            logger.warning(
                "service %s answers %d %s: %s (trace %s)",
                self._rules.name,
                refused.status,
                refused.name,
                (refused.detail or refused.message).removesuffix(f" (trace {visit.trace})"),
                visit.trace,
            )
        answer = render(refused, visit.trace, (head.get(b"accept") or b"") if head is not None else b"")
        is_old = head is not None and head.version == b"1.0"
        connection = b"Connection: close\r\n" if not keeps_on else b"Connection: keep-alive\r\n" if is_old else b""
        body = b"" if head is not None and head.method == b"HEAD" else answer.body
        await client.send(answer.head + connection + b"\r\n" + body)
        visit.bytes_out = len(body)

    def _new_entrance(self) -> RequestAuth | None:
        admission, opening, rules = self._around.admission, self._opening, self._rules
        if admission is None:
            return None
        client_admission = admission.receive(rules.name, opening.client, opening.trace)
        count = partial(self._around.desk.count_refusal, self._service)
        return RequestAuth(client_admission, rules.passes, opening.ticket, count, takes_bearers=rules.takes_bearers)

    def _new_visit(self) -> RequestRecord:
        opening = self._opening
        return RequestRecord(opening.trace, self._rules.name, opening.client, trio.current_time())


def _refusal(bad: BadHead) -> Refused:
    text = str(bad)
    return Refused(bad.status, NAMES.get(bad.status, "BadRequest"), f"{text[:1].upper()}{text[1:]}.")
