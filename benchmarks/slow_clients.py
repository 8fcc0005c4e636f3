"""Task: `python -m benchmarks.slow_clients PORT N [tls]`: clients that take their time, each kind a third of N.

Heads a byte a second, bodies a byte a second, and answers that are never read. Who is turned away comes back at once. Prints a line when
all stand, another when stdin ends.
"""

import json
import resource
import select
import socket
import ssl
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Final

KINDS: Final = ("head", "body", "reader")
PERIOD_S: Final = 1.0
SMALL_BUFFER_BYTES: Final = 4_096
_HEAD: Final = b"GET /small HTTP/1.1\r\nHost: bench.example\r\nX-Slow: " + b"s" * 4_096
_BODY: Final = b"POST /small HTTP/1.1\r\nHost: bench.example\r\nContent-Length: 1000000\r\n\r\n"
_READER: Final = b"GET /bytes/104857600 HTTP/1.1\r\nHost: bench.example\r\n\r\n"


@dataclass(slots=True)
class Slow:
    """One of them. `due` is when it says its next byte; `begun` how much it has said."""

    kind: str
    sock: socket.socket | None = None
    due: float = 0.0
    begun: int = 0


@dataclass(slots=True)
class Crowd:
    """All of them."""

    port: int
    context: ssl.SSLContext | None
    members: list[Slow] = field(default_factory=list)
    came_back: int = 0

    def connect(self, member: Slow, due: float) -> None:
        """Let a member come in, and say what it says at once."""
        sock = socket.socket()
        if member.kind == "reader":
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SMALL_BUFFER_BYTES)
        sock.settimeout(10)
        sock.connect(("127.0.0.1", self.port))
        if self.context is not None:
            sock = self.context.wrap_socket(sock)
        sock.sendall({"head": b"", "body": _BODY, "reader": _READER}[member.kind])
        sock.setblocking(False)
        member.sock, member.due, member.begun = sock, due, 0

    def turn(self, now: float) -> None:
        """Those whose time has come say a byte, or come back if they were turned away."""
        for member in self.members:
            if member.due > now:
                continue
            if not self._say(member, now):
                self.came_back += 1
                with suppress(OSError):
                    self.connect(member, now + PERIOD_S)

    def _say(self, member: Slow, now: float) -> bool:
        sock = member.sock
        member.due = now + PERIOD_S
        if sock is None:
            return False
        if member.kind == "reader":
            return True
        try:
            with suppress(BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
                sock.recv(65_536)
                raise ConnectionResetError  # an answer, or the end: it took too long
            with suppress(BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
                at = member.begun
                sock.send(_HEAD[at : at + 1] if member.kind == "head" else b"b")
                member.begun = at + 1
        except OSError:
            sock.close()
            member.sock = None
            return False
        return True


def main() -> None:
    """See above."""
    port, count = int(sys.argv[1]), int(sys.argv[2])
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    context = None
    if sys.argv[3:] == ["tls"]:
        context = ssl.create_default_context()
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    crowd = Crowd(port, context)
    failed = 0
    began = time.monotonic()
    for number in range(count):
        member = Slow(KINDS[number % len(KINDS)])
        try:
            crowd.connect(member, time.monotonic() + PERIOD_S * number / count)
            crowd.members.append(member)
        except OSError:
            failed += 1
    stands = {"open": len(crowd.members), "failed": failed, "seconds": time.monotonic() - began}
    sys.stdout.write(json.dumps(stands) + "\n")
    sys.stdout.flush()
    while not select.select([sys.stdin], [], [], 0.01)[0]:
        crowd.turn(time.monotonic())
    sys.stdout.write(json.dumps({"came_back": crowd.came_back}) + "\n")


if __name__ == "__main__":
    main()
