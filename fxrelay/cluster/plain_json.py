"""Pure: JSON from outside that every language reads alike: no NaN, no infinity, no halves of characters, not nested beyond reason."""

import json
import math
from typing import Any, Final

MAX_DEPTH: Final = 32
"""Levels of lists and objects. What is read here is written again deeper in the stack, where Python's own limit would hit."""


def read_json(text: str) -> Any:
    """The value of a JSON text.

    Raises:
        ValueError: it is none, or other programs would not read it (RFC 8259, 6 and 8.2); the text says why.
    """
    try:
        if not text.isascii():
            text.encode()
        value = _DECODER.decode(text)
        if "\\ud" in text or "\\uD" in text:
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as exc:
        raise ValueError("half of a UTF-16 pair stands alone") from exc
    except RecursionError as exc:
        raise ValueError(f"nested more than {MAX_DEPTH} levels deep") from exc
    if text.count("[") + text.count("{") > MAX_DEPTH:
        _check_depth(value)
    return value


def size_of(value: Any) -> int:
    """Bytes of a JSON value as server objects are measured. Raises ValueError for NaN and infinities."""
    return len(json.dumps(value, allow_nan=False))


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        level = [child for parent in level for child in _children(parent)]
        if not level:
            return
    raise ValueError(f"nested more than {MAX_DEPTH} levels deep")


def _children(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return list(value.values())
    return value if isinstance(value, list) else []


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")


def _finite(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ValueError(f"a number is too large: {text[:20]}")
    return value


_DECODER: Final = json.JSONDecoder(parse_constant=_no_constant, parse_float=_finite)
