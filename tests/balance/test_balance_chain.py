"""A chain of entries: who is asked about whom, and how it ends."""

import pytest
from balance_samples import LOGIN, Bench, Here, Says, candidate, candidates, ids

from fxrelay.balance.chain import NO_CANDIDATES, builtin, decide
from fxrelay.balance.model import Chosen, Decision, Dropped, Failed, Narrowed, Passed
from fxrelay.balance.verdicts import NO_SERVER_SELECTED
from fxtunnel.model import RelayId

GONE = (Dropped(RelayId("z"), "stale"),)


async def decided(*chain: Says, among: str = "abc") -> Decision:
    return await decide(chain, LOGIN, candidates(*among), GONE, Here())


async def test_the_first_to_choose_ends_it() -> None:
    first, second, third = Says(Passed(), "1"), Says(Chosen(RelayId("b")), "2"), Says(Chosen(RelayId("c")), "3")
    decision = await decided(first, second, third)
    assert (decision.server_id, decision.failure, decision.dropped) == ("b", None, GONE)
    assert [(step.entry, step.candidates, step.verdict) for step in decision.steps] == [("1", 3, Passed()), ("2", 3, second.verdict)]
    assert third.asked == []


async def test_narrowing_keeps_the_order_given_and_passing_keeps_the_list() -> None:
    last = Says(Chosen(RelayId("a")))
    await decided(Says(Narrowed(ids("c", "a"))), Says(Passed()), last)
    assert last.asked == [["c", "a"]]


async def test_a_failure_ends_it() -> None:
    last = Says(Chosen(RelayId("a")))
    decision = await decided(Says(Failed("E", "m", "d")), last)
    assert (decision.server_id, decision.failure) == (None, Failed("E", "m", "d"))
    assert last.asked == []


@pytest.mark.parametrize("chain", [[], [Says(Passed())], [Says(Narrowed(ids("a")))], [Says(Narrowed(())), Says(Chosen(RelayId("a")))]])
async def test_nobody_chose(chain: list[Says]) -> None:
    decision = await decided(*chain)
    assert decision.server_id is None
    assert decision.failure is not None
    assert decision.failure.name == NO_SERVER_SELECTED


async def test_nobody_is_asked_about_nothing() -> None:
    entry = Says(Chosen(RelayId("a")))
    decision = await decided(entry, among="")
    assert decision.failure is not None
    assert decision.failure.name == NO_CANDIDATES
    assert entry.asked == []
    after = Says(Chosen(RelayId("a")))
    await decided(Says(Narrowed(())), after)
    assert after.asked == []


async def test_round_robin_counts_for_its_service_alone() -> None:
    here = Here()
    desk, other = builtin("round-robin", "desk"), builtin("round-robin", "other")
    assert desk is not None
    assert other is not None
    taken = [(await decide([entry], LOGIN, candidates("a", "b"), (), here)).server_id for entry in (desk, desk, other, desk)]
    assert taken == ["a", "b", "a", "a"]
    assert builtin("none", "desk") is None


async def test_what_a_script_does_to_its_input_the_next_one_does_not_see(bench: Bench) -> None:
    spoil = bench.js(
        "(i) => { i.servers.sort().reverse(); i.servers[0].sessions = 99; i.servers.pop(); i.user.login = 'root'; i.data.x = 1 }", "1.js"
    )
    look = bench.js(
        "(i) => { throw new Error(JSON.stringify([i.servers.map(s => [s.serverId, s.sessions]), i.user.login, i.data])) }", "2.js"
    )
    decision = await bench.decide(spoil, look, among=[candidate("a", sessions=1), candidate("b", sessions=2)])
    assert decision.failure is not None
    assert decision.failure.message == '[[["a",1],["b",2]],"ann",{}]'


async def test_scripts_and_built_in_entries_together(bench: Bench) -> None:
    narrow = bench.js("(i) => i.servers.filter(s => s.sessions > 1).reverse()")
    fewest = builtin("fewest-sessions", "desk")
    assert fewest is not None
    among = [candidate("a", sessions=1), candidate("b", sessions=2), candidate("c", sessions=2), candidate("d", sessions=3)]
    decision = await bench.decide(narrow, fewest, among=among)
    assert decision.server_id == "c"  # the order the script gave decides between equals
    assert all(step.seconds >= 0 for step in decision.steps)
