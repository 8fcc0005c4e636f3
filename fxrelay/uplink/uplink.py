"""Task: a relay's uplink to one gateway: keeps its control link up and its data sessions alive, whatever the network does."""

import logging
import math
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Final

import trio

from fxrelay.uplink.control_link import ControlLink, control_hello, open_control_link
from fxrelay.uplink.datalink import open_data_link
from fxrelay.uplink.dial import Dialler, GatewayBusy
from fxrelay.uplink.enrol import enrol
from fxrelay.uplink.failure_policy import final_error, retry_delay_s
from fxrelay.uplink.gateway_file import GatewayFile, GatewayUrl
from fxrelay.uplink.identity import Identity
from fxrelay.uplink.ports import LinkSession, SessionFactory, UplinkConfig, UplinkSessionOwner, UplinkState, UplinkStatistics
from fxrelay.uplink.process_links import ProcessLinks, too_many
from fxrelay.uplink.reconnecting import is_gone, is_turned_away, keep_reconnecting
from fxrelay.uplink.redial_backoff import INTERNAL, Failure, RedialBackoff
from fxrelay.uplink.slot import Slot
from fxtunnel.codes import Code, Refusal
from fxtunnel.control.channel import GOODBYE_S
from fxtunnel.control.messages import CAP_LEAVING, CAP_NAMED, Drain, Earlier, Load, Services, encode
from fxtunnel.control.messages import Hello as ControlHello
from fxtunnel.errors import FxError, PeerRefused
from fxtunnel.kit.link_tls import LinkSocket
from fxtunnel.model import GatewayId, Offer, SessionId, is_name
from fxtunnel.protocol.hello import Hello, Welcome

logger = logging.getLogger(__name__)

MAX_DEPARTING: Final = 8
"""Processes of one gateway that may depart at once: one that announces it again and again must not fill this relay with links."""
DEPARTURE_SPREAD_S: Final = 0.2
"""Relays that are told to look for a successor spread their dials over this time."""
MAX_DEADLINE_S: Final = 86_400.0  # of a Drain message


@dataclass(frozen=True, slots=True)
class UplinkEnvironment:
    """What an uplink takes from outside, so that tests can repeat it: randomness, and the wall clock in seconds.

    `is_reluctant`: whether the gateway should ask other relays first (PROTOCOL.md, 3.3). `earlier`: who has made way for us.
    """

    rng: random.Random = field(default_factory=random.Random)
    now_unix: Callable[[], float] = time.time
    is_reluctant: Callable[[], bool] = lambda: False
    earlier: Callable[[], tuple[Earlier, ...]] = tuple


class Uplink:
    """One gateway's uplink. `run` it once; everything else may be called while it runs, from the same thread.

    Data sessions outlive the control link. Failures that may pass are retried for as long as `run` lives; those that need a person end it.
    When a gateway process departs, links to its successor are made at once, and open streams finish at the old process.
    """

    def __init__(
        self,
        gateway: GatewayFile,
        identity: Identity,
        offers: tuple[Offer, ...],
        factory: SessionFactory,
        config: UplinkConfig,
        environment: UplinkEnvironment | None = None,
    ) -> None:
        self.gateway_id: GatewayId = gateway.gateway_id
        self._gateway = gateway
        self._identity = identity
        self._offers = offers
        self._factory = factory
        self._config = config
        self._environment = environment or UplinkEnvironment()
        self._dialler = Dialler(gateway.ca_pem, config.proxy, timeout_s=config.dial_timeout_s, dead_after_s=config.dead_after_s)
        self._links = [self._new_links()]
        """To the gateway's processes; the last is the present one."""
        self._url_number = 0
        self._must_enrol = False
        self._has_enrolled = False
        self._welcomes = 0
        self._welcome_at = 0.0
        self._began_at = self._lost_at = -math.inf
        self._epoch = 0
        self._drain_until: float | None = None
        self._makes_way = False
        self.is_relieved = False
        """After `make_way`: a successor serves at the gateway."""
        self._is_stopping = False
        self._scope = trio.CancelScope()
        self._ended = trio.Event()
        self._failure: FxError | None = None
        self._state = UplinkState.STOPPED
        self._since_unix = self._environment.now_unix()
        self._last_error = ""
        self._attempts = 0
        self._next_try_unix = 0.0

    @property
    def wants_sessions(self) -> bool:
        """Whether a session that is over should be made anew."""
        return self._drain_until is None and not self._is_stopping

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Keep the links to the gateway up until `shutdown`, or until trying further is pointless. `started()` with the first welcome.

        Cancelling says goodbye to the gateway (within a second) and closes the sessions.

        Raises:
            PeerRefused, TunnelError: final; the message says what to do.
            ConfigError: the note of the enrolment cannot be written.
        """
        self._enter(UplinkState.CONNECTING)
        self._began_at = trio.current_time()
        try:
            with self._scope:
                async with trio.open_nursery() as nursery:
                    while True:
                        links = self._links[-1]
                        nursery.start_soon(self._hold, links, task_status)
                        await links.departs.wait()
                        if self._drain_until is not None:
                            await trio.sleep_forever()  # its next process would not let us in
                        for spare in too_many(self._links, MAX_DEPARTING):
                            spare.give_up()
                        self._links.append(self._new_links())
                        await trio.sleep(self._environment.rng.uniform(0, DEPARTURE_SPREAD_S))
        finally:
            self._is_stopping = True
            self._close_sessions(Code.SHUTDOWN, "the relay stops")
            self._enter(UplinkState.STOPPED)
            self._ended.set()
        if self._failure is not None:
            raise self._failure

    async def shutdown(self, code: Code, text: str = "") -> None:
        """Close the sessions and tell the gateway why, then end `run`, which returns. Takes at most about a second; idempotent."""
        self._is_stopping = True
        with trio.move_on_after(GOODBYE_S):
            async with trio.open_nursery() as nursery:
                for links in self._links:
                    nursery.start_soon(links.say_goodbye, code, text)
                self._close_sessions(code, text)
        self._scope.cancel()
        if self._state is not UplinkState.STOPPED:
            await self._ended.wait()

    def drain(self, deadline_s: float) -> None:
        """Ask the gateway for no more streams; the open ones have `deadline_s`. Sessions are resumed, but not made anew."""
        self._makes_way = False
        self._go_away(deadline_s)

    def make_way(self, deadline_s: float) -> None:
        """As `drain`, but until a successor of this process serves the gateway may send what no other relay can take."""
        self._makes_way = True
        self._go_away(deadline_s)

    def update_services(self, offers: tuple[Offer, ...]) -> None:
        """Offer these services from now on.

        Raises:
            LocalProtocolError: too many to be told in one message; nothing has changed.
        """
        message = Services(services=offers)
        encode(message)  # also where no link is up: the next hello would have to hold them
        self._send(message)
        self._offers = offers

    def sessions(self) -> list[LinkSession]:
        """Those that are not over, with every process of the gateway."""
        return [session for links in self._links for session in links.sessions]

    def statistics(self) -> UplinkStatistics:
        """A snapshot for status pages."""
        return UplinkStatistics(
            self.gateway_id,
            str(self._url),
            self._state,
            self._since_unix,
            self._last_error,
            self._epoch,
            self._drain_until is not None,
            tuple(session.statistics() for links in reversed(self._links) for session in links.sessions),
            self._attempts,
            self._next_try_unix,
        )

    async def dial_data(self, hello: Hello, worker: str, process: str) -> tuple[LinkSocket, Welcome]:
        """For the links to a process: see `ProcessLinksOwner`."""
        return await open_data_link(self._dialler, self._url, hello, worker, process)

    def new_session(self, owner: UplinkSessionOwner, session_id: SessionId) -> LinkSession:
        """For the links to a process: see `ProcessLinksOwner`."""
        return self._factory.new_session(owner, session_id)

    def ends_with(self, exc: FxError) -> bool:
        """For the links to a process, and ourselves: see `ProcessLinksOwner`."""
        final = final_error(exc, self._identity.relay_id, self.gateway_id, was_welcome=self._welcomes > 0)
        if final is None:
            return False
        if self._failure is None:
            self._failure = final
            self._last_error = str(final)
        self._scope.cancel()
        return True

    @property
    def _url(self) -> GatewayUrl:
        return self._gateway.urls[self._url_number % len(self._gateway.urls)]

    def _new_links(self) -> ProcessLinks:
        return ProcessLinks(self, self._config, lambda links: Slot(links, self._config, self._environment.rng))

    async def _hold(self, links: ProcessLinks, task_status: trio.TaskStatus[None]) -> None:
        """Keep the links to one process of the gateway, until it is gone."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(links.run_slots)
            await self._keep_control_link(links, task_status)
            await keep_reconnecting(links, self._return, self._config, self._environment.rng)
        if links is not self._links[-1]:
            self._links.remove(links)

    async def _keep_control_link(self, links: ProcessLinks, task_status: trio.TaskStatus[None]) -> None:
        """Dial control links, one after the other, until the process departs or the uplink ends."""
        waits, wait_s = RedialBackoff(self._config, self._environment.rng), 0.0
        while not (self._is_stopping or links.departs.is_set()):
            welcomes, failure = self._welcomes, INTERNAL
            try:
                await trio.sleep(wait_s)
                await self._use_control_link(links, task_status)
            except FxError as exc:
                if links.departs.is_set() and is_gone(exc):
                    links.lose()
                elif self._drain_until is not None and is_turned_away(exc, links):
                    links.depart()
                if self._is_stopping or links.departs.is_set() or self.ends_with(exc):
                    return
                self._last_error = str(exc)
                if isinstance(exc, GatewayBusy):
                    wait_s = self._retry_busy_s(exc, waits)
                    continue
                failure = Failure.of(exc)
            except Exception:  # whatever a peer's bytes did to a library, the relay and its sessions live on
                logger.exception("the control link to %s failed", self.gateway_id)
                self._last_error = "internal error"
            else:
                wait_s = 0.0
                continue
            now = trio.current_time()
            if self._welcomes == welcomes:
                self._url_number += 1
                wait_s = waits.unwelcome_s(failure, now, self._began_at, self._lost_at)
            else:
                wait_s = waits.lost_s(failure, now - self._welcome_at)
            if waits.failures.is_due():
                attempt = waits.failures.count + 1
                logger.warning("no control link to %s: %s; attempt %d in %.1f s", self.gateway_id, self._last_error, attempt, wait_s)
            self._await_next_try(wait_s)

    def _retry_busy_s(self, busy: GatewayBusy, waits: RedialBackoff) -> float:
        """The seconds until a busy gateway wants us again. Not a failure; but the next attempt goes to the next address, in case whoever
        answered only poses as the gateway.
        """
        wait_s = retry_delay_s(busy.retry_after, self._environment.rng.random(), self._config.max_backoff_s)
        self._url_number += 1
        if waits.busy.is_due():
            logger.info("%s; attempt %d in %.1f s", busy, waits.busy.count + 1, wait_s)
        self._await_next_try(wait_s)
        return wait_s

    async def _use_control_link(self, links: ProcessLinks, task_status: trio.TaskStatus[None]) -> None:
        """One control link from dial to end, after enrolment if need be. Returns only when it should be called again at once."""
        self._attempts += 1
        url = self._url
        # A gateway that has welcomed us knows our key, whether the note of it can be read now or not: the token may be good no more.
        is_known = self._welcomes > 0 or self._has_enrolled
        if self._must_enrol or not (is_known or await self._identity.is_enrolled(self.gateway_id)):
            self._enter(UplinkState.ENROLLING)
            await enrol(self._dialler, url, self._gateway, self._identity, self._environment.now_unix)
            self._must_enrol, self._has_enrolled = False, True
        self._enter(UplinkState.CONNECTING)
        hello = self._hello()
        try:
            async with open_control_link(self._dialler, url, self._gateway, hello, self._bearer, self._config, links.worker) as link:
                if links.process not in ("", link.welcome.process) and link.welcome.process:
                    logger.info("gateway %s is another process now", self.gateway_id)
                    self._lost_at = trio.current_time()
                    if links.is_up or (links.is_named and links.sessions and links.process in link.welcome.earlier):
                        # We missed the old process's Drain message. Keep what is open there, and begin new links with this one.
                        links.depart()
                        return
                    # No session of the old process can be resumed: end them, and keep these links and this one.
                    links.close_sessions(Code.LINK_LOST, "its process of the gateway is gone")
                self._welcomed(links, link, url)
                if self._welcomes == 1:
                    task_status.started()
                try:
                    await self._carry(links, link, hello)
                finally:
                    if not links.departs.is_set():
                        self._lost_at = trio.current_time()
        except PeerRefused as exc:
            # Only before the first welcome: a relay that an administrator forgets while it runs must not enrol again by itself.
            if exc.refusal is not Refusal.UNKNOWN_RELAY or self._welcomes or self._has_enrolled or self._gateway.enrolment is None:
                raise
            logger.info("gateway %s no longer knows relay %s; enrolling again", self.gateway_id, self._identity.relay_id)
            self._must_enrol = True

    async def _return(self, links: ProcessLinks) -> None:
        """One control link to a process that goes away, from dial to end."""
        hello, process = self._hello(), links.process
        async with open_control_link(self._dialler, self._url, self._gateway, hello, self._bearer, self._config, process=process) as link:
            logger.info("connected again to the process of gateway %s that goes away", self.gateway_id)
            await self._carry(links, link, hello)

    async def _carry(self, links: ProcessLinks, link: ControlLink, hello: ControlHello) -> None:
        """Carry a link that was welcomed upon `hello` until it ends. Always raises, a TunnelClosed unless it is cancelled."""
        links.set_link(link)
        try:
            if self._offers != hello.services:  # they have changed while the link was made
                links.send(Services(services=self._offers))
            if self._drain_until is not None:
                links.send(self._departure(self._drain_until - trio.current_time()))
            await link.run(partial(self._load, links), partial(self._on_drain, links), lambda: links.is_up)
        finally:
            links.set_link(None)

    def _hello(self) -> ControlHello:
        leaving = (CAP_LEAVING,) if self._drain_until is not None else ()
        return control_hello(self._identity, self._offers, (*self._config.caps, *leaving), self._environment.earlier())

    def _load(self, links: ProcessLinks) -> Load:
        return Load(streams=links.streams, reluctant=self._environment.is_reluctant())

    def _bearer(self, binding: str) -> str:
        return self._identity.assertion(self.gateway_id, binding, self._environment.now_unix())

    def _on_drain(self, links: ProcessLinks, message: Drain) -> None:
        if self._drain_until is not None:
            # A departing gateway's own Drain is not about our successor. Gateways that do not know `relieved` send a deadline of 0.
            self.is_relieved = self.is_relieved or message.relieved or not message.deadline_s
            return
        logger.info("gateway %s goes away within %g s; looking for its successor", self.gateway_id, message.deadline_s)
        self._lost_at = trio.current_time()
        links.depart()

    def _welcomed(self, links: ProcessLinks, link: ControlLink, url: GatewayUrl) -> None:
        self._welcomes += 1
        self._welcome_at = trio.current_time()
        links.process, links.worker = link.welcome.process, link.welcome.worker
        links.is_named = CAP_NAMED in link.welcome.caps and is_name(links.process)
        self._epoch, links.hold_s = link.welcome.epoch, link.welcome.hold_s
        logger.info("connected to gateway %s at %s, epoch %d", self.gateway_id, url, self._epoch)
        self._last_error = ""
        self._enter(UplinkState.UP)

    def _go_away(self, deadline_s: float) -> None:
        self._drain_until = trio.current_time() + deadline_s
        self._send(self._departure(deadline_s))

    def _departure(self, deadline_s: float) -> Drain:
        return Drain(deadline_s=min(max(0.0, deadline_s), MAX_DEADLINE_S), handover=self._makes_way)

    def _send(self, message: Drain | Services) -> None:
        """Send it on the control links that are up; any later one begins with the same facts anyway."""
        for links in self._links:
            if not links.send(message):
                logger.debug("a %s message waits for the next control link", message.type)

    def _close_sessions(self, code: Code, text: str) -> None:
        for links in self._links:
            links.close_sessions(code, text)

    def _enter(self, state: UplinkState) -> None:
        if state is not self._state:
            self._state, self._since_unix = state, self._environment.now_unix()

    def _await_next_try(self, wait_s: float) -> None:
        self._enter(UplinkState.WAITING)
        self._next_try_unix = self._environment.now_unix() + wait_s
