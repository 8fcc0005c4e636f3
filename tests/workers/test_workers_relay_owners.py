"""Which worker has which relay; and how several processes count clients together."""

import random
from ipaddress import ip_network

from hypothesis import given, settings
from hypothesis import strategies as st

from fxgateway.routing.admission import Admission, AdmissionLimits, Verdict
from fxgateway.routing.shared_admission import SharedAdmission
from fxgateway.workers.relay_owners import PLACED_S, Granted, Holder, RelayOwners
from fxtunnel.model import InstanceId, RelayId

A, B = RelayId("node-a"), RelayId("node-b")
FIRST, SECOND = InstanceId("first"), InstanceId("second")


def test_the_same_instance_at_the_same_worker_keeps_its_epoch() -> None:
    owners = RelayOwners(10)
    assert owners.claim(1, A, FIRST) == Granted(1)
    assert owners.claim(1, A, FIRST) == Granted(1)


def test_whoever_had_the_name_elsewhere_is_named_and_the_epoch_rises() -> None:
    owners = RelayOwners(10)
    owners.claim(1, A, FIRST)
    assert owners.claim(2, A, SECOND) == Granted(2, Holder(1, FIRST, 1))
    assert owners.claim(2, A, FIRST) == Granted(3)  # at the same worker its own registry fences
    assert owners.claim(1, A, FIRST) == Granted(4, Holder(2, FIRST, 3))


def test_a_worker_that_lost_a_name_cannot_give_it_up_for_its_successor() -> None:
    owners = RelayOwners(10)
    owners.claim(1, A, FIRST)
    owners.claim(2, A, SECOND)
    owners.gone(1, A)
    assert owners.holder(A) == Holder(2, SECOND, 2)
    owners.note(1, A, FIRST, 1)  # said before it heard of the other
    assert owners.holder(A) == Holder(2, SECOND, 2)
    owners.gone(2, A)
    assert owners.holder(A) is None
    assert owners.claim(1, A, FIRST) == Granted(3)


def test_there_is_room_for_so_many_relays_over_all_workers() -> None:
    owners = RelayOwners(1)
    assert owners.claim(1, A, FIRST) is not None
    assert owners.claim(2, B, FIRST) is None
    assert owners.claim(2, A, SECOND) is not None
    owners.worker_gone(2)
    assert owners.claim(1, B, FIRST) is not None


def test_relays_are_spread_evenly_also_when_all_come_at_once() -> None:
    owners = RelayOwners(100)
    assert [owners.place((1, 2, 3), 0.0) for _ in range(6)] == [1, 2, 3, 1, 2, 3]
    for number in range(4):
        owners.claim(1, RelayId(f"relay-{number}"), FIRST)
    assert owners.place((1, 2, 3), PLACED_S + 1) in (2, 3)
    assert owners.place((), 0.0) is None


def test_a_worker_that_has_nobody_yet_is_chosen_before_one_that_has_somebody() -> None:
    """An enrolment is a connection that turns out to be none, and its relay may dial again before that is known."""
    owners = RelayOwners(10)
    assert owners.place([1, 2], 0.0) == 1
    owners.claim(1, A, FIRST)
    assert owners.place([1, 2], 0.1) == 2, "the enrolment of another relay"
    assert owners.place([1, 2], 0.1) == 2, "the relay itself"


def test_a_connection_that_was_no_relay_is_counted_no_longer() -> None:
    owners = RelayOwners(100)
    assert owners.place((1, 2), 0.0) == 1
    owners.unplace(1)
    owners.unplace(1)
    assert owners.place((1, 2), 0.0) == 1


LIMITS = AdmissionLimits(
    connections=12, connections_per_door=9, connections_per_source=5, open_rate_per_source_per_s=1.0, open_burst_per_source=8
)


def tell(processes: list[SharedAdmission], now: float) -> None:
    for number, process in enumerate(processes):
        changes = process.changes()
        if changes is not None:
            for other in processes:
                if other is not process:
                    other.note(number, changes, now)


STEPS = st.tuples(st.integers(0, 2), st.sampled_from(["in", "in", "out", "over"]), st.sampled_from(["192.0.2.1", "192.0.2.2"]))


@given(st.lists(STEPS, max_size=80))
@settings(max_examples=150, deadline=None)
def test_processes_that_tell_each_other_admit_what_one_would(steps: list[tuple[int, str, str]]) -> None:
    alone = Admission(LIMITS)
    together = [SharedAdmission(LIMITS, 1_000) for _ in range(3)]
    inside: list[tuple[int, str, str]] = []
    rng = random.Random(1)
    for number, (process, what, address) in enumerate(steps):
        now = number * 0.1
        door = f"door-{number % 2}"
        if what == "in":
            verdict = alone.admit(door, address, now)
            assert together[process].admit(door, address, now) is verdict
            if verdict is Verdict.ADMIT:
                inside.append((process, door, address))
        elif inside:
            process, door, address = inside.pop(rng.randrange(len(inside)))
            if what == "out":
                alone.release(door, address)
                together[process].release(door, address)
            else:  # passed on
                other = (process + 1) % 3
                together[process].release(door, address)
                together[other].adopt(door, address, now)
                inside.append((other, door, address))
        tell(together, now)
        assert {process.connections for process in together} == {alone.connections} == {len(inside)}


def test_no_process_gets_more_connections_than_it_has_descriptors_for() -> None:
    one, other = (SharedAdmission(AdmissionLimits(exempt=(ip_network("192.0.2.0/24"),)), 4) for _ in range(2))
    assert one.has_room(2)
    for _ in range(3):
        assert other.admit("door", "192.0.2.1", 0.0) is Verdict.ADMIT
    changes = other.changes()
    assert changes is not None
    one.note(2, changes, 0.0)
    assert one.has_room(2)
    one.passed_on(2)
    assert not one.has_room(2), "this one is on its way there"
    other.adopt("door", "192.0.2.1", 0.0)
    other.release("door", "192.0.2.1")
    tell([other, one], 0.0)
    one.note(2, other.counts(), 0.0)
    assert one.has_room(2)
    assert one.admit("door", "192.0.2.1", 0.0) is Verdict.ADMIT
    one.bridge(2)  # whom the other counts, and who take as many descriptors here
    assert one.admit("door", "192.0.2.1", 0.0) is Verdict.FULL
    other.note(1, one.counts(), 0.0)
    assert not other.has_room(1)
    one.bridge(1)
    changes = one.changes()
    assert changes is not None
    other.note(1, changes, 0.0)
    assert other.has_room(1)


def test_a_process_that_dies_takes_its_counts_with_it() -> None:
    one, other = SharedAdmission(LIMITS, 1_000), SharedAdmission(LIMITS, 1_000)
    for _ in range(5):
        assert one.admit("door", "192.0.2.1", 0.0) is Verdict.ADMIT
    tell([one, other], 0.0)
    assert other.admit("door", "192.0.2.1", 0.0) is Verdict.SOURCE_FULL
    other.forget(0, 0.0)
    assert other.connections == 0
    assert other.admit("door", "192.0.2.1", 0.0) is Verdict.ADMIT  # of the burst of 8, 5 are spent


def test_who_knows_nothing_yet_is_told_everything() -> None:
    one, late = SharedAdmission(LIMITS, 1_000), SharedAdmission(LIMITS, 1_000)
    for _ in range(5):
        one.admit("door", "192.0.2.1", 0.0)
    one.changes()
    late.note(0, one.counts(), 0.0)
    assert late.admit("door", "192.0.2.1", 0.0) is Verdict.SOURCE_FULL
    assert one.changes() is None


def test_a_process_has_no_more_than_its_descriptors_allow() -> None:
    one = SharedAdmission(LIMITS, 2)
    assert [one.admit("door", "192.0.2.1", 0.0) for _ in range(3)] == [Verdict.ADMIT, Verdict.ADMIT, Verdict.FULL]
