"""Who is let in, that what is counted comes back, and that strangers cannot make the counting itself a burden."""

from ipaddress import ip_network

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from fxgateway.routing import admission as module
from fxgateway.routing.admission import Admission, AdmissionLimits, Verdict
from fxtunnel.kit.sources import source_of

ADMIT = Verdict.ADMIT


def limits(
    *, connections: int = 100, per_door: int = 100, per_source: int = 100, rate_per_s: float = 1.0, burst: int = 1_000, exempt: str = ""
) -> AdmissionLimits:
    networks = tuple(ip_network(text) for text in exempt.split())
    return AdmissionLimits(connections, per_door, per_source, rate_per_s, burst, networks)


def remembered(admission: Admission) -> int:
    return len(admission._sources) + len(admission._exempt_cache)


@pytest.mark.parametrize(
    ("bounds", "verdict"),
    [
        (limits(connections=3), Verdict.FULL),
        (limits(per_door=3), Verdict.DOOR_FULL),
        (limits(per_source=3), Verdict.SOURCE_FULL),
        (limits(burst=3), Verdict.TOO_FAST),
    ],
)
def test_each_limit_has_its_own_verdict(bounds: AdmissionLimits, verdict: Verdict) -> None:
    admission = Admission(bounds)
    assert [admission.admit("ssh", "192.0.2.1", 5.0) for _ in range(4)] == [ADMIT] * 3 + [verdict]
    assert admission.connections == 3


def test_refusals_are_not_counted() -> None:
    admission = Admission(limits(per_source=1))
    assert admission.admit("ssh", "192.0.2.1", 0.0) is ADMIT
    for _ in range(50):
        assert admission.admit("ssh", "192.0.2.1", 0.0) is Verdict.SOURCE_FULL
    admission.release("ssh", "192.0.2.1")
    assert admission.connections == 0
    assert admission.admit("ssh", "192.0.2.1", 0.0) is ADMIT


def test_the_gateway_is_full_before_anything_else_is() -> None:
    admission = Admission(limits(connections=1, per_door=1, per_source=1, burst=1))
    assert admission.admit("ssh", "192.0.2.1", 0.0) is ADMIT
    assert admission.admit("ssh", "192.0.2.1", 0.0) is Verdict.FULL


def test_doors_are_counted_apart() -> None:
    admission = Admission(limits(per_door=1))
    assert admission.admit("ssh", "192.0.2.1", 0.0) is ADMIT
    assert admission.admit("db", "192.0.2.1", 0.0) is ADMIT
    assert admission.admit("db", "192.0.2.1", 0.0) is Verdict.DOOR_FULL


def test_a_door_may_have_a_bound_of_its_own() -> None:
    admission = Admission(AdmissionLimits(connections_per_door=2, per_door={"vnc": 1}))
    assert [admission.admit("vnc", "192.0.2.1", 0.0) for _ in range(2)] == [ADMIT, Verdict.DOOR_FULL]
    assert [admission.admit("ssh", "192.0.2.1", 0.0) for _ in range(3)] == [ADMIT, ADMIT, Verdict.DOOR_FULL]


def test_a_bucket_fills_again_at_its_rate_up_to_the_burst() -> None:
    admission = Admission(limits(rate_per_s=2.0, burst=4))
    admitted = []
    for now, tries in ((0.0, 6), (0.4, 1), (0.5, 1), (0.9, 1), (1.0, 2), (100.0, 6)):
        verdicts = [admission.admit("ssh", "192.0.2.1", now) for _ in range(tries)]
        assert set(verdicts) <= {ADMIT, Verdict.TOO_FAST}
        admitted.append(verdicts.count(ADMIT))
    assert admitted == [4, 0, 1, 0, 1, 4]


def test_sources_have_buckets_of_their_own() -> None:
    admission = Admission(limits(burst=1))
    assert [admission.admit("ssh", f"192.0.2.{i}", 0.0) for i in range(20)] == [ADMIT] * 20


@pytest.mark.parametrize(
    ("address", "source"),
    [
        ("192.0.2.1", "192.0.2.1"),
        ("::ffff:192.0.2.1", "192.0.2.1"),
        ("2001:db8:1:2::1", "2001:db8:1:2::/64"),
        ("2001:db8:1:2:ffff:ffff:ffff:ffff", "2001:db8:1:2::/64"),
        ("2001:db8:1:3::1", "2001:db8:1:3::/64"),
        ("fe80::1%eth0", "fe80::/64"),
        ("::1", "::/64"),
        ("", ""),
    ],
)
def test_what_counts_as_one_source(address: str, source: str) -> None:
    assert source_of(address) == source


def test_addresses_of_one_ipv6_site_share_a_count() -> None:
    admission = Admission(limits(per_source=2))
    assert [admission.admit("ssh", f"2001:db8:1:2::{i}", 0.0) for i in range(1, 4)] == [ADMIT, ADMIT, Verdict.SOURCE_FULL]
    assert admission.admit("ssh", "2001:db8:1:3::1", 0.0) is ADMIT
    admission.release("ssh", "2001:db8:1:2::1")
    assert admission.admit("ssh", "2001:db8:1:2::9", 0.0) is ADMIT


def test_a_mapped_address_is_the_ipv4_address() -> None:
    admission = Admission(limits(per_source=1))
    assert admission.admit("ssh", "::ffff:192.0.2.1", 0.0) is ADMIT
    assert admission.admit("ssh", "192.0.2.1", 0.0) is Verdict.SOURCE_FULL


@pytest.mark.parametrize("address", ["127.0.0.1", "127.9.9.9", "::ffff:127.0.0.1", "::1", "2001:db8::7", "fe80::1%eth0", ""])
def test_exempt_sources_are_bound_by_the_gateway_and_the_door_only(address: str) -> None:
    admission = Admission(limits(per_source=1, burst=1, per_door=5, exempt="127.0.0.0/8 ::1/128 2001:db8::/48 fe80::/10"))
    assert [admission.admit("ssh", address, 0.0) for _ in range(6)] == [ADMIT] * 5 + [Verdict.DOOR_FULL]
    for _ in range(5):
        admission.release("ssh", address)
    assert admission.connections == 0


def test_an_exempt_address_does_not_give_back_what_its_neighbours_hold() -> None:
    """Both are of one /64, only one is exempt."""
    admission = Admission(limits(per_source=1, exempt="2001:db8::1/128"))
    assert admission.admit("ssh", "2001:db8::2", 0.0) is ADMIT
    assert admission.admit("ssh", "2001:db8::1", 0.0) is ADMIT
    admission.release("ssh", "2001:db8::1")
    assert admission.admit("ssh", "2001:db8::2", 0.0) is Verdict.SOURCE_FULL


@pytest.mark.parametrize(("before", "after"), [("192.0.2.0/24", ""), ("", "192.0.2.0/24")])
def test_new_exemptions_leave_the_count_of_open_connections_right(before: str, after: str) -> None:
    admission = Admission(limits(per_source=2, exempt=before))
    assert admission.admit("ssh", "192.0.2.1", 0.0) is ADMIT
    admission.apply(limits(per_source=2, exempt=after))
    assert admission.admit("ssh", "192.0.2.1", 0.0) is ADMIT
    admission.release("ssh", "192.0.2.1")
    admission.release("ssh", "192.0.2.1")
    admission.apply(limits(per_source=2))
    assert [admission.admit("ssh", "192.0.2.1", 0.0) for _ in range(3)] == [ADMIT, ADMIT, Verdict.SOURCE_FULL]


def test_new_limits_hold_for_what_comes_in_from_now_on() -> None:
    admission = Admission(limits(per_source=4))
    for _ in range(4):
        assert admission.admit("ssh", "192.0.2.1", 0.0) is ADMIT
    admission.apply(limits(per_source=2))
    for _ in range(2):
        admission.release("ssh", "192.0.2.1")
        assert admission.admit("ssh", "192.0.2.1", 0.0) is Verdict.SOURCE_FULL
    admission.release("ssh", "192.0.2.1")
    assert admission.admit("ssh", "192.0.2.1", 0.0) is ADMIT


def test_sweep_forgets_full_buckets_and_nothing_else() -> None:
    admission = Admission(limits(rate_per_s=10.0, burst=20))
    assert admission.admit("ssh", "192.0.2.1", 0.0) is ADMIT
    assert admission.admit("ssh", "192.0.2.2", 0.0) is ADMIT
    admission.release("ssh", "192.0.2.2")
    admission.sweep(1.9)
    assert set(admission._sources) == {"192.0.2.1", "192.0.2.2"}
    admission.sweep(2.0)
    assert set(admission._sources) == {"192.0.2.1"}
    admission.release("ssh", "192.0.2.1")
    admission.sweep(2.0)
    assert not admission._sources


def test_sweeping_never_refills_a_bucket() -> None:
    swept, kept = Admission(limits(rate_per_s=10.0, burst=5)), Admission(limits(rate_per_s=10.0, burst=5))
    for step in range(200):
        now = step * 0.03
        swept.sweep(now)
        verdicts = [admission.admit("ssh", "192.0.2.1", now) for admission in (swept, kept)]
        assert verdicts[0] is verdicts[1]
        for admission, verdict in zip((swept, kept), verdicts, strict=True):
            if verdict is ADMIT:
                admission.release("ssh", "192.0.2.1")


def test_memory_is_bounded_and_strangers_are_refused_cheaply(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "REMEMBERED_SOURCES", 64)
    sweeps = 0

    class Counting(Admission):
        def sweep(self, now: float) -> None:
            nonlocal sweeps
            sweeps += 1
            super().sweep(now)

    admission = Counting(limits(connections=10_000, per_door=10_000, rate_per_s=0.1, burst=10))
    for i in range(5_000):
        address = f"10.0.{i >> 8}.{i & 255}"
        verdict = admission.admit("ssh", address, i * 1e-4)
        assert verdict is (ADMIT if i < 64 else Verdict.TOO_FAST)
        if verdict is ADMIT:
            admission.release("ssh", address)
        assert remembered(admission) <= 128
    assert sweeps <= 2
    assert admission.admit("ssh", "10.9.9.9", 200.0) is ADMIT


ADDRESSES = ["192.0.2.1", "::ffff:192.0.2.1", "2001:db8::1", "2001:db8::2", "2001:db8:0:1::1", "127.0.0.1", ""]
EXEMPT = ["", "127.0.0.0/8", "127.0.0.0/8 2001:db8::1/128", "0.0.0.0/0"]


class AdmissionMachine(RuleBasedStateMachine):
    """Connections come, go, and limits change; what is open is what is counted."""

    @initialize(exempt=st.sampled_from(EXEMPT))
    def begin(self, exempt: str) -> None:
        self.bounds = limits(connections=12, per_door=7, per_source=4, rate_per_s=2.0, burst=8, exempt=exempt)
        self.admission = Admission(self.bounds)
        self.open: list[tuple[str, str]] = []
        self.now = 0.0

    @rule(door=st.sampled_from(["ssh", "db"]), address=st.sampled_from(ADDRESSES), after_s=st.floats(0, 2))
    def arrive(self, door: str, address: str, after_s: float) -> None:
        self.now += after_s
        verdict = self.admission.admit(door, address, self.now)
        full = len(self.open) >= self.bounds.connections
        door_full = sum(one == door for one, _ in self.open) >= self.bounds.connections_per_door
        assert (verdict is Verdict.FULL) == full
        assert (verdict is Verdict.DOOR_FULL) == (door_full and not full)
        if verdict is ADMIT:
            self.open.append((door, address))

    @precondition(lambda self: self.open)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        self.admission.release(*self.open.pop(data.draw(st.integers(0, len(self.open) - 1))))

    @rule(exempt=st.sampled_from(EXEMPT))
    def reload(self, exempt: str) -> None:
        self.bounds = limits(connections=12, per_door=7, per_source=4, rate_per_s=2.0, burst=8, exempt=exempt)
        self.admission.apply(self.bounds)

    @rule()
    def sweep(self) -> None:
        self.admission.sweep(self.now)

    @invariant()
    def open_connections_are_counted_once(self) -> None:
        if hasattr(self, "admission"):
            assert self.admission.connections == len(self.open)
            counted = sum(source.count for source in self.admission._sources.values())
            assert 0 <= counted <= len(self.open)
            assert all(0 <= source.count <= 4 for source in self.admission._sources.values())

    def teardown(self) -> None:
        if hasattr(self, "admission"):
            for door, address in self.open:
                self.admission.release(door, address)
            self.admission.sweep(self.now + 1_000.0)
            assert self.admission.connections == 0
            assert not self.admission._sources
            assert not self.admission._doors


TestAdmission = AdmissionMachine.TestCase
TestAdmission.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)


@given(st.ip_addresses(v=6))
def test_every_ipv6_address_is_in_its_source(address: object) -> None:
    source = source_of(str(address))
    assert source_of(str(address)) == source
    if ":" in source:
        assert address in ip_network(source)
