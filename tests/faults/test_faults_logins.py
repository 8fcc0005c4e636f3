"""R10: an exception at every await of logins, and of the loops that go with them. The others log in and out as before."""

import contextlib
import logging
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path

import pytest
import trio
from sabotage import FAULTS, LIMIT, Fault, lines_about, sabotage

from fxrelay.balance.reservations import Login
from fxrelay.cluster.members import Ages
from fxrelay.cluster.view import ClusterView
from fxrelay.delivery.ports import Node, NoNode, Wanted
from fxrelay.logins.gate import AT_ONCE, LoginGate, Timing
from fxrelay.logins.login import HeldLogin
from fxrelay.logins.rules import FASTX3, Bounds, LoginRules
from fxrelay.reserving.ledger import Ledger
from fxrelay.web.ports import Reply, WholeAnswer
from fxtunnel.model import RelayId
from tests.logins.login_rig import N1, SIMPLE, SITE, Chooser, Claim, Rig, Service, answer, open_rig, pass_of, stage, success
from tests.reservations.test_reservations_service import LEASE_S, until

WAITS = 20
"""After so many each of the loops has been round."""
IDLE_S = 40.0
SHORT_MS = 20_000


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
        return Node(name, False, "", False, claim, self._seat)  # a fake seat


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
async def test_a_login_fails_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rules: LoginRules, login: Callable[[Rig, str], Awaitable[None]]
) -> None:
    monkeypatch.setattr("fxrelay.reserving.reservations.CALL_S", 0.2)
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
            going_on = {ongoing.user for ongoing in rig.gate.attempts._ongoing.values()}
            await until(lambda rest=set(users) - going_on: not entered(rig) & rest)
            for user in set(users) - set(done_by):  # what is left of the first try, an entry at most, keeps nobody out
                await login(rig, user)
            await until(lambda: not rig.users)
            await until(lambda: not entered(rig))
            if not done.hit:
                break
    assert hits >= 4 * len(FAULTS)


def entered(rig: Rig) -> set[str]:
    """Servers with entries, as the store has it."""
    ledger = Ledger(rig.relay.store, RelayId("looks"), LEASE_S)
    return {server_id for server_id, record in ledger.records() if record.entries}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: type(fault()).__name__)
async def test_the_loops_of_the_gate_go_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, fault: Fault
) -> None:
    caplog.set_level(logging.ERROR)
    monkeypatch.setattr("fxtunnel.kit.process.PAUSE_S", 0.01)
    monkeypatch.setattr("fxrelay.logins.gate.LOOK_S", 0.01)
    hits = 0
    async with open_rig(tmp_path, replace(SIMPLE, bounds=Bounds(lifetime_s=4 * IDLE_S, idle_s=IDLE_S)), N1) as rig:
        reservations = rig.relay.reservations
        for nth in range(1, WAITS):
            gate = rig.gate = LoginGate(Chooser(reservations, N1), ClusterView(Ages()), HeldLogin, Timing(1.0, 3.0))
            gate.reservations = reservations
            gate.reconfigure({SITE: rig.service})
            with sabotage(nth, "keep_going", faults=[fault]) as done:
                async with trio.open_nursery() as nursery:
                    await nursery.start(gate.run)
                    reply = await rig.ask(Service([answer(302)]))
                    for _ in range(AT_ONCE):
                        await prolong(rig, reply)
                        await trio.sleep(0.01)
                    passed = await gate.admit(rig.request("/", cookie=pass_of(reply)))
                    lost = trio.Event()
                    assert passed.watch is not None
                    passed.watch(lost.set)
                    for _ in range(AT_ONCE + 1):  # each of those tasks is hit once at most
                        await prolong(rig, reply)
                    with trio.fail_after(20):
                        while left_ms(rig) <= IDLE_S * 900:
                            await gate.admit(rig.request("/", cookie=pass_of(reply)))
                            await trio.sleep(0.05)
                    reply.undone()
                    with trio.fail_after(20):
                        await lost.wait()
                    await until(lambda: has_ended(rig))
                    nursery.cancel_scope.cancel()
            hits += len(done.hit)
            for tree in done.hit:
                lines = [line.getMessage() for line in lines_about(tree.fault, caplog)]
                assert lines, "it was swallowed"
                assert all("begins again" in line for line in lines), lines
            caplog.clear()
    assert hits > WAITS


async def prolong(rig: Rig, reply: Reply) -> None:
    """Show the login that is about to end for want of requests. What hits the task that is to tell the store leaves it as it is."""
    reservations, login = rig.relay.reservations, login_of(rig)
    await reservations.extend(N1, login.login_id, SHORT_MS)
    await rig.gate.admit(rig.request("/", cookie=pass_of(reply)))


def left_ms(rig: Rig) -> int:
    """How long the login still lasts."""
    return login_of(rig).expires_ms - rig.relay.store.now_ms()


def has_ended(rig: Rig) -> bool:
    """Whether the store has no login any more that counts."""
    return all(login.expires_ms <= rig.relay.store.now_ms() for login in rig.relay.reservations.holders.standings()[N1].record.logins)


def login_of(rig: Rig) -> Login:
    """The one login; one before it may still be in the record."""
    return max(rig.relay.reservations.holders.standings()[N1].record.logins, key=lambda login: login.expires_ms)
