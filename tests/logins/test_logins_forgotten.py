"""Logins that the store keeps, and a store that has forgotten them: they count until the relays have had the time to say so again."""

import sqlite3
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from fxtunnel.kit.answers import Refused
from tests.logins.login_rig import N1, SIMPLE, Rig, Service, answer, open_rig, pass_of
from tests.reservations.test_reservations_kept import ANOTHER
from tests.reservations.test_reservations_service import until


@asynccontextmanager
async def forgotten(rig: Rig, tmp_path: Path) -> AsyncIterator[None]:
    """The store has forgotten everything, this relay has read that, and the relay that let the user in could not say so yet."""
    (hold,) = rig.relay.reservations.leases.kept()
    async with hold.lock:
        await trio.to_thread.run_sync(wipe, tmp_path)
        await until(lambda: not rig.users)
        yield
    await until(lambda: hold.token.epoch == ANOTHER)


def wipe(path: Path) -> None:
    database = sqlite3.connect(path / "cluster.db", timeout=10)
    with database:
        database.execute(f"UPDATE facts SET value = '{ANOTHER}' WHERE name = 'epoch'")
        database.execute("DELETE FROM documents")
    database.close()


async def test_a_user_stays_logged_in_though_the_store_has_forgotten_him(tmp_path: Path) -> None:
    async with open_rig(tmp_path, SIMPLE, N1) as rig:
        await until(lambda: rig.relay.reservations.upkeep.has_read)
        request = rig.request("/", cookie=pass_of(await rig.ask(Service([answer(302)]))))
        async with forgotten(rig, tmp_path):
            with pytest.raises(Refused) as caught:
                await rig.gate.admit(request)
            assert (caught.value.status, caught.value.fields) == (503, ())
        assert (await rig.gate.admit(request)).node == N1


async def test_what_hangs_on_a_login_stays_though_the_store_has_forgotten_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fxrelay.logins.gate.LOOK_S", 0.05)
    async with open_rig(tmp_path, SIMPLE, N1) as rig:
        await until(lambda: rig.relay.reservations.upkeep.has_read)
        allowed = await rig.gate.admit(rig.request("/", cookie=pass_of(await rig.ask(Service([answer(302)])))))
        assert allowed.watch is not None
        lost: list[None] = []
        allowed.watch(lambda: lost.append(None))
        async with forgotten(rig, tmp_path):
            await trio.sleep(0.2)
        await until(lambda: bool(rig.users))
        await trio.sleep(0.2)
        assert not lost


async def test_a_login_that_nobody_says_he_holds_ends_when_the_store_has_settled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # One that is gone does not find in the store either what it has let in.
    monkeypatch.setattr("fxrelay.reserving.upkeep.adopt_kept", lambda *_: None)
    async with open_rig(tmp_path, SIMPLE, N1) as rig:
        await until(lambda: rig.relay.reservations.upkeep.has_read)
        allowed = await rig.gate.admit(request := rig.request("/", cookie=pass_of(await rig.ask(Service([answer(302)])))))
        assert allowed.watch is not None
        lost: list[None] = []
        allowed.watch(lambda: lost.append(None))
        (hold,) = rig.relay.reservations.leases.kept()
        rig.relay.reservations.leases.forget(hold)  # as a relay that is gone does
        await trio.to_thread.run_sync(wipe, tmp_path)
        await until(lambda: bool(lost))
        with pytest.raises(Refused) as caught:
            await rig.gate.admit(request)
        assert (caught.value.status, caught.value.name) == (401, "LoginEnded")
        assert not rig.users
