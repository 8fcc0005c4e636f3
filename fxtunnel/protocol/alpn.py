"""Pure: what a relay wants a connection for, and from which process, as its ALPN protocols say (PROTOCOL.md, 1)."""

from typing import Final

ALPN_HTTP: Final = "http/1.1"
"""Enrolment, and the control link."""
ALPN_DATA: Final = "fx-data/1"
ALPN_WORKER: Final = "fx-worker/"
"""Prefix of the number of the worker that should take the connection."""
ALPN_SPOKEN: Final = (ALPN_DATA, ALPN_HTTP)
"""What every process of a gateway speaks."""
ALPN_PROCESS: Final = "fx-process/"
"""Prefix of `NAME/PROTOCOL`: only the gateway process of that name may take the connection, and then speaks PROTOCOL."""


def at_process(process: str, protocol: str) -> str:
    """`protocol` (ALPN_HTTP or ALPN_DATA) such that only this gateway process speaks it; unchanged if `process` is empty."""
    return f"{ALPN_PROCESS}{process}/{protocol}" if process else protocol


def named_process(protocol: bytes) -> str:
    """The process that an ALPN protocol of a ClientHello names; empty if it names none."""
    if not protocol.startswith(ALPN_PROCESS.encode()):
        return ""
    return protocol.removeprefix(ALPN_PROCESS.encode()).partition(b"/")[0].decode("ascii", "replace")


def spoken_by(process: str) -> tuple[str, ...]:
    """All ALPN protocols that this process of a gateway speaks."""
    return *ALPN_SPOKEN, *(at_process(process, protocol) for protocol in ALPN_SPOKEN)


def is_data(protocol: str | None) -> bool:
    """Whether the negotiated protocol is that of data links, of whichever process."""
    return protocol is not None and protocol.endswith(ALPN_DATA)
