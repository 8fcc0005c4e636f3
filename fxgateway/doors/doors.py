"""Pump: all doors of a gateway, and how a reload changes them: completely or not at all."""

from collections.abc import Sequence
from functools import partial

from fxgateway.doors.door import CLIENT_OPTIONS, Door, DoorConfig, DoorRelays
from fxgateway.routing.admission import Admission
from fxgateway.routing.offers import Forward
from fxtunnel.engine.reactor import Reactor
from fxtunnel.kit.listeners import Inherited, bound_address, listen


class Doors:
    """The doors that are open, and those that have been closed but still have clients in them."""

    def __init__(self, reactor: Reactor, relays: DoorRelays, admission: Admission) -> None:
        self._reactor = reactor
        self._relays = relays
        self._admission = admission
        self._open: dict[str, Door] = {}
        self._closed: list[Door] = []
        self._accepted_before = 0
        """Of doors that are no more."""
        self._inherited: Inherited | None = None
        self.bound: dict[str, str] = {}

    def open_doors(self) -> list[Door]:
        """The doors that take clients now."""
        return list(self._open.values())

    def shown(self) -> list[Door]:
        """Those that take clients, and those that still have some, as while the gateway drains. Each name once."""
        occupied = {door.name: door for door in self._closed if door.occupants}
        return list((occupied | {door.name: door for door in self._open.values()}).values())

    @property
    def clients(self) -> int:
        """Clients in all doors, closed ones included."""
        return sum(door.occupants for door in (*self._open.values(), *self._closed))

    @property
    def accepted(self) -> int:
        """Clients let in since start, by all doors that there have been: it never falls."""
        return self._accepted_before + sum(door.counters.accepted for door in (*self._open.values(), *self._closed))

    def leading_in(self, listen_address: str) -> Door | None:
        """The door with this address, closed ones included."""
        closed = (door for door in reversed(self._closed) if str(door.config.listen) == listen_address)
        return self._open.get(listen_address) or next(closed, None)

    def apply(self, configs: Sequence[DoorConfig], inherited: Inherited | None = None) -> None:
        """Have exactly these doors open. Those that stay keep their sockets and clients. `inherited` need be given only once.

        Raises:
            ListenError: one of them cannot be opened. Nothing has changed.
        """
        self._inherited = inherited = inherited or self._inherited
        wanted = {str(config.listen): config for config in configs}
        fresh = {}
        try:
            for key, config in wanted.items():
                if key not in self._open:
                    fresh[key] = listen(config.listen, inherited, CLIENT_OPTIONS)
        except BaseException:
            for sock in fresh.values():
                if inherited is not None:
                    inherited.undo(sock)
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
        self._accepted_before += sum(door.counters.accepted for door in self._closed if not door.clients)
        self._closed = [door for door in self._closed if door.clients]

    def hold(self) -> None:
        """Let nobody in before `hold_until_served`: until it is our turn, the relays are still with the process before us."""
        for door in self._open.values():
            door.hold()

    def hold_until_served(self, wait_s: float) -> None:
        """Let clients in once every service of their door has a relay, or after `wait_s`: after a restart relays need a moment.

        Until then clients wait in the queues of the listening sockets. Returns at once.
        """
        for door in self._open.values():
            door.hold_until(partial(self._is_served, door), self._reactor.now + wait_s)

    @property
    def is_waiting(self) -> bool:
        """Whether a door still keeps clients in its queue after `hold_until_served`."""
        return any(door.is_waiting for door in self._open.values())

    def release(self) -> None:
        """Take no more clients: a successor has the sockets. Open clients stay."""
        for key in list(self._open):
            door = self._open.pop(key)
            door.release()
            self._closed.append(door)

    def close(self) -> None:
        """Take no more clients; open ones stay."""
        for key in list(self._open):
            self._close(key)

    def _is_served(self, door: Door) -> bool:
        decisions = (self._relays.offers.decide(service) for service in door.services)
        return all(isinstance(decision, Forward) for decision in decisions)

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
        bound = self.bound.pop(key, None)
        if bound is not None and self._inherited is not None:
            self._inherited.forget(bound)
        door.close()
        self._closed.append(door)
