"""Pure: what a relay says of a connection before its first byte: the ALPN protocols of PROTOCOL.md, 1."""

from typing import Final

ALPN_HTTP: Final = "http/1.1"
"""Enrolment, and the control link."""
ALPN_DATA: Final = "fx-data/1"
ALPN_WORKER: Final = "fx-worker/"
"""Before the number of the worker that should take the connection."""
ALPN_SPOKEN: Final = (ALPN_DATA, ALPN_HTTP)
"""What a gateway chooses from, whichever of its processes it is."""
ALPN_PROCESS: Final = "fx-process/"
"""Before the name of the gateway's process that alone shall take the connection, and what it shall speak."""


def at_process(process: str, protocol: str) -> str:
    """ALPN_HTTP or ALPN_DATA as spoken by this process of a gateway only; by any, if it has no name."""
    return f"{ALPN_PROCESS}{process}/{protocol}" if process else protocol


def named_process(protocol: bytes) -> str:
    """The process that a protocol of a ClientHello names; empty if none."""
    if not protocol.startswith(ALPN_PROCESS.encode()):
        return ""
    return protocol.removeprefix(ALPN_PROCESS.encode()).partition(b"/")[0].decode("ascii", "replace")


def spoken_by(process: str) -> tuple[str, ...]:
    """What this process of a gateway chooses from."""
    return *ALPN_SPOKEN, *(at_process(process, protocol) for protocol in ALPN_SPOKEN)


def is_data(protocol: str | None) -> bool:
    """Whether the protocol agreed on is that of data links."""
    return protocol is not None and protocol.endswith(ALPN_DATA)
