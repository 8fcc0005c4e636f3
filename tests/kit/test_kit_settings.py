from ipaddress import IPv4Network, IPv6Network
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError

from fxtunnel.errors import ConfigError
from fxtunnel.kit.settings import Address, AddressField, ConfigPath, NameField, dotted, load_settings, said_plainly


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Door(Section):
    listen: AddressField
    service: NameField = "ssh"
    ports: tuple[int, ...] = ()


class Admin(Section):
    listen: AddressField = Address.parse("unix:admin.sock")
    key: ConfigPath = Path("server.key")
    password: SecretStr = SecretStr("")
    level: Literal["info", "debug"] = "info"
    either: int | bool = 0


class Settings(Section):
    name: NameField
    doors: tuple[Door, ...] = Field((), alias="door")
    admin: Admin = Admin()
    limit_bytes: int = Field(1, ge=1)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "gateway.toml"
    path.write_text('name = "a"\n[admin]\n[[door]]\nlisten = "127.0.0.1:1"\n')
    return path


def load(path: Path, **environ: str) -> Settings:
    return load_settings(Settings, path, prefix="FX", environ=environ)


def complaints(path: Path, **environ: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load(path, **environ)
    assert {problem.file for problem in caught.value.problems} == {str(path)}
    return [str(problem).removeprefix(f"{path}: ") for problem in caught.value.problems]


def test_defaults_and_paths_beside_the_file(file: Path) -> None:
    settings = load(file)
    assert settings.doors == (Door(listen=Address("127.0.0.1", 1)),)
    assert settings.admin.key == file.parent / "server.key"
    assert settings.admin.listen == Address(path=file.parent / "admin.sock")


def test_a_relative_file_name_still_gives_absolute_paths(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(file.parent)
    assert load(Path(file.name)).admin.key == file.parent / "server.key"


def test_every_problem_is_told_at_once_with_its_place_and_what_was_expected(file: Path) -> None:
    file.write_text("""
limit_bytes = 0
colour = "blue"
[admin]
key = 5
password = ["hunter2"]
level = "loud"
either = "maybe"
lissten = "x"
[[door]]
listen = "nowhere"
[[door]]
service = "a b"
ports = ["hunter2"]
""")
    assert sorted(complaints(file)) == sorted(
        [
            "name: is required",
            "limit_bytes: must be at least 1",
            "colour: unknown key; known here: name, door, admin, limit_bytes",
            "admin.key: must be a path; found an integer",
            "admin.password: must be a valid string; found an array",
            "admin.level: must be 'info' or 'debug'",
            "admin.either: must be a whole number; found a string; or must be true or false; found a string",
            "admin.lissten: unknown key; did you mean listen?",
            "door[0].listen: expected HOST:PORT, [IPV6]:PORT or unix:PATH, found 'nowhere'",
            "door[1].listen: is required",
            "door[1].service: expected a name: 1 to 64 of the characters A-Z a-z 0-9 . _ -",
            "door[1].ports[0]: must be a whole number; found a string",
        ]
    )


def test_what_was_expected_is_said_without_the_words_of_a_library() -> None:
    class Limits(BaseModel):
        size: int = Field(1, le=8)
        share: float = 1.0
        networks: tuple[IPv4Network | IPv6Network, ...] = ()
        kinds: tuple[Literal["a", "b"], ...] = Field((), min_length=1)
        is_on: bool = False

    with pytest.raises(ValidationError) as caught:
        Limits.model_validate({"size": 9, "share": "x", "networks": ["10.0.0.0/33"], "kinds": ["c"], "is_on": "perhaps"})
    assert [(dotted(error["loc"][:2]), said_plainly(error)) for error in caught.value.errors() if error["type"] != "too_short"] == [
        ("size", "must be at most 8"),
        ("share", "must be a number"),
        ("networks[0]", "expected a network, such as 10.0.0.0/8 or fd00::/8"),
        ("networks[0]", "expected a network, such as 10.0.0.0/8 or fd00::/8"),
        ("kinds[0]", "must be 'a' or 'b'"),
        ("is_on", "must be true or false"),
    ]


def test_files_of_other_editors_are_read(file: Path) -> None:
    file.write_bytes(b'\xef\xbb\xbfname = "a"\r\n')
    assert load(file).name == "a"


def test_what_cannot_be_read_is_said_with_file_and_line(file: Path, tmp_path: Path) -> None:
    assert complaints(tmp_path / "gone.toml") == ["does not exist; name the configuration with --config, or see --help for how to begin"]
    assert complaints(tmp_path) == ["cannot be read: Is a directory"]
    file.write_text('name = "a"\nlisten 5\n')
    (text,) = complaints(file)
    assert text.startswith("is not valid TOML")
    assert "line 2" in text
    file.write_bytes(b'name = "\xff"')
    assert complaints(file) == ["is not UTF-8 text (byte 8)"]
    file.write_text("a = " + "[" * 100_000)
    assert complaints(file)[0].startswith("is not valid TOML")


def test_variables_replace_add_and_extend(file: Path) -> None:
    settings = load(
        file,
        FX__NAME="b",
        FX__LIMIT_BYTES="0x10",
        FX__ADMIN__LEVEL="debug",
        FX__ADMIN__KEY="/elsewhere",
        FX__DOOR__0__SERVICE="vnc",
        FX__DOOR__1__LISTEN="[::1]:5",
        FX__DOOR__1__PORTS="[1, 2]",
        FX__DOOR__1__SERVICE="db",
        FXOTHER__NAME="c",
        FX_NAME="d",
    )
    assert (settings.name, settings.limit_bytes, settings.admin.level, settings.admin.key) == ("b", 16, "debug", Path("/elsewhere"))
    assert [(str(door.listen), door.service, door.ports) for door in settings.doors] == [
        ("127.0.0.1:1", "vnc", ()),
        ("[::1]:5", "db", (1, 2)),
    ]


def test_twelve_doors_from_variables_come_in_their_order(tmp_path: Path) -> None:
    path = tmp_path / "empty.toml"
    path.write_text("")
    doors = {f"FX__DOOR__{n}__LISTEN": f"127.0.0.1:{n}" for n in range(12)}
    assert [door.listen.port for door in load(path, FX__NAME="a", **doors).doors] == list(range(12))


@pytest.mark.parametrize("text", ["1234", "true", "2026-01-01", "1.5", "inf", "a"])
def test_a_text_that_looks_like_something_else_stays_text_where_text_is_wanted(file: Path, text: str) -> None:
    assert load(file, FX__NAME=text, FX__ADMIN__PASSWORD=text, FX__ADMIN__KEY=text).name == text


@pytest.mark.parametrize("text", ["x\nlimit = 2", "5\nlimit = 2", "[" * 100_000, "", '"', "=", "hunter2 # 5"])
def test_any_text_is_one_value_and_never_a_second_key(file: Path, text: str) -> None:
    assert load(file, FX__ADMIN__PASSWORD=text).admin.password.get_secret_value() == text


def test_a_variable_cannot_smuggle_in_a_second_key(file: Path) -> None:
    (text,) = complaints(file, FX__LIMIT_BYTES="5\nname = 2")
    assert text.startswith("limit_bytes: must be a whole number")


def test_problems_of_variables_name_them_and_keep_their_values_to_themselves(file: Path) -> None:
    found = complaints(
        file,
        FX__LIMIT_BYTES="many",
        FX__ADMIN='{ password = ["hunter2"] }',
        FX__TYPO="1",
        FX__DOOR__7__LISTEN="x",
        FX__NAME__FIRST="x",
        FX____NAME="x",
    )
    assert sorted(found) == sorted(
        [
            "door[7].listen: door is a list of 1; expected a number up to 1, not 7 (from FX__DOOR__7__LISTEN in the environment)",
            "name.first: name is a single value; nothing can be below it (from FX__NAME__FIRST in the environment)",
            ".name: expected PREFIX__SECTION__KEY with nothing left out (from FX____NAME in the environment)",
            "limit_bytes: must be a whole number; found a string (from FX__LIMIT_BYTES in the environment)",
            "admin.password: must be a valid string; found an array (from FX__ADMIN in the environment)",
            "typo: unknown key; known here: name, door, admin, limit_bytes (from FX__TYPO in the environment)",
        ]
    )


def test_a_table_that_only_a_variable_names_is_the_variables(file: Path) -> None:
    assert complaints(file, FX__ADMYN__LEVEL="info", FX__ADMYN__PASSWORD="x") == [
        "admyn: unknown key; did you mean admin? (from FX__ADMYN__LEVEL in the environment)"
    ]


def test_a_problem_inside_a_variables_table_is_the_variables(file: Path) -> None:
    assert complaints(file, FX__ADMIN='{ level = "loud" }') == [
        "admin.level: must be 'info' or 'debug' (from FX__ADMIN in the environment)"
    ]


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("127.0.0.1:80", Address("127.0.0.1", 80)),
        ("localhost:0", Address("localhost", 0)),
        ("[::1]:65535", Address("::1", 65535)),
        ("unix:/run/x.sock", Address(path=Path("/run/x.sock"))),
        ("unix:x.sock", Address(path=Path("x.sock"))),
        ("/run/x.sock", Address(path=Path("/run/x.sock"))),
    ],
)
def test_addresses(text: str, address: Address) -> None:
    assert Address.parse(text) == address
    assert Address.parse(str(address)) == address


@pytest.mark.parametrize(
    "text",
    [
        *("", ":", "a", "a:", ":80", "a:65536", "a:-1", "a:+1", "a:1_0", "a:\u0661", "::1:80", "[::1]", "[::1:80", "[a]:80", "[]:80"),
        *("*:80", "a b:80", "a:80\n", "é:80", "a:b:80", "unix:", "unix:a\0b", "http://a:80", "[::1]x:80"),
    ],
)
def test_what_is_no_address(text: str) -> None:
    with pytest.raises(ValueError, match="expected"):
        Address.parse(text)


@given(st.text(max_size=40))
def test_an_address_that_parses_prints_as_something_that_parses_the_same(text: str) -> None:
    try:
        address = Address.parse(text)
    except ValueError:
        return
    assert Address.parse(str(address)) == address


def test_a_socket_path_longer_than_the_kernel_takes_is_refused_beside_the_file_it_stands_in(file: Path) -> None:
    assert "is longer than a socket's path may be" in complaints(file, FX__ADMIN__LISTEN="unix:" + "x" * 107)[0]
