"""Port: what a peer is, and the two simplest: nothing at all, and the list of all of them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Final, Protocol

Interpose = Callable[[int], int]


def nothing_between(port: int) -> int:
    """The way of a tunnel that nothing is put into."""
    return port


STREAMS: Final = frozenset({"bulk", "bulk16", "conn", "echo", "idle", "stalled", "cut", "rtt"})
"""The measures of streams."""


@dataclass(frozen=True, slots=True)
class Running:
    """A started peer: where clients connect, the root pid of each daemon by what it is called, and other doors by their kind."""

    port: int
    daemons: Mapping[str, int] = field(default_factory=dict)
    doors: Mapping[str, int] = field(default_factory=dict)


class Peer(Protocol):
    """A way from a client to a service over two processes. One object is one peer; it is started and stopped many times.

    `measures` names the measures it takes part in.
    """

    name: str
    label: str
    measures: frozenset[str]

    def why_not(self) -> str | None:
        """The reason why it cannot run here, or None."""

    def version(self) -> str:
        """What is being measured, in one line."""

    def start(self, service_port: int, interpose: Interpose = nothing_between) -> Running:
        """Start both daemons and wait until a byte has come back from the service.

        `interpose(port)` gives the port to dial instead of the tunnel's own, so that something can be put into the tunnel.

        Raises:
            BenchmarkError: it did not come up; what it left must still be stopped.
        """

    def stop(self) -> None:
        """End all its processes and remove its files. Harmless when it is not running."""


class Direct:
    """No peer: clients connect straight to the service. This is the load generator's own ceiling."""

    name = "direct"
    label = "load generator alone"
    measures: frozenset[str] = frozenset({"bulk", "bulk16", "conn", "echo", "get"})

    def why_not(self) -> str | None:
        """Always there."""
        return None

    def version(self) -> str:
        """Nothing to tell."""
        return ""

    def start(self, service_port: int, interpose: Interpose = nothing_between) -> Running:
        """Nothing to start."""
        return Running(service_port)

    def stop(self) -> None:
        """Nothing to stop."""
