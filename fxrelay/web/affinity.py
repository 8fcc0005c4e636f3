"""Pure: which node a client was at before: by a cookie that this service signed, or by a claim in the caller's JWT.

Both only steer. The cookie is signed so that clients cannot pick a node. The JWT's signature is not verified: showing a claim proves
nothing.
"""

import base64
import binascii
import hashlib
import hmac
import json
from dataclasses import dataclass, field
from typing import Final

from fxrelay.web.heads import RequestHead, cookie_values
from fxtunnel.model import RelayId, is_name

MAX_TOKEN_BYTES: Final = 8_192
KEY_BYTES: Final = 32
"""As long as the output of the hash (RFC 2104, 3)."""
_MAC_CHARS: Final = 22
"""Of an HMAC-SHA256 in base64url: 132 bits, more than anybody can guess, in a cookie that stays short."""


@dataclass(frozen=True, slots=True)
class CookieAffinity:
    """A cookie `name` whose value is a node, signed for one service. Relays that share the key know each other's cookies."""

    name: str
    service: str
    key: bytes = field(repr=False)

    def node_of(self, head: RequestHead) -> RelayId | None:
        """The node that the request's cookie names, if we signed it."""
        nodes = map(self._verified, cookie_values(head.fields, self.name.encode()))
        return next((node for node in nodes if node is not None), None)

    def set_cookie(self, node: RelayId, *, secure: bool) -> bytes:
        """The field that makes the client come back to `node`."""
        value = f"{self._mac(node)}.{node}"
        return f"Set-Cookie: {self.name}={value}; Path=/; HttpOnly; SameSite=Lax{'; Secure' if secure else ''}\r\n".encode()

    def _verified(self, value: bytes) -> RelayId | None:
        try:
            mac, _, node = value.decode("ascii").partition(".")
        except UnicodeDecodeError:
            return None
        if not is_name(node) or not hmac.compare_digest(mac, self._mac(node)):
            return None
        return RelayId(node)

    def _mac(self, node: str) -> str:
        text = f"fxnode\0{self.service}\0{self.name}\0{node}".encode()
        return base64.urlsafe_b64encode(hmac.new(self.key, text, hashlib.sha256).digest()).decode()[:_MAC_CHARS]


@dataclass(frozen=True, slots=True)
class ClaimAffinity:
    """A claim of the JWT in `Authorization: Bearer`. A FastX login's `iss` is the server that it was made on."""

    claim: str

    def node_of(self, head: RequestHead) -> RelayId | None:
        """The node that the claim names."""
        scheme, _, token = (head.get(b"authorization") or b"").partition(b" ")
        if scheme.lower() != b"bearer" or len(token) > MAX_TOKEN_BYTES:
            return None
        parts = token.strip(b" ").split(b".")
        if len(parts) != 3:
            return None
        try:
            claims = json.loads(base64.urlsafe_b64decode(parts[1] + b"=" * (-len(parts[1]) % 4)))
        except (ValueError, binascii.Error, RecursionError):
            return None
        value = claims.get(self.claim) if isinstance(claims, dict) else None
        return RelayId(value) if isinstance(value, str) and is_name(value) else None


Affinity = CookieAffinity | ClaimAffinity
