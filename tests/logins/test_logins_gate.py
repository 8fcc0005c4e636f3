"""Logins at one relay with a real store: what becomes of each, and of its entry, when the service, the client or a rival does something."""

import json
import sqlite3
import time
from dataclasses import replace
from pathlib import Path

import jwt
import pytest
import trio
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fxrelay.balance.seating import SeatRules
from fxrelay.balance.settling import Mark, encode_mark
from fxrelay.cluster.members import MemberState
from fxrelay.cluster.ports import RESERVATION_MARKS
from fxrelay.cluster.sqlite_store import SqliteStore
from fxrelay.logins.gate import LoginGate, Timing
from fxrelay.logins.login import HeldLogin
from fxrelay.logins.rules import FASTX3, Bounds, Retry, ValueLocation, Where
from fxrelay.reserving.leases import Hold
from fxrelay.reserving.ledger import MARK
from fxrelay.web.heads import Field
from fxtunnel.kit.answers import Refused
from fxtunnel.model import RelayId, ServiceName
from tests.logins.login_rig import GONE, N1, N2, SIMPLE, SITE, Service, answer, open_rig, pass_of, stage, success
from tests.reservations.test_reservations_kept import ANOTHER
from tests.reservations.test_reservations_service import until


async def test_what_becomes_of_a_login(tmp_path: Path) -> None:
    async with open_rig(tmp_path, SIMPLE, N1, N2) as rig:
        reply = await rig.ask(Service([answer(200)]))
        assert (reply.answer.status, reply.extra) == (200, ())
        await rig.nothing_is_left()
        await rig.refused(Service([Refused(502, "BadGateway", "no")]), 502, "BadGateway")
        await rig.nothing_is_left()
        await rig.refused(Service([GONE, GONE]), 502, "Unreachable")
        await rig.nothing_is_left()
        await rig.refused(Service([]), 400, "NoUser", b"password=x")
        await rig.refused(Service([]), 400, "BadLogin", b"username=a&username=b")

        service = Service([GONE, answer(302)])
        reply = await rig.ask(service)
        assert service.sent_to == [N1, N2]
        assert rig.users == {N2: "ann"}
        assert rig.gate.chooser.asked[-1].user == "ann"
        live = await rig.gate.admit(rig.request("/", cookie=pass_of(reply)))
        assert (live.node, live.held) == (N2, None)
        named = replace(rig.request("/", cookie=pass_of(reply)), node=N1, is_named=True)
        assert (await rig.gate.admit(named)).node is None
        lost = trio.Event()
        assert live.watch is not None
        live.watch(lost.set)

        logout = rig.request("/logout", "POST", cookie=pass_of(reply))
        assert await rig.gate.answered(logout, N2, 403, ()) == ()
        assert await rig.gate.answered(rig.request("/", cookie=pass_of(reply)), N2, 200, ()) == ()
        assert rig.users == {N2: "ann"}
        assert b"Max-Age=0" in (await rig.gate.answered(logout, N2, 302, ()))[0]
        await rig.nothing_is_left()
        with trio.fail_after(10):
            await lost.wait()
        for _ in range(2):
            with pytest.raises(Refused, match="ended") as caught:
                await rig.gate.admit(rig.request("/", cookie=pass_of(reply)))
            assert caught.value.fields


async def test_an_answer_that_cannot_be_given_ends_the_login(tmp_path: Path) -> None:
    async with open_rig(tmp_path, SIMPLE, N1) as rig:
        reply = await rig.ask(Service([answer(302)]))
        assert rig.users == {N1: "ann"}
        reply.undone()
        await rig.nothing_is_left()
        with trio.move_on_after(0.2) as scope:
            await rig.ask(Service([answer(302)], trio.sleep_forever))
        assert scope.cancelled_caught
        await rig.nothing_is_left()
        assert len(rig.gate.quota) == 0


async def test_a_first_answer_that_cannot_be_given_ends_the_login(tmp_path: Path) -> None:
    async with open_rig(tmp_path, FASTX3, N1) as rig:
        first = await rig.ask(Service([stage("T1")]), b'{"username": "ann"}')
        first.undone()
        await rig.nothing_is_left()
        assert len(rig.gate.attempts) == 0
        await rig.ask(Service([stage("T1")]), b'{"username": "ann"}')
        second = await rig.ask(Service([stage("T2")]), b'{"authtoken": "T1"}')
        second.undone()  # the browser has a cookie by which it may go on
        await trio.sleep(0.3)  # what would take the login out would have done so
        assert rig.relay.reservations.holders.wanted(0) == {N1}


async def test_a_login_that_cannot_be_committed_leaves_no_entry(tmp_path: Path) -> None:
    async with open_rig(tmp_path, SIMPLE, N1) as rig:

        async def breaks() -> None:
            rig.relay.store.is_cut = True

        await rig.refused(Service([answer(302)], breaks), 503, "ReservationsUnavailable")
        rig.relay.store.is_cut = False
        await rig.nothing_is_left()


async def test_who_loses_his_server_is_moved_or_told(tmp_path: Path) -> None:
    async with open_rig(tmp_path, SIMPLE, N1, N2) as rig:
        taken: list[Hold] = []

        async def rival_comes() -> None:
            if not taken:
                taken.append(await rig.rival.taken(N1, "bob"))

        service = Service([answer(302), answer(302)], rival_comes)
        reply = await rig.ask(service)
        assert service.sent_to == [N1, N2]
        assert rig.users == {N1: "bob", N2: "ann"}
        reply.undone()
        rig.rival.reservations.release(taken.pop())
        await rig.nothing_is_left()
        rig.gate.reconfigure({SITE: replace(rig.service, rules=replace(SIMPLE, retry=Retry.TELL))})
        service = Service([answer(302)], rival_comes)
        refused = await rig.refused(service, 409, "Reserved")
        assert "bob" not in str(refused)
        assert service.sent_to == [N1]
        assert rig.users == {N1: "bob"}


async def test_tokens_decide_whose_login_it_is(tmp_path: Path) -> None:
    async with open_rig(tmp_path, FASTX3, N1) as rig:
        body = b'{"username": "whoever", "password": "x", "basic": true}'
        forged = jwt.encode({"sub": "ann", "exp": 4_000_000_000}, Ed25519PrivateKey.generate(), algorithm="EdDSA")
        for bad in (
            answer(200, b'{"result": {"stage": "success"}}'),
            answer(200, json.dumps({"result": {"stage": "success", "token": forged}}).encode()),
            success(exp=1_000_000_000),
            success(sub=""),
            success(sub=7),
            success(sub="a\nb"),
        ):
            await rig.refused(Service([bad]), 502, "BadLogin", body)
            await rig.nothing_is_left()
        for value in (True, False, None, {}):
            reply = await rig.ask(Service([success(**{"fastx/daemon": value})]), body)
            assert reply.extra == ()
            await rig.nothing_is_left()
        good = success()
        await rig.ask(Service([good]), body)
        assert rig.users == {N1: "ann"}
        token = json.loads(good.body)["result"]["token"]
        for name, value in ((b"authorization", b"Bearer " + token.encode()), (b"x-fastx-token", token.encode())):
            shown = replace(rig.request("/"), fields=(Field(name, name, value),))
            assert (await rig.gate.admit(shown)).node == N1
        stranger = replace(rig.request("/"), fields=(Field(b"authorization", b"Authorization", b"Bearer x.y.z"),))
        assert (await rig.gate.admit(stranger)).node is None
        # A login that says nothing of its user until it has succeeded
        await rig.refused(Service([]), 503, "NoServerFree", b'{"code": "x"}')


async def test_a_login_of_several_requests(tmp_path: Path) -> None:
    async with open_rig(tmp_path, FASTX3, N1, N2) as rig:
        first = await rig.ask(Service([stage("T1")]), b'{"username": "ann"}')
        assert b"fxlogin-try=" in first.extra[0]
        assert rig.relay.reservations.holders.wanted(0) == {N1}
        service = Service([stage("T2")])
        await rig.ask(service, b'{"authtoken": "T1"}')
        assert service.sent_to == [N1]
        await rig.refused(Service([]), 409, "Reserved", b'{"authtoken": "T1"}')  # an old one
        await rig.refused(Service([]), 409, "Reserved", b'{"authtoken": "unknown"}')
        # A wrong password; this service lets it be corrected
        await rig.ask(Service([answer(200, b'{"error": {}}')]), b'{"authtoken": "T2", "password": "wrong"}')
        await rig.nothing_is_left()
        service = Service([success()])
        await rig.ask(service, b'{"authtoken": "T2", "password": "right"}')
        assert service.sent_to == [N1]
        assert rig.users == {N1: "ann"}
        await rig.refused(Service([]), 409, "Reserved", b'{"authtoken": "T2"}')
        assert len(rig.gate.attempts) == 0


async def test_two_requests_of_one_login_at_once(tmp_path: Path) -> None:
    async with open_rig(tmp_path, FASTX3, N1) as rig:
        await rig.ask(Service([stage("T1")]), b'{"username": "ann"}')
        go = trio.Event()
        async with trio.open_nursery() as nursery:
            service = Service([success()], go.wait)
            nursery.start_soon(rig.ask, service, b'{"authtoken": "T1"}')
            await until(lambda: bool(service.sent_to))
            await rig.refused(Service([]), 409, "LoginBusy", b'{"authtoken": "T1"}')
            go.set()
        assert rig.users == {N1: "ann"}


async def test_servers_that_are_nobodys_alone(tmp_path: Path) -> None:
    async with open_rig(tmp_path, FASTX3, N1, is_reserving=False) as rig:
        await rig.ask(Service([stage("T1")]), b'{"username": "ann"}')
        service = Service([success()])
        await rig.ask(service, b'{"authtoken": "T1"}')
        assert service.sent_to == [N1]
        await rig.nothing_is_left()


async def test_starts_are_kept_off_others_servers_if_that_is_wanted(tmp_path: Path) -> None:
    async with open_rig(tmp_path, SIMPLE, N1, N2) as rig:
        reply = await rig.ask(Service([answer(302)]))
        assert (await rig.gate.admit(rig.request("/"))).closed == frozenset()
        rig.gate.reconfigure({SITE: replace(rig.service, seats=SeatRules(always=True, guard_start=True))})
        assert N1 in (await rig.gate.admit(rig.request("/"))).closed
        own = await rig.gate.admit(rig.request("/", cookie=pass_of(reply)))
        assert own.node == N1
        assert N1 not in own.closed


async def test_services_without_logins_may_keep_off_reserved_servers_too(tmp_path: Path) -> None:
    async with open_rig(tmp_path, SIMPLE, N1, N2) as rig:
        await rig.ask(Service([answer(302)]))
        start = replace(rig.request("/node/n1/x"), service=ServiceName("start"))
        assert not rig.gate.concerns(start.service)
        rig.gate.reconfigure({SITE: rig.service}, frozenset({start.service}))
        assert rig.gate.concerns(start.service)
        assert N1 in (await rig.gate.admit(start)).closed
        assert N1 not in (await rig.gate.admit(replace(start, user="ann"))).closed
        rig.gate.reservations = None
        with pytest.raises(Refused, match="cannot be given out"):
            await rig.gate.admit(start)


async def test_without_the_store(tmp_path: Path) -> None:
    async with open_rig(tmp_path, SIMPLE, N1, N2) as rig:
        reply = await rig.ask(Service([answer(302)]))
        rig.relay.store.is_cut = True
        await rig.refused(Service([answer(302)]), 503, "ReservationsUnavailable")
        assert (await rig.gate.admit(rig.request("/", cookie=pass_of(reply)))).node == N1

        async def breaks() -> None:
            rig.relay.store.is_cut = True

        rig.relay.store.is_cut = False
        await rig.refused(Service([answer(302)], breaks), 503, "ReservationsUnavailable", b"username=bob")
        rig.relay.store.is_cut = False


async def test_nothing_is_sent_to_a_server_before_the_store_can_be_trusted(tmp_path: Path) -> None:
    async with open_rig(tmp_path, FASTX3, N1) as rig:
        first = b'{"username": "ann"}'
        await rig.ask(Service([stage("t1")]), first)
        await trio.to_thread.run_sync(forget, tmp_path, rig.relay.store)
        for body in (first, b'{"authtoken": "t1", "password": "x"}'):
            service = Service([])
            with pytest.raises(Refused) as caught:
                await rig.ask(service, body)
            assert (caught.value.status, caught.value.name, service.sent_to) == (503, "ReservationsUnavailable", [])


def forget(path: Path, store: SqliteStore) -> None:
    """The store has lost its memory, and goes on having lost it a moment ago."""
    with sqlite3.connect(path / "cluster.db", timeout=10) as database:
        database.execute(f"UPDATE facts SET value = '{ANOTHER}' WHERE name = 'epoch'")
    database.close()
    store.put(RESERVATION_MARKS, MARK, encode_mark(Mark(ANOTHER, store.now_ms() + 60_000, store.now_ms())))


async def test_one_address_may_hold_so_many(tmp_path: Path) -> None:
    rules = replace(SIMPLE, bounds=Bounds(per_address=2), token=ValueLocation(Where.COOKIE, "s"))
    async with open_rig(tmp_path, rules, N1) as rig, trio.open_nursery() as nursery:
        for _ in range(2):
            nursery.start_soon(rig.ask, Service([], trio.sleep_forever))
        await until(lambda: len(rig.gate.quota) == 2)
        await rig.refused(Service([]), 429, "TooManyLogins")
        reply = await rig.ask(Service([answer(302, set_cookie="s=1")]), b"username=bob", "192.0.2.2:7")
        assert reply.answer.status == 302
        assert rig.users == {N1: "bob"}
        nursery.cancel_scope.cancel()


async def test_an_idle_login_ends_sooner_than_one_that_is_used(tmp_path: Path) -> None:
    async with open_rig(tmp_path, replace(SIMPLE, bounds=Bounds(lifetime_s=100, idle_s=40)), N1) as rig:
        reply = await rig.ask(Service([answer(302)]))

        def left_ms() -> int:
            login = rig.relay.reservations.holders.standings()[N1].record.logins[0]
            return login.expires_ms - rig.relay.store.now_ms()

        assert 30_000 < left_ms() <= 40_000
        login_id = rig.relay.reservations.holders.standings()[N1].record.logins[0].login_id
        await rig.relay.reservations.extend(N1, login_id, 20_000)
        assert left_ms() <= 20_000
        await rig.gate.admit(rig.request("/", cookie=pass_of(reply)))
        await until(lambda: left_ms() > 30_000)


async def test_a_relay_that_takes_no_part_refuses(tmp_path: Path) -> None:
    async with open_rig(tmp_path, SIMPLE, N1) as rig:
        rig.gate.reservations = None
        with pytest.raises(Refused, match="cannot be given out"):
            await rig.gate.admit(rig.request("/"))
        other = replace(rig.request("/"), service=ServiceName("other"))
        assert (await rig.gate.admit(other)).held is None
        assert await rig.gate.answered(other, N1, 200, ()) == ()


class Silence:
    """What the cluster's view says of servers: `state` of them all, at `now`."""

    def __init__(self) -> None:
        self.now = 0.0
        self.now_ms = 0
        self.state = MemberState.DOWN
        self.members = self

    def get(self, server_id: RelayId, now: float) -> "Silence":
        return self


async def test_a_relay_that_stood_still_ends_nobodys_login(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fxrelay.logins.gate.LOOK_S", 0.05)
    async with open_rig(tmp_path, SIMPLE, N1) as rig, trio.open_nursery() as nursery:
        await until(lambda: rig.relay.reservations.upkeep.has_read)
        await rig.ask(Service([answer(302)]))
        silence = Silence()
        silence.state = MemberState.UP
        gate = LoginGate(rig.gate.chooser, silence, HeldLogin, Timing(1.0, 3.0))  # a fake view
        gate.reservations = rig.relay.reservations
        nursery.start_soon(gate._look)
        await until(lambda: gate._silent_since == {N1: None})
        silence.state = MemberState.DOWN
        time.sleep(1.0)  # noqa: ASYNC251 - as if the process had been stopped; what it has not read yet makes everybody look dead
        await until(lambda: gate._silent_since.get(N1) is not None)
        assert rig.users == {N1: "ann"}
        silence.state = MemberState.UP
        await until(lambda: gate._silent_since == {N1: None})
        silence.state = MemberState.DOWN
        await rig.nothing_is_left()
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("was_heard", [True, False])
async def test_a_dead_server_has_no_logins(tmp_path: Path, was_heard: bool) -> None:
    async with open_rig(tmp_path, SIMPLE, N1) as rig:
        silence = Silence()
        gate = LoginGate(rig.gate.chooser, silence, HeldLogin, Timing(1.0, 90.0))
        await rig.ask(Service([answer(302)]))
        if was_heard:
            silence.state = MemberState.UP
            gate._free_dead_servers(rig.relay.reservations)
            silence.state = MemberState.DOWN
        else:  # after a rest of all relays everybody looks dead
            for silence.now in (0.0, 89.0):
                gate._free_dead_servers(rig.relay.reservations)
                await trio.sleep(0.3)
                assert rig.users == {N1: "ann"}
            silence.now = 91.0
        gate._free_dead_servers(rig.relay.reservations)
        await rig.nothing_is_left()
