"""Pure: which servers a user has, as the store keeps it beside their records: so a commit can tell that one of them would do.

It is written in the same step as the record that says whose the server is. What it says too much, a look at that record takes out.
"""

import json
from typing import Final

from fxtunnel.model import is_name

MAX_HOMES: Final = 64
"""Servers of one user that are kept: the latest."""
_MAX_KEY_BYTES: Final = 1_024


def decode_homes(text: str | None) -> tuple[str, ...]:
    """The servers of a stored text, the latest last; none if it is malformed."""
    try:
        found = json.loads(text) if text else []
    except (ValueError, RecursionError):
        return ()
    if not isinstance(found, list):
        return ()
    return tuple(server_id for server_id in found if isinstance(server_id, str) and is_name(server_id))[-MAX_HOMES:]


def encode_homes(homes: tuple[str, ...]) -> str | None:
    """As JSON text; None for none."""
    return json.dumps(homes, separators=(",", ":")) if homes else None


def with_home(homes: tuple[str, ...], server_id: str) -> tuple[str, ...]:
    """With this server among them."""
    return homes if server_id in homes else (*homes, server_id)[-MAX_HOMES:]


def without_home(homes: tuple[str, ...], server_id: str) -> tuple[str, ...]:
    """Without it."""
    return tuple(home for home in homes if home != server_id) if server_id in homes else homes


def key_of(user: str) -> str:
    """The store's key for this user's servers; empty for a user who can have none."""
    return user if 0 < len(user.encode(errors="replace")) <= _MAX_KEY_BYTES and user.isprintable() else ""
