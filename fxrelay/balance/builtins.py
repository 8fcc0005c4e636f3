"""Pure: the built-in balancing entries. Each picks one of the candidates; only `user_hash` looks at who is asking.

Candidates come in order of id. Load-based entries count placements on their way (`load_sessions`) and break ties by id, so every relay
that knows the same decides the same.
"""

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from operator import attrgetter
from typing import Final

from fxrelay.balance.candidates import CandidateList, Rank
from fxrelay.balance.model import Candidate, Chosen, Passed, Request, Verdict
from fxtunnel.model import RelayId

Choose = Callable[[Request, Sequence[Candidate], RelayId], Verdict]

PLACEMENT_BYTES: Final = 1 << 30
"""What a session on its way is expected to take: most-available-memory subtracts it for each, until the server has measured it."""
PACK_LOAD: Final = 0.8
"""`pack` fills a server up to this share of its maxSessions or, where there is none, of its memory."""
_SESSIONS: Final[Rank] = attrgetter("load_sessions")


def fewest_sessions(request: Request, candidates: Sequence[Candidate], local_id: RelayId) -> Verdict:
    """The server with the fewest sessions."""
    return _ranked(candidates, _SESSIONS)


def most_available_memory(request: Request, candidates: Sequence[Candidate], local_id: RelayId) -> Verdict:
    """The server with the most memory left, counting what is promised to sessions on their way."""
    return _ranked(candidates, _promised)


def weighted_least(request: Request, candidates: Sequence[Candidate], local_id: RelayId) -> Verdict:
    """The server that would have the fewest sessions for its weight. Weight 0 takes none."""
    return _ranked(candidates, _weighted)


def user_hash(request: Request, candidates: Sequence[Candidate], local_id: RelayId) -> Verdict:
    """The same server for the same user, as long as it is there; when servers come or go, few users move.

    Source: rendezvous hashing (Thaler and Ravishankar, "A Name-Based Mapping Scheme for Rendezvous", 1996).
    """
    user = request.user.encode()
    return _least(candidates, lambda candidate: hashlib.blake2b(user + b"\0" + candidate.server_id.encode(), digest_size=8).digest())


def local(request: Request, candidates: Sequence[Candidate], local_id: RelayId) -> Verdict:
    """This node, if it is among them; otherwise no opinion."""
    return Chosen(local_id) if any(candidate.server_id == local_id for candidate in candidates) else Passed()


def pack(request: Request, candidates: Sequence[Candidate], local_id: RelayId) -> Verdict:
    """The fullest server that still has room, so that others stay empty; the least full one when none has."""
    roomy = [candidate for candidate in candidates if _fullness(candidate) < PACK_LOAD]
    if roomy:
        return _least(roomy, lambda candidate: -_fullness(candidate))
    return _least(candidates, _fullness)


def round_robin(candidates: Sequence[Candidate], number: int) -> Verdict:
    """One after the other in order of id; `number` is the cluster's counter."""
    return Chosen(candidates[(number - 1) % len(candidates)].server_id) if candidates else Passed()


BUILTINS: Final[Mapping[str, Choose]] = {
    "fewest-sessions": fewest_sessions,
    "most-available-memory": most_available_memory,
    "weighted-least": weighted_least,
    "user-hash": user_hash,
    "local": local,
    "pack": pack,
}
ROUND_ROBIN: Final = "round-robin"
NAMES: Final = (*BUILTINS, ROUND_ROBIN)


def _least(candidates: Sequence[Candidate], key: Callable[[Candidate], int | float | bytes]) -> Verdict:
    best = min(candidates, key=key, default=None)
    return Chosen(best.server_id) if best is not None else Passed()


def _ranked(candidates: Sequence[Candidate], rank: Rank) -> Verdict:
    best = candidates.least(rank) if isinstance(candidates, CandidateList) else min(candidates, key=rank, default=None)
    return Chosen(best.server_id) if best is not None and rank(best) != math.inf else Passed()


def _promised(candidate: Candidate) -> int:
    return candidate.in_flight * PLACEMENT_BYTES - candidate.server.available_bytes


def _weighted(candidate: Candidate) -> float:
    return (candidate.load_sessions + 1) / candidate.server.weight if candidate.server.weight > 0 else math.inf


def _fullness(candidate: Candidate) -> float:
    server = candidate.server
    if server.max_sessions:
        return candidate.load_sessions / server.max_sessions
    if server.total_bytes:
        left = server.available_bytes - candidate.in_flight * PLACEMENT_BYTES
        return 1 - max(left, 0) / server.total_bytes
    return 0.0
