"""Task: where the keys for other people's JWTs come from: a file, or a page that is fetched, kept, and fetched again when keys change."""

import http.client
import ipaddress
import logging
import ssl
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import trio

from fxtunnel.errors import ConfigError
from fxtunnel.kit.jwt_verifying import BadKeys, BadToken, KeySet, TokenRules, UnknownKey, read_keys, verify_token

logger = logging.getLogger(__name__)

MAX_PAGE_BYTES: Final = 262_144
"""Room for MAX_KEYS keys of 4 KiB each, certificate chains included."""
FETCH_S: Final = 5.0
"""For one fetch, from the connection to the last byte."""
KEEP_S: Final = 600.0
"""Keys that are older are fetched anew; if that fails, they go on being good."""
AGAIN_S: Final = 10.0
"""The least time between two fetches: tokens with unknown keys must not make us a nuisance to who serves them."""


@dataclass(frozen=True, slots=True)
class KeySource:
    """Either a file (PEM, JWK or JWK set) or a URL of a JWK set; `ca` is a file with certificates to trust for it."""

    file: Path | None = None
    url: str = ""
    ca: Path | None = None


class NoRedirects(urllib.request.HTTPRedirectHandler):
    """A key must come from where the administrator said."""

    def redirect_request(self, *_: object) -> None:
        """None: the redirect is an error."""


class TokenVerifier:
    """Verifies tokens by rules and keys of the configuration. Any number of tasks may use it.

    Raises:
        ConfigError: the key file cannot be used. A URL is not asked before the first token comes.
    """

    def __init__(
        self,
        rules: TokenRules,
        source: KeySource,
        *,
        fetch: Callable[[KeySource], bytes] | None = None,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self.rules = rules
        self._source = source
        self._fetch = fetch or fetch_page
        self._wall_clock = wall_clock
        self._keys = KeySet() if source.file is None else read_key_file(source.file)
        self._fetched_at: float | None = None
        self._tried_at: float | None = None
        self._fetching = trio.Lock()

    async def verify(self, token: str) -> dict[str, Any]:
        """The claims of a good token. At most one fetch is waited for, FETCH_S at most. Safe to cancel.

        Raises:
            BadToken: it is not good, or there is no key to tell.
        """
        await trio.lowlevel.checkpoint()
        if self._source.url and self._is_due():
            await self._refresh()
        try:
            return verify_token(token, self.rules, self._keys, self._wall_clock())
        except UnknownKey:
            if not self._source.url or not await self._refresh():
                raise
        return verify_token(token, self.rules, self._keys, self._wall_clock())

    def _is_due(self) -> bool:
        return self._fetched_at is None or trio.current_time() - self._fetched_at > KEEP_S

    async def _refresh(self) -> bool:
        """Fetch the keys, if that was not just tried. Whether there are new ones."""
        asked_at = trio.current_time()
        async with self._fetching:
            if self._fetched_at is not None and self._fetched_at >= asked_at:
                return True  # somebody else's fetch, begun before we waited
            if self._tried_at is not None and trio.current_time() - self._tried_at < AGAIN_S:
                return False
            self._tried_at = trio.current_time()
            try:
                with trio.fail_after(FETCH_S):
                    data = await trio.to_thread.run_sync(self._fetch, self._source, abandon_on_cancel=True)
                self._keys = read_keys(data)
            except trio.TooSlowError:
                logger.warning("the keys at %s did not come within %g s", self._source.url, FETCH_S)
                return False
            except (OSError, http.client.HTTPException, BadKeys, ConfigError) as exc:
                logger.warning("the keys at %s cannot be used: %s", self._source.url, exc)
                return False
            self._fetched_at = trio.current_time()
            return True


def read_key_file(path: Path) -> KeySet:
    """The keys of a file. Blocking.

    Raises:
        ConfigError: there are none.
    """
    try:
        with path.open("rb") as file:
            return read_keys(file.read(MAX_PAGE_BYTES))
    except OSError as exc:
        raise ConfigError.one(path, "", f"cannot be read: {exc.strerror or exc}") from exc
    except BadKeys as exc:
        raise ConfigError.one(path, "", str(exc)) from exc


def is_key_url(url: str) -> bool:
    """Whether keys may be fetched from there: over TLS, or from this host itself."""
    parts = urllib.parse.urlsplit(url)
    if parts.scheme == "https":
        return bool(parts.hostname)
    try:
        return parts.scheme == "http" and ipaddress.ip_address(parts.hostname or "").is_loopback
    except ValueError:
        return False


def fetch_page(source: KeySource) -> bytes:
    """The page of a source's URL. Blocking; one silence may take FETCH_S. No proxy and no redirect.

    Raises:
        OSError, http.client.HTTPException: it did not come.
    """
    context = ssl.create_default_context(cafile=source.ca)
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=context), NoRedirects())
    try:
        with opener.open(source.url, timeout=FETCH_S) as answer:
            data: bytes = answer.read(MAX_PAGE_BYTES + 1)
    except urllib.error.HTTPError as exc:
        exc.close()
        raise OSError(f"status {exc.code}") from None
    if len(data) > MAX_PAGE_BYTES:
        raise OSError(f"longer than {MAX_PAGE_BYTES} bytes")
    return data


__all__ = ["BadToken", "KeySource", "TokenVerifier", "fetch_page", "is_key_url", "read_key_file"]
