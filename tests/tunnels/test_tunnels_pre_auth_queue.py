"""Whose turn it is among strangers, whose time runs, and who is told to come again, on a clock that is faked."""

import contextlib
import itertools

import pytest
import trio
import trio.testing

from fxgateway.tunnels.pre_auth_queue import (
    CROWD_SHARE,
    LATE_SHARE,
    LONGEST_WAIT_S,
    SILENT_S,
    TURN_S,
    PortLimits,
    PreAuthPeer,
    PreAuthQueue,
    TooBusy,
)
from fxgateway.tunnels.retry_spacing import FIRST_GAP_S, LEAST_S, MOST_S, TURNS_A_RELAY, RetrySpacing

LIMITS = PortLimits(hello_timeout_s=5.0, pending=8, pending_per_source=4, at_once=2)


async def served(pre_auth_queue: PreAuthQueue, peer: PreAuthPeer, finished: list[PreAuthPeer], takes_s: float) -> None:
    """One peer, from its first bytes to its end."""
    try:
        with peer.scope:
            await pre_auth_queue.wait_turn(peer)
            await trio.sleep(takes_s)
            pre_auth_queue.admit(peer)
            finished.append(peer)
    finally:
        pre_auth_queue.leave(peer)


async def test_only_so_many_are_worked_on_and_the_others_wait_without_losing_time(autojump_clock: trio.testing.MockClock) -> None:
    pre_auth_queue, finished = PreAuthQueue(), []
    peers = [pre_auth_queue.enter(f"10.0.0.{number}", LIMITS, has_spoken=True) for number in range(8)]
    async with trio.open_nursery() as nursery:
        for peer in peers:
            nursery.start_soon(served, pre_auth_queue, peer, finished, 0.9)
        await trio.testing.wait_all_tasks_blocked()
        assert sum(peer.turn.is_set() for peer in peers) == 2
        await trio.sleep(2.0)
        assert len(finished) == 4
    assert set(finished) == set(peers)
    assert len(pre_auth_queue) == 0


async def test_a_wait_for_us_does_not_count(autojump_clock: trio.testing.MockClock) -> None:
    """Both have 5 s of their own; the second waits 4 s for its turn, and then takes 4.5 s."""
    pre_auth_queue, finished = PreAuthQueue(), []
    limits = PortLimits(hello_timeout_s=5.0, pending=8, pending_per_source=4, at_once=1)
    first, second = (pre_auth_queue.enter(f"10.0.0.{number}", limits, has_spoken=True) for number in range(2))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(served, pre_auth_queue, first, finished, 4.0)
        await trio.testing.wait_all_tasks_blocked()
        nursery.start_soon(served, pre_auth_queue, second, finished, 4.5)
    assert finished == [first, second]


async def test_a_peer_that_is_slow_in_its_turn_still_ends_in_time(autojump_clock: trio.testing.MockClock) -> None:
    pre_auth_queue, finished = PreAuthQueue(), []
    peer = pre_auth_queue.enter("10.0.0.1", LIMITS)
    await trio.sleep(3.0)
    began = trio.current_time()
    await served(pre_auth_queue, peer, finished, 60.0)
    assert peer.scope.cancelled_caught
    assert trio.current_time() - began == pytest.approx(2.0)
    assert not finished


async def test_turns_go_round_among_sources(autojump_clock: trio.testing.MockClock) -> None:
    pre_auth_queue, finished = PreAuthQueue(), []
    limits = PortLimits(pending=20, pending_per_source=10, at_once=1)
    crowd = [pre_auth_queue.enter("10.0.0.1", limits, has_spoken=True) for _ in range(6)]
    async with trio.open_nursery() as nursery:
        for peer in crowd:
            nursery.start_soon(served, pre_auth_queue, peer, finished, 0.1)
        await trio.testing.wait_all_tasks_blocked()
        other = pre_auth_queue.enter("10.0.0.2", limits, has_spoken=True)
        nursery.start_soon(served, pre_auth_queue, other, finished, 0.1)
    assert finished.index(other) <= 2


async def test_who_keeps_us_waiting_loses_its_turn_and_then_its_place(autojump_clock: trio.testing.MockClock) -> None:
    pre_auth_queue = PreAuthQueue()
    limits = PortLimits(hello_timeout_s=60.0, pending=100, pending_per_source=100, at_once=1)
    slow = [pre_auth_queue.enter("10.0.0.1", limits, has_spoken=True) for _ in range(LATE_SHARE + 1)]
    good, finished = pre_auth_queue.enter("10.0.0.2", limits, has_spoken=True), []
    async with trio.open_nursery() as nursery:
        nursery.start_soon(pre_auth_queue.run)
        for peer in slow:
            nursery.start_soon(served, pre_auth_queue, peer, [], 50.0)
            await trio.testing.wait_all_tasks_blocked()
        nursery.start_soon(served, pre_auth_queue, good, finished, 0.1)
        await trio.sleep(2 * TURN_S + 0.5)
        assert finished == [good]
        assert not any(peer.is_evicted for peer in slow)
        await trio.sleep((LATE_SHARE + 1) * (TURN_S + 0.2))
        assert [peer.is_evicted for peer in slow] == [False] * len(slow), "nobody waits: nobody has to go"
        more = [pre_auth_queue.enter("10.0.0.3", limits, has_spoken=True) for _ in range(3)]
        for peer in more:
            nursery.start_soon(served, pre_auth_queue, peer, [], 50.0)
            await trio.testing.wait_all_tasks_blocked()
        await trio.sleep(3 * TURN_S)
        assert slow[0].is_evicted
        assert not more[2].is_evicted
        nursery.cancel_scope.cancel()


async def test_the_silent_make_room_and_those_who_spoke_do_not(autojump_clock: trio.testing.MockClock) -> None:
    pre_auth_queue = PreAuthQueue()
    silent = pre_auth_queue.enter("10.0.0.1", LIMITS)
    await trio.sleep(SILENT_S)
    spoke = [pre_auth_queue.enter(f"10.0.1.{number}", LIMITS, has_spoken=True) for number in range(7)]
    pre_auth_queue.enter("10.0.0.9", LIMITS, has_spoken=True)
    assert silent.is_evicted
    assert silent.scope.cancel_called
    with pytest.raises(TooBusy):
        pre_auth_queue.enter("10.0.0.10", LIMITS, has_spoken=True)
    assert not any(peer.is_evicted for peer in spoke)


async def test_a_source_makes_room_for_itself(autojump_clock: trio.testing.MockClock) -> None:
    pre_auth_queue = PreAuthQueue()
    other = pre_auth_queue.enter("10.0.0.2", LIMITS)
    mine = [pre_auth_queue.enter("10.0.0.1", LIMITS) for _ in range(4)]
    with pytest.raises(TooBusy):  # the others' hellos may be on their way
        pre_auth_queue.enter("10.0.0.1", LIMITS)
    await trio.sleep(SILENT_S)
    mine.append(pre_auth_queue.enter("10.0.0.1", LIMITS))
    assert [peer.is_evicted for peer in (other, *mine)] == [False, True, False, False, False, False]


async def test_nobody_waits_for_long(autojump_clock: trio.testing.MockClock) -> None:
    pre_auth_queue = PreAuthQueue()
    limits = PortLimits(hello_timeout_s=60.0, at_once=1)
    first, second = (pre_auth_queue.enter("10.0.0.1", limits, has_spoken=True) for _ in range(2))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(served, pre_auth_queue, first, [], 50.0)
        await trio.testing.wait_all_tasks_blocked()
        began = trio.current_time()
        with pytest.raises(TooBusy), second.scope:
            await pre_auth_queue.wait_turn(second)
        assert trio.current_time() - began == pytest.approx(LONGEST_WAIT_S)
        pre_auth_queue.leave(second)
        assert len(pre_auth_queue) == 1
        nursery.cancel_scope.cancel()


async def test_a_crowd_that_only_keeps_its_turns_turns_nobody_else_away(autojump_clock: trio.testing.MockClock) -> None:
    """It takes every turn there is, for a second each, and always has more who wait; another's relays wait for about a turn each."""
    pre_auth_queue, finished = PreAuthQueue(), []
    limits = PortLimits(hello_timeout_s=60.0, pending=100, pending_per_source=40, at_once=2)

    async def waits_for_ever(peer: PreAuthPeer) -> None:
        with contextlib.suppress(TooBusy):
            await served(pre_auth_queue, peer, [], 1e9)

    async def dials_for_ever() -> None:
        while True:
            try:
                nursery.start_soon(waits_for_ever, pre_auth_queue.enter("10.0.0.1", limits, has_spoken=True))
            except TooBusy:
                await trio.sleep(0.01)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(pre_auth_queue.run)
        nursery.start_soon(dials_for_ever)
        await trio.sleep(120.0)
        for _ in range(20):
            began = trio.current_time()
            await served(pre_auth_queue, pre_auth_queue.enter("10.0.0.2", limits, has_spoken=True), finished, 0.05)
            assert trio.current_time() - began < 3 * TURN_S
        nursery.cancel_scope.cancel()
    assert len(finished) == 20


async def test_a_crowd_makes_room_for_others_when_the_lobby_is_full(autojump_clock: trio.testing.MockClock) -> None:
    pre_auth_queue = PreAuthQueue()
    limits = PortLimits(pending=8, pending_per_source=8, at_once=1)
    crowd = [pre_auth_queue.enter("10.0.0.1", limits, has_spoken=True) for _ in range(8)]
    async with trio.open_nursery() as nursery:
        for peer in crowd:
            nursery.start_soon(served, pre_auth_queue, peer, [], 1e9)
            await trio.testing.wait_all_tasks_blocked()
        pre_auth_queue.enter("10.0.0.2", limits, has_spoken=True)
        assert [peer.is_evicted for peer in crowd] == [False] * 7 + [True]
        await trio.testing.wait_all_tasks_blocked()
        pre_auth_queue.enter("10.0.0.3", limits, has_spoken=True)
        pre_auth_queue.enter("10.0.0.4", limits, has_spoken=True)
        assert sum(peer.is_evicted for peer in crowd) == 3
        assert len(pre_auth_queue) == 8
        with pytest.raises(TooBusy):  # four wait there: no crowd any more
            pre_auth_queue.enter("10.0.0.5", limits, has_spoken=True)
        assert not crowd[0].is_evicted, "it was begun"
        nursery.cancel_scope.cancel()
    assert CROWD_SHARE == 4


async def test_nobody_pays_for_a_machine_that_stood_still(mock_clock: trio.testing.MockClock) -> None:
    pre_auth_queue = PreAuthQueue()
    limits = PortLimits(hello_timeout_s=5.0, at_once=1)
    first, second = (pre_auth_queue.enter("10.0.0.1", limits, has_spoken=True) for _ in range(2))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(pre_auth_queue.run)
        for peer in (first, second):
            nursery.start_soon(served, pre_auth_queue, peer, [], 1e9)
            await trio.testing.wait_all_tasks_blocked()
        mock_clock.jump(4.5)
        await trio.testing.wait_all_tasks_blocked()
        assert not second.turn.is_set()
        for _ in range(10):
            mock_clock.jump(0.1)
            await trio.testing.wait_all_tasks_blocked()
        assert second.turn.is_set()
        assert not first.scope.cancelled_caught, "it has had a second of its five"
        nursery.cancel_scope.cancel()


def test_appointments_follow_one_another_as_fast_as_arrivals_are_dealt_with() -> None:
    spacing = RetrySpacing()
    times = [spacing.book(100.0, 0).retry_after_s for _ in range(10)]
    gaps = [later - earlier for earlier, later in itertools.pairwise(times)]
    assert times[0] == LEAST_S
    assert gaps == pytest.approx([TURNS_A_RELAY * FIRST_GAP_S] * 9)


def test_appointments_are_never_too_far_off() -> None:
    spacing = RetrySpacing()
    waits = [spacing.book(100.0, 400) for _ in range(10_000)]
    assert max(wait.retry_after_s + wait.spread_s for wait in waits) <= MOST_S * 1.25
    assert spacing.book(100.0 + MOST_S, 0).retry_after_s < 1


def test_the_pace_is_what_was_measured_while_others_waited() -> None:
    spacing = RetrySpacing()
    now = 0.0
    for _ in range(500):
        now += 0.02
        spacing.note_done(now, is_crowded=True)
    assert spacing.gap_s == pytest.approx(0.02, rel=0.05)
    spacing.note_done(now, is_crowded=False)
    spacing.note_done(now + 3600.0, is_crowded=False)
    assert spacing.gap_s == pytest.approx(0.02, rel=0.1)
