"""docs/PROTOCOL.md and the code say the same: vectors, frame types and codes."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Final

import pytest

from fxtunnel.codes import Code, Refusal
from fxtunnel.model import RelayId, ServiceName
from fxtunnel.protocol import frames
from fxtunnel.protocol.opening import Opening, decode_open, encode_tags
from tests.protocol.recording import CollectingSink, parse

DOCUMENT: Final = (Path(__file__).parents[2] / "docs" / "PROTOCOL.md").read_text(encoding="utf-8")
Fields = dict[str, str]

SESSION_FRAMES: Final = {"ACK": "received", "PING": "opaque", "PONG": "opaque", "GOAWAY": "code"}
KINDS: Final = {
    "DATA": frames.DATA,
    "OPEN": frames.OPEN,
    "ACCEPT": frames.ACCEPT,
    "REFUSE": frames.REFUSE,
    "REDIRECT": frames.REDIRECT,
    "CREDIT": frames.CREDIT,
    "FIN": frames.FIN,
    "RESET": frames.RESET,
    "ACK": frames.ACK,
    "PING": frames.PING,
    "PONG": frames.PONG,
    "GOAWAY": frames.GOAWAY,
}
ENCODERS: Final[dict[str, Callable[[int, Fields], bytes]]] = {
    "DATA": lambda stream, f: frames.encode(frames.DATA, stream, bytes.fromhex(f["payload"])),
    "OPEN": lambda stream, f: frames.encode_open(stream, int(f["window"]), _vector_tags(f)),
    "ACCEPT": lambda stream, f: frames.encode_accept(stream, int(f["window"])),
    "REFUSE": lambda stream, f: frames.encode_refuse(stream, Code(int(f["code"])), f["text"]),
    "REDIRECT": lambda stream, f: frames.encode(frames.REDIRECT, stream, f["relay"].encode()),
    "CREDIT": lambda stream, f: frames.encode_credit(stream, int(f["bytes"])),
    "FIN": lambda stream, f: frames.encode_fin(stream),
    "RESET": lambda stream, f: frames.encode_reset(stream, Code(int(f["code"]))),
    "ACK": lambda _, f: frames.encode_u64(frames.ACK, int(f["received"])),
    "PING": lambda _, f: frames.encode_u64(frames.PING, int(f["opaque"])),
    "PONG": lambda _, f: frames.encode_u64(frames.PONG, int(f["opaque"])),
    "GOAWAY": lambda _, f: frames.encode_goaway(Code(int(f["code"])), f["text"]),
}


def _vector_tags(fields: Fields) -> bytes:
    via = RelayId(fields["via"]) if "via" in fields else None
    avoid = tuple(map(RelayId, fields["not"].split(","))) if "not" in fields else ()
    node = RelayId(fields["node"]) if "node" in fields else None
    others = {name: fields.get(name, "") for name in ("client", "door", "trace", "host", "scheme", "ticket")}
    return encode_tags(Opening(ServiceName(fields["service"]), via=via, avoid=avoid, node=node, **others))


def _section(number: int) -> str:
    found = re.search(rf"^## {number}\. .*?(?=^## |\Z)", DOCUMENT, re.MULTILINE | re.DOTALL)
    assert found is not None, f"PROTOCOL.md has no section {number}"
    return found[0]


def _vectors() -> list[str]:
    block = re.search(r"^```vectors\n(.*?)^```", _section(10), re.MULTILINE | re.DOTALL)
    return block[1].splitlines() if block else []


def _read(line: str) -> tuple[str, int, Fields, bytes]:
    """Name, stream id, named fields and the bytes of one vector."""
    text, _, raw = line.rpartition(" = ")
    name, *words = text.split()
    stream = 0 if name in SESSION_FRAMES else int(words.pop(0))
    if name == "DATA":
        words = [f"payload={words[0]}"]
    return name, stream, dict(word.split("=", 1) for word in words), bytes.fromhex(raw)


def test_every_frame_type_has_a_vector() -> None:
    assert {_read(line)[0] for line in _vectors()} == set(KINDS)


@pytest.mark.parametrize("line", _vectors())
def test_vector_encodes(line: str) -> None:
    name, stream, fields, raw = _read(line)
    assert ENCODERS[name](stream, fields).hex() == raw.hex()


@pytest.mark.parametrize("line", _vectors())
def test_vector_decodes(line: str) -> None:
    name, stream, fields, raw = _read(line)
    kind, parsed_stream, payload = parse(raw)
    assert (kind, parsed_stream) == (KINDS[name], stream)
    assert _decoded(name, payload) == fields


@pytest.mark.parametrize("line", _vectors())
def test_vector_cut_anywhere_is_not_yet_a_frame(line: str) -> None:
    *_, raw = _read(line)
    for cut in range(len(raw)):
        sink = CollectingSink()
        sink.feed(raw[:cut])
        assert not sink.whole_frames()


def _decoded(name: str, payload: bytes) -> Fields:
    if name == "DATA":
        return {"payload": payload.hex()}
    if name == "OPEN":
        window, opening = decode_open(payload)
        tags = {"service": opening.service, "client": opening.client, "door": opening.door}
        tags |= {"via": opening.via or "", "not": ",".join(opening.avoid), "node": opening.node or ""}
        tags |= {"trace": opening.trace, "host": opening.host, "scheme": opening.scheme, "ticket": opening.ticket}
        return {"window": str(window)} | {tag: value for tag, value in tags.items() if value}
    if name in ("REFUSE", "GOAWAY"):
        return {"code": str(frames.decode_u16(payload)), "text": frames.decode_text(payload)}
    if name == "RESET":
        return {"code": str(frames.decode_u16(payload))}
    if name == "REDIRECT":
        return {"relay": payload.decode("ascii")}
    if name in ("ACCEPT", "CREDIT"):
        return {"window" if name == "ACCEPT" else "bytes": str(frames.decode_u32(payload))}
    if name == "FIN":
        return {}
    return {SESSION_FRAMES[name]: str(frames.decode_u64(payload))}


def test_frame_types_are_those_of_the_document() -> None:
    table = re.findall(r"^\| (0x[0-9a-f]{2}) \| ([A-Z]+) \| (id|0) \|", _section(5), re.MULTILINE)
    assert {name: int(number, 16) for number, name, _ in table} == KINDS
    assert {name for _, name, stream in table if stream == "0"} == set(SESSION_FRAMES)


def test_codes_are_those_of_the_document() -> None:
    table = re.findall(r"^\| (\d+) \| ([a-z-]+) \|", _section(8), re.MULTILINE)
    assert {int(number): name for number, name in table} == {int(code): code.label for code in Code}


def test_http_errors_are_those_of_the_document() -> None:
    rows = re.findall(r"^\| ([a-z, -]+) \| (\d{3}) \| (yes|no)", _section(8), re.MULTILINE)
    documented = {name: (int(status), final == "yes") for names, status, final in rows for name in names.split(", ")}
    assert documented
    assert documented == {name: (Refusal(name).status, Refusal(name).is_final) for name in documented}
    assert {refusal.value for refusal in Refusal if refusal.is_final} <= set(documented)
