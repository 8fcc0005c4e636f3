"""Port: what status pages and metrics say about one session."""

from dataclasses import dataclass

from fxtunnel.engine.ports import SessionStatistics, State


@dataclass(frozen=True, slots=True)
class LinkStatus:
    """One session and the data link under it. `rtt_ms` is None until a probe has come back."""

    session: str
    up: bool
    streams: int
    rtt_ms: float | None
    bytes_in: int
    bytes_out: int
    resumed: int


def link_status(session: SessionStatistics) -> LinkStatus:
    """The session as people are told of it."""
    mux = session.mux
    rtt_ms = round(mux.min_rtt_s * 1e3, 3) if mux.min_rtt_s else None
    return LinkStatus(session.id, session.state is State.UP, mux.streams, rtt_ms, mux.bytes_in, mux.bytes_out, session.resumed)
