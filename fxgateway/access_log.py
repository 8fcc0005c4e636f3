"""Task: the access log: one JSON object per line, written by a thread of its own, so that adding a record never waits for the disk."""

import json
import logging
import os
import queue
import sys
import threading
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any, Final, TextIO

from fxtunnel.errors import ConfigError

logger = logging.getLogger(__name__)

MAX_WAITING: Final = 8_192
"""Records that wait for the disk. More are dropped and counted: a disk that is full or slow must not fill the memory."""
STOP_S: Final = 2.0
"""For the thread to take up another file, or to write what waits at the end."""
BUFFER_BYTES: Final = 1 << 20
"""More than LINES_AT_ONCE lines take, so that a line is never written in two parts."""
LINES_AT_ONCE: Final = 128
"""Written with one call, which appends them whole: several workers may write to one file."""
_MODE: Final = 0o640


class AccessLog:
    """Implements `AccessSink`. Starts with the first `open`; lines for which there is no room, or no disk, are dropped and counted."""

    def __init__(self, max_waiting: int = MAX_WAITING) -> None:
        self.dropped = 0
        self._queue: queue.Queue[dict[str, Any] | TextIO | None] = queue.Queue(max_waiting)
        self._thread: threading.Thread | None = None

    def put(self, record: dict[str, Any]) -> None:
        """See `AccessSink`; from the reactor's thread only."""
        record["ts"] = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        try:
            self._queue.put_nowait(record)
        except queue.Full:
            self.dropped += 1

    def open(self, where: str) -> None:
        """Write to "stderr", or append to the file of that name, opened anew, from now on; "off" ends what was open. Blocking.

        Raises:
            ConfigError: the file cannot be opened, or nobody can be started who writes. What was open stays.
        """
        if where == "off":
            if self._thread is None:
                return
            target: TextIO = open(os.devnull, "a", encoding="utf-8")  # noqa: SIM115  # the thread closes it
        elif where == "stderr":
            target = sys.stderr
        else:
            try:
                descriptor = os.open(where, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK, _MODE)
            except OSError as exc:
                raise ConfigError.one(where, "log.access", f"cannot be opened: {exc.strerror}") from exc
            os.set_blocking(descriptor, True)
            target = open(descriptor, "a", BUFFER_BYTES, encoding="utf-8", errors="backslashreplace")  # noqa: SIM115  # as above
        if self._thread is None:
            thread = threading.Thread(target=self._run, name="access-log", daemon=True)
            try:
                thread.start()
            except RuntimeError as exc:
                _close(target)
                raise ConfigError.one(where, "log.access", f"cannot be written: {exc}") from exc
            self._thread = thread
        try:
            self._queue.put(target, timeout=STOP_S)
        except queue.Full:
            _close(target)
            raise ConfigError.one(where, "log.access", "the log that is open takes no more lines") from None

    def close(self) -> None:
        """Write what waits, for at most STOP_S."""
        thread, self._thread = self._thread, None
        if thread is not None:
            with suppress(queue.Full):
                self._queue.put(None, timeout=STOP_S)
            thread.join(STOP_S)

    def _run(self) -> None:
        target: TextIO | None = None
        written = 0
        while True:
            item = self._queue.get()
            if item is None or not isinstance(item, dict):
                _close(target)
                target = item
                if item is None:
                    return
            elif target is not None:
                try:
                    target.write(line_of(item))
                    written += 1
                    if self._queue.empty() or written >= LINES_AT_ONCE:
                        written = 0
                        target.flush()
                except (OSError, ValueError) as exc:
                    self.dropped += 1
                    logger.warning("access log: %s", exc)


def line_of(record: dict[str, Any]) -> str:
    """One line, whatever clients have put into the record, in the form of the log's other lines."""
    ts = record.pop("ts", "")
    fields = {"ts": ts, "level": "info", "event": "client ended", "logger": "fxgateway.access", **record}
    return json.dumps(fields, ensure_ascii=True) + "\n"


def _close(target: TextIO | None) -> None:
    if target is not None and target is not sys.stderr:
        with suppress(OSError):
            target.close()
