"""Pure: the JavaScript around balancing functions: it keeps the server objects, calls functions with them, and sorts what they answer.

A `call` gets the server objects that are kept themselves, frozen, and runs in strict mode: there every attempt to change what is frozen
throws a TypeError, and what would become a global a ReferenceError. So a function that ends without one of them, and that has no way to
catch them (which its caller sees to), has done what it would have done with a copy of its own. Otherwise the answer is null: ask again
in another way. So is everything that comes with the language, however a function reaches it (`seal`).
"""

from typing import Final

FRAME: Final = r"""
(function () {
  const { stringify, parse } = JSON, { isArray } = Array, text = String, realm = globalThis;
  const { setPrototypeOf: bare, getPrototypeOf: prototypeOf, keys: keysOf, freeze, defineProperty, preventExtensions } = Object;
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
  // The same words again and again: what a thousand servers say in one place in memory need not be fetched from a thousand.
  const words = new Map();
  const word = (one) => {
    const known = words.get(one);
    if (known !== undefined) return known;
    if (words.size > 20000) words.clear();
    words.set(one, one);
    return one;
  };
  const frozen = (value) => {
    if (typeof value === "string") return value.length <= 32 ? word(value) : value;
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
  const some = (list, [pick, ...places]) => {
    if (pick === 1) return places.map((place) => list[place]);
    if (places.length > 256) {
      const gone = new Set(places);
      return list.filter((_, place) => !gone.has(place));
    }
    let from = 0;
    const runs = places.map((place) => { const run = list.slice(from, place); from = place + 1; return run; });
    return runs.length === 0 ? list.slice() : [].concat(...runs, list.slice(from));
  };
  const inputOf = (base, counts, list, picked, made) => {
    const input = parse(base), servers = some(lists.get(list), parse(picked));
    input.servers = made === itself ? servers : servers.map(made);
    for (const [index, sessions, inflight] of parse(counts)) input.servers[index] = { ...input.servers[index], sessions, inflight };
    return input;
  };

  // ---- nothing that calls share can be changed
  const fixed = new WeakSet();
  const fix = (rest) => {
    while (rest.length > 0) {
      const one = rest.pop();
      if (one === null || (typeof one !== "object" && typeof one !== "function") || fixed.has(one)) continue;
      fixed.add(one);
      for (const key of ownKeys(one)) {
        const { value, get, set } = getOwnPropertyDescriptor(one, key);
        rest.push(value, get, set);
      }
      rest.push(prototypeOf(one));
      freeze(one);
    }
  };
  const errors = [Error, EvalError, RangeError, ReferenceError, SyntaxError, TypeError, URIError, InternalError, AggregateError];
  // Scripts give errors of their own a name: what is read-only there would keep them from it.
  const asOwn = (object, key) => {
    const { value } = getOwnPropertyDescriptor(object, key);
    const get = () => value;
    const set = function (own) {
      "use strict";
      if (this === object) throw new TypeError("read-only");
      defineProperty(this, key, { value: own, writable: true, enumerable: true, configurable: true });
    };
    defineProperty(object, key, { get, set });
  };
  const makers = [() => {}, function* () {}, async () => {}, async function* () {}].map((one) => prototypeOf(one));
  // Not reached by the name of a global.
  const hidden = () => [
    ...makers, [].values(), new Map().keys(), new Set().keys(), ""[Symbol.iterator](), "".matchAll(/./g), (function* () {})(),
    (async function* () {})(), [].values().map(text), Iterator.from({ next: text }), Iterator.concat ? Iterator.concat([]) : null,
  ];
  const seal = () => {
    for (const { prototype } of errors) for (const key of ["name", "message"]) asOwn(prototype, key);
    for (const key of ["stackTraceLimit", "prepareStackTrace"]) defineProperty(Error, key, { value: undefined });
    for (const maker of makers) {
      // What makes functions of texts would make them without strict code.
      const { name } = maker.constructor;
      const another = function () { throw new TypeError("not here"); };
      defineProperty(another, "name", { value: name });
      defineProperty(maker, "constructor", { value: another });
    }
    fix([realm, ...hidden()]);
  };

  // A direct `eval` in a function: what a file declares ends with the call.
  const evaluated = (0, eval)('(function (module, exports, console) { "use strict"; return eval(arguments[3]) })');
  const evaluatedOnce = (0, eval)(
    '(function () { "use strict"; const [module, exports, console] = arguments; return eval(arguments[3]) })'
  );
  const isFunction = (value) => typeof value === "function";
  const { toString: sourceOf } = isFunction, isNothing = /^(?:\s|\/\/[^\n]*(?:\n|$)|\/\*(?:[^*]|\*(?!\/))*\*\/)*$/;
  const statements = new Set(), ready = new Map();
  // A file that is one function and nothing else need not be run for each call, if nothing that the function can reach can be changed.
  const isAll = (fn, source) => {
    const its = apply(sourceOf, fn, []), at = source.indexOf(its);
    return at >= 0 && isNothing.test(source.slice(0, at)) && isNothing.test(source.slice(at + its.length));
  };
  const functionIn = (source, names) => {
    const run = (text, evaluate = evaluated) => {
      const module = { exports: {} }, own = console();
      const last = apply(evaluate, realm, [module, module.exports, own, text]);
      if (evaluate === evaluatedOnce) fix([module, own, last]);
      return [module.exports, last];
    };
    if (ready.has(source)) return ready.get(source);
    if (!statements.has(source)) {
      try {
        const expression = "(" + source + "\n)", fn = run(expression)[1];
        if (!isFunction(fn) || !isAll(fn, source)) return fn;
        if (ready.size > 64) ready.clear();
        ready.set(source, run(expression, evaluatedOnce)[1]);
        return ready.get(source);
      } catch (error) {
        if (!(error instanceof NotWritten)) throw error;
      }
      if (statements.size > 64) statements.clear();
      statements.add(source);
    }
    return run(source).find(isFunction) || run(source + "\n;" + names)[1].find(isFunction);
  };
  const call = (source, names, base, counts, list, picked, way) => {
    lines.length = 0;
    const input = inputOf(base, counts, list, picked, way === "fresh" ? fresh : itself);
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
    return stringify(answer({ answer: found, log: lines.join("\n") }));
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
  return function (task, ...given) {
    switch (task) {
      case "learn": return stringify(learn(parse(given[0]), itself));
      case "learn-frozen": return stringify(learn(parse(given[0]), frozen));
      case "list": lists.set(given[0], parse(given[1]).map((place) => kept[place])); return;
      case "edit": edit(lists.get(given[0]), parse(given[1])); return;
      case "seal": seal(); return;
      case "call": return call(...given);
      case "input": input = inputOf(...given, itself); lines.length = 0; return;
      case "is-function": return typeof given[0] === "function";
      case "run": return run(given[0]);
      case "result": return stringify(answer({ answer: settled, log: lines.join("\n") }));
    }
  };
})()
"""
