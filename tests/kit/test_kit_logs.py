import io
import json
import logging
from collections.abc import Callable, Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import SecretStr

from fxtunnel.kit.logs import RateLimited, Style, configure

CANARY = "canary-5f3a"
NASTY = st.text() | st.text("\n\r\x1b\u2028\u2029\x00\x85\x0b\x0c\x1c\ud800{}\"'\\ %s=")
logger = logging.getLogger("fx.test")

Log = Callable[..., list[str]]


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    root = logging.getLogger()
    before, level, raising = root.handlers[:], root.level, logging.raiseExceptions
    yield
    root.handlers[:], logging.raiseExceptions = before, raising
    root.setLevel(level)


def written(style: Style, write: Callable[[], object], level: str = "info") -> str:
    stream = io.StringIO()
    configure(level, style, stream)
    write()
    return stream.getvalue()


@given(NASTY, NASTY, st.dictionaries(st.text("abc_", min_size=1), NASTY, max_size=3))
def test_any_text_is_one_json_line_and_comes_back_whole(template: str, text: str, extra: dict[str, str]) -> None:
    for write, event in (
        (lambda: logger.warning("said %s", text, extra=extra), f"said {text}"),
        (lambda: logger.warning(template, extra=extra), template),
    ):
        output = written("json", write)
        assert output.isascii()
        assert output.count("\n") == 1
        assert len(output.splitlines()) == 1
        read = json.loads(output)
        assert (read["event"], read["level"], read["logger"]) == (event, "warning", "fx.test")
        assert {name: read[name] for name in extra} == extra


@given(NASTY, NASTY)
def test_any_text_is_one_line_of_text_without_control_characters(text: str, value: str) -> None:
    output = written("text", lambda: logger.warning("said %s", text, extra={"client": value}))
    assert output.endswith("\n")
    assert output[:-1].isprintable()
    assert len(output.splitlines()) == 1


@given(NASTY)
def test_an_exceptions_text_cannot_forge_a_line(text: str) -> None:
    def fail() -> None:
        try:
            raise RuntimeError(text)
        except RuntimeError:
            logger.exception("it failed")

    assert len(written("json", fail).splitlines()) == 1
    first, *rest = written("text", fail)[:-1].split("\n")
    assert first.endswith("ERROR   it failed [fx.test]")
    assert rest
    assert all(line.startswith("    | ") and line.isprintable() for line in rest)


def test_a_line_has_its_fields_in_order() -> None:
    output = written("json", lambda: logger.info("tunnel up", extra={"relay": "node-a", "streams": 3}))
    read = json.loads(output)
    assert list(read) == ["ts", "level", "event", "logger", "relay", "streams"]
    assert read["ts"].endswith("Z")
    assert read["streams"] == 3


def test_an_extra_field_cannot_pose_as_one_of_ours() -> None:
    forged = {"ts": "then", "level": "info", "event": "all is well", "logger": "root", "traceback": "none"}
    read = json.loads(written("json", lambda: logger.error("broken", extra=forged)))
    assert (read["event"], read["level"], read["logger"]) == ("broken", "error", "fx.test")
    assert read["event_"] == "all is well"
    assert read["traceback_"] == "none"


@pytest.mark.parametrize("style", ["json", "text"])
def test_a_secret_never_shows(style: Style) -> None:
    secret = SecretStr(CANARY)

    def write() -> None:
        hidden = CANARY
        logger.info("%s %r %s", secret, secret, [secret], extra={"token": secret, "nested": {"a": [secret]}})
        logger.info(secret)
        logger.info("a %s b", f"{secret}")
        try:
            json.loads(secret)
        except TypeError:
            logger.exception("it failed")
        assert hidden

    output = written(style, write)
    assert CANARY not in output
    assert output.count("**********") >= 7


def test_values_json_does_not_know_are_shown_as_python_does() -> None:
    extra = {"raw": b"\n\x1b", "keys": {(1, 2): 3, "a": {4}}, "kind": ValueError("x")}
    read = json.loads(written("json", lambda: logger.info("odd", extra=extra)))
    assert (read["raw"], read["keys"], read["kind"]) == (r"b'\n\x1b'", {"a": "{4}"}, "ValueError('x')")


def test_a_line_that_cannot_be_formatted_is_dropped_without_a_word_on_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    output = written("json", lambda: (logger.info("%d", CANARY), logger.info("next")))
    assert json.loads(output)["event"] == "next"
    assert capsys.readouterr() == ("", "")


def test_levels_and_styles() -> None:
    assert written("json", lambda: logger.info("x"), "warning") == ""
    assert written("json", lambda: logger.debug("x"), "debug") != ""
    assert written("auto", lambda: logger.info("x")).startswith("{")

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    stream = Terminal()
    configure("info", "auto", stream)
    logger.info("x", extra={"relay": "node-a"})
    assert stream.getvalue().endswith(" INFO    x relay=node-a [fx.test]\n")


def test_configuring_again_replaces() -> None:
    first, second = io.StringIO(), io.StringIO()
    configure("info", "json", first)
    configure("info", "json", second)
    logger.info("x")
    assert (first.getvalue(), second.getvalue().count("\n")) == ("", 1)


def test_the_same_template_is_limited_then_announced_then_counted() -> None:
    now = 100.0
    limited = RateLimited(limit=3, window_s=10, clock=lambda: now)

    def passes(template: str, *args: object, name: str = "a") -> logging.LogRecord | None:
        record = logging.LogRecord(name, logging.INFO, "", 0, template, args, None)
        return record if limited.filter(record) else None

    assert [passes("from %s", n) is not None for n in range(6)] == [True] * 4 + [False] * 2
    assert passes("other") is not None
    assert passes("from %s", 1, name="b") is not None
    now = 109.9
    assert passes("from %s", 7) is None
    now = 110.0
    record = passes("from %s", 8)
    assert record is not None
    assert record.__dict__["suppressed"] == 3
    assert record.getMessage() == "from 8"
    following = passes("from %s", 9)
    assert following is not None
    assert "suppressed" not in following.__dict__


def test_the_announcement_says_that_more_is_suppressed() -> None:
    output = written("json", lambda: [logger.info("from %s", n) for n in range(1000)])
    events = [json.loads(line)["event"] for line in output.splitlines()]
    assert len(events) == 21
    assert events[:2] == ["from 0", "from 1"]
    assert written("json", lambda: [logger.info("%d", "x") for _ in range(30)]) == "", "and a wrong template raises nothing"
    assert events[-1] == "from 20 (more of these are suppressed for 10 s)"


def test_templates_without_end_are_forgotten_again() -> None:
    limited = RateLimited(clock=lambda: 0.0)
    for n in range(5000):
        assert limited.filter(logging.LogRecord("a", logging.INFO, "", 0, f"text {n}", (), None))
    assert len(limited._windows) <= 1024
