"""Task: runs JavaScript balancing functions, in the script process, with limits of time and memory; no call leaves anything for the next.

The file holds a function as the clustering guide writes it, `function(input) { ... }`; arrow functions, declarations, `module.exports =`
and async functions are taken as well.

Reading a thousand server objects takes the engine longer than all the rest. So the process keeps engines that have read them, and only
server objects that are new are read. There are three ways to call a function; the first that works for it is used from then on:

- *frozen*: in the engine itself, with the server objects that all calls share, which nobody can change; about 1 ms for a thousand.
- *fresh*: with a copy of each server object, of which only what lies deeper is shared: for functions that write into server objects.
- *in a copy* of the process, which ends with the call; about 10 ms. For all others, and from the first for functions whose source has a
  word by which they could not be told that they may not write.

For the first two everything that comes with the language is frozen too, however it is reached.
"""

import json
import re
import socket
from collections.abc import Sequence
from enum import Enum
from importlib import import_module
from pathlib import Path
from typing import Any, Final

from fxrelay.balance.answers import failed
from fxrelay.balance.candidates import Op
from fxrelay.balance.forked import dying_with, in_child
from fxrelay.balance.javascript_frame import FRAME
from fxrelay.balance.script_input import ScriptInput
from fxrelay.balance.sent_texts import Listed

MAX_ANSWER_BYTES: Final = 1 << 20
MAX_KEPT: Final = 65_536
"""Server objects kept; with more, all are read again."""
MAX_SOURCE_BYTES: Final = 1 << 20
MAX_LOG_CHARS: Final = 4_000

MAX_SOURCES: Final = 64
FAULTS: Final = frozenset(
    ["AggregateError", "EvalError", "InternalError", "RangeError", "ReferenceError", "SyntaxError", "TypeError", "URIError"]
)
"""Errors by which the language says that something is wrong with a function, or with what it found. By others the function says no."""
_BYTES_PER_CHAR: Final = 8
"""What the engine needs for a server object, for each character of its text; 5.5 was measured."""
_DECLARED: Final = re.compile(r"^\s*(?:async\s+)?function\s+([A-Za-z_$][\w$]*)", re.MULTILINE)
_WORD: Final = re.compile(r"[A-Za-z_$][\w$]*")
_ESCAPE: Final = re.compile(r"\\[ux]")
_DENIED: Final = frozenset(
    """__proto__ getPrototypeOf setPrototypeOf __defineGetter__ __defineSetter__ __lookupGetter__ __lookupSetter__
    eval Function globalThis Reflect Proxy WeakRef FinalizationRegistry SharedArrayBuffer Atomics Iterator
    isFrozen isSealed isExtensible getOwnPropertyDescriptor getOwnPropertyDescriptors arguments
    try catch finally import async await fromAsync queueMicrotask Promise""".split()  # noqa: SIM905 - to be read
)
"""Words of sources that are called in copies: by them strict mode is left, frozen objects are told from others, or errors are kept from the
caller.
"""


class Way(Enum):
    """How a function is called."""

    FROZEN = "frozen"
    FRESH = "fresh"
    IN_COPY = "in-copy"


def _engine_module() -> Any:
    """The package's own C module: importing `quickjs` itself starts a thread, and a process with threads cannot be copied safely."""
    return import_module("_quickjs")


class Engine:
    """JavaScript with the server objects of earlier calls. `run` may be called again and again."""

    def __init__(self) -> None:
        self._sources: dict[str, _Source] = {}
        self._shared = _Kept("learn-frozen")
        self._copied = _Kept("learn")

    def run(self, path: str, given: ScriptInput, limits: tuple[float, int], relay: socket.socket) -> dict[str, Any]:
        """Call the function in the file with the input; `limits` are seconds and bytes. The answer is as `worker_main` describes it.

        Raises:
            RelayGone: the other end of `relay` was closed meanwhile.
        """
        try:
            source = Path(path).read_bytes()[: MAX_SOURCE_BYTES + 1].decode()
        except (OSError, UnicodeDecodeError) as exc:
            return failed("ScriptUnreadable", "the balancing script cannot be read", f"{path}: {exc}")
        if len(source) > MAX_SOURCE_BYTES:
            return failed("ScriptUnreadable", "the balancing script is too large", path)
        known = self._known(source)
        while known.way is not Way.IN_COPY:
            with dying_with(relay):
                found = self._here(path, known, given, limits)
            if found is not None:
                return found
        return self._in_copy(path, source, given, limits, relay)

    def _known(self, source: str) -> "_Source":
        known = self._sources.get(source)
        if known is None:
            if len(self._sources) >= MAX_SOURCES:
                self._sources.clear()
            known = self._sources[source] = _Source(source)
        return known

    def _here(self, path: str, script: "_Source", given: ScriptInput, limits: tuple[float, int]) -> dict[str, Any] | None:
        """The answer; None if it has to be asked for in another way, which is the script's from now on."""
        limit_s, memory_bytes = limits
        quickjs = _engine_module()
        engine = self._shared
        chosen = engine.choose(given)
        engine.context.set_memory_limit(engine.used_bytes + memory_bytes)
        engine.context.set_time_limit(limit_s)
        try:
            told = (given.base, _counts_of(given), *chosen)
            found = json.loads(engine.frame("call", script.text, script.names, *told, script.way.value))
        except (quickjs.JSException, quickjs.StackOverflow) as exc:
            self._shared = _Kept("learn-frozen")
            if "interrupted" in str(exc):
                return failed("ScriptTimeout", "the balancing script took too long", path)
            script.way = Way.IN_COPY
            return None
        engine.context.set_memory_limit(-1)
        engine.context.set_time_limit(-1)
        if found is None:
            script.way = Way.FRESH if script.way is Way.FROZEN else Way.IN_COPY
            return None
        if found["answer"].get("name") in ("InternalError", "RangeError"):
            self._shared = _Kept("learn-frozen")
        return _settled(found, path)

    def _in_copy(self, path: str, source: str, given: ScriptInput, limits: tuple[float, int], relay: socket.socket) -> dict[str, Any]:
        limit_s, memory_bytes = limits
        engine = self._copied
        told = (given.base, _counts_of(given), *engine.choose(given))

        def work() -> bytes:
            engine.context.set_memory_limit(engine.used_bytes + memory_bytes)
            engine.context.set_time_limit(limit_s)
            return json.dumps(_called(engine.context, engine.frame, (path, source), told)).encode()

        try:
            answer: dict[str, Any] = json.loads(in_child(work, limit_s, relay, MAX_ANSWER_BYTES))
        except TimeoutError:
            return failed("ScriptTimeout", "the balancing script took too long", path)
        except EOFError:
            return failed("ScriptDied", "the balancing script's process died", path)
        except ValueError:
            return failed("BadReturn", "the balancing script returned too much", path)
        except OSError as exc:
            return failed("NoProcess", "there can be no process for the balancing script now", f"{path}: {exc.strerror or exc}")
        return answer


class _Source:
    """What is known of a script's text: how to call it, and an array of the functions it declares."""

    def __init__(self, text: str) -> None:
        self.text = text
        is_told = _DENIED.isdisjoint(_WORD.findall(text)) and _ESCAPE.search(text) is None
        self.way = Way.FROZEN if is_told else Way.IN_COPY
        names = (f"typeof {name} === 'function' ? {name} : undefined" for name in reversed(_DECLARED.findall(text)))
        self.names = f"[{','.join(names)}]"


class _Kept:
    """An engine and the server objects it has read, by the frame's task `learning`."""

    def __init__(self, learning: str) -> None:
        self._learning = learning
        self._begin()

    def _begin(self) -> None:
        self.context: Any = _engine_module().Context()
        self.frame: Any = self.context.eval(FRAME)
        self.used_bytes: int = self.context.memory()["malloc_size"]
        self._places: dict[str, int] = {}
        self._texts: dict[int, str] = {}
        self._turns: dict[int, int] = {}
        if self._learning == "learn-frozen":
            self.frame("seal")

    def choose(self, given: ScriptInput) -> tuple[int, str]:
        """The engine's list with the servers of the next call, and which of them are meant; those that it does not know are read.

        A list that the engine had a turn ago is only edited. A thousand texts are cold by the next call, and as many objects.
        """
        if len(self._texts) > MAX_KEPT:
            self._begin()
        listed = given.listed or Listed(given.servers, 0, 0, None)
        if listed.edits is None or self._turns.get(listed.number) != listed.turn - 1:
            self._learn(listed.texts)
            self.frame("list", listed.number, json.dumps([self._places[text] for text in listed.texts]))
        elif listed.edits:
            self._learn([edit.text for edit in listed.edits if edit.op is not Op.LEAVE])
            edits = [[edit.op, edit.at, self._places.get(edit.text, 0)] for edit in listed.edits]
            self.frame("edit", listed.number, json.dumps(edits))
        self._turns[listed.number] = listed.turn
        return listed.number, json.dumps([listed.picked.pick, *listed.picked.places])

    def _learn(self, texts: Sequence[str]) -> None:
        places = self._places
        new = list(dict.fromkeys([text for text in texts if text not in places]))
        if new:
            for text, place in zip(new, json.loads(self.frame(self._learning, f"[{','.join(new)}]")), strict=True):
                before = self._texts.get(place, "")
                places.pop(before, None)
                places[text] = place
                self._texts[place] = text
                self.used_bytes += (len(text) - len(before)) * _BYTES_PER_CHAR


def _counts_of(given: ScriptInput) -> str:
    return json.dumps([[count.index, count.sessions, count.in_flight] for count in given.counts])


def _called(context: Any, frame: Any, script: tuple[str, str], given: tuple[str, str, int, str]) -> dict[str, Any]:
    """The answer, in the child; the engine is not to be used again. `script` is path and source, `given` base, counts, list, picked."""
    quickjs = _engine_module()
    path, source = script
    try:
        frame("input", *given)  # before the script can change what that needs
        function = _function(context, frame, source)
        if function is None:
            return failed("ScriptInvalid", "the balancing script holds no function", path)
        frame("run", function)
        while context.execute_pending_job():
            pass
        found = json.loads(frame("result"))
    except quickjs.StackOverflow as exc:
        return failed("ScriptStack", "the balancing script recursed too deeply", f"{path}: {exc}")
    except quickjs.JSException as exc:
        return _limit_or_error(str(exc), path)
    return _settled(found, path)


def _settled(found: dict[str, Any], path: str) -> dict[str, Any]:
    answer: dict[str, Any] | None = found["answer"]
    if answer is None:
        return failed("BadReturn", "the balancing script's promise was never settled", path)
    name, message = answer.get("name"), answer.get("message", "")
    if name == "InternalError" and "out of memory" in message:
        return failed("ScriptMemory", "the balancing script ran out of memory", path)
    if name in ("InternalError", "RangeError") and ("stack overflow" in message or "call stack" in message):
        return failed("ScriptStack", "the balancing script recursed too deeply", f"{path}: {answer['detail'][:500]}")
    if answer["kind"] == "failed" and name not in FAULTS:
        answer["kind"] = "refused"
    answer["log"] = found["log"][:MAX_LOG_CHARS]
    return answer


def _function(context: Any, frame: Any, source: str) -> Any:
    """The file's function: the whole file as an expression, what it exports, what its last line yields, or the last one it declares."""
    quickjs = _engine_module()
    found = None
    try:
        found = context.eval(f"({source}\n)")
    except quickjs.JSException as exc:
        if not str(exc).startswith("SyntaxError"):
            raise
        last = context.eval(source)
        declared = [context.get(name) for name in _DECLARED.findall(source)]
        found = next((each for each in (context.eval("module.exports"), last, *reversed(declared)) if frame("is-function", each)), None)
    return found if found is not None and frame("is-function", found) else None


def _limit_or_error(text: str, path: str) -> dict[str, Any]:
    if text.startswith("InternalError: interrupted"):
        return failed("ScriptTimeout", "the balancing script took too long", path)
    if text.strip() == "null" or "out of memory" in text:
        return failed("ScriptMemory", "the balancing script ran out of memory", path)
    name, _, rest = text.partition(":")
    message = rest.strip().splitlines()[0][:500] if rest.strip() else "the balancing script failed"
    return failed(name.strip()[:100], message, f"{path}: {text[:4000]}")
