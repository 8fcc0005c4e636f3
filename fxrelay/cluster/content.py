"""Pure: what may be written to a store or a message, and how to tell whether something read from one was written by a member."""

import re
from typing import Final

from fxrelay.cluster.ports import MAX_DOCUMENT_BYTES, Document
from fxtunnel.errors import StoreError

MAX_KEY_BYTES: Final = 1_024
MAX_MS: Final = 1 << 53
"""Milliseconds since 1970: what JavaScript, and Lua in Redis, can count to exactly."""
MAX_COUNT: Final = (1 << 63) - 1
"""What both SQLite and Redis can count to."""
MAX_BATCH_BYTES: Final = 16 << 20
"""Messages of one batch: a thousand of the longest would be 256 MiB."""
MAX_BATCH: Final = 1_000
_COLLECTION: Final = re.compile(r"[A-Za-z0-9._-]{1,64}")


def is_collection(name: str) -> bool:
    """Whether a collection or a topic may be called this: the characters of file names, since collections are exported to files."""
    return _COLLECTION.fullmatch(name) is not None


def encode_collection(name: str) -> str:
    """`name`, unless nothing may be called so: StoreError."""
    if not is_collection(name):
        raise StoreError(f"no name of a collection or topic: {name[:80]!r}")
    return name


def encode_key(key: str) -> bytes:
    """A key, or a counter's name, as it is stored. Raises StoreError."""
    data = _encode(key, "the key")
    if not 1 <= len(data) <= MAX_KEY_BYTES:
        raise StoreError(f"the key has {len(data)} bytes; expected 1 to {MAX_KEY_BYTES}")
    return data


def encode_text(text: str) -> bytes:
    """A document or a message as it is stored. Raises StoreError."""
    data = _encode(text, "the document")
    if len(data) > MAX_DOCUMENT_BYTES:
        raise StoreError(f"the document has {len(data)} bytes; at most {MAX_DOCUMENT_BYTES} are stored")
    return data


def encode_amount(amount: int) -> int:
    """`amount`, unless no counter can be that far from 0: StoreError."""
    if abs(amount) > MAX_COUNT:
        raise StoreError("the counter cannot go that far")
    return amount


def decode_document(key: object, text: object, updated_ms: object) -> Document | None:
    """The document of these raw values; None if a member that follows the rules would not have written them."""
    if not (isinstance(key, bytes) and isinstance(text, bytes) and type(updated_ms) is int):
        return None
    if not (1 <= len(key) <= MAX_KEY_BYTES and len(text) <= MAX_DOCUMENT_BYTES and 0 <= updated_ms <= MAX_MS):
        return None
    try:
        return Document(key.decode(), text.decode(), updated_ms)
    except UnicodeDecodeError:
        return None


def decode_text(text: object) -> str | None:
    """The text of a message; None if it is too long or no text."""
    if not isinstance(text, bytes) or len(text) > MAX_DOCUMENT_BYTES:
        return None
    try:
        return text.decode()
    except UnicodeDecodeError:
        return None


def _encode(text: str, what: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError:
        raise StoreError(f"{what} holds half a surrogate pair, which UTF-8 cannot") from None
