"""Task: reconnect to a gateway process that has handed its address on, for the sessions that are left there (PROTOCOL.md, 3.1)."""

import logging
import random
from collections.abc import Awaitable, Callable

import trio

from fxrelay.uplink.dial import GatewayBusy
from fxrelay.uplink.failure_policy import retry_after_s, retry_delay_s
from fxrelay.uplink.ports import GatewayClosing, UplinkConfig
from fxrelay.uplink.process_links import ProcessLinks
from fxrelay.uplink.slot import RESUMING_CAP_S
from fxtunnel.codes import Code, Refusal
from fxtunnel.errors import FxError, PeerRefused
from fxtunnel.kit.backoff import FullJitter
from fxtunnel.kit.tls import HandshakeFailed, HandshakeProblem

logger = logging.getLogger(__name__)


async def keep_reconnecting(
    links: ProcessLinks, use_control_link: Callable[[ProcessLinks], Awaitable[None]], config: UplinkConfig, rng: random.Random
) -> None:
    """Keep a control link to the process for as long as it can be reached by name and has sessions of ours. Safe to cancel.

    `use_control_link` dials it by name and carries the link; it ends with an FxError.
    """
    backoff = FullJitter(base_s=config.min_backoff_s, cap_s=RESUMING_CAP_S, rng=rng)
    while links.is_named and links.sessions:
        try:
            await use_control_link(links)
        except FxError as exc:
            if is_gone(exc):
                logger.info("gateway %s: the process that went away cannot be reached any more: %s", links.gateway_id, exc)
                links.lose()
                return
            logger.debug("gateway %s: no control link to the process that goes away: %s", links.gateway_id, exc)
            if isinstance(exc, GatewayBusy):
                wait_s = retry_delay_s(exc.retry_after, rng.random(), RESUMING_CAP_S)
            else:
                wait_s = backoff.next_s(at_least_s=min(retry_after_s(exc), RESUMING_CAP_S))
        except Exception:  # whatever a peer's bytes did to a library, the other links live on
            logger.exception("a control link to %s failed", links.gateway_id)
            wait_s = RESUMING_CAP_S
        else:
            wait_s = 0.0
        await trio.sleep(wait_s)


def is_gone(exc: FxError) -> bool:
    """Whether this failure means that the process cannot be reached again: it has said goodbye, it no longer knows us, or whoever has its
    address now does not know it.
    """
    match exc:
        case HandshakeFailed(problem=problem):
            return problem is HandshakeProblem.NO_COMMON_PROTOCOL
        case GatewayClosing(code=code):
            return code is Code.SHUTDOWN
        case PeerRefused(refusal=refusal):
            return refusal is Refusal.DRAINING
        case _:
            return False


def is_turned_away(exc: FxError, links: ProcessLinks) -> bool:
    """Whether whoever has the address has nothing of ours, though we have sessions: as it is another process, perhaps. Who drains is let in
    nowhere else, and told no names there.
    """
    return isinstance(exc, PeerRefused) and exc.refusal is Refusal.DRAINING and links.is_named and bool(links.sessions)
