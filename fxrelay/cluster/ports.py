"""Port: where a cluster keeps what its members must agree on (store), and how they hear of changes at once (transporter).

Both are blocking: call them in worker threads only. Adapters turn every exception of their library into StoreError or TransporterError.
What comes back may have been written by anyone who can reach the store: it is data to be checked, never trusted.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

SERVERS: Final = "servers"
"""Collection of server objects, by server id."""
CONTROLS: Final = "controls"
"""Collection of what administrators switched off, by server id."""
PLACEMENTS: Final = "placements"
"""Topic: sessions that were just placed and that no server object counts yet."""
RESERVATIONS: Final = "reservations"
"""Collection and topic of who has which server, by server id."""
RESERVATION_MARKS: Final = "reservation-marks"
"""Collection of one document: what tells relays that the store has forgotten something."""
RESERVATION_USERS: Final = "reservation-users"
"""Collection of the servers that each user has, by user."""
TICKETS: Final = "tickets"
"""Collection of the tickets that were used, until they expire."""
TOPICS: Final = (SERVERS, CONTROLS, PLACEMENTS, RESERVATIONS)

MAX_DOCUMENT_BYTES: Final = 262_144
"""A longer document is refused on the way in and skipped (and counted) on the way out: one member must not fill the others' memory."""


@dataclass(frozen=True, slots=True)
class Document:
    """What the store holds under a key. `updated_ms` is the store's clock at the last `put`, in ms since 1970."""

    key: str
    text: str
    updated_ms: int


@dataclass(frozen=True, slots=True)
class Present:
    """A document as `update` finds or leaves it. `text` None: there is none. `number` counts the updates of this key: it survives the
    document's deletion, and is never given twice within an epoch. `beside` is the text of the second document, if there is one.
    """

    text: str | None
    number: int
    now_ms: int
    epoch: str
    beside: str | None = None


@dataclass(frozen=True, slots=True)
class Both:
    """What the two documents of an update become, in one step. `beside` None: the second one is removed, or stays away."""

    text: str
    beside: str | None


Change = Callable[[Present], str | None]
"""Returns the new text of a document, None to leave it. Called within the update, perhaps several times: it must be quick and pure."""


@dataclass(frozen=True, slots=True)
class Update:
    """A document and its change. `beside`: collection and key of a second document, which `change` sees and may write in the same step.
    Its writes are not numbered, and what is not ours there counts as nothing.
    """

    collection: str
    key: str
    change: Callable[[Present], str | Both | None]
    beside: tuple[str, str] | None = None


@dataclass(frozen=True, slots=True)
class Message:
    """A change that a member published. `text` is at most MAX_DOCUMENT_BYTES long."""

    topic: str
    text: str


class Store(Protocol):
    """Documents in collections, and counters. Any number of threads may call at once. Every call has a deadline of its own (a few seconds).

    Raises:
        StoreError: the store cannot be reached, refuses, or holds something that is not ours. Try again later; go on with what is known.
    """

    @property
    def skipped(self) -> int:
        """Documents read, each time it was, that no member of ours would have written."""

    @property
    def doubt(self) -> str:
        """Why it may forget what it has acknowledged, as far as it told when `epoch` was asked for last; empty: nothing speaks for that."""

    def epoch(self) -> str:
        """Changes whenever the store may have forgotten something: another Redis run_id without AOF, another SQLite file."""

    def now_ms(self) -> int:
        """The store's clock, ms since 1970: the one clock all members share."""

    def put(self, collection: str, key: str, text: str) -> int:
        """Write a document; returns the store's clock."""

    def get(self, collection: str, key: str) -> Document | None:
        """One document."""

    def delete(self, collection: str, key: str) -> None:
        """Remove a document, if it is there."""

    def delete_if_same(self, collection: str, document: Document) -> bool:
        """Remove a document if it is still the one that was read, text and time, as one step among all members. Returns whether it was
        there and is gone.
        """

    def documents(self, collection: str) -> Iterator[Document]:
        """All documents of a collection, fetched in parts: ten thousand of them are never in memory at once. In no order."""

    def add(self, counter: str, amount: int) -> int:
        """Add to a named counter, which begins at 0; returns its new value. Atomic among all members."""

    def update(self, collection: str, key: str, change: Change) -> Present:
        """Read a document, decide, and write what `change` says, as one step among all members; returns what is there then.

        `change` gets the number that its write would have; clock and epoch are the store's at that step. What it raises comes out, and
        nothing is written.

        Raises:
            StoreError: also if the document is none of ours, or others are quicker again and again. It may or may not be written.
        """

    def update_all(self, updates: Sequence[Update]) -> list[Present | Exception]:
        """Several updates for the price of little more than one: each a step by itself, done or not whatever becomes of the others. Of
        each, in order, what `update` would return, or the exception that it would raise.
        """

    def close(self) -> None:
        """Let go of connections and files. May be repeated; calls under way in other threads fail with StoreError."""


class Subscription(Protocol):
    """Messages from the moment it was made. For one thread at a time."""

    def next_batch(self, timeout_s: float) -> list[Message]:
        """What has come, at most 1,000 messages; waits up to `timeout_s` for the first one, then may be empty.

        Raises:
            TransporterError: the connection is lost, and messages may be: make a new subscription and read the store again.
        """

    def close(self) -> None:
        """Stop listening. May be repeated, from any thread; a `next_batch` that waits returns or raises soon."""


class Transporter(Protocol):
    """Tells the other members at once. Nothing is kept for those who do not listen: the store is what counts."""

    def publish(self, topic: str, *texts: str) -> None:
        """Tell everyone who has subscribed, this relay included, in this order. Many at once cost little more than one. Raises
        TransporterError: none, some or all were told.
        """

    def subscribe(self, topics: tuple[str, ...]) -> Subscription:
        """Listen. Raises TransporterError."""

    def close(self) -> None:
        """Let go of everything; open subscriptions end. May be repeated."""
