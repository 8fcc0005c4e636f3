"""Task: a guard for one direction of a stream, which two tasks must not use at once."""

import trio


class ConflictDetector:
    """Turns the mistake of two tasks using one direction at once into an error; trio keeps its own such guard private."""

    __slots__ = ("_message", "is_busy")

    def __init__(self, message: str) -> None:
        self._message = message
        self.is_busy = False

    def __enter__(self) -> None:
        if self.is_busy:
            raise trio.BusyResourceError(self._message)
        self.is_busy = True

    def __exit__(self, *_: object) -> None:
        self.is_busy = False
