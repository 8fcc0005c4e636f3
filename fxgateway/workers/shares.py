"""Pure: a configuration on its way to a worker, and a worker's share of limits that bound memory or strangers."""

from enum import Enum
from math import ceil
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from fxgateway.settings import GatewaySettings


def as_message(settings: GatewaySettings) -> dict[str, Any]:
    """What `from_message` makes the same settings of."""
    message: dict[str, Any] = _plain(settings)
    return message


def from_message(message: dict[str, Any], directory: Path) -> GatewaySettings:
    """The settings that another process has loaded from a file in this directory, and checked."""
    return GatewaySettings.model_validate(message, context={"directory": directory})


def share_of(settings: GatewaySettings, workers: int) -> GatewaySettings:
    """What one of so many workers may take. Clients are counted together and relays by the parent, so their limits stay as they are."""
    limits = settings.limits
    shares = {
        "memory_bytes": limits.memory_bytes // workers,
        "pending_handshakes": ceil(limits.pending_handshakes / workers),
        "pending_handshakes_per_source": ceil(limits.pending_handshakes_per_source / workers),
    }
    return settings.model_copy(update={"limits": limits.model_copy(update=shares)})


def _plain(value: object) -> Any:
    """As it could have been written in TOML: what was not written stays unsaid, and is the default again."""
    if isinstance(value, BaseModel):
        fields = type(value).model_fields
        return {fields[name].alias or name: _plain(getattr(value, name)) for name in value.model_fields_set}
    if isinstance(value, tuple | list | frozenset):
        return [_plain(entry) for entry in value]
    if isinstance(value, Enum):
        return value.value
    return value if value is None or isinstance(value, str | int | float) else str(value)
