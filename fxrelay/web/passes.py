"""Pure: what a ticket is changed for at an HTTP service: a cookie that this relay signs, so that a page's other requests need no ticket.

    NAME = PAYLOAD "." MAC      PAYLOAD = base64url of {"u": user, "g": groups, "n": node or null, "x": expiry, Unix seconds}

It is a bearer's secret like any session cookie, and holds until it expires: it cannot be called back before.
"""

import base64
import binascii
import hashlib
import hmac
import json
from dataclasses import dataclass, field, replace
from typing import Final

from fxrelay.admitting.ticket import Caller
from fxrelay.web.heads import Field, RequestHead, cookie_values
from fxtunnel.model import RelayId, is_name

MAX_PASS_BYTES: Final = 4_096
TICKET_PARAMETER: Final = b"fx_ticket"


@dataclass(frozen=True, slots=True)
class Passes:
    """The passes of one service. Relays that share the key know each other's."""

    service: str
    life_s: float
    key: bytes = field(repr=False)

    @property
    def name(self) -> bytes:
        """The cookie's name. Services at one host must not take each other's."""
        return f"fxpass_{self.service}".encode()

    def set_cookie(self, caller: Caller, now_unix: float, *, secure: bool) -> bytes:
        """The field that hands out a pass; nothing if the caller has too many groups for a cookie."""
        facts = {"u": caller.user, "g": list(caller.groups), "n": caller.node, "x": int(now_unix + self.life_s)}
        payload = _base64url(json.dumps(facts, separators=(",", ":"), ensure_ascii=False).encode())
        value = b"%b.%b" % (payload, self._mac(payload))
        if len(value) > MAX_PASS_BYTES:
            return b""
        where = b"; Path=/; HttpOnly; SameSite=Lax" + (b"; Secure" if secure else b"")
        return b"Set-Cookie: %b=%b; Max-Age=%d%b\r\n" % (self.name, value, int(self.life_s), where)

    def caller_of(self, head: RequestHead, now_unix: float) -> Caller | None:
        """Whose pass the request shows, if it is one of ours and still holds."""
        for value in cookie_values(head.fields, self.name):
            caller = self._verified(value, now_unix)
            if caller is not None:
                return caller
        return None

    def without(self, head: RequestHead) -> RequestHead:
        """The head for the service, without the pass: anybody who could read it there could use it."""
        kept = [found if found.name != b"cookie" else _without(found, self.name) for found in head.fields]
        return replace(head, fields=tuple(found for found in kept if found is not None))

    def _verified(self, value: bytes, now_unix: float) -> Caller | None:
        payload, _, mac = value.partition(b".")
        if len(value) > MAX_PASS_BYTES or not hmac.compare_digest(mac, self._mac(payload)):
            return None
        try:
            facts = json.loads(base64.urlsafe_b64decode(payload + b"=" * (-len(payload) % 4)))
            user, groups, node, expires = facts["u"], tuple(facts["g"]), facts["n"], facts["x"]
        except (ValueError, KeyError, TypeError, binascii.Error, RecursionError):
            return None  # signed by us, in another version
        if not isinstance(user, str) or type(expires) is not int or expires < now_unix:
            return None
        if node is not None and not (isinstance(node, str) and is_name(node)):
            return None
        return Caller(user, groups, RelayId(node) if node is not None else None)

    def _mac(self, payload: bytes) -> bytes:
        text = b"fxpass\0%b\0%b" % (self.service.encode(), payload)
        return _base64url(hmac.new(self.key, text, hashlib.sha256).digest())


def split_ticket(path: bytes) -> tuple[bytes, list[bytes]]:
    """A path without its `fx_ticket=…`, and what that said, as often as it was there. The rest of the query stays byte for byte."""
    before, mark, query = path.partition(b"?")
    if TICKET_PARAMETER not in query:
        return path, []
    parts = query.split(b"&")
    tickets = [part.partition(b"=")[2] for part in parts if part.partition(b"=")[0] == TICKET_PARAMETER]
    rest = b"&".join(part for part in parts if part.partition(b"=")[0] != TICKET_PARAMETER)
    return (before + mark + rest if rest else before), tickets


def bearer_of(head: RequestHead) -> bytes:
    """The token of `Authorization: Bearer`, or nothing (RFC 6750, 2.1)."""
    scheme, _, token = (head.get(b"authorization") or b"").partition(b" ")
    return token.strip(b" ") if scheme.lower() == b"bearer" else b""


def _without(cookies: Field, name: bytes) -> Field | None:
    parts = [part.strip(b" \t") for part in cookies.value.split(b";")]
    kept = [part for part in parts if part.partition(b"=")[0] != name]
    if len(kept) == len(parts):
        return cookies
    return cookies._replace(value=b"; ".join(kept)) if kept else None


def _base64url(raw: bytes) -> bytes:
    return base64.urlsafe_b64encode(raw).rstrip(b"=")
