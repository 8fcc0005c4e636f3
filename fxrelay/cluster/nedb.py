"""Pure: FastX's store files (NeDB): one JSON object a line, the last line of an `_id` wins, `{"_id":…,"$$deleted":true}` removes it.

Other lines with `$$` keys are about indexes and are ignored. Dates are `{"$$date": ms}` and stay so.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from fxrelay.cluster.content import encode_key, encode_text
from fxtunnel.errors import StoreError

ID: Final = "_id"
DELETED: Final = "$$deleted"


@dataclass(slots=True)
class Content:
    """What a file says: documents by `_id`, and the `_id`s of those that were removed."""

    documents: dict[str, dict[str, Any]] = field(default_factory=dict)
    deleted: set[str] = field(default_factory=set)


@dataclass(frozen=True, slots=True)
class BrokenLine:
    """A line that cannot be understood. `number` counts from 1."""

    number: int
    message: str


def parse(data: bytes) -> tuple[Content, list[BrokenLine]]:
    """The content of a file, and every line that is broken."""
    content = Content()
    broken = []
    for number, line in enumerate(data.split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            _take(line, content)
        except (ValueError, StoreError) as exc:
            broken.append(BrokenLine(number, str(exc)))
        except RecursionError:
            broken.append(BrokenLine(number, "is nested too deeply"))
    return content, broken


def encode(content: Content) -> bytes:
    """A file with this content, each `_id` once, in order."""
    lines = [compact({ID: key, **document}) for key, document in sorted(content.documents.items())]
    lines += [compact({ID: key, DELETED: True}) for key in sorted(content.deleted)]
    return "".join(f"{line}\n" for line in lines).encode()


def compact(document: Mapping[str, Any]) -> str:
    """JSON on one line. Raises ValueError: it holds a number JSON cannot write."""
    return json.dumps(document, ensure_ascii=False, separators=(",", ":"), allow_nan=False)


def from_store(key: str, text: str) -> dict[str, Any] | None:
    """A stored document as a line of a file can hold it, with its `_id`; None if none can."""
    try:
        found = json.loads(text, parse_constant=_no_constant)
        if not isinstance(found, dict) or has_reserved(found):
            return None
        document = {**found, ID: key}
        encode_text(compact(document))
    except (ValueError, RecursionError, StoreError):
        return None
    return document


def has_reserved(keys: Iterable[str]) -> bool:
    """Whether one of the keys means something to NeDB."""
    return any(key.startswith("$$") for key in keys)


def _take(line: bytes, content: Content) -> None:
    found = _object(line)
    if has_reserved(found) and DELETED not in found:
        return
    key = found.get(ID)
    if not isinstance(key, str):
        raise ValueError("has no _id, or one that is no text")
    encode_key(key)
    if found.get(DELETED) is True:
        content.documents.pop(key, None)
        content.deleted.add(key)
    elif has_reserved(found):
        raise ValueError(f"{DELETED} must be true")
    else:
        encode_text(compact(found))
        content.documents[key] = found
        content.deleted.discard(key)


def _object(line: bytes) -> dict[str, Any]:
    try:
        found = json.loads(line.decode(), parse_constant=_no_constant)
    except UnicodeDecodeError:
        raise ValueError("is not UTF-8 text") from None
    except json.JSONDecodeError as exc:
        raise ValueError(f"is not JSON: {exc.msg} at character {exc.pos + 1}") from None
    if not isinstance(found, dict):
        raise ValueError("is not a JSON object")
    return found


def _no_constant(name: str) -> None:
    raise ValueError(f"holds {name}, which is no JSON")
