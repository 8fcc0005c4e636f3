"""Placements on their way: counted until the server counts them, withdrawn, or too old."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fxrelay.cluster import inflight
from fxrelay.cluster.inflight import EXPIRES_S, InFlight, Placement, PlacementId
from fxtunnel.model import RelayId

A, B = RelayId("a"), RelayId("b")
MARGIN_MS = 250


def placement(name: str = "p1", server_id: str = "a", placed_ms: int = 10_000) -> Placement:
    return Placement(PlacementId(name), RelayId(server_id), placed_ms)


def test_it_counts_until_an_update_measured_later() -> None:
    flights = InFlight(MARGIN_MS)
    flights.add(placement(), 0.0)
    assert flights.counts(1.0) == {A: 1}
    for measured_ms in (0, 9_999, 10_000, 10_249):
        flights.measured(A, measured_ms)
        assert flights.counts(1.0) == {A: 1}
    flights.measured(B, 99_000)
    assert flights.counts(1.0) == {A: 1}
    flights.measured(A, 10_250)
    assert flights.counts(1.0) == {}
    assert len(flights) == 0


def test_a_replay_counts_once_and_a_later_time_counts() -> None:
    flights = InFlight(MARGIN_MS)
    flights.add(placement(), 0.0)
    flights.add(placement(), 1.0)
    assert flights.counts(1.0) == {A: 1}
    flights.add(placement(placed_ms=20_000), 2.0)
    flights.measured(A, 15_000)
    assert flights.counts(2.0) == {A: 1}
    flights.measured(A, 20_250)
    assert flights.counts(2.0) == {}


def test_an_earlier_time_does_not_undo_a_later_one() -> None:
    flights = InFlight(MARGIN_MS)
    flights.add(placement(placed_ms=20_000), 0.0)
    flights.add(placement(placed_ms=10_000), 0.0)
    flights.measured(A, 15_000)
    assert flights.counts(0.0) == {A: 1}


def test_nobody_moves_a_placement_to_another_server() -> None:
    flights = InFlight()
    flights.add(placement(), 0.0)
    flights.add(placement(server_id="b"), 0.0)
    assert flights.counts(0.0) == {A: 1}


def test_withdrawing_may_be_repeated() -> None:
    flights = InFlight()
    flights.add(placement(), 0.0)
    flights.add(placement("p2"), 0.0)
    flights.withdraw(PlacementId("p1"))
    flights.withdraw(PlacementId("p1"))
    flights.withdraw(PlacementId("nobody"))
    assert flights.counts(0.0) == {A: 1}


def test_one_that_nobody_withdrew_expires() -> None:
    flights = InFlight()
    flights.add(placement(), 0.0)
    flights.add(placement("p2"), 10.0)
    assert flights.counts(EXPIRES_S) == {A: 2}
    assert flights.counts(EXPIRES_S + 1) == {A: 1}
    assert flights.counts(EXPIRES_S + 11) == {}


def test_one_that_comes_again_after_its_end_lives_as_long_as_any() -> None:
    flights = InFlight()
    flights.add(placement(), 0.0)
    flights.withdraw(PlacementId("p1"))
    flights.add(placement(), 100.0)
    assert flights.counts(EXPIRES_S + 1) == {A: 1}
    assert flights.counts(EXPIRES_S + 101) == {}


def test_no_more_than_so_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inflight, "MAX_PLACEMENTS", 3)
    flights = InFlight()
    for number in range(10):
        flights.add(placement(f"p{number}"), 0.0)
    assert flights.counts(0.0) == {A: 3}
    flights.add(placement("p1", placed_ms=99_000), 0.0)
    flights.measured(A, 50_000)
    assert flights.counts(0.0) == {A: 1}
    flights.add(placement("p9"), 0.0)
    assert flights.counts(0.0) == {A: 2}


def test_what_is_remembered_of_those_that_ended_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inflight, "MAX_PLACEMENTS", 8)
    flights = InFlight()
    for number in range(1_000):
        flights.add(placement(f"p{number}"), 0.0)
        flights.withdraw(PlacementId(f"p{number}"))
    assert sum(map(len, (flights._where, flights._by_server))) == 0


NAMES = st.sampled_from([f"p{n}" for n in range(6)])
STEPS = st.one_of(
    st.tuples(st.just("add"), NAMES, st.sampled_from("ab"), st.integers(0, 5_000)),
    st.tuples(st.just("withdraw"), NAMES),
    st.tuples(st.just("measured"), st.sampled_from("ab"), st.integers(0, 6_000)),
    st.tuples(st.just("wait"), st.integers(0, 100)),
)


@given(st.lists(STEPS, max_size=60))
def test_it_counts_as_a_plain_list_would(steps: list[tuple[object, ...]]) -> None:
    flights = InFlight(MARGIN_MS)
    model: dict[str, tuple[str, int, float]] = {}
    now = 0.0
    for step in steps:
        match step:
            case ("add", str(name), str(server_id), int(placed_ms)):
                flights.add(placement(name, server_id, placed_ms), now)
                known = model.get(name, (server_id, placed_ms, now))
                if known[0] == server_id:
                    model[name] = (server_id, max(placed_ms, known[1]), known[2])
            case ("withdraw", str(name)):
                flights.withdraw(PlacementId(name))
                model.pop(name, None)
            case ("measured", str(server_id), int(measured_ms)):
                flights.measured(RelayId(server_id), measured_ms)
                model = {k: v for k, v in model.items() if v[0] != server_id or v[1] + MARGIN_MS > measured_ms}
            case ("wait", int(seconds)):
                now += seconds
        model = {k: v for k, v in model.items() if now - v[2] <= EXPIRES_S}
        expected = {each: sum(v[0] == each for v in model.values()) for each in "ab"}
        assert flights.counts(now) == {RelayId(key): value for key, value in expected.items() if value}
        assert len(flights) == len(model)
