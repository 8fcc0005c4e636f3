"""Pure: one stream of a session, seen from its endpoint: what the endpoint may say, and the counters of both directions."""

from typing import TYPE_CHECKING

from fxtunnel.codes import Code
from fxtunnel.protocol import frames
from fxtunnel.protocol.credit import ReceiveWindow
from fxtunnel.protocol.endpoint import Endpoint

if TYPE_CHECKING:
    from fxtunnel.protocol.mux import Mux


class Stream:
    """One stream. Made by `Mux.open` or handed to `on_open`; every method does nothing once it is closed."""

    __slots__ = (
        "accepted",
        "bytes_in",
        "bytes_out",
        "closed",
        "early",
        "endpoint",
        "fin_received",
        "fin_sent",
        "id",
        "mux",
        "send_credit",
        "window",
    )

    def __init__(self, mux: "Mux", stream_id: int, endpoint: Endpoint | None, window: ReceiveWindow, send_credit: int) -> None:
        self.mux = mux
        self.id = stream_id
        self.endpoint = endpoint
        self.window = window
        self.send_credit = send_credit
        self.early: bytearray | None = None
        self.accepted = False
        self.fin_sent = False
        self.fin_received = False
        self.closed = False
        self.bytes_in = 0
        self.bytes_out = 0

    def accept(self) -> None:
        """The service is reached: the opener may go on."""
        if not self.closed and not self.accepted:
            self.accepted = True
            self.mux.queue(frames.encode_accept(self.id, self.window.first_bytes))
            self.consumed(0)  # what was taken of the early bytes: no CREDIT goes before an ACCEPT

    def refuse(self, code: Code, text: str = "") -> None:
        """Turn the opening down; the opener may try elsewhere."""
        if not self.closed:
            self.mux.queue(frames.encode_refuse(self.id, code, text))
            self.mux.forget(self)

    def on_crash(self) -> None:
        """`Mux.on_open` raised before it had attached an endpoint: refuse the stream."""
        self.refuse(Code.INTERNAL_ERROR, "internal error")

    def redirect(self, relay: str) -> None:
        """Send the opener to another relay."""
        if not self.closed:
            self.mux.queue(frames.encode(frames.REDIRECT, self.id, relay.encode()))
            self.mux.forget(self)

    def sent(self, slot: memoryview, length: int) -> None:
        """The first `length` bytes of the ring's slot become a DATA frame. At most `send_credit` bytes."""
        self.mux.ring.commit_data(self.id, length)
        self.send_credit -= length
        self.bytes_out += length
        if self.early is not None:
            self.early += slot[:length]

    def replay(self, early: bytes | bytearray) -> None:
        """Send again what an earlier stream sent before its ACCEPT; at most EARLY_BYTES, before anything else."""
        if early:
            self.mux.queue(frames.encode(frames.DATA, self.id, bytes(early)))
            self.send_credit -= len(early)
            self.bytes_out += len(early)
            self.early = bytearray(early)

    def fin(self) -> None:
        """Nothing more will be sent."""
        if not self.closed and not self.fin_sent:
            self.fin_sent = True
            self.mux.queue(frames.encode_fin(self.id))
            if self.fin_received:
                self.mux.finish(self)

    def reset(self, code: Code) -> None:
        """End both directions."""
        if not self.closed:
            self.mux.queue(frames.encode_reset(self.id, code))
            self.mux.forget(self)

    def take_back(self) -> int:
        """Cancel an opening whose answer may be on its way, and go on listening for it. Returns the `Mux.mark` behind which none comes."""
        self.send_credit = 0
        self.fin_sent = True
        self.mux.queue(frames.encode_reset(self.id, Code.CANCELLED))
        return self.mux.mark()

    def consumed(self, amount_bytes: int) -> None:
        """The reader took that many of the bytes that arrived: credit goes back in time."""
        if self.window.consumed(amount_bytes) and self.accepted and not self.fin_received and not self.closed:
            mux = self.mux
            mux.queue(frames.encode_credit(self.id, self.window.grant(mux.now, mux.min_rtt_s, mux.max_window_bytes)))

    def emptied(self) -> None:
        """Nothing of what arrived is kept any more. To be called if anything was kept when the stream ended; may be repeated."""
        if self.closed:
            self.window.close()
