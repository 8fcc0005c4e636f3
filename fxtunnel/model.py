"""Pure: the identifiers and records both daemons speak of. One word per idea; see the glossary in docs/ARCHITECTURE.md."""

import re
from dataclasses import dataclass
from typing import Final, NewType

RelayId = NewType("RelayId", str)
GatewayId = NewType("GatewayId", str)
InstanceId = NewType("InstanceId", str)
SessionId = NewType("SessionId", str)
ServiceName = NewType("ServiceName", str)

NAME_PATTERN: Final = r"^[A-Za-z0-9._-]{1,64}$"
_NAME: Final = re.compile(r"[A-Za-z0-9._-]{1,64}")


def is_name(text: str) -> bool:
    """Whether `text` may name a relay, a gateway or a service (PROTOCOL.md, 5)."""
    return _NAME.fullmatch(text) is not None


@dataclass(frozen=True, slots=True)
class Offer:
    """A service as a relay announces it. `protocol` is "tcp", or "http" where the relay reads requests."""

    name: ServiceName
    protocol: str = "tcp"
