"""Pure: the JavaScript around balancing functions: it keeps the server objects, calls functions with them, and sorts what they answer.

A `call` gets the server objects that are kept themselves, frozen, and runs in strict mode: there every attempt to change what is frozen
throws a TypeError, and what would become a global a ReferenceError. So a function that ends without one of them, and that has no way to
catch them (which its caller sees to), has done what it would have done with a copy of its own. Otherwise the answer is null: ask again
in another way. The global object is frozen as well (`seal`); what the source names of it is looked at after each call.
"""

from typing import Final

FRAME: Final = r"""
(function () {
  const { stringify, parse } = JSON, { isArray } = Array, text = String, realm = globalThis;
  const { setPrototypeOf: bare, is, isExtensible, keys: keysOf, freeze, defineProperty, preventExtensions } = Object;
  const { ownKeys, getOwnPropertyDescriptor, apply } = Reflect;
  const telling = [TypeError, ReferenceError, SyntaxError], NotWritten = SyntaxError;
  const lines = [];
  const console = () => {
    const say = (...words) => { if (lines.length < 100) lines.push(words.map((word) => text(word)).join(" ").slice(0, 400)); };
    return { log: say, info: say, warn: say, error: say, debug: say };
  };
  globalThis.console = console();
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

  // ---- the server objects
  const kept = [], places = new Map(), lists = new Map();
  // `freeze` would give each object a layout of its own, to be fetched for each access; objects made like this share theirs.
  const slot = bare({ value: undefined, enumerable: true, writable: false, configurable: false }, null);
  const frozen = (value) => {
    if (value === null || typeof value !== "object") return value;
    if (isArray(value)) {
      for (let i = 0; i < value.length; i++) value[i] = frozen(value[i]);
      return freeze(value);
    }
    const made = {};
    for (const key of keysOf(value)) {
      const inner = frozen(value[key]);
      slot.value = inner;
      defineProperty(made, key, slot);
    }
    return preventExtensions(made);
  };
  const itself = (value) => value, fresh = (server) => ({ ...server });
  const learn = (servers, made) => servers.map((server) => {
    let place = places.get(server.serverId);
    if (place === undefined) places.set(server.serverId, place = kept.length);
    kept[place] = made(server);
    return place;
  });
  const edit = (list, edits) => {
    for (const [op, at, place] of edits) {
      if (op === 0) list[at] = kept[place];
      else if (op === 1) list.splice(at, 0, kept[place]);
      else list.splice(at, 1);
    }
  };
  const inputOf = (base, counts, list, made) => {
    const input = parse(base), servers = lists.get(list);
    input.servers = made === itself ? servers.slice() : servers.map(made);
    for (const [index, sessions, inflight] of parse(counts)) input.servers[index] = { ...input.servers[index], sessions, inflight };
    return input;
  };

  // ---- whether a call has left anything behind where the next one would find it
  const shapes = new Map();
  const sizeOf = (value) => typeof value === "function" ? ownKeys(value).length : 0;
  const shapeOf = (object) => {
    const keys = ownKeys(object), facts = keys.map((key) => getOwnPropertyDescriptor(object, key));
    return { object, keys, facts, sizes: facts.map((fact) => sizeOf(fact.value)) };
  };
  const isAsItWas = ({ object, keys, facts, sizes }) => {
    const now = ownKeys(object);
    if (!isExtensible(object) || now.length !== keys.length) return false;
    for (let i = 0; i < keys.length; i++) {
      const fact = getOwnPropertyDescriptor(object, keys[i]), was = facts[i];
      if (fact === undefined || !is(fact.value, was.value) || fact.get !== was.get || fact.set !== was.set) return false;
      if (fact.writable !== was.writable || fact.enumerable !== was.enumerable || fact.configurable !== was.configurable) return false;
      if (sizeOf(fact.value) !== sizes[i]) return false;
    }
    return true;
  };
  const isClean = (words) => {
    for (const word of words) if (shapes.has(word) && !isAsItWas(shapes.get(word))) return false;
    return true;
  };

  // A direct `eval` in a function: what a file declares ends with the call.
  const evaluated = (0, eval)('(function (module, exports, console, __source) { "use strict"; return eval(__source) })');
  const isFunction = (value) => typeof value === "function";
  const statements = new Set();
  const functionIn = (source, names) => {
    const run = (text) => {
      const module = { exports: {} };
      const last = apply(evaluated, realm, [module, module.exports, console(), text]);
      return [module.exports, last];
    };
    if (!statements.has(source)) {
      try {
        return run("(" + source + "\n)")[1];
      } catch (error) {
        if (!(error instanceof NotWritten)) throw error;
      }
      if (statements.size > 64) statements.clear();
      statements.add(source);
    }
    return run(source).find(isFunction) || run(source + "\n;" + names)[1].find(isFunction);
  };
  const call = (source, names, words, base, counts, list, way) => {
    lines.length = 0;
    const input = inputOf(base, counts, list, way === "fresh" ? fresh : itself);
    let found;
    try {
      const fn = functionIn(source, names);
      if (!isFunction(fn)) return "null";
      const value = apply(fn, realm, [input]);
      if (value !== null && typeof value === "object" && typeof value.then === "function") return "null";
      found = sort(value);
    } catch (error) {
      if (error === null) throw error;  // that is how the engine says that memory ran out
      for (const kind of telling) if (error instanceof kind) return "null";
      found = wrong(error);
    }
    return stringify(answer({ answer: found, log: lines.join("\n"), clean: isClean(parse(words)) }));
  };

  // ---- in a copy of the process
  let input = null, settled = null;
  const run = (fn) => {
    try {
      const value = fn(input);
      if (value !== null && typeof value === "object" && typeof value.then === "function") {
        value.then((v) => { try { settled = sort(v); } catch (e) { settled = wrong(e); } }, (e) => { settled = wrong(e); });
      } else {
        settled = sort(value);
      }
    } catch (error) {
      if (error === null) throw error;
      settled = wrong(error);
    }
  };
  for (const name of ownKeys(globalThis)) {
    const value = globalThis[name];
    if (value !== null && (typeof value === "object" || typeof value === "function")) shapes.set(name, shapeOf(value));
  }
  return function (task, ...given) {
    switch (task) {
      case "learn": return stringify(learn(parse(given[0]), itself));
      case "learn-frozen": return stringify(learn(parse(given[0]), frozen));
      case "list": lists.set(given[0], parse(given[1]).map((place) => kept[place])); return;
      case "edit": edit(lists.get(given[0]), parse(given[1])); return;
      case "seal": freeze(realm); return;
      case "call": return call(...given);
      case "input": input = inputOf(...given, itself); lines.length = 0; return;
      case "is-function": return typeof given[0] === "function";
      case "run": return run(given[0]);
      case "result": return stringify(answer({ answer: settled, log: lines.join("\n") }));
    }
  };
})()
"""
