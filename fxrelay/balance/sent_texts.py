"""Pure: lists of texts for another process, each text sent once: most of a thousand server objects are the same as a moment ago.

    kept u32 | list u32 | edits u32 | count u32 | pick u32 | picked u32
    edits × (op u32, at u32, place u32) | count × place u32 | picked × at u32 | the texts from place `kept` on

The texts are joined by U+001E. `kept` is how many of them the other end has from before; 0 begins anew. `list` is the number of a list that
the other end keeps: `edits` are what has changed in it since it was sent; with WHOLE in their stead come the places of all its texts.
Meant are some of the list, by `pick`. Native byte order: both ends are on one machine.
"""

import struct
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Final

from fxrelay.balance.candidates import ALL, CandidateList, CandidateSubset, Edit, Op, Pick, Picked

PASSING: Final = 0
"""The number of lists that nobody keeps: each comes whole."""
MAX_LISTS: Final = 16
"""Lists kept, one for each pool, action and gateway; with more, all are sent again."""
WHOLE: Final = 0xFFFF_FFFF
_HEAD: Final = struct.Struct("=IIIIII")
_SEPARATOR: Final = "\x1e"  # RFC 7464: no JSON text holds it
_NUMBER_BYTES: Final = 4
_EDIT_NUMBERS: Final = 3
_KEPT_PER_TEXT: Final = 2
_KEPT_BESIDES: Final = 1_000
"""Both ends keep twice what one call needs, and so many besides; then they begin anew. What is outdated must not fill their memory."""


@dataclass(frozen=True, slots=True)
class Listed:
    """A list that came, and how: `edits` is what made its texts of those of its turn before; None: they came whole. Meant are those
    that are `picked`.
    """

    texts: Sequence[str]
    number: int
    turn: int
    edits: Sequence[Edit] | None
    picked: Picked = ALL

    def meant(self) -> list[str]:
        """The texts that are meant, in their order."""
        texts, places = self.texts, self.picked.places
        if self.picked.pick is Pick.ONLY:
            return [texts[place] for place in places]
        left = list(texts)
        for place in reversed(places):
            del left[place]
        return left


class SentTexts:
    """The sender's end, for one receiver, which must get everything that is packed."""

    def __init__(self) -> None:
        self._places: dict[str, int] = {}
        self._lists: dict[object, tuple[int, int]] = {}

    def pack(self, texts: Sequence[str]) -> bytes:
        """These texts for the receiver."""
        return self._pack((PASSING, None, ALL), texts, len(texts))

    def pack_offered(self, wanted: CandidateList | CandidateSubset) -> bytes:
        """The texts of the candidates: of a list that the receiver has from before only what has changed, and which of it are meant."""
        if isinstance(wanted, CandidateSubset) and not wanted.is_current:
            return self.pack([candidate.server.text for candidate in wanted])
        offered, picked = (wanted.offered, wanted.picked) if isinstance(wanted, CandidateSubset) else (wanted, ALL)
        known = self._lists.get(offered.key)
        if known is None and len(self._lists) >= MAX_LISTS:
            self._lists.clear()
        number, mark = known or (len(self._lists) + 1, 0)
        edits = offered.since(mark) if known is not None else None
        self._lists[offered.key] = (number, offered.mark)
        if edits is None:
            return self._pack((number, None, picked), [candidate.server.text for candidate in offered], len(offered))
        return self._pack((number, edits, picked), [edit.text for edit in edits if edit.op is not Op.LEAVE], len(offered))

    def _pack(self, how: tuple[int, Sequence[Edit] | None, Picked], texts: Sequence[str], length: int) -> bytes:
        number, edits, picked = how
        places = self._places
        if len(places) > _KEPT_PER_TEXT * length + _KEPT_BESIDES:
            places.clear()
        kept = len(places)
        wanted = array("I", [places.setdefault(text, len(places)) for text in texts])
        tail = (picked.pick, len(picked.places))
        if edits is None:
            head = _HEAD.pack(kept, number, WHOLE, len(wanted), *tail)
        else:
            head = _HEAD.pack(kept, number, len(edits), 0, *tail)
            wanted = array("I", [each for edit in edits for each in (edit.op, edit.at, places.get(edit.text, 0))])
        wanted.extend(picked.places)
        fresh = list(islice(reversed(places), len(places) - kept))
        fresh.reverse()
        return head + wanted.tobytes() + _SEPARATOR.join(fresh).encode()


class ReceivedTexts:
    """The receiver's end."""

    def __init__(self) -> None:
        self._kept: list[str] = []
        self._lists: dict[int, list[str]] = {}
        self._turns: dict[int, int] = {}

    def unpack(self, packed: bytes) -> Listed:
        """The list; it stays as it is until the next call.

        Raises:
            ValueError: what was packed before this did not come here.
        """
        kept, number, edits, count, pick, some = _HEAD.unpack_from(packed)
        length = count if edits == WHOLE else edits * _EDIT_NUMBERS
        end = _HEAD.size + (length + some) * _NUMBER_BYTES
        numbers = array("I", packed[_HEAD.size : end])
        if not kept:
            self._kept.clear()
        elif kept != len(self._kept):
            raise ValueError(f"{len(self._kept)} texts are kept, not {kept}")
        if len(packed) > end:
            self._kept += packed[end:].decode().split(_SEPARATOR)
        picked = Picked(Pick(pick), numbers[length:])
        self._turns[number] = turn = self._turns.get(number, 0) + 1
        if edits == WHOLE:
            texts = self._lists[number] = [self._kept[place] for place in numbers[:length]]
            return Listed(texts, number, turn, None, picked)
        texts = self._lists[number]
        done = [self._edit(texts, *numbers[at : at + _EDIT_NUMBERS]) for at in range(0, length, _EDIT_NUMBERS)]
        return Listed(texts, number, turn, done, picked)

    def _edit(self, texts: list[str], op: int, at: int, place: int) -> Edit:
        match op:
            case Op.CHANGE:
                texts[at] = self._kept[place]
            case Op.ENTER:
                texts.insert(at, self._kept[place])
            case _:
                del texts[at]
                return Edit(Op.LEAVE, at)
        return Edit(Op(op), at, texts[at])
