"""Task: one data session kept alive: dialled, resumed when its link is lost, made anew when it is over."""

import logging
import math
import random
from typing import Final, Protocol

import trio

from fxrelay.uplink.dial import GatewayBusy
from fxrelay.uplink.failure_policy import LogBackoff, final_goodbye, retry_after_s, retry_delay_s
from fxrelay.uplink.ports import LinkSession, UplinkConfig, UplinkSessionOwner
from fxtunnel.codes import Code, Refusal
from fxtunnel.errors import FxError, PeerRefused, RemoteProtocolError
from fxtunnel.kit.backoff import FullJitter
from fxtunnel.kit.link_tls import LinkSocket
from fxtunnel.model import GatewayId, SessionId
from fxtunnel.protocol.frames import WORN_STREAMS
from fxtunnel.protocol.hello import CAP_RESUME, Welcome

logger = logging.getLogger(__name__)

RESUMING_CAP_S: Final = 2.0
"""A session is held for seconds only: with streams to resume a busy gateway is asked more often than it would like."""
_SESSION_IS_GONE: Final = frozenset({Refusal.UNKNOWN_SESSION, Refusal.BAD_RESUME})


class SlotOwner(Protocol):
    """What a slot needs of its uplink."""

    @property
    def gateway_id(self) -> GatewayId:
        """For log lines."""

    @property
    def hold_s(self) -> float:
        """How long the gateway keeps a session without a link."""

    @property
    def wants_sessions(self) -> bool:
        """Whether a session that is over should be made anew."""

    async def open_link(self, session: LinkSession | None) -> tuple[LinkSocket, Welcome]:
        """A welcomed data link: for a new session, or to resume this one. Waits for the control link. Raises TunnelError."""

    def new_session(self, owner: UplinkSessionOwner, session_id: SessionId) -> LinkSession:
        """A session that the gateway has begun."""

    def ends_with(self, exc: FxError) -> bool:
        """Whether this failure is final; if so, the uplink has begun to end."""


class Slot:
    """The place of one data session: owns it, and hears of its fate from the engine.

    A lost link is dialled again at once, and after failures with full jitter.
    """

    def __init__(self, owner: SlotOwner, config: UplinkConfig, rng: random.Random) -> None:
        self.session: LinkSession | None = None
        self.retires = False
        """Another slot takes its place: its session is not made anew."""
        self._owner = owner
        self._settled_s = config.min_backoff_s
        self._rng = rng
        self._busy_cap_s = config.max_backoff_s
        self._backoff = FullJitter(base_s=config.min_backoff_s, cap_s=config.max_backoff_s, rng=rng)
        self._failures = LogBackoff()
        self._down = trio.Event()
        self._attempt: trio.CancelScope | None = None
        self._hold_until = math.inf
        self._opened_at = 0.0
        self._goodbye: FxError | None = None

    async def run(self) -> None:
        """Keep a session until the uplink wants none or ends. Cancelling leaves the session to `close`."""
        wait_s = 0.0
        while self.session is not None or (self._owner.wants_sessions and not self.retires):
            try:
                wait_s = await self._live() if await self._try_once(wait_s) else self._backoff.next_s()
            except FxError as exc:
                if self._owner.ends_with(exc):
                    return
                wait_s = self._after_failure(exc)
            except Exception:  # a bug of ours must not take the other slots along
                logger.exception("a data link to %s failed", self._owner.gateway_id)
                wait_s = self._backoff.next_s()
            if self._goodbye is not None and self._owner.ends_with(self._goodbye):
                return

    def close(self, code: Code, text: str) -> None:
        """End the session, if there is one."""
        if self.session is not None:
            self.session.close(code, text)

    @property
    def is_worn(self) -> bool:
        """Whether its session has had half of its stream ids."""
        return self.session is not None and self.session.statistics().mux.opened >= WORN_STREAMS

    def close_if_done(self) -> None:
        """End the session if it has no streams and the gateway has all that was sent on those it had; else hurry that on."""
        session = self.session
        if session is None or session.statistics().mux.streams:
            return
        if session.has_delivered:
            session.close(Code.NORMAL, "another has taken its place")
        else:
            session.press()

    def on_link_down(self, session: LinkSession, reason: str) -> None:
        """From the engine: see `UplinkSessionOwner`."""
        if session is self.session:
            held = session.statistics().mux.streams
            logger.info("link to %s lost: %s; streams held: %d", self._owner.gateway_id, reason, held, extra={"tunnel": session.id})
            self._down.set()

    def on_closed(self, session: LinkSession, code: Code, text: str) -> None:
        """From the engine, or from our own `close`: see `UplinkSessionOwner`."""
        if session is not self.session:
            return
        counters = session.statistics().mux
        lived_s = trio.current_time() - self._opened_at
        logger.info(
            "tunnel to %s closed after %.1f s: %s",
            self._owner.gateway_id,
            lived_s,
            text or code.label,
            extra={"tunnel": session.id, "bytes_in": counters.bytes_in, "bytes_out": counters.bytes_out, "streams": counters.opened},
        )
        self.session = None
        self._goodbye = final_goodbye(code, text)
        self._down.set()
        if self._attempt is not None:
            self._attempt.cancel()  # nothing is left to resume

    async def _try_once(self, wait_s: float) -> bool:
        """Bring a link up after a wait. False: the session that was to be resumed is over."""
        session = self.session
        with trio.CancelScope(deadline=math.inf if session is None else self._hold_until) as self._attempt:
            await trio.sleep(wait_s)
            await self._connect(session)
            return True
        if session is not None:
            session.close(Code.LINK_LOST, f"no link for {self._owner.hold_s:g} s")
        return False

    async def _connect(self, session: LinkSession | None) -> None:
        is_new = session is None
        if session is not None:
            session.detach("resuming")  # its counter must stand still before it is quoted
        link, welcome = await self._owner.open_link(session)
        if session is None:
            session = self.session = self._owner.new_session(self, welcome.session)
            self._opened_at = trio.current_time()
            if CAP_RESUME not in welcome.caps:
                session.forgo_resumption()
        self._down = trio.Event()
        try:
            session.attach(link, welcome.received)
        except RemoteProtocolError as exc:
            link.close()
            session.close(exc.code, str(exc))
            raise
        self._failures.reset()
        logger.info("tunnel to %s %s", self._owner.gateway_id, "open" if is_new else "resumed", extra={"tunnel": session.id})

    async def _live(self) -> float:
        """Wait until the link is lost or the session over; the seconds to wait before the next attempt."""
        session, began = self.session, trio.current_time()
        before = 0 if session is None else session.received
        try:
            await self._down.wait()
        finally:
            now = trio.current_time()
            self._hold_until = now + self._owner.hold_s
        is_settled = now - began >= self._settled_s
        if is_settled or (session is not None and session.received > before):
            self._backoff.reset()
        # At once only for a link that had lasted: one that dies as soon as it is up would be dialled in a tight loop.
        return 0.0 if is_settled and self.session is not None else self._backoff.next_s()

    def _after_failure(self, exc: FxError) -> float:
        """The seconds to wait before the next attempt."""
        if self.session is not None and isinstance(exc, PeerRefused) and exc.refusal in _SESSION_IS_GONE:
            self.session.close(Code.LINK_LOST, f"the gateway cannot resume it: {exc}")
            return 0.0
        if isinstance(exc, GatewayBusy):
            return retry_delay_s(exc.retry_after, self._rng.random(), self._busy_cap_s if self.session is None else RESUMING_CAP_S)
        wait_s = self._backoff.next_s(at_least_s=retry_after_s(exc))
        if self._failures.is_due():
            attempt = self._failures.count
            logger.warning("no data link to %s: %s; attempt %d in %.1f s", self._owner.gateway_id, exc, attempt + 1, wait_s)
        return wait_s
