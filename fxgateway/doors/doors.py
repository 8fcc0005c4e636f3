"""Pump: all doors of a gateway, and how a reload changes them: all of it, or nothing."""

from collections.abc import Sequence

from fxgateway.doors.door import CLIENT_OPTIONS, Door, DoorConfig, Relays
from fxgateway.routing.admission import Admission
from fxtunnel.engine.reactor import Reactor
from fxtunnel.kit.listeners import Inherited, bound_address, listen


class Doors:
    """The doors that are open, and those that have been closed but still have clients in them."""

    def __init__(self, reactor: Reactor, relays: Relays, admission: Admission) -> None:
        self._reactor = reactor
        self._relays = relays
        self._admission = admission
        self._open: dict[str, Door] = {}
        self._closed: list[Door] = []
        self.bound: dict[str, str] = {}

    def open_doors(self) -> list[Door]:
        """Those that take clients now."""
        return list(self._open.values())

    @property
    def clients(self) -> int:
        """Clients in all doors, closed ones included."""
        return sum(len(door.clients) for door in (*self._open.values(), *self._closed))

    def leading_in(self, listen_address: str) -> Door | None:
        """The door with this address, closed ones included."""
        closed = (door for door in reversed(self._closed) if str(door.config.listen) == listen_address)
        return self._open.get(listen_address) or next(closed, None)

    def apply(self, configs: Sequence[DoorConfig], inherited: Inherited | None = None) -> None:
        """Have exactly these doors open. Those that stay keep their sockets and clients.

        Raises:
            ListenError: one of them cannot be opened. Nothing has changed.
        """
        wanted = {str(config.listen): config for config in configs}
        fresh = {}
        try:
            for key, config in wanted.items():
                if key not in self._open:
                    fresh[key] = listen(config.listen, inherited, CLIENT_OPTIONS)
        except BaseException:
            for sock in fresh.values():
                sock.close()
            raise
        for key in [key for key in self._open if key not in wanted]:
            self._close(key)
        for key, config in wanted.items():
            if key in fresh:
                door = self._open[key] = Door(self._reactor, config, self._relays, self._admission)
                self.bound[key] = str(bound_address(fresh[key]))
                door.open(fresh[key])
            else:
                self._open[key].reconfigure(config)
        self._closed = [door for door in self._closed if door.clients]

    def close(self) -> None:
        """Take no more clients; those that are in stay."""
        for key in list(self._open):
            self._close(key)

    def abort_all(self) -> None:
        """End every client, with RST."""
        for door in (*self._open.values(), *self._closed):
            door.abort_all()

    def end_idle(self) -> None:
        """See `Door.end_idle`."""
        for door in (*self._open.values(), *self._closed):
            door.end_idle()

    def _close(self, key: str) -> None:
        door = self._open.pop(key)
        self.bound.pop(key, None)
        door.close()
        self._closed.append(door)
