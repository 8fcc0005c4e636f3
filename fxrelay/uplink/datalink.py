"""Task: a data link's first two frames (PROTOCOL.md, 4): a ticket and a counter out, a session and a counter back."""

import trio

from fxrelay.uplink.dial import Dialler, within
from fxrelay.uplink.gateway_file import GatewayUrl
from fxtunnel.codes import Code
from fxtunnel.errors import PeerRefused, RemoteProtocolError, TunnelClosed
from fxtunnel.kit.link_tls import LinkSocket
from fxtunnel.kit.tls import TlsStream
from fxtunnel.protocol.alpn import ALPN_DATA, at_process
from fxtunnel.protocol.hello import HEADER_BYTES, Denied, Hello, Welcome, decode_reply, encode_hello, parse_header


async def open_data_link(
    dialler: Dialler, url: GatewayUrl, hello: Hello, worker: str = "", process: str = ""
) -> tuple[LinkSocket, Welcome]:
    """A data link that the gateway has welcomed: its socket, not a byte behind the WELCOME taken from it, and the answer.

    `worker` is the one that issued the ticket, if the gateway has several; `process` is the only gateway process that will do. To resume,
    detach the session before its counter goes into `hello`.
    The caller owns the socket. Takes at most two of the dialler's timeouts. Cancelling leaves nothing open; the ticket may be spent then.

    Raises:
        PeerRefused: the gateway answered DENIED.
        TunnelError: it could not be reached, did not answer in time, or broke the protocol.
    """
    stream = TlsStream(await dialler.dial(url, at_process(process, ALPN_DATA), worker))
    try:
        with within(dialler.timeout_s, f"{url.authority} did not answer on a data link"):
            welcome = await _greet(stream, hello)
    except trio.BrokenResourceError as exc:
        await trio.aclose_forcefully(stream)
        raise TunnelClosed(Code.LINK_LOST, f"{url.authority} closed a data link before it was open", by_peer=True) from exc
    except BaseException:
        await trio.aclose_forcefully(stream)
        raise
    return stream.detach()[0], welcome


async def _greet(stream: TlsStream, hello: Hello) -> Welcome:
    await stream.send_all(encode_hello(hello))
    kind, length, _ = parse_header(await stream.receive_exactly(HEADER_BYTES))
    answer = decode_reply(kind, await stream.receive_exactly(length))
    match answer:
        case Denied(code=refusal, message=message, retry_after_s=retry_after_s):
            raise PeerRefused(refusal, message or refusal.value, retry_after_s=retry_after_s)
        case Welcome(session=session) if hello.session not in (None, session):
            raise RemoteProtocolError(Code.PROTOCOL_ERROR, "the gateway resumed another session than the one asked for")
        case welcome:
            return welcome
