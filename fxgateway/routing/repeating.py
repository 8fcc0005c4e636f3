"""Pure: whether what a client said first may reach two services, where nobody can know whether the first has acted on it."""

from typing import Final

from fxgateway.routing.request_head import RequestHead, read_request_head
from fxtunnel.kit.client_hello import ClientHello, read_client_hello

IDEMPOTENT: Final = frozenset({b"GET", b"HEAD", b"OPTIONS", b"TRACE", b"PUT", b"DELETE"})
"""RFC 9110, 9.2.2: a proxy may repeat such a request by itself."""
_SSH: Final = b"SSH-"


def may_be_repeated(early: bytes) -> bool:
    """Whether a service that gets `early` and then RST has done nothing that a second one must not do again.

    So it is for nothing at all; for a TLS ClientHello, and what may follow it before an answer (RFC 8446, 8: early data is replayable); for
    SSH's greeting and key exchange, as nobody has logged in; and for the head of one idempotent HTTP request, with nothing behind it.
    """
    if not early or early.startswith(_SSH) or isinstance(read_client_hello(early), ClientHello):
        return True
    head = read_request_head(early)
    return isinstance(head, RequestHead) and len(head.raw) == len(early) and early.partition(b" ")[0] in IDEMPOTENT
