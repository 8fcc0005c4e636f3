"""Pump: a splice whose socket speaks TLS. The plain one pays nothing for it."""

import socket

from fxtunnel.codes import Code
from fxtunnel.engine.reactor import READ, STREAM_EVENTS, WRITE
from fxtunnel.engine.splice import HEARD, Splice
from fxtunnel.engine.tls_socket import TlsSocket


class TlsSplice(Splice):
    """To be put before the splice that is to speak TLS: `class TlsClient(TlsSplice, Client)`. Its `sock` is a `TlsSocket`.

    close_notify stands for FIN, both ways. RST stays RST: a broken stream sends no close_notify, and a client's FIN without one is an
    abort, so neither end can take a cut transfer for a whole one.
    """

    __slots__ = ()

    fin_is_end = False

    sock: TlsSocket

    def start(self) -> None:
        """See `Splice`. What was peeked at is read first."""
        self._room = HEARD
        self.reactor.register(self.sock, self, STREAM_EVENTS)
        # There may be bytes that have left the kernel already; of those no event tells.
        self._readable = True
        if self.stream is not None and self.stream.send_credit > 0:
            self._queue_read()

    def read_turn(self, limit_bytes: int) -> int:
        """See `Splice`."""
        count = super().read_turn(limit_bytes)
        if self.sock.has_more and not (self._readable or self._read_done or self.closed):
            self._readable = True
            if self.stream is not None and self.stream.send_credit > 0:
                self._queue_read()
        return count

    def on_event(self, events: int) -> None:
        """From the reactor."""
        if self.sock.read_awaits_write or self.sock.write_awaits_read:
            events |= READ | WRITE
        super().on_event(events)

    def _shut_write(self) -> None:
        try:
            self.sock.shutdown(socket.SHUT_WR)
        except BlockingIOError:
            self._write_blocked = True
        except OSError:
            self.fail(Code.PEER_RESET)
        else:
            self._close_if_done()
