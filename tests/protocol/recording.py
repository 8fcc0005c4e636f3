"""A sink that writes down what a parser hands out, for the tests of frames and parser."""

from dataclasses import dataclass, field

from fxtunnel.protocol.frames import DATA
from fxtunnel.protocol.parser import FrameParser

Frame = tuple[int, int, bytes]


@dataclass
class CollectingSink:
    """Frames in order; the chunks of a DATA frame are joined, and counted against its header."""

    frames: list[Frame] = field(default_factory=list)
    data_left: int = 0

    def __post_init__(self) -> None:
        self.parser = FrameParser(self)

    def feed(self, data: bytes) -> None:
        self.parser.feed(memoryview(data))

    @property
    def is_mid_frame(self) -> bool:
        """Whether what has arrived ends inside a frame."""
        return bool(self.parser._data_left or self.parser._held)

    def whole_frames(self) -> list[Frame]:
        """What has arrived completely."""
        return self.frames[:-1] if self.data_left else self.frames

    def on_data_header(self, stream_id: int, length: int) -> None:
        assert not self.data_left, "a DATA frame began inside another"
        self.data_left = length
        self.frames.append((DATA, stream_id, b""))

    def on_data(self, stream_id: int, data: memoryview) -> None:
        kind, begun, so_far = self.frames.pop()
        assert (kind, begun) == (DATA, stream_id)
        assert 0 < len(data) <= self.data_left
        self.data_left -= len(data)
        self.frames.append((DATA, stream_id, so_far + bytes(data)))

    def on_last_data(self, stream_id: int, data: memoryview) -> None:
        self.on_data(stream_id, data)

    def on_frame(self, kind: int, stream_id: int, payload: memoryview) -> None:
        assert not self.data_left, "a frame inside a DATA frame"
        self.frames.append((kind, stream_id, bytes(payload)))


def parse(raw: bytes) -> Frame:
    """The one whole frame in `raw`."""
    sink = CollectingSink()
    sink.feed(raw)
    assert not sink.is_mid_frame
    (frame,) = sink.whole_frames()
    return frame
