"""Relays and the store are killed while users log in and out of reserved servers; afterwards the history is read."""

import os
from pathlib import Path

from tests.chaos.figures import Outcome
from tests.chaos.stage import Fault, Stage
from tests.cluster_store.store_rig import REDIS
from tests.reservations.reservation_chaos import ANSWER_S, DURABLE, FORGETFUL, Chaos

CLIENTS = 17
"""At each of three relays."""
STORES: dict[str, tuple[tuple[str, ...] | None, float, float]] = {
    "SQLite": (None, 8.0, 180.0),
    "Redis": (DURABLE, 5.0, 180.0),
    "Redis without AOF": (FORGETFUL, 6.0, 60.0),
}
"""Options of the server; seconds in the short and in the full form."""


def logins(stage: Stage, outcome: Outcome) -> None:
    """On one store after the other."""
    wanted = {name: row for name, row in STORES.items() if row[0] is None or Path(REDIS).exists()}
    for number, (name, (options, short_s, full_s)) in enumerate(wanted.items()):
        stage.show(name, number / len(wanted))
        directory = stage.directory / f"store{number}"
        directory.mkdir()
        chaos = Chaos(directory, options, CLIENTS, seed=int.from_bytes(os.urandom(4)))
        try:
            chaos.run(stage.pick(short_s, full_s))
            chaos.stop()
            stage.show(f"{name}: reading the history", (number + 0.9) / len(wanted))
            found = chaos.verdict()
            if found.problems:
                outcome.error = "; ".join([f"seed {chaos.seed}", *found.problems])[:1000]
        finally:
            chaos.close()
        outcome.add(f"{name}: logins let in", found.counts["in"], "> 3")
        outcome.add("refused, reserved for another", found.counts["no reserved"], "> 3")
        outcome.add("refused, the store is away or not settled", found.counts["no no-store"] + found.counts["no unsettled"])
        outcome.add("relays killed", len(chaos.kills), "> 0")
        if options is not None:
            outcome.add("stores killed", chaos.store_kills, stage.pick("", "> 0"))
        outcome.add("two users on one server", len(found.overlaps), "= 0")
        outcome.add("tokens that do not rise", len(found.tokens), "= 0")
        outcome.add("servers whose history is not that of a lock", len(found.not_linearizable), "= 0")
        outcome.add("servers that stay reserved", len(found.leaked), "= 0")
        outcome.add(f"clients without an answer in {ANSWER_S:g} s", len(found.unanswered), "= 0")
        outcome.add("s for an answer, longest", found.slowest_s)


LOGINS = Fault(
    "logins", "relays and store killed while 51 clients log in and out: no server with two users, none left reserved, all answered", logins
)
