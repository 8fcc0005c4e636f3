"""Task: what administrators say about this node: static data from relay.toml and a JSON file, metadata from files and the environment."""

import datetime
import logging
import os
import re
import stat
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Final

from fxrelay.cluster.plain_json import read_json, size_of
from fxrelay.cluster.server import MAX_STATIC_BYTES
from fxrelay.cluster.settings import NodeSection
from fxtunnel.errors import ConfigError

logger = logging.getLogger(__name__)

MAX_METADATA_BYTES: Final = 8_192
MAX_FILE_BYTES: Final = 65_536
PREFIX: Final = "METADATA_"
CONFIG_DIR: Final = "FX_CONFIG_DIR"
_LARGEST: Final = 1 << 53
"""Whole numbers beyond it are not exact in JavaScript: they stay text."""
_NUMBER: Final = re.compile(r"-?(0|[1-9]\d*)(\.\d+)?([eE][+-]?\d+)?", re.ASCII)
_LINE: Final = re.compile(r"(?:export\s+)?([A-Za-z_][A-Za-z0-9_]*)\s*=\s*(.*)", re.ASCII)
_SINGLE: Final = re.compile(r"'([^']*)'\s*(?:#.*)?")
_DOUBLE: Final = re.compile(r'"((?:[^"\\]|\\.)*)"\s*(?:#.*)?')
_ESCAPE: Final = re.compile(r"\\(.)")
_ESCAPED: Final = {"n": "\n", "r": "\r", "t": "\t"}


def parse_dotenv(text: str) -> tuple[dict[str, str], list[str]]:
    """The variables of NAME=value lines, and what is wrong with which line; such lines are left out.

    Values may stand in quotes: within '…' everything is as written, within "…" \\n, \\r and \\t mean what they do in C, and any other
    character behind a backslash means itself. Without quotes a value ends before ` #`. Nothing is expanded, and no value goes on in
    the next line.
    """
    variables: dict[str, str] = {}
    problems: list[str] = []
    for number, line in enumerate(text.removeprefix("\ufeff").splitlines(), 1):
        stripped = line.strip()
        if not stripped or stripped.startswith("#"):
            continue
        match = _LINE.fullmatch(stripped)
        value = _unquoted(match[2]) if match is not None else None
        if match is None:
            problems.append(f"line {number}: expected NAME=value")
        elif value is None:
            problems.append(f"line {number}: a quote does not end, or something follows it")
        else:
            variables[match[1]] = value
    return variables, problems


def _unquoted(text: str) -> str | None:
    if text.startswith("'"):
        match = _SINGLE.fullmatch(text)
        return match[1] if match is not None else None
    if text.startswith('"'):
        match = _DOUBLE.fullmatch(text)
        return _ESCAPE.sub(lambda found: _ESCAPED.get(found[1], found[1]), match[1]) if match is not None else None
    return re.split(r"(?:^|\s)#", text, maxsplit=1)[0].rstrip()


def metadata_of(variables: Mapping[str, str]) -> dict[str, Any]:
    """The metadata in METADATA_NAME variables: each under NAME as written, and in lower case unless a variable is called so itself."""
    found = {name.removeprefix(PREFIX): coerced(variables[name]) for name in sorted(variables) if name.startswith(PREFIX)}
    found.pop("", None)
    aliases: dict[str, Any] = {}
    for name, value in found.items():
        aliases.setdefault(name.lower(), value)
    return aliases | found


def coerced(text: str) -> str | bool | int | float:
    """`true`, `false` (in any case) and numbers as JSON writes them are no text. `007`, `0x10` and numbers too large to be exact are."""
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    match = _NUMBER.fullmatch(text)
    if match is None or len(text) > 32:
        return text
    if match[2] is None and match[3] is None:
        return int(text) if abs(int(text)) <= _LARGEST else text
    number = float(text)
    return number if abs(number) <= _LARGEST else text


def site_environment(section: NodeSection, environ: Mapping[str, str]) -> dict[str, str]:
    """The variables of the fastx.env files, under those of `environ`. Lines that are none are left out: `StaticData` tells of them. Blocks.

    Raises:
        ConfigError: a file cannot be read.
    """
    variables: dict[str, str] = {}
    for path in _environment_files(section, environ):
        try:
            variables |= parse_dotenv(_read_text(path))[0]
        except (OSError, ValueError) as exc:
            reason = exc.strerror if isinstance(exc, OSError) and exc.strerror else str(exc)
            raise ConfigError.one(path, "", reason) from exc
    return variables | dict(environ)


def _environment_files(section: NodeSection, environ: Mapping[str, str]) -> tuple[Path, ...]:
    directory = environ.get(CONFIG_DIR)
    return (*([Path(directory, "fastx.env")] if directory else []), section.environment_file)


class StaticData:
    """Reads static data and metadata anew for every update. For one thread at a time; blocks.

    `problems` says what was wrong at the last reading; each is logged when it is new. A source that is wrong counts as it was before.
    `section` may be replaced at any time.
    """

    def __init__(self, section: NodeSection, environ: Mapping[str, str]) -> None:
        self.section = section
        self._environ = environ
        self._last: dict[str, dict[str, Any]] = {}
        self._found: list[str] = []
        self.problems: tuple[str, ...] = ()

    def read(self) -> dict[str, Any]:
        """The fields `staticData` and `metadata`. Never fails."""
        self._found = []
        fields = {"staticData": self._static_data(), "metadata": self._metadata()}
        for problem in self._found:
            if problem not in self.problems:
                logger.warning("%s", problem)
        self.problems = tuple(self._found)
        return fields

    def _static_data(self) -> dict[str, Any]:
        written = {key: plain for key, value in self.section.static_data.items() if (plain := self._plain(key, value)) is not None}
        path = self.section.static_data_file
        merged = written | self._good(str(path), partial(_read_object, path))
        return self._good("static data", partial(_bounded, merged, MAX_STATIC_BYTES))

    def _metadata(self) -> dict[str, Any]:
        variables: dict[str, str] = {}
        for path in _environment_files(self.section, self._environ):
            variables |= self._good(str(path), partial(self._read_variables, path))
        metadata = metadata_of(variables | dict(self._environ))
        return self._good("metadata", partial(_bounded, metadata, MAX_METADATA_BYTES))

    def _read_variables(self, path: Path) -> dict[str, str]:
        variables, problems = parse_dotenv(_read_text(path))
        self._found += [f"{path}: {problem}" for problem in problems]
        return variables

    def _plain(self, key: str, value: Any) -> Any:
        try:
            plain = _without_dates(value)
            size_of(plain)
        except ValueError as exc:
            self._found.append(f"node.static_data.{key} is left out: {exc}")
            return None
        return plain

    def _good(self, source: str, read: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What `read` returns or, while it fails, what it returned last."""
        try:
            self._last[source] = read()
        except (OSError, ValueError) as exc:
            reason = exc.strerror if isinstance(exc, OSError) and exc.strerror else str(exc)
            self._found.append(f"{source}: {reason}; what it said before stays")
        return self._last.get(source, {})


def _read_text(path: Path) -> str:
    """Empty for a file that is not there. Raises OSError and ValueError."""
    try:
        # O_NONBLOCK: a FIFO under that name must not hang the update.
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        return ""
    with os.fdopen(fd, "rb") as file:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise ValueError("is not a regular file")
        data = file.read(MAX_FILE_BYTES + 1)
    if len(data) > MAX_FILE_BYTES:
        raise ValueError(f"is larger than {MAX_FILE_BYTES} bytes")
    try:
        return data.decode()
    except UnicodeDecodeError as exc:
        raise ValueError(f"is not UTF-8 text (byte {exc.start})") from exc


def _read_object(path: Path) -> dict[str, Any]:
    text = _read_text(path)
    if not text and not path.exists():
        return {}
    try:
        found = read_json(text)
    except ValueError as exc:
        raise ValueError(f"is no JSON: {exc}") from exc
    if not isinstance(found, dict):
        raise ValueError("is no JSON object")
    return found


def _bounded(values: dict[str, Any], limit_bytes: int) -> dict[str, Any]:
    if size_of(values) > limit_bytes:
        raise ValueError(f"is longer than {limit_bytes} bytes as JSON")
    return values


def _without_dates(value: Any) -> Any:
    """TOML knows dates and times, JSON does not: they become text (RFC 3339)."""
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, dict):
        return {key: _without_dates(inner) for key, inner in value.items()}
    return [_without_dates(inner) for inner in value] if isinstance(value, list) else value
