"""One user, one server, though his streams come by relays that have not heard of each other yet."""

from pathlib import Path

import home_world
import pytest
import trio
from home_world import Stream, World
from hypothesis import given
from hypothesis import strategies as st
from reservation_search import search
from test_reservations_service import Relay, relays, until

from fxrelay.balance.homes import MAX_HOMES, decode_homes, encode_homes, key_of, with_home, without_home
from fxrelay.balance.reservations import OwnerRelogin, Reason
from fxrelay.balance.seating import SeatRules
from fxrelay.cluster.ports import RESERVATION_USERS
from fxrelay.delivery.ports import NotTaken, Taken, Then
from fxrelay.reserving.leases import Hold, LeaseTerms
from fxrelay.reserving.reservations import NotEntered
from fxrelay.reserving.seats import StreamSeating
from fxtunnel.model import RelayId

S1, S2 = RelayId("s1"), RelayId("s2")
BOTH = frozenset({"s1", "s2"}).__contains__
ANNS = World((Stream("ann"), Stream("ann"), Stream("bob")))


@pytest.mark.parametrize("streams", [2, 3])
def test_a_user_has_one_server_in_every_interleaving(streams: int) -> None:
    start = ANNS._replace(streams=ANNS.streams[:streams])
    found = search(start, home_world.Steps(True), home_world.problem, max_depth=80, max_states=10_000)
    assert not found.problem, found.told()
    assert found.depth > 7


def test_the_search_would_find_a_commit_that_does_not_ask_for_the_users_servers() -> None:
    found = search(ANNS, home_world.Steps(False), home_world.problem, max_depth=40, max_states=20_000)
    assert "ann is on s1 and on s2" in found.problem


async def take(relay: Relay, server: RelayId, user: str = "ann", relogin: OwnerRelogin = OwnerRelogin.PREFER) -> Hold | NotEntered:
    return await relay.reservations.take(server, user, "192.0.2.1", LeaseTerms(), relogin, BOTH)


async def test_of_two_first_streams_by_two_relays_the_second_goes_to_the_firsts_server(tmp_path: Path) -> None:
    async with relays(tmp_path, "a", "b") as (first, second):
        answers: dict[str, Hold | NotEntered] = {}

        async def come(relay: Relay, server: RelayId) -> None:
            answers[server] = await take(relay, server)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(come, first, S1)
            nursery.start_soon(come, second, S2)
        holds = [answer for answer in answers.values() if isinstance(answer, Hold)]
        refused = [answer for answer in answers.values() if isinstance(answer, NotEntered)]
        assert [len(holds), len(refused)] == [1, 1]
        assert (refused[0].reason, refused[0].is_final) == (Reason.ELSEWHERE, False)
        other = second if isinstance(answers[S1], Hold) else first
        # Nobody was told anything yet: no follower runs here.
        assert other.reservations.holders.users(0) == {holds[0].server_id: "ann"}
        assert isinstance(await take(other, holds[0].server_id), Hold)


async def test_who_may_have_several_servers_gets_them(tmp_path: Path) -> None:
    async with relays(tmp_path, "a", "b") as (first, second):
        assert isinstance(await take(first, S1, relogin=OwnerRelogin.DENY), Hold)
        assert isinstance(await take(second, S2, relogin=OwnerRelogin.DENY), Hold)
        assert isinstance(await take(first, S2, "bob"), NotEntered)


async def test_a_server_that_would_not_do_is_in_nobodys_way(tmp_path: Path) -> None:
    async with relays(tmp_path, "a", "b") as (first, second):
        assert isinstance(await take(first, S1), Hold)
        elsewhere = await second.reservations.take(S2, "ann", "192.0.2.1", LeaseTerms(), OwnerRelogin.PREFER, "s3".__eq__)
        assert isinstance(elsewhere, Hold)


async def test_who_has_left_a_server_gets_another(tmp_path: Path) -> None:
    async with relays(tmp_path, "a", "b") as (first, second):
        hold = await take(first, S1)
        assert isinstance(hold, Hold)
        first.reservations.release(hold)
        await until(lambda: not first.reservations.leases.is_ending(hold.login_id))
        assert first.store.get(RESERVATION_USERS, "ann") is None
        assert isinstance(await take(second, S2), Hold)
        assert decode_homes(second.store.get(RESERVATION_USERS, "ann").text) == ("s2",)


async def test_a_server_lost_by_a_lease_is_written_out_of_its_users_document(tmp_path: Path) -> None:
    async with relays(tmp_path, "a", "b") as (first, second):
        assert isinstance(await take(first, S1), Hold)
        first.store.is_cut = True
        await second.taken(S1, "bob")
        await until(lambda: second.store.get(RESERVATION_USERS, "ann") is None)
        assert isinstance(await take(second, S2), Hold)


async def test_an_administrator_who_releases_a_server_releases_its_user(tmp_path: Path) -> None:
    async with relays(tmp_path, "a") as (relay,):
        hold = await take(relay, S1)
        assert isinstance(hold, Hold)
        before, after = relay.reservations._cache.ledger.clear(S1)
        assert (before.holder, after.holder, after.fence) == ("ann", "", after.revision)
        assert relay.store.get(RESERVATION_USERS, "ann") is None


@pytest.mark.parametrize("text", ["nonsense", "{}", '["s1", 7, "a b"]', '["s1", "s9"]'])
async def test_a_users_document_that_says_too_much_is_mended(tmp_path: Path, text: str) -> None:
    async with relays(tmp_path, "a") as (relay,):
        relay.store.put(RESERVATION_USERS, "ann", text)
        for _ in range(2):
            answer = await take(relay, S2)
        assert isinstance(answer, Hold)
        assert not set(decode_homes(relay.store.get(RESERVATION_USERS, "ann").text)) & {"s1"}


async def test_a_seat_is_not_taken_by_who_has_another_and_the_chooser_is_asked_again(tmp_path: Path) -> None:
    async with relays(tmp_path, "a", "b") as (first, second):
        seats = [StreamSeating(relay.reservations) for relay in (first, second)]
        one, two = seats[0].seat(S1, "ann", SeatRules(), BOTH), seats[1].seat(S2, "ann", SeatRules(), BOTH)
        assert isinstance(await one.take(), Taken)
        refused = await two.take()
        assert isinstance(refused, NotTaken)
        assert (refused.then, "ann" in refused.text, "s1" in refused.text) == (Then.AGAIN, False, False)
        assert second.reservations.holders.users(0) == {S1: "ann"}
        one.release()


async def test_what_a_relay_has_not_heard_it_reads(tmp_path: Path) -> None:
    async with relays(tmp_path, "a", "b") as (first, second):
        assert isinstance(await take(first, S1), Hold)
        await StreamSeating(second.reservations).find_homes("ann")
        assert second.reservations.holders.users(0)[S1] == "ann"


NAMES = st.lists(st.sampled_from([f"s{number}" for number in range(100)]), max_size=80)


@given(NAMES)
def test_the_latest_servers_are_kept(names: list[str]) -> None:
    homes: tuple[str, ...] = ()
    for name in names:
        homes = with_home(homes, name)
        assert name in homes
    assert len(homes) == min(MAX_HOMES, len(set(names)))
    assert decode_homes(encode_homes(homes)) == homes
    for name in names:
        homes = without_home(homes, name)
        assert name not in homes
    assert encode_homes(homes) is None


@pytest.mark.parametrize(
    ("user", "key"), [("ann", "ann"), ("", ""), ("192.0.2.1", "192.0.2.1"), ("\ud800", ""), ("a" * 1_025, ""), ("ä" * 512, "ä" * 512)]
)
def test_users_whose_servers_can_be_written_down(user: str, key: str) -> None:
    assert key_of(user) == key
