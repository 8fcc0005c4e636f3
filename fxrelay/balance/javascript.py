"""Task: runs JavaScript balancing functions, in the script process: a fresh engine for each call, with limits of time and memory.

The file holds a function as the clustering guide writes it, `function(input) { ... }`; arrow functions, declarations, `module.exports =`
and async functions are taken as well.

Reading a thousand server objects takes the engine longer than all the rest. So the process keeps an engine that has read them and never
runs a script: each call has a copy of it, in a child, and only server objects that are new are read.
"""

import json
import re
import socket
from importlib import import_module
from pathlib import Path
from typing import Any, Final

from fxrelay.balance.answers import failed
from fxrelay.balance.forked import in_child
from fxrelay.balance.script_input import ScriptInput

MAX_ANSWER_BYTES: Final = 1 << 20
MAX_KEPT: Final = 65_536
"""Server objects kept; with more, all are read again."""
MAX_SOURCE_BYTES: Final = 1 << 20
MAX_LOG_CHARS: Final = 4_000

_PRELUDE: Final = """
(function () {
  const stringify = JSON.stringify, parse = JSON.parse, isArray = Array.isArray, bare = Object.setPrototypeOf, text = String;
  const lines = [];
  const say = (...words) => { if (lines.length < 100) lines.push(words.map((word) => text(word)).join(" ").slice(0, 400)); };
  globalThis.console = { log: say, info: say, warn: say, error: say, debug: say };
  globalThis.module = { exports: {} };
  globalThis.exports = globalThis.module.exports;
  // Answers have no prototype: a toJSON that a script put there is not for them.
  const answer = (fields) => bare(fields, null);
  const failed = (name, message, detail) => answer({ kind: "failed", name: name, message: message, detail: detail });
  const idOf = (e) => {
    const id = e !== null && typeof e === "object" ? e.serverId : e;
    return typeof id === "string" ? id : null;
  };
  const sort = (value) => {
    if (typeof value === "string") return answer({ kind: "value", value: value });
    if (!value) return answer({ kind: "value", value: null });
    if (!isArray(value)) return answer({ kind: "value", value: answer({ type: typeof value }) });
    const ids = bare([], null), count = value.length;
    for (let i = 0; i < count; i++) ids[i] = idOf(value[i]);
    return answer({ kind: "value", value: ids });
  };
  const wrong = (error) => {
    try {
      const isError = error !== null && typeof error === "object";
      return failed(
        text(isError && error.name || "Error").slice(0, 100),
        text(isError ? error.message : error).slice(0, 500),
        text(isError && error.stack || "").slice(0, 4000),
      );
    } catch (another) {
      return failed("Error", "the error the script threw cannot be read", "");
    }
  };
  const kept = [], places = new Map();
  const learn = (servers) => servers.map((server) => {
    let place = places.get(server.serverId);
    if (place === undefined) places.set(server.serverId, place = kept.length);
    kept[place] = server;
    return place;
  });
  const inputOf = (text, picks) => {
    const input = parse(text), chosen = parse(picks);
    input.servers = chosen.places.map((place) => kept[place]);
    for (const [index, sessions, inflight] of chosen.counts) {
      input.servers[index].sessions = sessions;
      input.servers[index].inflight = inflight;
    }
    return input;
  };
  let input = null, settled = null;
  return function (task, fn, text, picks) {
    if (task === "is-function") return typeof fn === "function";
    if (task === "learn") return stringify(learn(parse(text)));
    if (task === "result") return stringify(answer({ answer: settled, log: lines.join("\\n") }));
    if (task === "input") return void (input = inputOf(text, picks));
    try {
      const value = fn(input);
      if (value !== null && typeof value === "object" && typeof value.then === "function") {
        value.then((v) => { try { settled = sort(v); } catch (e) { settled = wrong(e); } }, (e) => { settled = wrong(e); });
      } else {
        settled = sort(value);
      }
    } catch (error) {
      if (error === null) throw error;  // that is how the engine says that memory ran out
      settled = wrong(error);
    }
  };
})()
"""
_DECLARED: Final = re.compile(r"^\s*(?:async\s+)?function\s+([A-Za-z_$][\w$]*)", re.MULTILINE)


def _engine_module() -> Any:
    """The package's own C module: importing `quickjs` itself starts a thread, and a process with threads cannot be copied safely."""
    return import_module("_quickjs")


class Engine:
    """JavaScript with the server objects of earlier calls. `run` may be called again and again."""

    def __init__(self) -> None:
        self._forget()

    def run(self, path: str, given: ScriptInput, limits: tuple[float, int], relay: socket.socket) -> dict[str, Any]:
        """Call the function in the file with the input; `limits` are seconds and bytes. The answer is as `worker_main` describes it.

        Raises:
            RelayGone: the other end of `relay` was closed meanwhile.
        """
        limit_s, memory_bytes = limits
        picks = json.dumps({"places": self._places_of(given), "counts": [[c.index, c.sessions, c.in_flight] for c in given.counts]})
        limit_bytes = self._used_bytes + memory_bytes

        def work() -> bytes:
            self._context.set_memory_limit(limit_bytes)
            self._context.set_time_limit(limit_s)
            return json.dumps(_called(self._context, self._frame, path, (given.base, picks))).encode()

        try:
            answer: dict[str, Any] = json.loads(in_child(work, limit_s, relay, MAX_ANSWER_BYTES))
        except TimeoutError:
            return failed("ScriptTimeout", "the balancing script took too long", path)
        except EOFError:
            return failed("ScriptDied", "the balancing script's process died", path)
        except ValueError:
            return failed("BadReturn", "the balancing script returned too much", path)
        return answer

    def _forget(self) -> None:
        quickjs = _engine_module()
        self._context = quickjs.Context()
        self._frame = self._context.eval(_PRELUDE)
        self._places: dict[str, int] = {}
        self._texts: dict[int, str] = {}
        self._used_bytes: int = self._context.memory()["malloc_size"]

    def _places_of(self, given: ScriptInput) -> list[int]:
        """Where the engine keeps the input's servers; those it does not know are read."""
        if len(self._texts) > MAX_KEPT:
            self._forget()
        new = list(dict.fromkeys(text for text in given.servers if text not in self._places))
        if new:
            for text, place in zip(new, json.loads(self._frame("learn", None, f"[{','.join(new)}]")), strict=True):
                self._places.pop(self._texts.get(place, ""), None)
                self._places[text] = place
                self._texts[place] = text
            self._used_bytes = self._context.memory()["malloc_size"]
        return [self._places[text] for text in given.servers]


def _called(context: Any, frame: Any, path: str, given: tuple[str, str]) -> dict[str, Any]:
    """The answer, in the child; the engine is not to be used again."""
    quickjs = _engine_module()
    try:
        source = Path(path).read_bytes()[: MAX_SOURCE_BYTES + 1].decode()
    except (OSError, UnicodeDecodeError) as exc:
        return failed("ScriptUnreadable", "the balancing script cannot be read", f"{path}: {exc}")
    if len(source) > MAX_SOURCE_BYTES:
        return failed("ScriptUnreadable", "the balancing script is too large", path)
    try:
        frame("input", None, *given)  # before the script can change what that needs
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
