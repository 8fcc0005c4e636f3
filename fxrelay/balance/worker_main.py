"""Task: the process that runs balancing scripts: `python -m fxrelay.balance.worker_main FD MEMORY_BYTES DIRECTORY`.

It says READY, then reads requests from a socket and answers each, one at a time, until the socket ends: that is also how it learns that the
relay is gone, in the middle of a Python function by a signal (SIGIO). A request that takes too long ends the process (SIGALRM).

    request:   length u32, JSON {"kind", "spec", "limit_s", "memory_bytes", "base", "counts"}    length u32, servers, see `sent_texts`
    answer:    length u32, JSON {"kind": "value", "value"} | {"kind": "output", "text"} | {"kind": "failed", "name", "message", "detail"}
               or {"kind": "refused"} with the same fields
"""

import importlib
import io
import json
import math
import os
import resource
import signal
import socket
import struct
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from types import ModuleType
from typing import Any, Final

from fxrelay.balance.answers import Answer, failed, refused
from fxrelay.balance.executable import run_executable
from fxrelay.balance.forked import RelayGone, bound, collect_children, is_gone, told_when_gone
from fxrelay.balance.javascript import Engine
from fxrelay.balance.niceness import give_way
from fxrelay.balance.script_input import Count, ScriptInput, fastx4_input
from fxrelay.balance.sent_texts import ReceivedTexts

READY: Final = b"\n"
LENGTH: Final = struct.Struct(">I")
MAX_REQUEST_BYTES: Final = 1 << 30
MAX_ANSWER_BYTES: Final = 8 << 20
HEADROOM_BYTES: Final = 512 << 20
"""Memory for Python itself and the input, beside what the script may take."""
MAX_LOG_CHARS: Final = 4_000
FAULTS: Final = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    EOFError,
    ImportError,
    LookupError,
    NameError,
    OSError,
    RecursionError,
    SyntaxError,
    SystemError,
    TypeError,
    ValueError,
)
"""By these Python says that something is wrong with a function, or with what it found. By others the function says no."""


def serve(channel: socket.socket) -> None:
    """Answer requests until the other end is gone."""
    server = _Server(channel)
    texts = ReceivedTexts()
    while (head := _receive(channel)) is not None and (packed := _receive(channel)) is not None:
        request = json.loads(head)
        signal.setitimer(signal.ITIMER_REAL, request["limit_s"] * 2 + 1)
        try:
            counts = tuple(Count(*count) for count in request["counts"])
            answer = server.answer(request, ScriptInput(request["base"], (), counts, texts.unpack(packed)))
        except RelayGone:
            return
        except MemoryError:
            answer = failed("ScriptMemory", "the script ran out of memory")
        signal.setitimer(signal.ITIMER_REAL, 0)
        encoded = json.dumps(answer).encode()
        if len(encoded) > MAX_ANSWER_BYTES:
            encoded = json.dumps(failed("BadReturn", "the script returned too much")).encode()
        channel.sendall(LENGTH.pack(len(encoded)) + encoded)
        collect_children()


class _Server:
    """One of these for each process."""

    def __init__(self, channel: socket.socket) -> None:
        self._channel = channel
        self._engine: Engine | None = None

    def answer(self, request: dict[str, Any], given: ScriptInput) -> Answer:
        """Run one script."""
        match request["kind"]:
            case "js":
                self._engine = self._engine or Engine()
                return self._engine.run(request["spec"], given, (request["limit_s"], request["memory_bytes"]), self._channel)
            case "exec":
                return run_executable(request["spec"], fastx4_input(given), request["limit_s"], self._channel)
            case "owner-exec":
                return run_executable(request["spec"], given.base, request["limit_s"], self._channel)
            case "owner-python":
                with _ending_with(self._channel):
                    return _call(request["spec"], given.base)
            case _:
                with _ending_with(self._channel):
                    return _call(request["spec"], given.whole())


@contextmanager
def _ending_with(channel: socket.socket) -> Iterator[None]:
    """This process ends, with all that it has started, when the other end of `channel` does: a function may run for ever."""

    def look(*_: object) -> None:
        if is_gone(channel):
            os.killpg(0, signal.SIGKILL)

    with told_when_gone(channel, look):
        look()  # before the signal was asked for
        yield


class _Said(io.TextIOBase):
    """The beginning of what a function prints."""

    def __init__(self) -> None:
        self.text = ""

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        self.text += text[: MAX_LOG_CHARS - len(self.text)]
        return len(text)


def _call(spec: str, text: str) -> Answer:
    module_name, _, function_name = spec.partition(":")
    said = _Said()
    try:
        with redirect_stdout(said), redirect_stderr(said):
            function = getattr(_module(module_name), function_name)
            value = function(json.loads(text))
        return {"kind": "value", "value": _plain(value), "log": said.text}
    except MemoryError:
        raise
    except BaseException as exc:  # a script may raise SystemExit as well
        import traceback

        told = failed if isinstance(exc, FAULTS) else refused
        return told(type(exc).__name__, str(exc)[:500], traceback.format_exc()[-4000:])


_Stamp = tuple[int, int, int]
_modules: dict[str, tuple[_Stamp, ModuleType]] = {}


def _module(name: str) -> ModuleType:
    """The module in its present form: it is loaded again when its file has changed."""
    importlib.invalidate_caches()
    known = _modules.get(name)
    if known is None:
        module = importlib.import_module(name)
        _modules[name] = (_stamp(module), module)
    else:
        module, stamp = known[1], _stamp(known[1])
        if stamp != known[0]:
            module = importlib.reload(module)
            _modules[name] = (stamp, module)
    return module


def _stamp(module: ModuleType) -> _Stamp:
    try:
        facts = Path(str(module.__file__)).stat()
    except OSError:
        return (0, 0, 0)
    return (facts.st_mtime_ns, facts.st_size, facts.st_ino)


def _plain(value: Any) -> Any:
    """Something JSON can carry. NaN counts as nothing, as in JavaScript; what JSON has no word for becomes an object, which is refused."""
    if isinstance(value, float) and math.isnan(value):
        return None
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError, RecursionError):
        return {"type": type(value).__name__}
    return value


def _receive(channel: socket.socket) -> bytes | None:
    head = _receive_exactly(channel, LENGTH.size)
    if head is None:
        return None
    (length,) = LENGTH.unpack(head)
    return _receive_exactly(channel, length) if length <= MAX_REQUEST_BYTES else None


def _receive_exactly(channel: socket.socket, size_bytes: int) -> bytes | None:
    received = bytearray(size_bytes)
    view = memoryview(received)
    got = 0
    while got < size_bytes:
        count = channel.recv_into(view[got:])
        if not count:
            return None
        got += count
    return bytes(received)


def main() -> None:
    """Take the limits on, then serve."""
    channel = socket.socket(fileno=int(sys.argv[1]))
    limit_bytes = int(sys.argv[2]) + HEADROOM_BYTES
    # Not RLIMIT_AS: executables inherit it, and Node, Java and Go reserve far more addresses than they use.
    bound(resource.RLIMIT_DATA, limit_bytes)
    bound(resource.RLIMIT_CORE, 0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the relay's to handle; it ends this process by closing the socket
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    # Decisions can wait a moment, streams cannot.
    give_way()
    sys.path.append(sys.argv[3])  # the last: a site's json.py does not replace the standard one
    # What scripts print must not get into anybody's protocol.
    os.dup2(2, 1)
    sys.dont_write_bytecode = True  # it is told apart by whole seconds: a module changed twice in one would be read as it was
    channel.sendall(READY)
    serve(channel)


if __name__ == "__main__":
    main()
