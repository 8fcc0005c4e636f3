"""The tunnel is cut with a hundred streams in mid-transfer, again and again: with RST, and by silence."""

import time
from typing import Any

from tests.chaos.figures import Outcome
from tests.chaos.stage import MIB, Fault, Stage, judge, served_again_s
from tests.system.peers import dial, payload, read_exactly, say
from tests.system.stack import Stack, wait_until

STREAMS = 100
CLIENTS = 110
"""Each begins anew when its stream has ended; so many that STREAMS are in mid-transfer at any time."""
RATE = MIB / 8


def resumptions(stack: Stack) -> int:
    """Data links that were cut and continued, as the gateway counts them."""
    return sum(link["resumed"] for relay in stack.live_relays().values() for link in relay["links"])


def is_up(stack: Stack) -> bool:
    """Whether any data link is."""
    return any(link["up"] for relay in stack.live_relays().values() for link in relay["links"])


def cuts(stage: Stage, outcome: Outcome) -> None:
    """Every second cut is silence: nothing says that the path is gone."""
    plain = stage.plain()
    stack = plain.stack
    count = stage.pick(2, 50)
    # Much longer than a silence, and not begun at once: or all that are due while the path is gone would end together when it is back.
    size_bytes, start_per_s = stage.pick((3 * MIB // 4, 0.0), (4 * MIB, 10.0))
    load = stage.load(plain.swap, CLIENTS, size_bytes=size_bytes, rate_bytes_per_s=RATE, start_per_s=start_per_s, repeat=True)
    load.wait_running()
    cut_streams: list[int] = []
    back_s: dict[str, list[float]] = {"RST": [0.0], "silence": [0.0]}
    for number in range(count):
        stage.show(f"cut {number + 1}", number / count)
        wait_until(lambda: is_up(stack), 20, "the link")
        time.sleep(0.5)
        before, kind = resumptions(stack), "silence" if number % 2 else "RST"
        load.wait_moving(CLIENTS - 3)
        began = time.monotonic()
        if kind == "RST":
            stack.cutter.cut()
        else:
            stack.cutter.freeze()
        cut_streams.append(load.moving)
        wait_until(lambda before=before: resumptions(stack) > before, 20, "the link resumed")
        back_s[kind].append(time.monotonic() - began)
    resumed = resumptions(stack)
    tally = load.finish()
    outcome.add("cuts", count)
    outcome.add("streams in transfer at a cut, least", min(cut_streams), f"≥ {STREAMS}")
    outcome.add("links resumed", resumed, f"≥ {count}")
    outcome.add("s to resume after RST, longest", max(back_s["RST"]), "≤ 5")
    outcome.add("s to resume after silence, longest (dead_after_s = 3)", max(back_s["silence"]), "≤ 8")
    judge(outcome, tally, plain.services)
    outcome.add("MiB compared", tally["bytes_right"] / MIB)


def silence(stage: Stage, outcome: Outcome) -> None:
    """With the times of the default configuration: what runs goes silent; in the full form also what is dialled after."""
    plain = stage.plain(extra="", relay="")
    with dial(plain.echo, 30) as old:
        say(old)
        began = time.monotonic()
        plain.stack.cutter.freeze()
        stage.show("the path is silent", 0.1)
        old.sendall(bytes(payload(1, 100_000)))
        outcome.add("s until a new client is served", served_again_s(plain.echo), "≤ 15")
        assert read_exactly(old, 100_000) == payload(1, 100_000), "wrong bytes on the old stream"
        outcome.add("s until the old stream moves", time.monotonic() - began, "≤ 15")
        silent_s: Any = stage.pick(0, 20)
        if silent_s:
            stage.show("a partition", 0.5)
            plain.stack.cutter.cut_off()
            old.sendall(bytes(payload(2, 100_000)))
            time.sleep(silent_s)
            plain.stack.cutter.thaw()
            began = time.monotonic()
            outcome.add(f"s until a new client is served after a partition of {silent_s} s", served_again_s(plain.echo), "≤ 15")
            assert read_exactly(old, 100_000) == payload(2, 100_000), "wrong bytes on the old stream"
            outcome.add("s until the old stream moves after it", time.monotonic() - began, "≤ 15")
        say(old)


CUTS = Fault("cuts", "a tunnel cut with 100 streams in transfer, by RST and by silence in turn: no stream, no byte lost", cuts)
SILENCE = Fault("silence", "a path that falls silent: new clients within 15 s, old streams go on", silence)
