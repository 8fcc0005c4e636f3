"""Task: which relays may come in: the file relays.json, shared by the daemon and the commands.

Everything but `find_key`, `known` and `watch` blocks on the disk: call it in a worker thread. Any thread may.
"""

import contextlib
import fcntl
import hmac
import logging
import os
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Annotated, Final, NoReturn

import trio
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fxtunnel.errors import ConfigError
from fxtunnel.kit.files import read_secret, write_secret
from fxtunnel.kit.tokens import KeyProblem, public_from_text, public_to_text, thumbprint, token_digest
from fxtunnel.model import NAME_PATTERN, RelayId

logger = logging.getLogger(__name__)

MAX_RELAYS: Final = 8_192
"""Relays that may be enrolled; more than limits.relays lets in at once by default. Each takes up to 350 bytes of the file."""
MAX_FILE_BYTES: Final = 4 << 20
"""Room for MAX_RELAYS, and for some thousand tokens."""
WATCH_S: Final = 1.0  # revocation has to reach live tunnels within 5 s
_LOCK_S: Final = 5.0
_LOCK_POLL_S: Final = 0.02

_Name = Annotated[RelayId, Field(pattern=NAME_PATTERN)]
_Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
_Thumbprint = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{43}$")]
_Unix = Annotated[int, Field(ge=0)]


class EnrolOutcome(Enum):
    """What became of an attempt to enrol."""

    ENROLLED = "enrolled"
    ALREADY = "already"
    NAME_TAKEN = "name-taken"
    REVOKED = "revoked"
    TOO_MANY_KEYS = "too-many-keys"
    BAD_TOKEN = "bad-token"  # noqa: S105 - an outcome, not a token
    EXPIRED_TOKEN = "expired-token"  # noqa: S105 - an outcome, not a token


@dataclass(frozen=True, slots=True)
class EnrolResult:
    """An outcome; `expired_unix` is when the token expired, if that is why."""

    outcome: EnrolOutcome
    expired_unix: int = 0


@dataclass(frozen=True, slots=True)
class KnownRelay:
    """A relay in the file, for people: its key ids, and when it was revoked."""

    relay_id: RelayId
    kids: tuple[str, ...]
    revoked_unix: int | None


class _Record(BaseModel):
    # Not strict about more fields: an older gateway may meet a newer file. Anything else that is odd stops it.
    model_config = ConfigDict(frozen=True, extra="ignore", strict=True)


class _Key(_Record):
    kid: _Thumbprint
    public_key: _Thumbprint
    enrolled_unix: _Unix
    token_id: str


class _Revoked(_Record):
    unix: _Unix


class _Relay(_Record):
    keys: tuple[_Key, ...] = ()
    revoked: _Revoked | None = None


class _Token(_Record):
    id: str
    sha256: _Digest
    expires_unix: _Unix


class _State(_Record):
    relays: dict[_Name, _Relay] = Field(default_factory=dict)
    tokens: tuple[_Token, ...] = ()


class Identities:
    """The relays' public keys, revocations and enrolment tokens' digests in `path`; nothing in it lets anyone in by itself.

    A missing file is an empty one. Changes are made under a lock beside it, on what the file holds at that moment.
    """

    def __init__(self, path: Path, *, now_unix: Callable[[], float] = time.time) -> None:
        self._path = path
        self._now_unix = now_unix
        self._state = _State()
        self._met: dict[RelayId, frozenset[str]] = {}
        """Keys that were good at any time since `watch` last looked: one may be added and removed in between, and leave a tunnel open."""
        self._seen: tuple[int, int, int] | None = None
        # Orders loads among this process's threads, so an older state never replaces a newer one.
        self._loading = threading.Lock()

    def load(self) -> None:
        """Read the file.

        Raises:
            ConfigError: it is readable by others, or is not what it should be.
        """
        with self._loading:
            self._adopt(self._signature(), self._read())

    def look_again(self) -> None:
        """Read the file if it has changed. One that cannot be used changes nothing; `watch` logs it."""
        with contextlib.suppress(ConfigError, OSError):
            self._load_if_changed()

    def find_key(self, relay_id: RelayId, kid: str) -> Ed25519PublicKey | KeyProblem:
        """The relay's key, from memory. Never blocks."""
        relay = self._state.relays.get(relay_id)
        key = None if relay is None else next((key for key in relay.keys if key.kid == kid), None)
        if relay is None or key is None:
            return KeyProblem.UNKNOWN
        return KeyProblem.REVOKED if relay.revoked is not None else public_from_text(key.public_key)

    def known(self) -> tuple[KnownRelay, ...]:
        """All relays, by name, from memory. Never blocks."""
        return tuple(
            KnownRelay(relay_id, tuple(key.kid for key in relay.keys), None if relay.revoked is None else relay.revoked.unix)
            for relay_id, relay in sorted(self._state.relays.items())
        )

    def enrol(self, relay_id: RelayId, public: Ed25519PublicKey, token: str) -> EnrolResult:
        """Give a relay its key. The caller has seen proof that the relay holds it. Only a success writes.

        Raises:
            ConfigError: the file cannot be read or written.
        """
        if self._signature() != self._seen:
            self.load()
        digest, kid = token_digest(token), thumbprint(public)
        # First from memory: strangers must not be able to keep the disk busy.
        result = _judge(self._state, relay_id, kid, digest, self._now_unix())
        if result.outcome is not EnrolOutcome.ENROLLED:
            return result
        with self._changing() as state:
            result = _judge(state, relay_id, kid, digest, self._now_unix())
            if result.outcome is EnrolOutcome.ENROLLED:
                used = _matching(state, digest)
                assert used is not None
                key = _Key(kid=kid, public_key=public_to_text(public), enrolled_unix=int(self._now_unix()), token_id=used.id)
                self._write(state.model_copy(update={"relays": {**state.relays, relay_id: _Relay(keys=(key,))}}))
        return result

    def revoke(self, relay_id: RelayId) -> int | None:
        """Turn a relay away for good, and withdraw the tokens it enrolled with: whoever has its disk may have gateway.json too.

        Returns how many of those were still good; None if there is no such relay.
        """
        now_unix = self._now_unix()
        with self._changing() as state:
            relay = state.relays.get(relay_id)
            if relay is None:
                return None
            used = {key.token_id for key in relay.keys}
            revoked = relay.revoked or _Revoked(unix=int(now_unix))
            self._write(
                _State(
                    relays={**state.relays, relay_id: relay.model_copy(update={"revoked": revoked})},
                    tokens=tuple(token for token in state.tokens if token.id not in used),
                )
            )
        return sum(token.id in used and token.expires_unix > now_unix for token in state.tokens)

    def forget(self, relay_id: RelayId) -> bool:
        """Remove a relay with its keys, so that another key may enrol under its name. False if there is no such relay."""
        with self._changing() as state:
            if relay_id not in state.relays:
                return False
            left = {name: relay for name, relay in state.relays.items() if name != relay_id}
            self._write(state.model_copy(update={"relays": left}))
        return True

    def add_token(self, token: str, expires_unix: int) -> str:
        """Let relays enrol with `token`; returns its id. Tokens that expired a month ago are dropped on the way."""
        token_id = secrets.token_hex(4)
        with self._changing() as state:
            kept = tuple(old for old in state.tokens if old.expires_unix > self._now_unix() - 30 * 86_400)
            added = _Token(id=token_id, sha256=token_digest(token), expires_unix=expires_unix)
            self._write(state.model_copy(update={"tokens": (*kept, added)}))
        return token_id

    def withdraw_token(self, token: str) -> bool:
        """Nobody enrols with this token any more. False if there is no such token."""
        digest = token_digest(token)
        with self._changing() as state:
            kept = tuple(known for known in state.tokens if not hmac.compare_digest(known.sha256, digest))
            if len(kept) == len(state.tokens):
                return False
            self._write(state.model_copy(update={"tokens": kept}))
        return True

    def withdraw_all_tokens(self) -> int:
        """Nobody enrols any more with what was given out so far. How many of them were still good."""
        now_unix = self._now_unix()
        with self._changing() as state:
            good = sum(token.expires_unix > now_unix for token in state.tokens)
            self._write(state.model_copy(update={"tokens": ()}))
        return good

    async def watch(self, on_gone: Callable[[RelayId], None], *, poll_s: float = WATCH_S) -> NoReturn:
        """Follow changes by other processes, and report each relay that lost a key or was revoked since the last look. Never returns.

        Start it after `load`. A file that has become unusable changes nothing but is logged.
        """
        while True:
            await trio.sleep(poll_s)
            try:
                await trio.to_thread.run_sync(self._load_if_changed)
            except (ConfigError, OSError) as exc:
                logger.error("relays.json cannot be used, what it said before stays in force: %s", exc)
            for relay_id in await trio.to_thread.run_sync(self._gone):
                on_gone(relay_id)

    def _load_if_changed(self) -> None:
        if self._signature() != self._seen:
            self.load()

    def _gone(self) -> list[RelayId]:
        """Relays that have lost a key since the last call."""
        with self._loading:
            trusted = _trusted(self._state)
            met, self._met = self._met, trusted
        return [relay_id for relay_id, kids in met.items() if kids - trusted.get(relay_id, frozenset())]

    def _adopt(self, seen: tuple[int, int, int] | None, state: _State) -> None:
        self._seen, self._state = seen, state
        for relay_id, kids in _trusted(state).items():
            self._met[relay_id] = self._met.get(relay_id, frozenset()) | kids

    def _signature(self) -> tuple[int, int, int] | None:
        try:
            facts = os.stat(self._path, follow_symlinks=False)
        except FileNotFoundError:
            return None
        return facts.st_ino, facts.st_mtime_ns, facts.st_size

    def _read(self) -> _State:
        if self._signature() is None:
            return _State()
        try:
            return _State.model_validate_json(read_secret(self._path, max_bytes=MAX_FILE_BYTES))
        except ValidationError as exc:
            first = exc.errors(include_url=False, include_context=False, include_input=False)[0]
            where = ".".join(str(part) for part in first["loc"])
            raise ConfigError.one(self._path, where, f"{first['msg']}; restore the file from a backup") from None

    def _write(self, state: _State) -> None:
        write_secret(self._path, state.model_dump_json(indent=1).encode() + b"\n")
        self._adopt(self._signature(), state)

    @contextlib.contextmanager
    def _changing(self) -> Iterator[_State]:
        """The file's state now, which nobody else changes meanwhile."""
        with self._loading:
            # Not the file itself: that one is replaced by every change.
            lock_path = self._path.with_name(f"{self._path.name}.lock")
            try:
                lock = os.open(lock_path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
            except OSError as exc:
                raise ConfigError.one(lock_path, "", f"cannot be opened: {exc.strerror or exc}") from exc
            try:
                _lock(lock, self._path)
                yield self._read()
            finally:
                os.close(lock)


def _lock(fd: int, path: Path) -> None:
    give_up_at = time.monotonic() + _LOCK_S
    while True:
        try:
            return fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > give_up_at:
                raise ConfigError.one(path, "", "is being changed by another process; try again") from None
            time.sleep(_LOCK_POLL_S)


def _matching(state: _State, digest: str) -> _Token | None:
    """The token with this digest. Looks at every one, so that time tells nothing."""
    found = None
    for token in state.tokens:
        if hmac.compare_digest(token.sha256, digest):
            found = token
    return found


def _judge(state: _State, relay_id: RelayId, kid: str, digest: str, now_unix: float) -> EnrolResult:
    """What an attempt to enrol would come to."""
    token, relay = _matching(state, digest), state.relays.get(relay_id)
    has_key = relay is not None and any(key.kid == kid for key in relay.keys)
    is_revoked = relay is not None and relay.revoked is not None
    if has_key and is_revoked:
        return EnrolResult(EnrolOutcome.REVOKED)
    if token is None:
        return EnrolResult(EnrolOutcome.BAD_TOKEN)
    if has_key:
        return EnrolResult(EnrolOutcome.ALREADY)
    if token.expires_unix <= now_unix:
        return EnrolResult(EnrolOutcome.EXPIRED_TOKEN, token.expires_unix)
    if relay is not None:
        return EnrolResult(EnrolOutcome.REVOKED if is_revoked else EnrolOutcome.NAME_TAKEN)
    if len(state.relays) >= MAX_RELAYS:
        return EnrolResult(EnrolOutcome.TOO_MANY_KEYS)
    return EnrolResult(EnrolOutcome.ENROLLED)


def _trusted(state: _State) -> dict[RelayId, frozenset[str]]:
    return {name: frozenset(key.kid for key in relay.keys) for name, relay in state.relays.items() if relay.revoked is None}
