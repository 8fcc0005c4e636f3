"""Task: where the keys for other people's JWTs come from: a file, or a page that is fetched, kept, and fetched again when keys change."""

import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import trio

from fxtunnel.errors import ConfigError
from fxtunnel.kit.jwt_verifying import BadKeys, BadToken, KeySet, TokenRules, UnknownKey, read_keys, verify_token
from fxtunnel.kit.key_page import MAX_PAGE_BYTES, PageError, fetch_page

logger = logging.getLogger(__name__)

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
        fetch: Callable[[str, Path | None], Awaitable[bytes]] = fetch_page,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self.rules = rules
        self._source = source
        self._fetch = fetch
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
                    self._keys = read_keys(await self._fetch(self._source.url, self._source.ca))
            except trio.TooSlowError:
                logger.warning("the keys at %s did not come within %g s", self._source.url, FETCH_S)
                return False
            except (PageError, BadKeys) as exc:
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


__all__ = ["BadToken", "KeySource", "TokenVerifier", "read_key_file"]
