"""Task: runs one JavaScript balancing function, in the script process: a fresh engine for each call, with limits of time and memory.

The file holds a function as the clustering guide writes it, `function(input) { ... }`; arrow functions, declarations, `module.exports =`
and async functions are taken as well.
"""

import json
import re
from pathlib import Path
from typing import Any, Final

MAX_SOURCE_BYTES: Final = 1 << 20
MAX_LOG_CHARS: Final = 4_000

_PRELUDE: Final = """
(function () {
  const stringify = JSON.stringify, parse = JSON.parse, isArray = Array.isArray, map = Array.prototype.map, call = Function.prototype.call;
  const mapOf = call.bind(map);
  const lines = [];
  const say = function () { if (lines.length < 100) lines.push(mapOf([].slice.call(arguments), String).join(" ").slice(0, 400)); };
  globalThis.console = { log: say, info: say, warn: say, error: say, debug: say };
  globalThis.module = { exports: {} };
  globalThis.exports = globalThis.module.exports;
  const idOf = (e) => {
    const id = e !== null && typeof e === "object" ? e.serverId : e;
    return typeof id === "string" ? id : null;
  };
  const sort = (value) => {
    if (typeof value === "string") return { kind: "value", value: value };
    if (!value) return { kind: "value", value: null };
    if (isArray(value)) return { kind: "value", value: mapOf(value, idOf) };
    return { kind: "value", value: { type: typeof value } };
  };
  const wrong = (error) => {
    const isError = error !== null && typeof error === "object";
    return {
      kind: "failed",
      name: String(isError && error.name || "Error").slice(0, 100),
      message: String(isError ? error.message : error).slice(0, 500),
      detail: String(isError && error.stack || "").slice(0, 4000),
    };
  };
  let settled = null;
  return function (task, fn, text) {
    if (task === "is-function") return typeof fn === "function";
    if (task === "result") return stringify({ answer: settled, log: lines.join("\\n") });
    try {
      const value = fn(parse(text));
      if (value !== null && typeof value === "object" && typeof value.then === "function") {
        value.then((v) => { settled = sort(v); }, (e) => { settled = wrong(e); });
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


def run_javascript(path: str, text: str, limit_s: float, memory_bytes: int) -> dict[str, Any]:
    """Call the function in the file with the input; the answer is as `worker_main` describes it."""
    import quickjs

    try:
        source = Path(path).read_bytes()[: MAX_SOURCE_BYTES + 1].decode()
    except (OSError, UnicodeDecodeError) as exc:
        return _failed("ScriptUnreadable", "the balancing script cannot be read", f"{path}: {exc}")
    if len(source) > MAX_SOURCE_BYTES:
        return _failed("ScriptUnreadable", "the balancing script is too large", path)
    context = quickjs.Context()
    context.set_memory_limit(memory_bytes)
    context.set_time_limit(limit_s)
    try:
        frame = context.eval(_PRELUDE)
        function = _function(context, frame, source)
        if function is None:
            return _failed("ScriptInvalid", "the balancing script holds no function", path)
        frame("run", function, text)
        while context.execute_pending_job():
            pass
        found = json.loads(frame("result"))
    except quickjs.StackOverflow as exc:
        return _failed("ScriptStack", "the balancing script recursed too deeply", f"{path}: {exc}")
    except quickjs.JSException as exc:
        return _limit_or_error(str(exc), path)
    if found["answer"] is None:
        return _failed("BadReturn", "the balancing script's promise was never settled", path)
    answer: dict[str, Any] = found["answer"]
    answer["log"] = found["log"][:MAX_LOG_CHARS]
    return answer


def _function(context: Any, frame: Any, source: str) -> Any:
    """The file's function: the whole file as an expression, what it exports, what its last line yields, or the last one it declares."""
    import quickjs

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
        return _failed("ScriptTimeout", "the balancing script took too long", path)
    if text.strip() == "null" or "out of memory" in text:
        return _failed("ScriptMemory", "the balancing script ran out of memory", path)
    name, _, rest = text.partition(":")
    message = rest.strip().splitlines()[0][:500] if rest.strip() else "the balancing script failed"
    return _failed(name.strip()[:100], message, f"{path}: {text[:4000]}")


def _failed(name: str, message: str, detail: str) -> dict[str, Any]:
    return {"kind": "failed", "name": name, "message": message, "detail": detail}
