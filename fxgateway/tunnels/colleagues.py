"""Port: the other processes of this gateway, as the tunnel port sees them; and what it is to have none."""

import socket
from typing import Protocol, Self

import trio

from fxtunnel.kit.settings import Address
from fxtunnel.kit.tokens import ReplayGuard
from fxtunnel.model import InstanceId, RelayId


class Passed:
    """A connection that this process or another has accepted; nothing has been read from it."""

    __slots__ = ("counts_as_relay", "ip", "remote_address", "sock")

    def __init__(self, sock: socket.socket, ip: str, remote_address: str, *, counts_as_relay: bool = False) -> None:
        self.sock = sock
        self.ip = ip
        self.remote_address = remote_address
        self.counts_as_relay = counts_as_relay
        """Where relays are spread evenly, it has been counted as one already."""

    @classmethod
    def fresh(cls, sock: socket.socket, address: tuple[str, int]) -> Self:
        """One that has come from there, as `accept` or `getpeername` says."""
        return cls(sock, str(address[0]), str(Address(str(address[0]), int(address[1]))))


class Colleagues(Protocol):
    """Whoever serves relays beside this process."""

    @property
    def worker(self) -> str:
        """What relays are told to ask for when they dial again (PROTOCOL.md, 1); empty if there is nobody else."""

    @property
    def is_named(self) -> bool:
        """Whether connections that name this process still reach it, passed on, when it listens no more."""

    @property
    def earlier(self) -> tuple[str, ...]:
        """The names of processes before this one that connections are passed on to."""

    async def keeps(self, passed: Passed) -> bool:
        """Whether a fresh connection is to be served here. If not, it has been passed on, and the caller closes its own copy.

        Waits for the first bytes, and takes none. Set a deadline around it.

        Raises:
            TurnedAway: whose it is has no time for it now.
        """

    async def wait_passed(self) -> Passed:
        """The next connection that somebody else has passed on to us."""

    def was_no_relay(self) -> None:
        """A connection that counted as a relay has ended without one."""

    async def first_use(self, use: str, exp_unix: float, now_unix: float) -> bool:
        """See `ReplayGuard`: over all processes."""

    async def claim(self, relay_id: RelayId, instance: InstanceId) -> int:
        """Take the relay's name over all processes; the epoch, or 0 where the registry counts them itself.

        The caller enters it without a checkpoint in between.

        Raises:
            PeerRefused: there is no room for this relay now; it may try again.
            TunnelClosed: somebody else has been given the name meanwhile; the relay is to be told the code.
        """


class Alone:
    """Implements `Colleagues` for a gateway of one process."""

    worker = ""

    def __init__(self) -> None:
        self._replays = ReplayGuard()

    @property
    def is_named(self) -> bool:
        """See `Colleagues`."""
        return False

    @property
    def earlier(self) -> tuple[str, ...]:
        """See `Colleagues`."""
        return ()

    async def keeps(self, passed: Passed) -> bool:
        """See `Colleagues`."""
        await trio.lowlevel.checkpoint()
        return True

    async def wait_passed(self) -> Passed:
        """See `Colleagues`: never."""
        await trio.sleep_forever()
        raise AssertionError

    def was_no_relay(self) -> None:
        """See `Colleagues`."""

    async def first_use(self, use: str, exp_unix: float, now_unix: float) -> bool:
        """See `Colleagues`."""
        await trio.lowlevel.checkpoint()
        return self._replays.first_use(use, exp_unix, now_unix)

    async def claim(self, relay_id: RelayId, instance: InstanceId) -> int:
        """See `Colleagues`."""
        await trio.lowlevel.checkpoint()
        return 0
