"""Port: what a stream of a session is attached to."""

from typing import Protocol

from fxtunnel.codes import Code


class Endpoint(Protocol):
    """What a stream is attached to. None of these may block. One that raises ends its stream, and `on_crash` is called."""

    def on_accept(self) -> None:
        """The other end has reached the service."""

    def on_refuse(self, code: Code, text: str) -> None:
        """The other end will not take this stream; it is closed. `stream.early` still holds what was sent."""

    def on_redirect(self, relay: str) -> None:
        """The stream should be opened on `relay` instead; it is closed here."""

    def on_data(self, data: memoryview) -> None:
        """Bytes arrived. Valid only during the call. Call `stream.consumed` when they have left."""

    def on_last_data(self, data: memoryview) -> None:
        """As `on_data`, and `on_fin` follows at once."""

    def on_fin(self) -> None:
        """Nothing more arrives."""

    def on_reset(self, code: Code) -> None:
        """The stream is gone, both ways; `code` says why."""

    def on_credit(self) -> None:
        """Sending was out of credit and may go on."""

    def on_crash(self) -> None:
        """One of these raised, which is a bug; it has been logged. Reset the stream, if it is open, and let go of everything."""
