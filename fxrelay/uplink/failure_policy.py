"""Pure: which failures of an uplink are final, what to do about them, and how long to wait after the others."""

from typing import Final

from fxrelay.uplink.ports import FINAL_CODES, GatewayClosing
from fxtunnel.codes import Code, Refusal
from fxtunnel.control.busy import RetryAfter
from fxtunnel.errors import ConfigError, FxError, LocalProtocolError, PeerRefused, TunnelClosed, TunnelError
from fxtunnel.kit.tls import HandshakeFailed, HandshakeProblem
from fxtunnel.model import GatewayId, RelayId

_INVITE: Final = "ask the gateway's administrator for a new gateway.json: fxgateway invite"
_LET_IN_AGAIN: Final = "to let it in again, run fxgateway forget {relay} on the gateway, then fxgateway invite"
_ADVICE: Final = {
    Refusal.BAD_REQUEST: "update fxrelay or fxgateway, whichever is older",
    Refusal.BAD_TOKEN: _INVITE,
    Refusal.EXPIRED_TOKEN: _INVITE,
    Refusal.BAD_ASSERTION: f"if gateway.json is not of this gateway, {_INVITE}",
    Refusal.UNKNOWN_RELAY: _INVITE,
    Refusal.REVOKED: _LET_IN_AGAIN,
    Refusal.NAME_TAKEN: "give this relay another id in relay.toml, or run fxgateway forget {relay} on the gateway",
    Refusal.VERSION_MISMATCH: "update fxrelay or fxgateway, whichever is older",
}
_FINAL_HANDSHAKES: Final = frozenset({HandshakeProblem.UNTRUSTED, HandshakeProblem.WRONG_NAME})


def final_error(exc: FxError, relay_id: RelayId, gateway_id: GatewayId, *, was_welcome: bool) -> FxError | None:
    """The error to end an uplink with, saying what to do; None if trying again may help.

    After a first welcome two things no longer are. A certificate that is not the gateway's: it was right before, so somebody else is
    answering now, and whoever can do that for a minute must not be able to end relays for good. And bad-request: our requests were good
    before, so this one was merely mangled or late.
    """
    match exc:
        case ConfigError() | LocalProtocolError():
            return exc
        case PeerRefused(refusal=refusal) if refusal.is_final and not (was_welcome and refusal is Refusal.BAD_REQUEST):
            # The gateway's own words may hold the command already.
            advice = "" if "fxgateway " in str(exc) else "; " + _ADVICE[refusal].format(relay=relay_id)
            return PeerRefused(refusal, f"gateway {gateway_id} refused relay {relay_id}: {_sentence(exc)}{advice}")
        case TunnelClosed(code=Code.FENCED, by_peer=True):
            return TunnelClosed(
                Code.FENCED,
                f"another fxrelay runs with the id {relay_id} and has taken over at gateway {gateway_id}: stop one of the two, or give "
                "it another id in relay.toml and a key of its own",
                by_peer=True,
            )
        case TunnelClosed(code=Code.REVOKED, by_peer=True):
            advice = _LET_IN_AGAIN.format(relay=relay_id)
            return TunnelClosed(Code.REVOKED, f"gateway {gateway_id} has revoked relay {relay_id}; {advice}", by_peer=True)
        case HandshakeFailed(problem=problem) if problem in _FINAL_HANDSHAKES and not was_welcome:
            advice = _INVITE if problem is HandshakeProblem.UNTRUSTED else "correct the URL in gateway.json, or renew the certificate"
            return HandshakeFailed(problem, f"gateway {gateway_id}: {_sentence(exc)}; {advice}")
        case _:
            return None


def final_goodbye(code: Code, text: str) -> TunnelError | None:
    """The failure that a session's end means for the whole uplink; None if the session can simply be made anew."""
    return TunnelClosed(code, text, by_peer=True) if code in FINAL_CODES else None


def retry_after_s(exc: FxError) -> float:
    """The least wait before the next attempt that the gateway has asked for."""
    return exc.retry_after_s if isinstance(exc, PeerRefused | GatewayClosing) else 0.0


def retry_delay_s(retry_after: RetryAfter, chance: float, at_most_s: float) -> float:
    """When to come again to a gateway that was busy: within its spread, by a `chance` from 0 to 1; `at_most_s` bounds both times.

    Whoever stands in the way could say so in the gateway's place; it keeps us waiting no longer than by dropping our bytes.
    """
    return min(retry_after.retry_after_s, at_most_s) + chance * min(retry_after.spread_s, at_most_s)


class LogBackoff:
    """Says which of a row of failures to make known: the first, the second, the fourth, the eighth, …"""

    __slots__ = ("count",)

    def __init__(self) -> None:
        self.count = 0

    def is_due(self) -> bool:
        """Count a failure; whether it is one to make known."""
        self.count += 1
        return self.count & (self.count - 1) == 0

    def reset(self) -> None:
        """It has worked; the next failure is a first one."""
        self.count = 0


def _sentence(exc: FxError) -> str:
    return str(exc).rstrip(".")
