"""Task: log lines: one JSON object a line for machines, one readable line for a terminal; no client's bytes can forge either."""

import logging
import sys
import time
import traceback
from collections.abc import Callable
from datetime import UTC, datetime
from types import TracebackType
from typing import Any, Final, Literal, TextIO, cast

import structlog
from structlog.typing import EventDict, Processor

Style = Literal["auto", "json", "text"]
_ExcInfo = tuple[type[BaseException], BaseException, TracebackType | None]

# What makes up every line. An extra field of the same name is kept under another one, so that it cannot pose as the real thing.
_OWN_FIELDS: Final = ("ts", "level", "event", "logger")
_RECORD_FIELDS: Final = frozenset(logging.makeLogRecord({}).__dict__) | {"message", "asctime", "taskName"}
# Talkative at INFO, about what our own lines say better.
_QUIETER: Final = ("hypercorn.error", "hypercorn.access", "trio-websocket", "trio_websocket")
_MAX_TEMPLATES: Final = 1024


class RateLimited(logging.Filter):
    """Lets at most `limit` records of one logger and message template pass in `window_s`.

    The next one becomes a line that says so; the rest are dropped and counted, and the count goes with the first record of a later
    window as `suppressed`. What is counted are templates, not texts: a peer that varies its bytes gains nothing. Records with `audit` set
    always pass: set it only where whoever causes them pays more for each than we do.
    """

    def __init__(self, limit: int = 20, window_s: float = 10.0, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._limit = limit
        self._window_s = window_s
        self._clock = clock
        self._windows: dict[tuple[str, str], tuple[float, int]] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether `record` is to be written; may turn it into the line that announces silence."""
        if getattr(record, "audit", False):
            return True
        key, now = (record.name, str(record.msg)), self._clock()
        ends, count = self._windows.get(key, (0.0, 0))
        if key not in self._windows or now >= ends:
            if count > self._limit + 1:
                record.suppressed = count - self._limit - 1
            self._windows.pop(key, None)
            if len(self._windows) >= _MAX_TEMPLATES:
                self._windows.pop(next(iter(self._windows)))
            ends, count = now + self._window_s, 0
        self._windows[key] = (ends, count + 1)
        if count == self._limit:
            # The arguments stay where they are: formatting may fail, and is the handler's to survive.
            record.msg = f"{record.msg} (more of these are suppressed for {ends - now:.0f} s)"
        return count <= self._limit


def configure(level: str, style: Style, stream: TextIO = sys.stderr) -> None:
    """Send what every logger says at `level` ("debug" to "error") or above to `stream`, rate-limited; "auto" means text on a terminal.

    Replaces what was configured before. The caller keeps `stream`.
    """
    as_text = style == "text" or (style == "auto" and stream.isatty())
    renderer: Processor = _text_line if as_text else structlog.processors.JSONRenderer(ensure_ascii=True, skipkeys=True)
    handler = logging.StreamHandler(stream)
    handler.setFormatter(structlog.stdlib.ProcessorFormatter(processors=[_fields, renderer]))
    handler.addFilter(RateLimited())
    root = logging.getLogger()
    for old in root.handlers[:]:
        root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(level.upper())
    for name in _QUIETER:
        logging.getLogger(name).setLevel(logging.DEBUG if root.level <= logging.DEBUG else logging.WARNING)
    # A line that cannot be written must not put a traceback, with its arguments, on standard error.
    logging.raiseExceptions = False


def _fields(_logger: object, _method: str, event_dict: EventDict) -> EventDict:
    """The fields of a line, in their order: our four, those given with `extra=`, and the traceback."""
    record: logging.LogRecord = event_dict["_record"]
    fields: EventDict = {
        "ts": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z"),
        "level": record.levelname.lower(),
        "event": event_dict["event"],
        "logger": record.name,
    }
    for name, value in record.__dict__.items():
        if name not in _RECORD_FIELDS and name != "audit":
            fields[f"{name}_" if name in (*_OWN_FIELDS, "traceback") else name] = value
    if "exc_info" in event_dict:
        # Never with the values of local variables: they hold keys and other people's bytes.
        fields["traceback"] = "".join(traceback.format_exception(*cast(_ExcInfo, event_dict["exc_info"]))).rstrip("\n")
    return fields


def _text_line(_logger: object, _method: str, fields: EventDict) -> str:
    """`12:00:00.000 INFO event key=value …`; a traceback follows in indented lines, which no event can begin with."""
    rest: dict[str, Any] = dict(fields)
    ts, level, event, logger = (str(rest.pop(name)) for name in _OWN_FIELDS)
    trace = str(rest.pop("traceback", ""))
    pairs = "".join(f" {_visible(name)}={_visible(str(value))}" for name, value in rest.items())
    lines = "".join(f"\n    | {_visible(line)}" for line in trace.splitlines())
    return f"{ts[11:23]} {level.upper():<7} {_visible(event)}{pairs} [{_visible(logger)}]{lines}"


def _visible(text: str) -> str:
    """`text` with everything that moves a cursor or begins a line spelled out."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode("ascii") for c in text)
