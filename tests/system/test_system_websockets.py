"""WebSockets by the book and against it: what a server answers to the shapes of Autobahn's cases is the same, byte for byte, behind us."""

import contextlib
import socket
import struct
import threading
from collections.abc import Iterator

import pytest

from tests.ports import free_port
from tests.system.conftest import MakeStack
from tests.system.peers import dial, payload
from tests.system.websocket_echo import websocket_echo

pytestmark = [pytest.mark.system, pytest.mark.xdist_group("web")]
MASK = b"\x37\xfa\x21\x3d"
FIN = 0x80
CONT, TEXT, BINARY, CLOSE, PING, PONG = 0, 1, 2, 8, 9, 10
KIB = 1 << 10
HANDSHAKE = (
    b"GET /echo HTTP/1.1\r\nHost: a\r\nConnection: %b\r\nUpgrade: websocket\r\n"
    b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n%b\r\n"
)


def frame(opcode: int, data: bytes = b"", *, first: int = FIN, masked: bool = True, length: bytes | None = None) -> bytes:
    """One frame of a client. `first` has FIN and the reserved bits; `length` is written in place of the shortest one."""
    size = len(data)
    if length is None:
        length = bytes((size,)) if size < 126 else struct.pack(">BH", 126, size) if size < 65536 else struct.pack(">BQ", 127, size)
    head = bytes((first | opcode, length[0] | (0x80 if masked else 0))) + length[1:]
    if not masked:
        return head + data
    mask = (MASK * (size // 4 + 1))[:size]
    return head + MASK + (int.from_bytes(data) ^ int.from_bytes(mask)).to_bytes(size)


def closing(code: int | None = 1000, reason: bytes = b"") -> bytes:
    return frame(CLOSE, b"" if code is None else struct.pack(">H", code) + reason)


def whole(*frames: bytes) -> list[bytes]:
    """Frames, and a clean close behind them."""
    return [*frames, closing()]


def in_pieces(data: bytes, size: int) -> list[bytes]:
    return [data[at : at + size] for at in range(0, len(data), size)]


def fragments(opcode: int, data: bytes, size: int, between: bytes = b"") -> list[bytes]:
    """A message in fragments, and `between` after each but the last."""
    parts = in_pieces(data, size)
    found = []
    for at, part in enumerate(parts):
        is_last = at == len(parts) - 1
        found.append(frame(CONT if at else opcode, part, first=FIN if is_last else 0) + (b"" if is_last else between))
    return found


_GREEK = "κόσμε".encode()
_BAD = b"\xce\xba\xe1\xbd\xb9\xcf\x83\xce\xbc\xce\xb5\xed\xa0\x80edited"
SIZES = (0, 125, 126, 127, 128, 65_535, 65_536, 65_537)
_WORDS = (b"\xf4\x90\x80\x80", b"\xc0\xaf", b"\xef\xbf\xbf", b"\xed\xbf\xbf", b"\xfe")
CASES: dict[str, list[bytes]] = {
    # The numbers are those of Autobahn's cases; each entry is what is sent, one write each.
    **{f"1.1 text of {size}": whole(frame(TEXT, b"*" * size)) for size in SIZES},
    **{f"1.2 binary of {size}": whole(frame(BINARY, b"\xfe" * size)) for size in SIZES},
    "1.1.8 text in many writes": [*in_pieces(frame(TEXT, b"*" * 65_536), 997), closing()],
    "1.x a length that is longer than needed": whole(frame(TEXT, b"abc", length=b"\x7e\x00\x03")),
    "2.1 ping": whole(frame(PING)),
    "2.4 binary ping of 125": whole(frame(PING, bytes(range(125)))),
    "2.5 ping of 126": whole(frame(PING, b"\xfe" * 126)),
    "2.6 ping an octet at a time": [*in_pieces(frame(PING, b"p" * 125), 1), closing()],
    "2.7 pong that nobody asked for": whole(frame(PONG, b"x"), frame(PING, b"y")),
    "2.10 ten pings": whole(*(frame(PING, b"%d" % number) for number in range(10))),
    **{f"3.{bits} reserved bits": whole(frame(TEXT, b"x"), frame(TEXT, b"y", first=FIN | bits << 4)) for bits in range(1, 8)},
    **{f"4.1 opcode {opcode}": whole(frame(TEXT, b"x"), frame(opcode, b"y"), frame(PING)) for opcode in (3, 4, 5, 6, 7)},
    **{f"4.2 opcode {opcode}": whole(frame(TEXT, b"x"), frame(opcode, b"y"), frame(PING)) for opcode in (11, 12, 13, 14, 15)},
    "5.1 ping in fragments": whole(frame(PING, b"a", first=0), frame(CONT, b"b")),
    "5.3 text in two": whole(*fragments(TEXT, b"fragment1fragment2", 9)),
    "5.5 text an octet at a time": [*in_pieces(b"".join(fragments(TEXT, b"fragment1fragment2", 9)), 1), closing()],
    "5.6 ping between": whole(*fragments(TEXT, b"fragment1fragment2", 9, frame(PING, b"p"))),
    "5.9 continuation of nothing": whole(frame(CONT, b"x"), frame(TEXT, b"y")),
    "5.12 unfinished continuation of nothing": whole(frame(CONT, b"x", first=0), frame(TEXT, b"y")),
    "5.18 text in text": whole(frame(TEXT, b"a", first=0), frame(TEXT, b"b")),
    "5.19 five fragments, pings between": whole(*fragments(TEXT, b"fragment" * 5, 8, frame(PING, b"pongme 1!"))),
    "6.2 text in fragments, within a character": whole(*fragments(TEXT, _GREEK, 1)),
    "6.3 no UTF-8": whole(frame(TEXT, _BAD)),
    "6.4 no UTF-8, seen early": [frame(TEXT, _BAD[:12], first=0), frame(CONT, _BAD[12:16], first=0), frame(CONT, _BAD[16:]), closing()],
    "6.6 half a character": whole(frame(TEXT, _GREEK[:-1])),
    **{f"6.x {word.hex()}": whole(frame(TEXT, word)) for word in _WORDS},
    "7.1 close": [closing()],
    "7.1.2 close twice": [closing(), closing()],
    "7.1.3 ping after close": [closing(), frame(PING, b"x")],
    "7.1.4 text after close": [closing(), frame(TEXT, b"x")],
    "7.1.5 close within a message": [frame(TEXT, b"a", first=0), closing(), frame(CONT, b"b")],
    "7.1.6 256 KiB, then close, then ping": [frame(TEXT, b"BAsd7&jh23" * 26_000), closing(), frame(PING)],
    "7.3.1 close without a body": [closing(None)],
    "7.3.2 close with one octet": [frame(CLOSE, b"\x03")],
    "7.3.5 close with a long reason": [closing(1000, b"*" * 123)],
    "7.3.6 close that is too long": [closing(1000, b"*" * 124)],
    "7.5.1 close with a reason that is no UTF-8": [closing(1000, _BAD)],
    **{f"7.7 close {code}": [closing(code)] for code in (1000, 1001, 1002, 1003, 1007, 1008, 1009, 1010, 1011, 3000, 3999, 4000, 4999)},
    **{f"7.9 close {code}": [closing(code)] for code in (0, 999, 1004, 1005, 1006, 1016, 1100, 2000, 2999, 5000, 65_535)},
    "9.1 text of 1 MiB": whole(frame(TEXT, b"*" * 1024 * KIB)),
    "9.2 binary of 4 MiB": whole(frame(BINARY, bytes(payload(1, 4096 * KIB)))),
    "9.3 1 MiB in fragments of 4 KiB": whole(*fragments(TEXT, b"*" * 1024 * KIB, 4 * KIB)),
    "9.5 1 MiB in writes of 4 KiB": [*in_pieces(frame(TEXT, b"*" * 1024 * KIB), 4 * KIB), closing()],
    "9.7 1,000 messages of 64": whole(*(frame(TEXT, b"%064d" % number) for number in range(1000))),
    "10.1 64 KiB in fragments of 1,300": whole(*fragments(TEXT, b"*" * 65_536, 1300)),
    "a frame without a mask": whole(frame(TEXT, b"x", masked=False)),
    "an end without a close": [frame(TEXT, b"x")],
    "an end within a frame": [frame(TEXT, b"x"), frame(TEXT, b"yyyyy")[:-2]],
}


@pytest.fixture(scope="module")
def ways(make_shared_stack: MakeStack) -> Iterator[dict[str, int]]:
    server, door = websocket_echo(), free_port()
    stack = make_shared_stack("raw", "web", extra=f'[[door]]\nlisten = "127.0.0.1:{door}"\nkind = "http"\nservice = "web"\n')
    stack.start_gateway()
    web = f'[[service]]\nname = "web"\nprotocol = "http"\ntarget = "{server.target}"\n'
    stack.start_relay("a", {"raw": server.target}, extra=web)
    yield {"direct": int(server.target.rpartition(":")[2]), "raw": stack.doors["raw"], "web": stack.doors["web"], "both": door}
    stack.stop()
    server.close()


def conversation(port: int, said: list[bytes]) -> tuple[bytes, bytes, str]:
    """What the server says after its 101, and how it ends. All is written without waiting, as Autobahn does."""
    with dial(port, 30) as client:
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        client.sendall(HANDSHAKE % (b"Upgrade", b""))
        heard = b""
        while b"\r\n\r\n" not in heard:
            heard += client.recv(1)
        head, _, heard = heard.partition(b"\r\n\r\n")

        def send() -> None:
            with contextlib.suppress(OSError):
                for data in said:
                    client.sendall(data)
                if not said[-1:] or said[-1][:1] != bytes((FIN | CLOSE,)):
                    client.shutdown(socket.SHUT_WR)

        sender = threading.Thread(target=send)
        sender.start()
        end = "closed"
        parts = [heard]
        try:
            while more := client.recv(65_536):
                parts.append(more)
        except ConnectionResetError:
            end = "reset"
        except TimeoutError:
            end = "open"
        sender.join()
        return head.split(b"\r\n")[0], b"".join(parts), end


@pytest.mark.parametrize("name", CASES)
def test_case(ways: dict[str, int], name: str) -> None:
    found = {way: conversation(port, CASES[name]) for way, port in ways.items()}
    direct = found["direct"]
    assert direct[0].startswith(b"HTTP/1.1 101")
    for way, heard in found.items():
        assert heard[:2] == direct[:2], way
        assert heard[2] != "open", way
