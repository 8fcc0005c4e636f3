"""Pure: a server's reservation record as the store and messages carry it: versioned JSON, checked and bounded on the way in."""

import json
from typing import Any, Final

from fxrelay.balance.reservations import MAX_ENTRIES, MAX_LOGINS, Entry, Login, Record, Token
from fxrelay.cluster.content import MAX_MS

VERSION: Final = 1
MAX_RECORD_BYTES: Final = 131_072
MAX_USER_CHARS: Final = 256
_MAX_ID_CHARS: Final = 128


class BadRecord(Exception):
    """The text is not a record, so it is not known whose the server is. Let nobody in, and tell the administrator."""


def encode_record(record: Record) -> str:
    """As JSON text."""
    found: dict[str, Any] = {
        "v": VERSION,
        "epoch": record.epoch,
        "fence": record.fence,
        "revision": record.revision,
        "user": record.holder,
        "sinceMs": record.since_ms,
        "logins": [
            {
                "id": login.login_id,
                "user": login.user,
                "relay": login.relay,
                "expiresMs": login.expires_ms,
                "ttlMs": login.ttl_ms,
                **({"lingers": True} if login.is_lingering else {}),
                **({"forSessions": True} if login.is_for_sessions else {}),
            }
            for login in record.logins
        ],
        "entries": [
            {
                "id": entry.entry_id,
                "user": entry.user,
                "address": entry.address,
                "relay": entry.relay,
                "createdMs": entry.created_ms,
                "expiresMs": entry.expires_ms,
            }
            for entry in record.entries
        ],
    }
    if record.was is not None:
        found["was"] = {"epoch": record.was.epoch, "fence": record.was.fence}
    return json.dumps(found, separators=(",", ":"))


def decode_record(text: str | None) -> Record:
    """The record of a stored text; an empty one if there is none.

    Raises:
        BadRecord: it is not one; the text says what is wrong.
    """
    if text is None:
        return Record()
    if len(text) > MAX_RECORD_BYTES:
        raise BadRecord(f"{len(text)} characters long")
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as exc:
        raise BadRecord("no JSON") from exc
    return read_record(found)


def read_record(found: Any) -> Record:
    """The record of a text that has been parsed.

    Raises:
        BadRecord: see `decode_record`.
    """
    if not isinstance(found, dict) or found.get("v") != VERSION:
        raise BadRecord(f"not of version {VERSION}")
    was = found.get("was")
    record = Record(
        _text(found, "epoch"),
        _number(found, "fence"),
        _number(found, "sinceMs"),
        tuple(_login(each) for each in _list(found, "logins", MAX_LOGINS + 1)),
        tuple(_entry(each) for each in _list(found, "entries", MAX_ENTRIES)),
        Token(_text(was, "epoch"), _number(was, "fence")) if was is not None else None,
        _number(found, "revision"),
    )
    if len({login.user for login in record.logins}) > 1:
        raise BadRecord("logins of two users")
    return record


def _login(found: Any) -> Login:
    return Login(
        _text(found, "id"),
        _text(found, "user", MAX_USER_CHARS),
        _text(found, "relay"),
        _number(found, "expiresMs"),
        _number(found, "ttlMs"),
        found.get("lingers") is True,
        found.get("forSessions") is True,
    )


def _entry(found: Any) -> Entry:
    return Entry(
        _text(found, "id"),
        _text(found, "user", MAX_USER_CHARS, least=0),
        _text(found, "address", least=0),
        _text(found, "relay"),
        _number(found, "createdMs"),
        _number(found, "expiresMs"),
    )


def _list(found: dict[str, Any], key: str, most: int) -> list[Any]:
    value = found.get(key)
    if not isinstance(value, list) or len(value) > most:
        raise BadRecord(f"{key} is not a list of at most {most}")
    return value


def _text(found: Any, key: str, most: int = _MAX_ID_CHARS, least: int = 1) -> str:
    value = found.get(key) if isinstance(found, dict) else None
    if not isinstance(value, str) or not least <= len(value) <= most:
        raise BadRecord(f"{key} is not a text of {least} to {most} characters")
    return value


def _number(found: Any, key: str) -> int:
    value = found.get(key) if isinstance(found, dict) else None
    if type(value) is not int or not 0 <= value <= MAX_MS:
        raise BadRecord(f"{key} is not a count")
    return value
