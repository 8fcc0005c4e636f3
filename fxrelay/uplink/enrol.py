"""Task: handing the relay's public key to a gateway, once (PROTOCOL.md, 2)."""

import logging
from collections.abc import Callable
from typing import Final

import trio

from fxrelay.uplink.dial import Dialler, within
from fxrelay.uplink.gateway_file import GatewayFile, GatewayUrl
from fxrelay.uplink.identity import Identity
from fxtunnel.codes import Code, Refusal
from fxtunnel.control.upgrade import ENROL_PATH, post_json, refusal_from
from fxtunnel.errors import PeerRefused, RemoteProtocolError
from fxtunnel.kit.tls import TlsStream
from fxtunnel.protocol.alpn import ALPN_HTTP

logger = logging.getLogger(__name__)

ENROLMENT_VERSION: Final = 1


async def enrol(dialler: Dialler, url: GatewayUrl, gateway: GatewayFile, identity: Identity, now_unix: Callable[[], float]) -> None:
    """Make the gateway know this relay's key, and remember that it does. Doing it again changes nothing.

    Takes at most two of the dialler's timeouts. Cancelling is safe.

    Raises:
        PeerRefused: the gateway said no, or the file holds no token.
        TunnelError: the gateway could not be reached, or answered nonsense.
        ConfigError: the note of it cannot be written.
    """
    if gateway.enrolment is None:
        raise PeerRefused(Refusal.BAD_TOKEN, f"{gateway.path} holds no enrolment token, and this relay is not enrolled")
    stream = TlsStream(await dialler.dial(url, ALPN_HTTP))
    try:
        with within(dialler.timeout_s, f"{url.authority} did not answer the enrolment"):
            body = {
                "v": ENROLMENT_VERSION,
                "token": gateway.enrolment.token.get_secret_value(),
                "relay_id": identity.relay_id,
                "assertion": identity.assertion(gateway.gateway_id, stream.socket.binding(), now_unix()),
                "public_key": identity.public_key,
            }
            status, fields = await post_json(stream, url.authority, ENROL_PATH, body)
    finally:
        await trio.aclose_forcefully(stream)
    if status != 200:
        raise refusal_from(status, fields)
    if fields.get("kid") != identity.kid:
        raise RemoteProtocolError(Code.PROTOCOL_ERROR, f"{url.authority} confirmed another key than the one it was given")
    await identity.note_enrolment(gateway.gateway_id)
    logger.info("relay %s is enrolled at %s", identity.relay_id, gateway.gateway_id)
