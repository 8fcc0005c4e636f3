"""Pure: what a browser keeps of its login: a signed cookie that names the server and the login, and one that names a login under way.

They only steer requests and end logins. Letting anybody in is the service's own business. Relays that share the key know each other's.
"""

import base64
import hashlib
import hmac
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from fxrelay.logins.recognising import cookies
from fxrelay.web.heads import Field
from fxtunnel.model import RelayId, is_name

TRY_SUFFIX: Final = "-try"
_MAC_CHARS: Final = 22
"""As for the cookies of nodes (fxrelay/web/affinity.py): 132 bits."""
_ID: Final = re.compile(r"[0-9A-Za-z]{1,64}")
_UNIX: Final = re.compile(r"[0-9]{1,12}")


TOLD_S: Final = 86_400
"""How much longer than its login a browser keeps the pass, so that it can be told once that the login has ended."""


@dataclass(frozen=True, slots=True)
class Pass:
    """`login_id` on `server_id`; `until_unix`: when it ends at the latest (of a login under way: when it began)."""

    server_id: RelayId
    login_id: str
    until_unix: int


@dataclass(frozen=True, slots=True)
class PassCookies:
    """Writes and reads the passes of one service. `name` is the cookie's; logins under way have one with TRY_SUFFIX."""

    name: str
    service: str
    key: bytes = field(repr=False)

    def read(self, fields: Sequence[Field]) -> list[Pass]:
        """The logins whose passes a request shows, if we signed them."""
        return self._read(fields, self.name)

    def read_tries(self, fields: Sequence[Field]) -> list[Pass]:
        """The logins under way."""
        return self._read(fields, self.name + TRY_SUFFIX)

    def grant(self, found: Pass, now_unix: float, *, secure: bool) -> bytes:
        """The field that gives a pass to a browser. It outlives its login: who shows it then is told, once, that the login has ended."""
        return self._set(self.name, found, max(1, int(found.until_unix - now_unix)) + TOLD_S, secure=secure)

    def grant_try(self, found: Pass, lasts_s: int, *, secure: bool) -> bytes:
        """The field that marks a browser's login under way."""
        return self._set(self.name + TRY_SUFFIX, found, lasts_s, secure=secure)

    def withdraw(self) -> bytes:
        """The field that takes a pass away."""
        return f"Set-Cookie: {self.name}=; Path=/; Max-Age=0; HttpOnly; SameSite=Lax\r\n".encode()

    def withdraw_try(self) -> bytes:
        """The field that takes the mark of a login under way."""
        return f"Set-Cookie: {self.name}{TRY_SUFFIX}=; Path=/; Max-Age=0; HttpOnly; SameSite=Lax\r\n".encode()

    def _set(self, name: str, found: Pass, lasts_s: int, *, secure: bool) -> bytes:
        text = f"{found.server_id}:{found.login_id}:{found.until_unix}"
        extra = "; Secure" if secure else ""
        return f"Set-Cookie: {name}={self._mac(name, text)}:{text}; Path=/; Max-Age={lasts_s}; HttpOnly; SameSite=Lax{extra}\r\n".encode()

    def _read(self, fields: Sequence[Field], name: str) -> list[Pass]:
        found = []
        for value in cookies(fields, name):
            mac, _, text = value.partition(":")
            server_id, _, rest = text.partition(":")
            login_id, _, until = rest.partition(":")
            if not (is_name(server_id) and _ID.fullmatch(login_id) and _UNIX.fullmatch(until)):
                continue
            if hmac.compare_digest(mac, self._mac(name, text)):
                found.append(Pass(RelayId(server_id), login_id, int(until)))
        return found[:4]

    def _mac(self, name: str, text: str) -> str:
        signed = f"fxlogin\0{self.service}\0{name}\0{text}".encode()
        return base64.urlsafe_b64encode(hmac.new(self.key, signed, hashlib.sha256).digest()).decode()[:_MAC_CHARS]
