"""Task: the open subscriptions of one transporter, so that closing it ends them all. For any thread."""

import threading
from typing import Generic, Protocol, TypeVar

from fxtunnel.errors import TransporterError


class Startable(Protocol):
    """A subscription that does not listen yet."""

    def start(self) -> None:
        """Listen from now on. Raises TransporterError."""

    def close(self) -> None:
        """Stop. May be repeated."""


S = TypeVar("S", bound=Startable)


class Subscribers(Generic[S]):
    """The open subscriptions. `name` is what errors call the transporter."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._open: set[S] = set()
        self._lock = threading.Lock()
        self._closed = False

    def start(self, subscription: S) -> S:
        """Start it as one of them.

        Raises:
            TransporterError: it could not be started, or all are closed; it is closed.
        """
        with self._lock:
            self._open.add(subscription)
        try:
            subscription.start()
            if self._closed:
                raise TransporterError(f"{self._name}: was closed")
        except TransporterError:
            subscription.close()
            raise
        return subscription

    def forget(self, subscription: S) -> None:
        """It has been closed. May be repeated."""
        with self._lock:
            self._open.discard(subscription)

    def close(self) -> None:
        """End all of them, and those still to come."""
        self._closed = True
        with self._lock:
            subscriptions = list(self._open)
        for subscription in subscriptions:
            subscription.close()
