"""How the commands say what went wrong, and what they leave behind for scripts: the exit code."""

import os
import signal
import subprocess
import sys
from contextlib import suppress

import click
import pytest
from click.testing import CliRunner, Result

import fxgateway.cli
import fxrelay.cli
from fxtunnel.errors import ConfigError, ConfigProblem, FxError
from fxtunnel.kit.console import DrainAnswer, Program, duration, link_cells, reload_held, watch_drain

BAD = ConfigError([ConfigProblem("x.toml", "a", "is wrong"), ConfigProblem("x.toml", "b", "too")])


def failing(error: BaseException) -> Result:
    @click.group("fxthing", cls=Program)
    def main() -> None:
        """Nothing."""

    @main.command()
    def go() -> None:
        raise error

    return CliRunner().invoke(main, ["go"])


@pytest.mark.parametrize(
    ("error", "lines", "code"),
    [
        (FxError("no"), ["no"], 1),
        (OSError("disk full"), ["disk full"], 1),
        (BAD, ["x.toml: a: is wrong", "x.toml: b: too"], 2),
        (ExceptionGroup("", [ExceptionGroup("", [FxError("one")]), FxError("two")]), ["one", "two"], 1),
        (ExceptionGroup("", [FxError("one"), BAD]), ["x.toml: a: is wrong", "x.toml: b: too", "one"], 2),
    ],
)
def test_errors_for_people(error: Exception, lines: list[str], code: int) -> None:
    result = failing(error)
    assert result.exit_code == code
    assert result.stderr.splitlines() == [f"fxthing: {line}" for line in lines]


@pytest.mark.parametrize("error", [ValueError("bug"), ExceptionGroup("", [OSError("bug")])])
def test_bugs_keep_their_traceback(error: Exception) -> None:
    assert repr(failing(error).exception) == repr(error)


PROGRAM = """
import click
from fxtunnel.kit.console import Program

@click.group("fxthing", cls=Program)
def main():
    pass

@main.command()
def lines():
    while True:
        click.echo("a line")

@main.command()
def elsewhere():
    raise BrokenPipeError(32, "of another pipe")

main()
"""


@pytest.mark.parametrize(("command", "said"), [("lines", b""), ("elsewhere", b"fxthing: [Errno 32] of another pipe\n")])
def test_who_has_read_enough_hears_nothing_more(command: str, said: bytes) -> None:
    with subprocess.Popen([sys.executable, "-c", PROGRAM, command], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        if command == "lines":
            assert process.stdout.readline() == b"a line\n"
            process.stdout.close()
        assert process.stderr.read() == said
        assert process.wait(20) == 1


def test_usage_errors_stay_click_s() -> None:
    result = failing(click.UsageError("like this"))
    assert (result.exit_code, "like this" in result.stderr) == (2, True)


def test_what_other_daemons_call_it_leads_to_the_command() -> None:
    assert "No such command 'status': it is called 'relays' here." in CliRunner().invoke(fxgateway.cli.main, ["status"]).stderr
    assert "it is called 'status' here" in CliRunner().invoke(fxrelay.cli.main, ["relays"]).stderr
    assert "called" not in CliRunner().invoke(fxrelay.cli.main, ["nothing"]).stderr


def test_links_in_a_row() -> None:
    up = {"up": True, "resumed": 2, "rtt_ms": 3.25, "streams": 5}
    held = {"up": False, "resumed": 0, "rtt_ms": None, "streams": 1}
    assert link_cells([up, held]) == ("1/2", "2", "3.2 ms", "6")
    assert link_cells([]) == ("0/0", "0", "-", "0")


@pytest.mark.parametrize(("seconds", "text"), [(5.9, "0 min 5 s"), (3_720, "1 h 2 min"), (90_000, "1 d 1 h")])
def test_durations_in_two_units(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_a_reload_waits_for_the_start_and_for_no_more() -> None:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    with suppress(SystemExit), reload_held():
        assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == before | {signal.SIGHUP}
        sys.exit(2)
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == before
    assert signal.SIGHUP not in before, "whoever is started from here could not be reloaded"


def test_a_reader_that_has_seen_enough_ends_a_command_without_a_word() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    try:
        command = [sys.executable, "-m", "fxgateway.cli", "relays", "--help"]
        done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, timeout=60, check=False)
    finally:
        os.close(writer)
    assert (done.returncode, done.stderr) == (1, b"")


def test_who_watches_a_drain_waits_for_an_answer_a_while(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    clock = [0.0]
    monkeypatch.setattr("fxtunnel.kit.console.time.monotonic", lambda: clock[0])
    monkeypatch.setattr("fxtunnel.kit.console.time.sleep", lambda pause_s: clock.__setitem__(0, clock[0] + pause_s))
    away = FxError("a worker does not answer")
    answers: list[int | FxError] = [3, *[away] * 15, 2, *[away] * 15, 0]

    def look() -> DrainAnswer:
        answer = answers.pop(0)
        if isinstance(answer, FxError):
            raise answer
        return DrainAnswer(answer, "a")

    watch_drain("a", look, "clients", None)
    assert [line.partition(",")[0] for line in capsys.readouterr().out.splitlines()] == [f"clients left: {left}" for left in (3, 2, 0)]
    answers[:] = [3, *[away] * 30]
    with pytest.raises(FxError, match="does not answer"):
        watch_drain("a", look, "clients", None)
    assert 5 < len(answers) < 15
    answers[:] = [3, *[away] * 30]
    with pytest.raises(FxError, match="does not answer"):
        watch_drain("a", look, "clients", 2.0)
    assert len(answers) > 20


def test_a_drain_that_a_restart_has_ended_is_not_said_to_be_done() -> None:
    with pytest.raises(FxError, match="restarted meanwhile"):
        watch_drain("a", lambda: DrainAnswer(0, "b"), "clients", None)


def test_what_is_no_page_of_a_drain_is_told() -> None:
    assert DrainAnswer.of({"left": -1, "process": "a"}) == DrainAnswer(-1, "a")
    for page in ({}, {"left": 1}, {"left": "1", "process": "a"}, {"left": 1, "process": 2}):
        with pytest.raises(FxError, match="not a daemon of this version"):
            DrainAnswer.of(page)


def test_ctrl_c_says_that_the_drain_goes_on() -> None:
    def look() -> DrainAnswer:
        raise KeyboardInterrupt

    with pytest.raises(FxError, match="the drain goes on"):
        watch_drain("a", look, "clients", None)
