"""Pure: plans: what a request's fields lead to, so that the next request with such fields is not judged again.

Two requests of one client differ in their path and in a value or two: a trace, a time, the page they come from. Most values go on to
the service as they are. So a plan holds for all heads that differ from its own in such values only. New values are shown to h11, as all
others were.
"""

from dataclasses import dataclass, replace
from typing import Final

from fxrelay.web.access import RequestRecord
from fxrelay.web.forwarding import free_fields
from fxrelay.web.heads import BadHead, RequestHead, are_fields, parse_request
from fxrelay.web.judging import Asked, Judge
from fxtunnel.kit.answers import Refused
from fxtunnel.model import RelayId

_GAP: Final = b"\0"
"""Stands for a value in a head for the service: h11 lets no other through."""


@dataclass(frozen=True, slots=True)
class Template:
    """A plan's `tail`, with its free values to be filled in."""

    lines: tuple[bytes, ...]
    """The client's field lines."""
    gaps: dict[int, tuple[bytes, int]]
    """Which of them may have another value: the line up to its colon, and where in `pieces` the value stands."""
    pieces: tuple[bytes, ...]

    def tail_of(self, block: bytes) -> bytes | None:
        """The tail for a head with these field lines; None unless they differ from the plan's in free values only, all of them sound."""
        lines = block.split(b"\r\n")
        if len(lines) != len(self.lines):
            return None
        changed = []
        pieces = list(self.pieces)
        for place, (line, known) in enumerate(zip(lines, self.lines, strict=True)):
            if line != known:
                gap = self.gaps.get(place)
                if gap is None or not line.startswith(gap[0]):
                    return None
                name, at = gap
                pieces[at] = value = line[len(name) :].strip(b" \t")
                changed.append((name[:-1], value))
        return b"".join(pieces) if are_fields(changed) else None


@dataclass(frozen=True, slots=True)
class Plan:
    """What is the same for all simple requests with equal header fields. `tail` is what the service gets after the request line."""

    head: RequestHead
    host: str
    tail: bytes
    node: RelayId | None
    keeps_alive: bool
    template: Template | None


def plan_for(raw: bytes, judge: Judge, visit: RequestRecord, *, is_pool: bool) -> Plan | None:
    """What is the same for all requests with the header fields of this one; None if they need a task."""
    try:
        head = parse_request(raw)
        asked = judge.judge(head, visit)
    except (BadHead, Refused):
        return None
    node = asked.wish.must or asked.wish.may
    if head.has_body or asked.onward.upgrade or (node is None and is_pool):
        return None
    wire = judge.wire(asked)
    template = _template(raw, judge, asked)
    return Plan(head, asked.target.host, wire[wire.index(b"\r\n") :], node, head.keeps_alive, template)


def _template(raw: bytes, judge: Judge, asked: Asked) -> Template | None:
    head, free = asked.head, free_fields(asked.head)
    fields = list(head.fields)
    for place in free:
        fields[place] = fields[place]._replace(value=_GAP)
    wire = judge.wire(replace(asked, head=replace(head, fields=tuple(fields))))
    around = wire[wire.index(b"\r\n") :].split(_GAP)
    if not free or len(around) != len(free) + 1:
        return None
    pieces, gaps = [around[0]], {}
    for place, after in zip(free, around[1:], strict=True):
        gaps[place] = head.fields[place].raw + b":", len(pieces)
        pieces += [head.fields[place].value, after]
    return Template(tuple(raw.split(b"\r\n")[1:]), gaps, tuple(pieces))
