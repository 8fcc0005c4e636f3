"""Task: the listening sockets that all workers share: taken over or bound once, and kept for a successor of the gateway."""

import socket
from collections.abc import Container, Iterable, Mapping, Sequence

from fxgateway.doors.door import CLIENT_OPTIONS
from fxtunnel.kit.listeners import Inherited, bound_address, listen
from fxtunnel.kit.settings import Address


class SharedListeners:
    """The tunnel's socket and those of the doors, by the addresses that the configuration knows them by. The workers get copies."""

    def __init__(self, inherited: Inherited) -> None:
        self._inherited = inherited
        self._tunnel: tuple[str, socket.socket] | None = None
        self._doors: dict[str, socket.socket] = {}

    def open(self, tunnel: Address, doors: Iterable[Address]) -> None:
        """Listen.

        Raises:
            ListenError: not on one of these addresses.
        """
        self._tunnel = str(tunnel), listen(tunnel, self._inherited)
        self._doors.update(self.open_more(doors))

    def open_more(self, doors: Iterable[Address]) -> dict[str, socket.socket]:
        """Sockets for those of these doors that have none, for `commit` or `give_up`.

        Raises:
            ListenError: not on one of these addresses; nothing has changed.
        """
        opened: dict[str, socket.socket] = {}
        try:
            for address in doors:
                if str(address) not in self._doors:
                    opened[str(address)] = listen(address, self._inherited, CLIENT_OPTIONS)
        except BaseException:
            for sock in opened.values():
                self._inherited.undo(sock)
            raise
        return opened

    def give_up(self, sockets: Iterable[socket.socket]) -> None:
        """Close them, and have none of them kept for a successor."""
        for sock in sockets:
            self._inherited.forget(str(bound_address(sock)))
            sock.close()

    def commit(self, opened: Mapping[str, socket.socket], wanted: Container[str]) -> None:
        """Have exactly the doors that are wanted."""
        self._doors.update(opened)
        self.give_up([self._doors.pop(key) for key in list(self._doors) if key not in wanted])

    def close_doors(self) -> None:
        """Close the doors' sockets, so that no client waits in a queue that no worker serves."""
        self.commit({}, ())

    def close(self) -> None:
        """Close our copies; a successor may have its own."""
        for _, sock in self.sockets():
            sock.close()

    def sockets(self) -> Sequence[tuple[str, socket.socket]]:
        """The tunnel's first. They stay ours."""
        return [*([] if self._tunnel is None else [self._tunnel]), *self._doors.items()]

    def bound(self) -> dict[str, str]:
        """Where each listens, the tunnel first: for port 0, with the port the kernel chose."""
        return {key: str(bound_address(sock)) for key, sock in self.sockets()}
