"""Static data and metadata: what administrators write, well or badly."""

import logging
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fxrelay.cluster.server import MAX_STATIC_BYTES
from fxrelay.cluster.settings import NodeSection
from fxrelay.cluster.static_data import MAX_FILE_BYTES, StaticData, coerced, metadata_of, parse_dotenv, site_environment
from fxtunnel.errors import ConfigError


@pytest.mark.parametrize(
    ("line", "value"),
    [
        ("A=b", "b"),
        ("export A=b", "b"),
        ("  A = b c  ", "b c"),
        ("A=", ""),
        ("A=b # c", "b"),
        ("A=b#c", "b#c"),
        ("A=# c", ""),
        ("A='b # c' # d", "b # c"),
        (r"A='b\n'", r"b\n"),
        (r'A="b\n\"c\" \\ \$D"', 'b\n"c" \\ $D'),
        ('A="b" # c', "b"),
        ("A=$HOME ${B}", "$HOME ${B}"),
        ("A=b=c", "b=c"),
        ("\ufeffA=b", "b"),
    ],
)
def test_lines_of_variables(line: str, value: str) -> None:
    assert parse_dotenv(line) == ({"A": value}, [])


def test_broken_lines_are_reported_with_their_number_and_skipped() -> None:
    variables, problems = parse_dotenv('# c\nA=1\nB\n\n2C=3\nD=\'x\nE="x" y\nF=2\n')
    assert variables == {"A": "1", "F": "2"}
    assert [problem.partition(":")[0] for problem in problems] == ["line 3", "line 5", "line 6", "line 7"]


@given(st.text())
def test_any_text_is_read(text: str) -> None:
    parse_dotenv(text)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("true", True),
        ("FALSE", False),
        ("12", 12),
        ("-3", -3),
        ("0.5", 0.5),
        ("1e3", 1000.0),
        ("007", "007"),
        ("0x10", "0x10"),
        ("", ""),
        ("1 ", "1 "),
        ("NaN", "NaN"),
        ("1e999", "1e999"),
        (str(1 << 53), 1 << 53),
        (str((1 << 53) + 1), str((1 << 53) + 1)),
        ("9" * 5000, "9" * 5000),
        ("١", "١"),
        ("yes", "yes"),
    ],
)
def test_values_that_are_no_text(text: str, value: Any) -> None:
    assert coerced(text) == value
    assert type(coerced(text)) is type(value)


def test_names_keep_their_case_and_have_a_lower_case_alias() -> None:
    variables = {"METADATA_GPU": "2", "METADATA_Site": "x", "METADATA_site": "y", "METADATA_": "z", "OTHER": "1"}
    assert metadata_of(variables) == {"GPU": 2, "gpu": 2, "Site": "x", "site": "y"}


def make(tmp_path: Path, environ: dict[str, str] | None = None, **values: Any) -> StaticData:
    section = NodeSection(
        static_data=values, static_data_file=tmp_path / "static-data.json", environment_file=tmp_path / "fastx.env", metrics_dir=tmp_path
    )
    return StaticData(section, environ or {})


def test_nothing_has_to_exist(tmp_path: Path) -> None:
    static_data = make(tmp_path)
    assert static_data.read() == {"staticData": {}, "metadata": {}}
    assert static_data.problems == ()


def test_the_file_lies_over_the_configuration_and_is_read_every_time(tmp_path: Path) -> None:
    static_data = make(tmp_path, group="cad", gpu=False)
    path = tmp_path / "static-data.json"
    path.write_text('{"gpu": true, "n": 1}')
    assert static_data.read()["staticData"] == {"group": "cad", "gpu": True, "n": 1}
    path.write_text('{"n": 2}')
    assert static_data.read()["staticData"] == {"group": "cad", "gpu": False, "n": 2}
    path.unlink()
    assert static_data.read()["staticData"] == {"group": "cad", "gpu": False}


@pytest.mark.parametrize(
    "content",
    [b"{", b"[]", b"", b'{"a": NaN}', b"\xff", b"[" * 5000, b'{"a": "' + b"x" * MAX_STATIC_BYTES + b'"}', b" " * (MAX_FILE_BYTES + 1)],
    ids=["cut", "list", "empty", "nan", "latin1", "deep", "long", "huge"],
)
def test_a_broken_file_counts_as_before_and_is_told_once(tmp_path: Path, content: bytes, caplog: pytest.LogCaptureFixture) -> None:
    static_data = make(tmp_path)
    path = tmp_path / "static-data.json"
    path.write_text('{"n": 1}')
    static_data.read()
    path.write_bytes(content)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert static_data.read()["staticData"] == {"n": 1}
    assert len(caplog.records) == len(static_data.problems) == 1
    path.write_text('{"n": 3}')
    assert static_data.read()["staticData"] == {"n": 3}
    assert static_data.problems == ()


def test_a_fifo_in_place_of_a_file_does_not_hang(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "static-data.json")
    os.mkfifo(tmp_path / "fastx.env")
    static_data = make(tmp_path)
    assert static_data.read() == {"staticData": {}, "metadata": {}}
    assert len(static_data.problems) == 2


def test_what_toml_knows_and_json_does_not(tmp_path: Path) -> None:
    import tomllib

    values = tomllib.loads("since = 2024-05-01\nat = [08:00:00]\nbad = {x = nan}\nworse = inf\ngood = 1")
    static_data = make(tmp_path, **values)
    assert static_data.read()["staticData"] == {"since": "2024-05-01", "at": ["08:00:00"], "good": 1}
    assert len(static_data.problems) == 2


def test_metadata_comes_from_two_files_and_the_environment_wins(tmp_path: Path) -> None:
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc" / "fastx.env").write_text("METADATA_A=etc\nMETADATA_B=etc\nMETADATA_C=etc\nSECRET=1\n")
    (tmp_path / "fastx.env").write_text("METADATA_B=file\nMETADATA_C=file\nbroken\n")
    static_data = make(tmp_path, {"FX_CONFIG_DIR": str(tmp_path / "etc"), "METADATA_C": "3", "PASSWORD": "x"})
    metadata = static_data.read()["metadata"]
    assert metadata == {"A": "etc", "a": "etc", "B": "file", "b": "file", "C": 3, "c": 3}
    (problem,) = static_data.problems
    assert problem.endswith("fastx.env: line 3: expected NAME=value")


def test_too_much_metadata_is_refused(tmp_path: Path) -> None:
    (tmp_path / "fastx.env").write_text("METADATA_A=1")
    static_data = make(tmp_path)
    static_data.read()
    (tmp_path / "fastx.env").write_text(f"METADATA_A={'x' * 10_000}")
    assert static_data.read()["metadata"] == {"A": 1, "a": 1}


def test_the_whole_environment_of_a_site_comes_from_the_same_files(tmp_path: Path) -> None:
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc" / "fastx.env").write_text("LOAD_BALANCER=custom\nLOAD_BALANCER_SCRIPT=/etc\nA=1\n")
    (tmp_path / "fastx.env").write_text("LOAD_BALANCER_SCRIPT=/file\nbroken\nA=2\n")
    section = NodeSection(environment_file=tmp_path / "fastx.env")
    environ = {"FX_CONFIG_DIR": str(tmp_path / "etc"), "A": "3"}
    assert site_environment(section, environ) == {**environ, "LOAD_BALANCER": "custom", "LOAD_BALANCER_SCRIPT": "/file"}
    (tmp_path / "fastx.env").unlink()
    assert site_environment(section, {"A": "3"}) == {"A": "3"}
    (tmp_path / "fastx.env").write_bytes(b"A=\xff")
    with pytest.raises(ConfigError, match=r"fastx\.env.*not UTF-8"):
        site_environment(section, {})
