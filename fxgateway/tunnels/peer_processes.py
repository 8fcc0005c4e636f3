"""Port: the other processes of this gateway, as the tunnel port sees them; and the implementation for a gateway that has none."""

import socket
from typing import Protocol, Self

import trio

from fxgateway.tunnels.ports import Departures
from fxtunnel.kit.settings import Address
from fxtunnel.model import InstanceId, RelayId


class AcceptedConnection:
    """A connection that this process or another has accepted; nothing has been read from it."""

    __slots__ = ("counts_as_relay", "ip", "remote_address", "sock")

    def __init__(self, sock: socket.socket, ip: str, remote_address: str, *, counts_as_relay: bool = False) -> None:
        self.sock = sock
        self.ip = ip
        self.remote_address = remote_address
        self.counts_as_relay = counts_as_relay
        """Whether it already counts as a relay of this worker, for spreading relays evenly (see `workers.relay_owners`)."""

    @classmethod
    def fresh(cls, sock: socket.socket, address: tuple[str, int]) -> Self:
        """A connection from `address`, which is (IP, port, ...) as `accept` or `getpeername` returns it."""
        return cls(sock, str(address[0]), str(Address(str(address[0]), int(address[1]))))


class PeerProcesses(Protocol):
    """The processes that serve relays beside this one."""

    @property
    def worker(self) -> str:
        """What relays are told to ask for when they dial again (PROTOCOL.md, 1); empty if there is nobody else."""

    @property
    def is_named(self) -> bool:
        """Whether connections that name this process are still passed on to it after it has stopped listening."""

    @property
    def earlier(self) -> tuple[str, ...]:
        """The names of earlier processes to which connections are passed on."""

    async def keeps(self, passed: AcceptedConnection) -> bool:
        """Whether a fresh connection is to be served here. If not, it has been passed on, and the caller closes its own copy.

        Waits for the first bytes and only peeks at them. Set a deadline around it.

        Raises:
            TooBusy: the process it belongs to is too busy to take it now.
        """

    async def wait_passed(self) -> AcceptedConnection:
        """The next connection that another process has passed on to us. The caller owns its socket."""

    def was_no_relay(self) -> None:
        """A connection that `counts_as_relay` has ended without becoming one."""

    async def claim(self, relay_id: RelayId, instance: InstanceId, departures: Departures) -> int:
        """Claim the relay's name across all processes. Returns its epoch, or 0 if the registry is to count epochs itself.

        `departures` are the earlier instances that are not to be fenced off. The caller calls `Registry.enter` next, with no checkpoint
        in between.

        Raises:
            PeerRefused: there is no room for this relay now; it may try again.
            TunnelClosed: another instance has been given the name meanwhile; close the link with this code.
        """


class SingleProcess:
    """Implements `PeerProcesses` for a gateway of one process."""

    worker = ""

    @property
    def is_named(self) -> bool:
        """See `PeerProcesses`."""
        return False

    @property
    def earlier(self) -> tuple[str, ...]:
        """See `PeerProcesses`."""
        return ()

    async def keeps(self, passed: AcceptedConnection) -> bool:
        """See `PeerProcesses`."""
        await trio.lowlevel.checkpoint()
        return True

    async def wait_passed(self) -> AcceptedConnection:
        """See `PeerProcesses`. Never returns."""
        await trio.sleep_forever()
        raise AssertionError

    def was_no_relay(self) -> None:
        """See `PeerProcesses`."""

    async def claim(self, relay_id: RelayId, instance: InstanceId, departures: Departures) -> int:
        """See `PeerProcesses`."""
        await trio.lowlevel.checkpoint()
        return 0
