"""R10: an exception at every await of logins, and of the loops that go with them. The others log in and out as before."""

import contextlib
import logging
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
import trio
from sabotage import FAULTS, LIMIT, Fault, lines_about, sabotage

from fxrelay.balance.login_attempt import Happening
from fxrelay.cluster.members import Ages
from fxrelay.cluster.view import ClusterView
from fxrelay.delivery.ports import Node, NoNode, Wanted
from fxrelay.logins.gate import AT_ONCE, LoginGate, Timing
from fxrelay.logins.login import HeldLogin
from fxrelay.logins.rules import FASTX3, LoginRules
from fxrelay.reserving.reservations import Entered, Reservations
from fxrelay.web.ports import WholeAnswer
from fxtunnel.model import RelayId
from tests.logins.login_rig import N1, SIMPLE, SITE, Chooser, Claim, Rig, Service, answer, open_rig, pass_of, stage, success
from tests.reservations.test_reservations_service import until

WAITS = 20
"""After so many each of the loops has been round."""
GIVES_NOTHING_BACK = frozenset({"Books.do_all", "HeldLogin._go_on"})
"""What the store was asked for and nobody heard of, and a login that can be gone on with: these entries expire."""


class CountedClaim(Claim):
    """What a node was told."""

    released = 0

    def release(self) -> None:
        self.released += 1


class OwnServers(Chooser):
    """Gives everybody the server that is called as he is, so that nobody is in another one's way."""

    def __init__(self, rig: Rig) -> None:
        super().__init__(rig.relay.reservations)
        self.claims: list[CountedClaim] = []

    async def choose(self, wanted: Wanted, excluded: frozenset[RelayId]) -> Node | NoNode:
        await trio.lowlevel.checkpoint()
        return self._node(RelayId(wanted.user))

    def _node(self, name: RelayId) -> Node:
        self.claims.append(claim := CountedClaim())
        return Node(name, False, "", False, claim, self._seat)  # type: ignore[arg-type]  # a fake seat


class Site(Service):
    """Gives the claim back when it has sent, as the relay's own sender does."""

    async def send(self, node: Node, most_bytes: int) -> WholeAnswer:
        try:
            return await super().send(node, most_bytes)
        finally:
            node.claim.release()


async def logs_in_at_once(rig: Rig, user: str) -> None:
    reply = await rig.ask(Site([answer(302)]), f"username={user}".encode())
    assert (await rig.gate.admit(rig.request("/", cookie=pass_of(reply)))).node == user
    await rig.gate.answered(rig.request("/logout", "POST", cookie=pass_of(reply)), RelayId(user), 302, ())


async def logs_in_by_stages(rig: Rig, user: str) -> None:
    await rig.ask(Site([stage(f"T-{user}")]), f'{{"username": "{user}"}}'.encode())
    reply = await rig.ask(Site([success(sub=user)]), f'{{"authtoken": "T-{user}"}}'.encode())
    reply.undone()


@pytest.mark.parametrize(("rules", "login"), [(SIMPLE, logs_in_at_once), (FASTX3, logs_in_by_stages)], ids=["at once", "by stages"])
async def test_a_login_fails_alone(tmp_path: Path, rules: LoginRules, login: Callable[[Rig, str], Awaitable[None]]) -> None:
    hits = 0
    async with open_rig(tmp_path, rules) as rig:
        chooser = rig.gate.chooser = OwnServers(rig)
        for nth in range(1, LIMIT):
            users = [f"u{nth}-{number}" for number in range(len(FAULTS))]
            done_by: list[str] = []

            async def victim(user: str, done_by: list[str] = done_by) -> None:
                with contextlib.suppress(Exception):
                    await login(rig, user)
                    done_by.append(user)

            with sabotage(nth, victim.__qualname__) as done, trio.fail_after(20):
                async with trio.open_nursery() as nursery:
                    for user in users:
                        nursery.start_soon(victim, user)
                        await trio.lowlevel.checkpoint()
            where = [tree.where for tree in done.hit]
            hits += len(done.hit)
            assert sorted(done_by) == [user for user, tree in zip(users, done.trees, strict=True) if not tree.where], where
            assert not len(rig.gate.quota), where
            assert all(claim.released == 1 for claim in chooser.claims), where
            assert not any(ongoing.is_busy for ongoing in rig.gate.attempts._ongoing.values()), where
            for user in set(users) - set(done_by):  # what is left of the first try, an entry at most, keeps nobody out
                await login(rig, user)
            await until(lambda: not rig.users)
            hit_there = {user for user, tree in zip(users, done.trees, strict=True) if tree.where.rpartition(" ")[2] in GIVES_NOTHING_BACK}
            await until(lambda rest=set(users) - hit_there: not rig.relay.reservations.holders.wanted(0) & rest)
            if not done.hit:
                break
    assert hits >= 4 * len(FAULTS)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: type(fault()).__name__)
async def test_the_loops_of_the_gate_go_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, fault: Fault
) -> None:
    caplog.set_level(logging.ERROR)
    monkeypatch.setattr("fxtunnel.kit.process.PAUSE_S", 0.01)
    monkeypatch.setattr("fxrelay.logins.gate.LOOK_S", 0.01)
    hits = 0
    async with open_rig(tmp_path, SIMPLE, N1) as rig:
        reservations = rig.relay.reservations
        for nth in range(1, WAITS):
            gate = rig.gate = LoginGate(Chooser(reservations, N1), ClusterView(Ages()), HeldLogin, Timing(1.0, 3.0))
            gate.reservations = reservations
            gate.reconfigure({SITE: rig.service})
            with sabotage(nth, "keep_going", faults=[fault]) as done:
                async with trio.open_nursery() as nursery:
                    await nursery.start(gate.run)
                    for _ in range(AT_ONCE):
                        await come_to_nothing(gate, nth)
                        await trio.sleep(0.01)
                    reply = await rig.ask(Service([answer(302)]))
                    passed = await gate.admit(rig.request("/", cookie=pass_of(reply)))
                    lost = trio.Event()
                    assert passed.watch is not None
                    passed.watch(lost.set)
                    reply.undone()
                    with trio.fail_after(20):
                        await lost.wait()
                    last = {await come_to_nothing(gate, nth) for _ in range(AT_ONCE + 1)}  # each of those tasks is hit once at most
                    await until(lambda last=last: not last <= entries(reservations))
                    nursery.cancel_scope.cancel()
            hits += len(done.hit)
            for tree in done.hit:
                (line,) = lines_about(tree.fault, caplog)
                assert "begins again" in line.getMessage()
            caplog.clear()
    assert hits > WAITS


async def come_to_nothing(gate: LoginGate, nth: int) -> str:
    """The id of a login that does. What hits the task that takes its entry out leaves it there until it expires."""
    assert gate.reservations is not None
    entered = await gate.reservations.enter(N1, "bob", f"192.0.{nth}.1")
    assert isinstance(entered, Entered)
    gate.take_out(entered, Happening.CLIENT_GONE)
    return entered.attempt.attempt_id


def entries(reservations: Reservations) -> set[str]:
    """Logins that are being authenticated, as far as this relay knows."""
    return {entry.entry_id for standing in reservations.holders.standings().values() for entry in standing.record.entries}
