"""Pure: texts for another process, each sent once: most of a thousand server objects are the same as a moment ago.

    kept u32 | count u32 | count × place u32 | the texts from place `kept` on, joined by U+001E

`kept` is how many texts the other end has from before; 0 begins anew. Native byte order: both ends are on one machine.
"""

import struct
from array import array
from collections.abc import Sequence
from itertools import islice
from typing import Final

_HEAD: Final = struct.Struct("=II")
_SEPARATOR: Final = "\x1e"  # RFC 7464: no JSON text holds it
_PLACE_BYTES: Final = 4
_KEPT_PER_TEXT: Final = 2
_KEPT_BESIDES: Final = 1_000
"""Both ends keep twice what one call needs, and so many besides; then they begin anew. What is outdated must not fill their memory."""


class SentTexts:
    """The sender's end, for one receiver."""

    def __init__(self) -> None:
        self._places: dict[str, int] = {}

    def pack(self, texts: Sequence[str]) -> bytes:
        """These texts for the receiver, which must get everything that is packed."""
        places = self._places
        if len(places) > _KEPT_PER_TEXT * len(texts) + _KEPT_BESIDES:
            places.clear()
        kept = len(places)
        wanted = array("I", [places.setdefault(text, len(places)) for text in texts])
        fresh = list(islice(reversed(places), len(places) - kept))
        fresh.reverse()
        return _HEAD.pack(kept, len(wanted)) + wanted.tobytes() + _SEPARATOR.join(fresh).encode()


class ReceivedTexts:
    """The receiver's end."""

    def __init__(self) -> None:
        self._kept: list[str] = []

    def unpack(self, packed: bytes) -> tuple[str, ...]:
        """The texts.

        Raises:
            ValueError: what was packed before this did not come here.
        """
        kept, count = _HEAD.unpack_from(packed)
        end = _HEAD.size + count * _PLACE_BYTES
        places = array("I", packed[_HEAD.size : end])
        if not kept:
            self._kept.clear()
        elif kept != len(self._kept):
            raise ValueError(f"{len(self._kept)} texts are kept, not {kept}")
        if len(packed) > end:
            self._kept += packed[end:].decode().split(_SEPARATOR)
        return tuple([self._kept[place] for place in places])
