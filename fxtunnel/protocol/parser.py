"""Pure: turns the byte sequence of a session into frames. It does not know links: a sequence cut anywhere simply goes on."""

from typing import Final, Protocol

from fxtunnel.protocol.frames import DATA, FIN, HEADER, HEADER_BYTES, MAX_DATA_BYTES, check_header

_LENGTH_MASK: Final = 0xFF_FFFF
_FIN_WORD: Final = FIN << 24


class FrameSink(Protocol):
    """Who takes the frames. Views are valid only during the call."""

    def on_data_header(self, stream_id: int, length: int) -> None:
        """A DATA frame begins; its bytes follow in one or more `on_data` calls."""

    def on_data(self, stream_id: int, data: memoryview) -> None:
        """The next bytes of the DATA frame that has begun."""

    def on_last_data(self, stream_id: int, data: memoryview) -> None:
        """As `on_data`, and the stream's FIN is the next frame."""

    def on_frame(self, kind: int, stream_id: int, payload: memoryview) -> None:
        """Any other frame, whole."""


class _NullSink:
    """Takes the frames of a session that is over."""

    def on_data_header(self, stream_id: int, length: int) -> None:
        """See `FrameSink`."""

    def on_data(self, stream_id: int, data: memoryview) -> None:
        """See `FrameSink`."""

    def on_last_data(self, stream_id: int, data: memoryview) -> None:
        """See `FrameSink`."""

    def on_frame(self, kind: int, stream_id: int, payload: memoryview) -> None:
        """See `FrameSink`."""


class FrameParser:
    """Feed it whatever arrived; it calls the sink. DATA passes through without being copied or held.

    Only an incomplete header or an incomplete short frame is kept, at most 2,056 bytes.
    `received` counts every byte ever fed: the receive counter of PROTOCOL.md, 7.
    """

    __slots__ = ("_data_left", "_data_stream", "_held", "_sink", "received")

    def __init__(self, sink: FrameSink) -> None:
        self._sink: FrameSink = sink
        self._held = bytearray()
        self._data_left = 0
        self._data_stream = 0
        self.received = 0

    def dispose(self) -> None:
        """Let go of the sink, which most likely owns this parser."""
        self._sink = _NullSink()

    def feed(self, view: memoryview) -> None:
        """Parse the next bytes.

        Raises:
            RemoteProtocolError: a header breaks PROTOCOL.md, 5, or the sink refused a frame; the session cannot go on.
        """
        self.received += len(view)
        if self._held:
            view = self._complete_held(view)
        position = 0
        end = len(view)
        sink = self._sink
        left = self._data_left
        if left and end:
            position = left if left < end else end
            self._data_left = left - position
            sink.on_data(self._data_stream, view[:position])
        unpack = HEADER.unpack_from
        while (start := position + HEADER_BYTES) <= end:
            word, stream_id = unpack(view, position)
            length = word & _LENGTH_MASK
            stop = start + length
            if word == length:  # DATA is type 0; nearly everything is
                if not (stream_id and 0 < length <= MAX_DATA_BYTES):
                    check_header(DATA, length, stream_id)
                sink.on_data_header(stream_id, length)
                if stop > end:
                    self._data_stream = stream_id
                    self._data_left = stop - end
                    if start < end:
                        sink.on_data(stream_id, view[start:end])
                    return
                if stop + HEADER_BYTES <= end and unpack(view, stop) == (_FIN_WORD, stream_id):
                    sink.on_last_data(stream_id, view[start:stop])
                else:
                    sink.on_data(stream_id, view[start:stop])
            else:
                kind = word >> 24
                check_header(kind, length, stream_id)
                if stop > end:
                    break
                sink.on_frame(kind, stream_id, view[start:stop])
            position = stop
        if position < end:
            self._held += view[position:end]

    def _complete_held(self, view: memoryview) -> memoryview:
        """Complete the frame that was cut; returns what is left of `view` behind it."""
        held = self._held
        if len(held) < HEADER_BYTES:
            missing = HEADER_BYTES - len(held)
            held += view[:missing]
            view = view[missing:]
            if len(held) < HEADER_BYTES:
                return view
        word, stream_id = HEADER.unpack_from(held)
        kind = word >> 24
        length = word & _LENGTH_MASK
        check_header(kind, length, stream_id)
        if kind == DATA:
            self._held = bytearray()
            self._sink.on_data_header(stream_id, length)
            self._data_stream = stream_id
            self._data_left = length
            return view
        missing = HEADER_BYTES + length - len(held)
        if missing > 0:
            held += view[:missing]
            view = view[missing:]
            if len(held) < HEADER_BYTES + length:
                return view
        self._held = bytearray()
        self._sink.on_frame(kind, stream_id, memoryview(held)[HEADER_BYTES:])
        return view
