"""Windows: what is promised never exceeds the budget, comes back whole, and grows only for readers that keep up."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from fxtunnel.protocol.credit import (
    CROWDED_WINDOW_BYTES,
    FIRST_WINDOW_BYTES,
    LOCAL_WINDOW_BYTES,
    MIN_GROWTH_RTT_S,
    PROOF_BYTES,
    SMALLEST_WINDOW_BYTES,
    USEFUL_WINDOW_BYTES,
    ReceiveWindow,
    WindowBudget,
)
from fxtunnel.protocol.frames import EARLY_BYTES

MIB = 1_048_576
MAX_WINDOW = 16 * MIB
LONG_RTT_S = 0.05


def first_bound(memory_bytes: int) -> int:
    return memory_bytes * 3 // 8


def growth_bound(memory_bytes: int) -> int:
    return memory_bytes // 4


def keep_up(window: ReceiveWindow, start: float, *, rounds: int, window_s: float, rtt_s: float = 0.0, limit: int = MAX_WINDOW) -> float:
    """The reader takes a whole window in `window_s`, `rounds` times; returns the time then."""
    now = start
    for _ in range(rounds):
        amount = window.window_bytes
        window.left_bytes -= amount
        now += window_s
        assert window.consumed(amount)
        assert window.grant(now, rtt_s, limit) == window.window_bytes
        assert window.left_bytes == window.window_bytes
    return now


@pytest.mark.parametrize("memory", [0, 1, 10_000, 65_536, MIB, 256 * MIB])
def test_first_windows_shrink_in_steps_and_end_within_the_bound(memory: int) -> None:
    budget = WindowBudget(memory)
    bound = first_bound(memory)
    given_out = []
    while window := budget.take_first():
        if window == FIRST_WINDOW_BYTES:
            assert budget.promised_bytes <= bound // 2
        elif window == CROWDED_WINDOW_BYTES:
            assert budget.promised_bytes <= bound - bound // 4
        else:
            assert window == SMALLEST_WINDOW_BYTES
        given_out.append(window)
        assert budget.promised_bytes == sum(given_out) <= bound
    assert given_out == sorted(given_out, reverse=True)
    assert bound - budget.promised_bytes < SMALLEST_WINDOW_BYTES
    for window in given_out:
        budget.release(window, 0)
    assert budget.promised_bytes == 0


def test_the_default_budget_knows_all_three_steps() -> None:
    budget = WindowBudget(256 * MIB)
    assert [budget.take_first() for _ in range(10_000)].count(FIRST_WINDOW_BYTES) == first_bound(256 * MIB) // 2 // FIRST_WINDOW_BYTES
    assert budget.take_first() == SMALLEST_WINDOW_BYTES


def test_every_first_window_holds_the_early_bytes() -> None:
    assert min(FIRST_WINDOW_BYTES, CROWDED_WINDOW_BYTES, SMALLEST_WINDOW_BYTES) >= EARLY_BYTES


@given(st.integers(0, 10 * MIB), st.lists(st.integers(-5, 5 * MIB), max_size=20))
def test_growth_stays_within_its_own_bound(memory: int, wishes: list[int]) -> None:
    budget = WindowBudget(memory)
    granted = [budget.take_growth(wish, FIRST_WINDOW_BYTES, PROOF_BYTES) for wish in wishes]
    assert all(0 <= grant <= max(wish, 0) for grant, wish in zip(granted, wishes, strict=True))
    assert budget.grown_bytes == sum(granted) <= growth_bound(memory)
    assert budget.promised_bytes == 0
    budget.release(0, sum(granted))
    assert budget.grown_bytes == 0


def test_credit_returns_when_a_quarter_is_free() -> None:
    window = ReceiveWindow(WindowBudget(0), 32_768)
    assert not window.consumed(8_191)
    assert window.consumed(1)
    window.left_bytes -= 8_192
    assert window.grant(100.0, 0.0, MAX_WINDOW) == 8_192
    assert window.left_bytes == window.window_bytes == 32_768


def test_a_reader_that_keeps_up_gets_a_mebibyte_and_no_more_on_a_short_path() -> None:
    budget = WindowBudget(256 * MIB)
    window = ReceiveWindow(budget, budget.take_first())
    keep_up(window, 100.0, rounds=30, window_s=0.001, rtt_s=MIN_GROWTH_RTT_S)
    assert window.window_bytes == LOCAL_WINDOW_BYTES
    assert budget.grown_bytes == LOCAL_WINDOW_BYTES - FIRST_WINDOW_BYTES


def test_credit_for_a_window_that_is_as_large_as_a_short_path_needs_returns_when_half_is_free() -> None:
    budget = WindowBudget(256 * MIB)
    window = ReceiveWindow(budget, budget.take_first())
    keep_up(window, 100.0, rounds=30, window_s=0.001, rtt_s=MIN_GROWTH_RTT_S)
    window.grant(200.0, 0.0, MAX_WINDOW)
    assert not window.consumed(LOCAL_WINDOW_BYTES // 2 - 1)
    assert window.consumed(1)
    window.grant(201.0, LONG_RTT_S, MAX_WINDOW)  # the path has become a long one: there every round trip counts
    assert not window.consumed(window.window_bytes // 4 - 1)
    assert window.consumed(1)


@pytest.mark.parametrize(("window_s", "grows"), [(0.99, True), (1.0, False)])
def test_a_slow_reader_keeps_its_first_window(window_s: float, grows: bool) -> None:
    budget = WindowBudget(256 * MIB)
    window = ReceiveWindow(budget, budget.take_first())
    now = keep_up(window, 100.0, rounds=8, window_s=0.1, limit=FIRST_WINDOW_BYTES)
    keep_up(window, now, rounds=30, window_s=window_s)
    assert (window.window_bytes > FIRST_WINDOW_BYTES) == (budget.grown_bytes > 0) == grows


def test_a_slow_reader_at_the_end_of_a_long_path_keeps_its_first_window() -> None:
    """From the first credit on: what it took since then, it did not take in one round trip."""
    window = ReceiveWindow(WindowBudget(256 * MIB), FIRST_WINDOW_BYTES)
    for second in range(30):
        assert window.consumed(FIRST_WINDOW_BYTES // 4)
        assert window.grant(100.0 + second, LONG_RTT_S, MAX_WINDOW) == FIRST_WINDOW_BYTES // 4


def test_bytes_given_back_count_when_they_have_left() -> None:
    window = ReceiveWindow(WindowBudget(0), 32_768)
    assert window.consumed(10_000)
    window.returned(8_000)
    assert not window.consumed(6_191)
    assert window.consumed(1)
    assert window.grant(100.0, 0.0, MAX_WINDOW) == 8_192


def test_a_long_path_gets_two_to_four_times_its_bandwidth_delay_product() -> None:
    budget = WindowBudget(1_024 * MIB)
    window = ReceiveWindow(budget, budget.take_first())
    rate_per_s = 40 * MIB
    now = 100.0
    for _ in range(40):
        now = keep_up(window, now, rounds=1, window_s=max(LONG_RTT_S, window.window_bytes / rate_per_s), rtt_s=LONG_RTT_S)
    assert 2 <= window.window_bytes / (LONG_RTT_S * rate_per_s) <= 4


@pytest.mark.parametrize("rate_per_s", [MIB, 12 * MIB, 120 * MIB])
def test_a_new_stream_fills_a_long_path_within_eight_round_trips(rate_per_s: int) -> None:
    """What is on the way while the window grows was sent under the smaller one."""
    window = ReceiveWindow(WindowBudget(1_024 * MIB), FIRST_WINDOW_BYTES)
    half_s, tick_s, now = LONG_RTT_S / 2, 0.001, 100.0
    credit, arriving, granted = float(FIRST_WINDOW_BYTES), [(now, 0.0)], [(now, 0.0)]
    taken = 0.0
    while now < 100.0 + 8.5 * LONG_RTT_S:
        now += tick_s
        while granted and granted[0][0] <= now:
            credit += granted.pop(0)[1]
        sent = min(credit, rate_per_s * tick_s)
        credit -= sent
        arriving.append((now + half_s, sent))
        taken = 0.0
        while arriving and arriving[0][0] <= now:
            taken += arriving.pop(0)[1]
        if window.consumed(int(taken)):
            granted.append((now + half_s, window.grant(now, LONG_RTT_S, MAX_WINDOW)))
    assert taken == pytest.approx(rate_per_s * tick_s, rel=0.01)
    assert window.window_bytes < max(5 * LONG_RTT_S * rate_per_s, 4 * FIRST_WINDOW_BYTES)


@pytest.mark.parametrize("limit", [FIRST_WINDOW_BYTES, 100_000, LOCAL_WINDOW_BYTES])
def test_no_window_of_a_short_path_grows_past_the_configured_limit(limit: int) -> None:
    window = ReceiveWindow(WindowBudget(1_024 * MIB), FIRST_WINDOW_BYTES)
    keep_up(window, 100.0, rounds=40, window_s=0.001, limit=limit)
    assert window.window_bytes == limit


@pytest.mark.parametrize("limit", [FIRST_WINDOW_BYTES, 100_000, LOCAL_WINDOW_BYTES, 3 * MIB, MAX_WINDOW])
def test_no_window_grows_past_the_configured_limit(limit: int) -> None:
    budget = WindowBudget(1_024 * MIB)
    window = ReceiveWindow(budget, budget.take_first())
    keep_up(window, 100.0, rounds=40, window_s=LONG_RTT_S, rtt_s=LONG_RTT_S, limit=limit)
    assert window.window_bytes == limit


def test_a_window_of_odd_size_does_not_double_past_the_short_path_limit() -> None:
    """A budget that was nearly used up leaves odd sizes behind."""
    budget = WindowBudget(256 * MIB)
    window = ReceiveWindow(budget, LOCAL_WINDOW_BYTES * 2 // 3)
    keep_up(window, 100.0, rounds=5, window_s=0.01)
    assert window.window_bytes == LOCAL_WINDOW_BYTES


def test_without_growth_memory_credit_still_returns() -> None:
    window = ReceiveWindow(WindowBudget(0), 4_096)
    keep_up(window, 100.0, rounds=10, window_s=0.01)
    assert window.window_bytes == window.left_bytes == 4_096


def test_closing_gives_first_window_and_growth_back() -> None:
    budget = WindowBudget(256 * MIB)
    window = ReceiveWindow(budget, budget.take_first())
    keep_up(window, 100.0, rounds=20, window_s=0.01)
    assert budget.grown_bytes > 0
    window.close()
    assert (budget.promised_bytes, budget.grown_bytes) == (0, 0)


@pytest.mark.parametrize(("rtt_s", "share"), [(0.0, 0), (LONG_RTT_S, 0.5)])
def test_readers_that_never_read_leave_growth_to_those_that_do(rtt_s: float, share: float) -> None:
    """The kernels on the way take about 100 KiB for each of them, as fast as it comes."""
    memory = 256 * MIB
    budget = WindowBudget(memory)
    for _ in range(1_000):
        window = ReceiveWindow(budget, budget.take_first())
        left, now = 100 * 1024, 100.0
        while left:
            amount = min(window.window_bytes, left)
            left -= amount
            now += 0.05
            window.left_bytes -= amount
            if window.consumed(amount):
                window.grant(now, rtt_s, MAX_WINDOW)
    assert budget.grown_bytes <= share * growth_bound(memory)
    reader = ReceiveWindow(budget, budget.take_first())
    keep_up(reader, 100.0, rounds=60, window_s=0.05)
    assert reader.window_bytes == LOCAL_WINDOW_BYTES or rtt_s


@pytest.mark.parametrize(("crowd_rtt_s", "rtt_s"), [(LONG_RTT_S, 0.0), (LONG_RTT_S, LONG_RTT_S), (0.0, 0.0), (0.0, LONG_RTT_S)])
def test_readers_that_read_and_stop_leave_a_useful_window_to_who_comes_later(crowd_rtt_s: float, rtt_s: float) -> None:
    """What a window was granted cannot be taken back, so a crowd keeps what it has grown by as long as its connections stand."""
    memory = 256 * MIB
    budget = WindowBudget(memory)
    crowd = [ReceiveWindow(budget, budget.take_first()) for _ in range(60)]
    for window in crowd:
        keep_up(window, 100.0, rounds=30, window_s=max(0.005, crowd_rtt_s), rtt_s=crowd_rtt_s)
    assert budget.grown_bytes >= growth_bound(memory) * 3 // 4, "the crowd has all that one may have"
    newcomer = ReceiveWindow(budget, budget.take_first())
    keep_up(newcomer, 100.0, rounds=1_200, window_s=max(0.005, rtt_s), rtt_s=rtt_s)
    assert newcomer.window_bytes == USEFUL_WINDOW_BYTES


class WindowMachine(RuleBasedStateMachine):
    """Several windows on one budget; what the peer may send, what waits and what was taken always add up to the window."""

    @initialize(memory=st.integers(0, 40 * MIB))
    def begin(self, memory: int) -> None:
        self.memory = memory
        self.budget = WindowBudget(memory)
        self.now = 1_000.0
        self.open: list[ReceiveWindow] = []
        self.waiting: list[int] = []
        self.untold: list[int] = []

    @rule()
    def open_one(self) -> None:
        if first := self.budget.take_first():
            self.open.append(ReceiveWindow(self.budget, first))
            self.waiting.append(0)
            self.untold.append(0)

    @precondition(lambda self: self.open)
    @rule(data=st.data(), share=st.floats(0, 1))
    def arrive(self, data: st.DataObject, share: float) -> None:
        i = data.draw(st.integers(0, len(self.open) - 1))
        amount = int(self.open[i].left_bytes * share)
        self.open[i].left_bytes -= amount
        self.waiting[i] += amount

    @precondition(lambda self: self.open)
    @rule(data=st.data(), share=st.floats(0, 1), after_s=st.floats(0, 3), rtt_s=st.sampled_from([0.0, 0.001, 0.05]))
    def take(self, data: st.DataObject, share: float, after_s: float, rtt_s: float) -> None:
        i = data.draw(st.integers(0, len(self.open) - 1))
        amount = int(self.waiting[i] * share)
        self.now += after_s
        self.waiting[i] -= amount
        self.untold[i] += amount
        window = self.open[i]
        if window.consumed(amount):
            before = window.window_bytes
            assert window.grant(self.now, rtt_s, MAX_WINDOW) == self.untold[i] + window.window_bytes - before
            self.untold[i] = 0

    @precondition(lambda self: self.open)
    @rule(data=st.data())
    def close_one(self, data: st.DataObject) -> None:
        i = data.draw(st.integers(0, len(self.open) - 1))
        self.open.pop(i).close()
        del self.waiting[i], self.untold[i]

    @invariant()
    def sums_agree(self) -> None:
        if not hasattr(self, "budget"):
            return
        budget = self.budget
        assert 0 <= budget.promised_bytes <= first_bound(self.memory)
        assert 0 <= budget.grown_bytes <= growth_bound(self.memory)
        assert budget.promised_bytes + budget.grown_bytes == sum(window.window_bytes for window in self.open)
        for window, waiting, untold in zip(self.open, self.waiting, self.untold, strict=True):
            assert window.left_bytes + waiting + untold == window.window_bytes
            assert untold * 4 < window.window_bytes or not untold

    def teardown(self) -> None:
        if hasattr(self, "budget"):
            for window in self.open:
                window.close()
            assert (self.budget.promised_bytes, self.budget.grown_bytes) == (0, 0)


TestWindows = WindowMachine.TestCase
TestWindows.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)


def test_the_shares_are_those_of_the_documents() -> None:
    """docs/dos.md, Memory."""
    budget = WindowBudget(256 * MIB)
    given_out: list[int] = []
    while window := budget.take_first():
        given_out.append(window)
    assert {size: given_out.count(size) for size in set(given_out)} == {32_768: 1_536, 8_192: 3_072, 4_096: 6_144}
    assert budget.take_growth(1 << 40, FIRST_WINDOW_BYTES, PROOF_BYTES - 1) == 32 * MIB
    assert budget.take_growth(1 << 40, FIRST_WINDOW_BYTES, PROOF_BYTES) == 16 * MIB
    assert budget.take_growth(1, USEFUL_WINDOW_BYTES, PROOF_BYTES) == 0
    assert budget.take_growth(1 << 40, FIRST_WINDOW_BYTES, PROOF_BYTES) == USEFUL_WINDOW_BYTES - FIRST_WINDOW_BYTES
    assert sum(budget.take_growth(1 << 40, FIRST_WINDOW_BYTES, PROOF_BYTES) for _ in range(80)) < 16 * MIB
    assert budget.grown_bytes == 64 * MIB
    assert budget.take_growth(1, FIRST_WINDOW_BYTES, PROOF_BYTES) == 0
    assert LOCAL_WINDOW_BYTES == 1 << 20


@pytest.mark.parametrize("wanted", [0, -1])
def test_who_wants_no_growth_changes_nothing(wanted: int) -> None:
    budget = WindowBudget(MIB)
    assert budget.take_growth(wanted, FIRST_WINDOW_BYTES, PROOF_BYTES) == 0
    assert budget.grown_bytes == 0
    assert budget.take_growth(1, FIRST_WINDOW_BYTES, PROOF_BYTES) == 1
