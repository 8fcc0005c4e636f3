"""Pure: what a script's return value means. JavaScript decides by truthiness, and its truthiness is not Python's (an empty array is true).

| returned | meaning |
|---|---|
| non-empty string, "0" too | this server; it must be one of those the entry was asked about |
| array, the empty one too | the next entry chooses among these, in this order; unknown ids are an error |
| nothing, null, 0, NaN, "", false | no opinion: the next entry gets what this one got |
| anything else | an error |

Source: the clustering guide, "The Return Value": String, Array, Falsy Value.
"""

from collections.abc import Container, Mapping, Sequence
from typing import Any, Final

from fxrelay.balance.model import Chosen, Failed, Narrowed, Passed, Verdict
from fxtunnel.model import RelayId

UNKNOWN_SERVER: Final = "UnknownServer"
BAD_RETURN: Final = "BadReturn"
NO_SERVER_SELECTED: Final = "NoServerSelected"
_SHOWN: Final = 80


def verdict_of(value: Any, known: Container[RelayId]) -> Verdict:
    """The verdict for a returned JSON value; `known` are the ids the entry was asked about. In an array a server is given as an object
    with `serverId`, as it was passed in, or by its id alone.
    """
    if isinstance(value, str):
        return _chosen(value, known) if value else Passed()
    if isinstance(value, list):
        return _narrowed(value, known)
    if value is None or value is False or (isinstance(value, int | float) and (value == 0 or value != value)):
        return Passed()
    # Script processes hand on the kind of what is no answer, not the thing itself.
    got = value["type"] if isinstance(value, Mapping) and value.keys() == {"type"} else _shown(value)
    return Failed(BAD_RETURN, f"expected a server id, a list of servers or nothing, got {got}")


def verdict_of_output(text: str, known: Container[RelayId]) -> Verdict:
    """The verdict for what a FastX 4 executable printed: one line with a node id. Nothing at all is an error there."""
    lines = text.strip().splitlines()
    if len(lines) != 1:
        return Failed(BAD_RETURN, f"expected one line with a node id on stdout, got {len(lines)} lines")
    return _chosen(lines[0].strip(), known)


def _chosen(server_id: str, known: Container[RelayId]) -> Verdict:
    if RelayId(server_id) in known:
        return Chosen(RelayId(server_id))
    return Failed(UNKNOWN_SERVER, f"{_shown(server_id)} is not one of the servers that were offered")


def _narrowed(entries: Sequence[Any], known: Container[RelayId]) -> Verdict:
    found: dict[RelayId, None] = {}
    for entry in entries:
        server_id = entry.get("serverId") if isinstance(entry, Mapping) else entry
        if not isinstance(server_id, str) or RelayId(server_id) not in known:
            return Failed(UNKNOWN_SERVER, f"the list has {_shown(server_id)}, which is not one of the servers that were offered")
        found[RelayId(server_id)] = None
    return Narrowed(tuple(found))


def _shown(value: Any) -> str:
    text = ascii(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
