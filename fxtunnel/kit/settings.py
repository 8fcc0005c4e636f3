"""Task: a TOML file with environment variables laid over it, checked by a pydantic model; every problem at once, for a person to read."""

import codecs
import difflib
import ipaddress
import os
import re
import tomllib
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Final, TypeVar

from pydantic import AfterValidator, BaseModel, Field, PlainValidator, ValidationError, ValidationInfo
from pydantic_core import ErrorDetails

from fxtunnel.errors import ConfigError, ConfigProblem
from fxtunnel.model import is_name

M = TypeVar("M", bound=BaseModel)
_Part = int | str
_Loc = tuple[_Part, ...]

MAX_SOCKET_PATH_BYTES: Final = 107
"""sun_path holds 108 bytes with the closing zero (unix(7))."""
_HOST: Final = re.compile(r"[A-Za-z0-9._-]{1,253}")
_PORT: Final = re.compile(r"[0-9]{1,5}")
_SUBJECT: Final = re.compile(r"^[A-Z][a-z]+ should ")
_NETWORK: Final = "expected a network, such as 10.0.0.0/8 or fd00::/8"
_PLAIN: Final = {
    "path_type": "must be a path",
    "bool_type": "must be true or false",
    "bool_parsing": "must be true or false",
    "int_type": "must be a whole number",
    "int_parsing": "must be a whole number",
    "int_parsing_size": "must be a whole number of at most 18 digits",
    "int_from_float": "must be a whole number",
    "float_type": "must be a number",
    "float_parsing": "must be a number",
    "list_type": "must be a list",
    "tuple_type": "must be a list",
    "ip_v4_network": _NETWORK,
    "ip_v6_network": _NETWORK,
}
"""What stands for pydantic's own text, which speaks of Python or of what it tried in vain."""
_BOUNDS: Final = (("greater than or equal to", "at least"), ("less than or equal to", "at most"))
_WANTED_TEXT: Final = frozenset({"string_type", "path_type"})


@dataclass(frozen=True, slots=True)
class Address:
    """Where to listen or connect: `host` (IPv6 without brackets) and `port`, or else `path`, a unix socket."""

    host: str | None = None
    port: int | None = None
    path: Path | None = None

    @classmethod
    def parse(cls, text: str) -> "Address":
        """The address written as `host:port`, `[ip6]:port`, `unix:PATH` or `/PATH`.

        Raises:
            ValueError: anything else; the text says what was expected.
        """
        if text.startswith(("unix:", "/")):
            path = text.removeprefix("unix:")
            if not path or "\0" in path:
                raise ValueError(f"expected unix:PATH, found {text!r}")
            return cls(path=Path(path))
        host, _, port = text.rpartition(":")
        if not _PORT.fullmatch(port) or int(port) > 65535 or not _is_host(host):
            raise ValueError(f"expected HOST:PORT, [IPV6]:PORT or unix:PATH, found {text!r}")
        return cls(host.strip("[]"), int(port))

    def __str__(self) -> str:
        if self.path is not None:
            return f"unix:{self.path}"
        return f"[{self.host}]:{self.port}" if ":" in str(self.host) else f"{self.host}:{self.port}"


def _is_host(text: str) -> bool:
    if not text.startswith("["):
        return _HOST.fullmatch(text) is not None
    try:
        ipaddress.IPv6Address(text.removeprefix("[").removesuffix("]"))
    except ValueError:
        return False
    return text.endswith("]")


def beside_the_file(path: Path, info: ValidationInfo) -> Path:
    """A path of a configuration, for validators: a relative one belongs to the file's directory."""
    # Without a context the model was made by hand, not loaded from a file.
    return Path(info.context["directory"], path) if info.context else path


def _address(value: object, info: ValidationInfo) -> Address:
    if not isinstance(value, Address | str):
        raise ValueError('expected "HOST:PORT", "[IPV6]:PORT" or "unix:PATH"')
    address = Address.parse(value) if isinstance(value, str) else value
    if address.path is None:
        return address
    path = beside_the_file(address.path, info)
    if len(os.fsencode(path)) > MAX_SOCKET_PATH_BYTES:
        raise ValueError(f"is longer than a socket's path may be ({MAX_SOCKET_PATH_BYTES} bytes): {path}")
    return Address(path=path)


def _name(value: str) -> str:
    if not is_name(value):
        raise ValueError("expected a name: 1 to 64 of the characters A-Z a-z 0-9 . _ -")
    return value


OptionalPath = Annotated[Path, AfterValidator(beside_the_file)]
"""A path without a default; a relative one belongs to the directory of the configuration file."""
OptionalAddress = Annotated[Address, PlainValidator(_address)]
"""An `Address` without a default, written as its `parse` takes it; relative unix paths as in OptionalPath."""
# validate_default: a default path is relative to the file as well.
ConfigPath = Annotated[OptionalPath, Field(validate_default=True)]
"""As OptionalPath, the default included."""
AddressField = Annotated[OptionalAddress, Field(validate_default=True)]
"""As OptionalAddress, the default included."""
NameField = Annotated[str, AfterValidator(_name)]
"""A name of a relay, a gateway or a service (PROTOCOL.md, 5)."""


def load_settings(model: type[M], path: Path, *, prefix: str, environ: Mapping[str, str]) -> M:
    """`path` checked by `model`, after PREFIX__SECTION__KEY variables have replaced or added values.

    A number in a variable's name is the index in a list (FXGATEWAY__DOOR__0__LISTEN); one past its end adds an entry. A variable's
    value is read as TOML (`8`, `true`, `["a"]`) or, where that fails, as plain text.

    Raises:
        ConfigError: with every problem, each naming the file, the key, and the variable if one is to blame. Values may be secret and
            are not repeated, unless a field's own check does so.
    """
    data = _read(path)
    overlay = _Overlay(data, path)
    overlay.apply(prefix, environ)
    settings, errors = _check(model, data, path)
    # To TOML a relay id of 1234 is a number, but the field wanted text: give it what was written.
    if overlay.respell(error["loc"] for error in errors if error["type"] in _WANTED_TEXT):
        settings, errors = _check(model, data, path)
    problems = [*overlay.problems, *_problems(errors, model, data, overlay)]
    if problems or settings is None:
        raise ConfigError(problems)
    return settings


def _read(path: Path) -> dict[str, object]:
    try:
        # Some editors begin UTF-8 with a byte order mark; TOML 1.0 does not know it.
        return tomllib.loads(path.read_bytes().removeprefix(codecs.BOM_UTF8).decode())
    except FileNotFoundError as exc:
        raise ConfigError.one(path, "", "does not exist; name the configuration with --config, or see --help for how to begin") from exc
    except OSError as exc:
        raise ConfigError.one(path, "", f"cannot be read: {exc.strerror or exc}") from exc
    except UnicodeDecodeError as exc:
        raise ConfigError.one(path, "", f"is not UTF-8 text (byte {exc.start})") from exc
    except (ValueError, RecursionError) as exc:
        raise ConfigError.one(path, "", f"is not valid TOML: {exc}") from exc


def _check(model: type[M], data: dict[str, object], path: Path) -> tuple[M | None, list[ErrorDetails]]:
    try:
        return model.model_validate(data, context={"directory": path.absolute().parent}), []
    except ValidationError as exc:
        return None, exc.errors(include_url=False, include_context=False, include_input=False)


class _Overlay:
    """Lays environment variables over `data`, and remembers which value came from which."""

    def __init__(self, data: dict[str, object], path: Path) -> None:
        self._data = data
        self._path = path
        self._made: dict[_Loc, str] = {}
        self._tables: dict[_Loc, str] = {}
        """Tables and lists that the file does not have, by the first variable that wanted one."""
        self._texts: dict[_Loc, str] = {}
        self.problems: list[ConfigProblem] = []

    def apply(self, prefix: str, environ: Mapping[str, str]) -> None:
        """Take every variable that begins with `prefix` and two underscores, entries of a list in their order."""
        start = f"{prefix}__"
        found = {_loc(name.removeprefix(start)): name for name in environ if name.startswith(start)}
        for loc in sorted(found, key=lambda loc: [(isinstance(part, str), part) for part in loc]):
            name = found[loc]
            fresh = [loc[:end] for end in range(1, len(loc)) if not _is_there(self._data, loc[:end])]
            try:
                self._put(loc, _literal(environ[name]))
            except LookupError as exc:
                self.problems.append(self._problem(loc, exc.args[0], name))
            else:
                self._made[loc], self._texts[loc] = name, environ[name]
                self._tables |= dict.fromkeys(fresh, name)

    def respell(self, locs: Iterable[_Loc]) -> bool:
        """Put the plain text of these values, where they came from variables; whether there were any."""
        wanted = [loc for loc in locs if loc in self._made]
        for loc in wanted:
            self._put(loc, self._texts[loc])
        return bool(wanted)

    def problem(self, loc: _Loc, message: str) -> ConfigProblem:
        """A problem of the value at `loc`, blamed on the variable that made it, a value around it or the table there, else on the file."""
        blamed = next((self._made[loc[:end]] for end in range(len(loc), 0, -1) if loc[:end] in self._made), self._tables.get(loc, ""))
        return self._problem(loc, message, blamed)

    def _problem(self, loc: _Loc, message: str, variable: str) -> ConfigProblem:
        return ConfigProblem(str(self._path), dotted(loc), f"{message} (from {variable} in the environment)" if variable else message)

    def _put(self, loc: _Loc, value: object) -> None:
        if "" in loc:
            raise LookupError("expected PREFIX__SECTION__KEY with nothing left out")
        container: object = self._data
        for position, part in enumerate(loc):
            is_last = position == len(loc) - 1
            fresh: object = value if is_last else [] if isinstance(loc[position + 1], int) else {}
            if isinstance(container, dict):
                key = str(part)
                if is_last or key not in container:
                    container[key] = fresh
                container = container[key]
            elif isinstance(container, list) and isinstance(part, int) and part <= len(container):
                if part == len(container):
                    container.append(fresh)
                elif is_last:
                    container[part] = fresh
                container = container[part]
            else:
                raise LookupError(f"{dotted(loc[:position])} {_why_no_entry(container, part)}")


def _loc(name: str) -> _Loc:
    return tuple(int(part) if _PORT.fullmatch(part) else part.lower() for part in name.split("__"))


def _literal(text: str) -> object:
    try:
        read = tomllib.loads(f"value = {text}")
    except (ValueError, RecursionError):
        return text
    # More than one key: the text had a line break and went on.
    return read["value"] if len(read) == 1 else text


def _why_no_entry(container: object, part: _Part) -> str:
    if isinstance(container, list):
        return f"is a list of {len(container)}; expected a number up to {len(container)}, not {part}"
    return "is a single value; nothing can be below it"


def said_plainly(error: ErrorDetails) -> str:
    """What was expected, for a person who wrote a file: pydantic's text without its subject, its Python, and its attempts."""
    text = _PLAIN.get(error["type"]) or error["msg"].removeprefix("Value error, ")
    text = _SUBJECT.sub("must ", text)
    for long, short in _BOUNDS:
        text = text.replace(long, short)
    return text[:1].lower() + text[1:]


def dotted(loc: _Loc) -> str:
    """Where a value is, as a person writes it: door[0].listen."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in loc).removeprefix(".")


def _problems(errors: list[ErrorDetails], model: type[BaseModel], data: object, overlay: _Overlay) -> list[ConfigProblem]:
    """One problem for each place: the branches of a union complain separately, about the same value."""
    messages: dict[_Loc, list[str]] = {}
    places = [error["loc"] for error in errors]
    for error in errors:
        # Of a list with a bad entry pydantic says as well that it is too short without it.
        if error["type"] == "too_short" and any(place[: len(error["loc"])] == error["loc"] != place for place in places):
            continue
        loc = _within(data, error["loc"])
        message = _message(error, loc, model, data)
        if message not in messages.setdefault(loc, []):
            messages[loc].append(message)
    return [overlay.problem(loc, "; or ".join(found)) for loc, found in messages.items()]


def _within(data: object, loc: _Loc) -> _Loc:
    """`loc` without what pydantic appends for its own use: the names of union branches and validators."""
    for position, part in enumerate(loc):
        if not isinstance(data, dict | list):
            return loc[:position]
        data = _get(data, part)
    return loc


def _is_there(data: object, loc: _Loc) -> bool:
    for part in loc:
        data = _get(data, part)
    return data is not None


def _get(container: object, part: _Part) -> object:
    if isinstance(container, dict):
        return container.get(part)
    if isinstance(container, list) and isinstance(part, int) and part < len(container):
        return container[part]
    return None


def _message(error: ErrorDetails, loc: _Loc, model: type[BaseModel], data: object) -> str:
    if error["type"] == "missing":
        return "is required"
    if error["type"] == "extra_forbidden":
        return f"unknown key; {_known_keys(model, loc)}"
    message = said_plainly(error)
    if not error["type"].endswith(("_type", "_parsing")):
        return message
    for part in loc:
        data = _get(data, part)
    return f"{message}; found {_kind(data)}"


def _known_keys(model: type[BaseModel], loc: _Loc) -> str:
    """What could have been meant by a key that is unknown where it stands."""
    current: type[BaseModel] | None = model
    for part in loc[:-1]:
        if isinstance(part, str) and current is not None:
            current = next((_model_in(f.annotation) for name, f in current.model_fields.items() if (f.alias or name) == part), None)
    known = [field.alias or name for name, field in current.model_fields.items()] if current is not None else []
    close = difflib.get_close_matches(str(loc[-1]), known, n=1, cutoff=0.75)
    return f"did you mean {close[0]}?" if close else f"known here: {', '.join(known)}"


def _model_in(annotation: object) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for inner in typing.get_args(annotation) if (found := _model_in(inner))), None)


def _kind(value: object) -> str:
    names = {bool: "a boolean", int: "an integer", float: "a float", str: "a string", list: "an array", dict: "a table"}
    return names.get(type(value), f"a {type(value).__name__}")
