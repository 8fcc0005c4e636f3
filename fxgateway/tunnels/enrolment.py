"""Task: POST /.fx/enrol: a relay hands over its public key, once (PROTOCOL.md, 2)."""

import logging
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Annotated, Final, Literal

import trio
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fxgateway.tunnels.identities import EnrolOutcome, EnrolResult, Identities
from fxtunnel.codes import Refusal
from fxtunnel.errors import ConfigError, PeerRefused
from fxtunnel.kit.tokens import KeyProblem, public_from_text, thumbprint, verify_assertion
from fxtunnel.model import NAME_PATTERN, GatewayId, RelayId

logger = logging.getLogger(__name__)

_RETRY_AFTER_S: Final = 60.0


class EnrolRequest(BaseModel):
    """What a relay posts."""

    model_config = ConfigDict(frozen=True, extra="ignore", strict=True)
    v: Literal[1]
    token: Annotated[str, Field(min_length=1, max_length=256, repr=False)]
    relay_id: Annotated[RelayId, Field(pattern=NAME_PATTERN)]
    assertion: Annotated[str, Field(max_length=8192, repr=False)]
    public_key: Annotated[str, Field(max_length=64)]


class Enroller:
    """Answers enrolment requests."""

    def __init__(self, identities: Identities, gateway_id: GatewayId, now_unix: Callable[[], float]) -> None:
        self._identities = identities
        self._gateway_id = gateway_id
        self._now_unix = now_unix

    async def enrol(self, body: bytes, binding: str) -> dict[str, object]:
        """The JSON of a success (status 200). Cancelling it may come too late to keep the relay from being enrolled.

        `binding` is that of the connection that the request came by.

        Raises:
            PeerRefused: with the reason, to be answered with its status.
        """
        request, public = _parse(body)
        kid = thumbprint(public)

        def posted_key(relay_id: RelayId, claimed_kid: str) -> Ed25519PublicKey | KeyProblem:
            return public if (relay_id, claimed_kid) == (request.relay_id, kid) else KeyProblem.UNKNOWN

        now_unix = self._now_unix()
        try:
            verify_assertion(request.assertion, gateway_id=self._gateway_id, binding=binding, find_key=posted_key, now_unix=now_unix)
        except PeerRefused as exc:
            if exc.refusal is not Refusal.UNKNOWN_RELAY:
                raise
            raise PeerRefused(Refusal.BAD_ASSERTION, "bad assertion: it is not signed by the key it comes with") from exc
        try:
            result = await trio.to_thread.run_sync(self._identities.enrol, request.relay_id, public, request.token)
        except ConfigError as exc:
            logger.error("relay %s cannot be enrolled: %s", request.relay_id, exc)
            raise PeerRefused(Refusal.TOO_MANY, "the gateway cannot store keys now; see its log", retry_after_s=_RETRY_AFTER_S) from exc
        _raise_refusal(result, request.relay_id)
        if result.outcome is EnrolOutcome.ENROLLED:
            logger.info("relay %s is enrolled with key %s", request.relay_id, kid)
        return {"relay_id": request.relay_id, "gateway_id": self._gateway_id, "kid": kid}


def _parse(body: bytes) -> tuple[EnrolRequest, Ed25519PublicKey]:
    try:
        request = EnrolRequest.model_validate_json(body)
        return request, public_from_text(request.public_key)
    except ValidationError as exc:
        first = exc.errors(include_url=False, include_context=False, include_input=False)[0]
        if first["loc"] == ("v",) and first["type"] != "missing":
            raise PeerRefused(Refusal.VERSION_MISMATCH, "this gateway speaks version 1; update the older of the two") from None
        where = ".".join(str(part) for part in first["loc"]) or "JSON"
        raise PeerRefused(Refusal.BAD_REQUEST, f"{where}: {first['msg']}"[:300]) from None
    except ValueError as exc:
        raise PeerRefused(Refusal.BAD_REQUEST, f"public_key: {exc}") from None


def _raise_refusal(result: EnrolResult, relay_id: RelayId) -> None:
    match result.outcome:
        case EnrolOutcome.ENROLLED | EnrolOutcome.ALREADY:
            return
        case EnrolOutcome.NAME_TAKEN:
            raise PeerRefused(
                Refusal.NAME_TAKEN, f"{relay_id} is enrolled with another key; on the gateway run: fxgateway forget {relay_id}"
            )
        case EnrolOutcome.REVOKED:
            raise PeerRefused(Refusal.REVOKED, f"relay {relay_id} was revoked by the gateway's administrator")
        case EnrolOutcome.TOO_MANY_KEYS:
            raise PeerRefused(Refusal.TOO_MANY, "no more relays can be enrolled; forget some first", retry_after_s=_RETRY_AFTER_S)
        case EnrolOutcome.BAD_TOKEN:
            raise PeerRefused(
                Refusal.BAD_TOKEN, "the enrolment token is unknown or was withdrawn; get a fresh gateway.json (fxgateway invite)"
            )
        case EnrolOutcome.EXPIRED_TOKEN:
            since = datetime.fromtimestamp(result.expired_unix, UTC)
            raise PeerRefused(
                Refusal.EXPIRED_TOKEN,
                f"the enrolment token expired on {since:%Y-%m-%d %H:%M} UTC; get a fresh gateway.json (fxgateway invite)",
            )
