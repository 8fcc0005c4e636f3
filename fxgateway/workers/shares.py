"""Pure: a configuration on its way to a worker, and a worker's share of limits that bound memory or strangers."""

from enum import Enum
from math import ceil
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from fxgateway.settings import GatewaySettings


def as_message(settings: GatewaySettings) -> dict[str, Any]:
    """The settings as a JSON object, from which `from_message` restores them."""
    message: dict[str, Any] = _plain(settings)
    return message


def from_message(message: dict[str, Any], directory: Path) -> GatewaySettings:
    """The settings that another process has loaded and checked. `directory` is that of its file, for relative paths."""
    return GatewaySettings.model_validate(message, context={"directory": directory})


def share_of(settings: GatewaySettings, workers: int) -> GatewaySettings:
    """The settings of one of `workers` workers, with its part of the limits. Those of clients and relays stay, being counted over all."""
    limits = settings.limits
    shares = {
        "memory_bytes": limits.memory_bytes // workers,
        "pending_handshakes": ceil(limits.pending_handshakes / workers),
        "pending_handshakes_per_source": ceil(limits.pending_handshakes_per_source / workers),
    }
    return settings.model_copy(update={"limits": limits.model_copy(update=shares)})


def _plain(value: object) -> Any:
    """The value as it could stand in TOML. Keys that were not set are left out, and take their defaults again."""
    if isinstance(value, BaseModel):
        fields = type(value).model_fields
        return {fields[name].alias or name: _plain(getattr(value, name)) for name in value.model_fields_set}
    if isinstance(value, tuple | list | frozenset):
        return [_plain(entry) for entry in value]
    if isinstance(value, Enum):
        return value.value
    return value if value is None or isinstance(value, str | int | float) else str(value)
