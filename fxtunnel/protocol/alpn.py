"""Pure: what a relay says of a connection before its first byte: the ALPN protocols of PROTOCOL.md, 1."""

from typing import Final

ALPN_HTTP: Final = "http/1.1"
"""Enrolment, and the control link."""
ALPN_DATA: Final = "fx-data/1"
ALPN_WORKER: Final = "fx-worker/"
"""Before the number of the worker that should take the connection."""
ALPN_SPOKEN: Final = (ALPN_DATA, ALPN_HTTP)
"""What a gateway chooses from."""
