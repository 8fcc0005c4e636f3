"""How far a script process gives way: quite, unless others leave it no processor."""

from pathlib import Path

import pytest

from fxrelay.balance.niceness import LOOK_S, NICE, PATIENT_NICE, STARVED_SHARE, URGENT_S, Patience

PID = 7


class Kernel:
    """What /proc shows of one process, and what it was told."""

    def __init__(self, proc: Path) -> None:
        self.proc = proc
        (proc / str(PID)).mkdir()
        self._group = proc / str(PID) / "autogroup"
        self._group.write_text("0")
        self.ran(0.0)

    def ran(self, seconds: float) -> None:
        (self.proc / str(PID) / "schedstat").write_text(f"{int(seconds * 1e9)} 0 1\n")

    @property
    def nice(self) -> int:
        return int(self._group.read_text())


@pytest.fixture
def kernel(tmp_path: Path) -> Kernel:
    return Kernel(tmp_path)


def test_who_is_asked_gives_way_quite(kernel: Kernel) -> None:
    patience = Patience(PID, kernel.proc)
    patience.begin(100.0)
    assert kernel.nice == PATIENT_NICE


def test_who_gets_no_processor_is_urgent_for_a_while(kernel: Kernel) -> None:
    patience = Patience(PID, kernel.proc)
    patience.begin(100.0)
    assert patience.look(100.0 + LOOK_S), "nothing can be said after one look"
    kernel.ran(0.9 * STARVED_SHARE * LOOK_S)
    assert not patience.look(100.0 + 2 * LOOK_S)
    assert kernel.nice == NICE
    patience.begin(100.0 + URGENT_S)
    assert kernel.nice == NICE
    patience.begin(100.1 + URGENT_S)
    assert kernel.nice == PATIENT_NICE


def test_who_works_for_long_goes_on_giving_way(kernel: Kernel) -> None:
    patience = Patience(PID, kernel.proc)
    patience.begin(100.0)
    for turn in range(1, 20):
        kernel.ran(1.1 * STARVED_SHARE * turn * LOOK_S)
        assert patience.look(100.0 + turn * LOOK_S)
    assert kernel.nice == PATIENT_NICE


def test_looks_of_another_question_do_not_count(kernel: Kernel) -> None:
    patience = Patience(PID, kernel.proc)
    patience.begin(100.0)
    assert patience.look(100.0 + LOOK_S)
    patience.begin(200.0)
    assert patience.look(200.0 + LOOK_S), "it was not asked anything for a while, and did not run"
    assert kernel.nice == PATIENT_NICE


def test_who_is_waited_for_in_a_thread_takes_what_it_needs(kernel: Kernel) -> None:
    patience = Patience(PID, kernel.proc)
    patience.end()
    assert kernel.nice == 0, "it did not give way"
    patience.begin(100.0)
    patience.end()
    assert kernel.nice == NICE


def test_a_wish_that_comes_too_soon_is_told_again(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    patience = Patience(PID, kernel.proc)
    patience.begin(100.0)
    assert patience.look(100.0 + LOOK_S)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", _too_soon)
        assert patience.look(100.0 + 2 * LOOK_S)
    assert not patience.look(100.0 + 3 * LOOK_S)
    assert kernel.nice == NICE


def test_a_kernel_without_groups_or_a_process_that_is_gone_is_no_reason_to_stop(tmp_path: Path) -> None:
    patience = Patience(PID, tmp_path)
    patience.begin(100.0)
    assert patience.look(100.0 + LOOK_S)
    assert not patience.look(100.0 + 2 * LOOK_S)
    patience.end()


def _too_soon(*_: object) -> int:
    raise BlockingIOError
