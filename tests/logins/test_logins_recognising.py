"""What counts as a login, how it goes on, and which answer lets somebody in."""

import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fxrelay.balance.script_input import without_secrets
from fxrelay.logins.recognising import (
    Failed,
    GoesOn,
    Kind,
    Parameters,
    Succeeded,
    judge,
    kind_of,
    login_id_of,
    plain_path,
    read_parameters,
    set_cookies,
    shown_tokens,
)
from fxrelay.logins.rules import FASTX3, FORM, OWN, Calls, LoginRules, Signs, Stages, ValueLocation, Where
from fxrelay.web.heads import Field

COOKIE_FORM = replace(FORM, signs=Signs(frozenset({302}), "session"))


def fields(**named: str) -> tuple[Field, ...]:
    found = []
    for name, value in named.items():
        raw = name.replace("_", "-").encode()
        found.append(Field(raw.lower(), raw, value.encode()))
    return tuple(found)


@pytest.mark.parametrize(
    ("rules", "method", "path", "kind"),
    [
        (FASTX3, b"POST", b"/v3/api/auth/ssh", Kind.LOGIN),
        (FASTX3, b"GET", b"/v3/api/user/login?username=a", Kind.LOGIN),
        (FASTX3, b"HEAD", b"/v3/api/user/login", Kind.LOGIN),
        (FASTX3, b"POST", b"//v3/./api/x/../auth/SSH/", Kind.LOGIN),
        (FASTX3, b"POST", b"/v3/api/auth/s%73h", Kind.LOGIN),
        (FASTX3, b"POST", b"/v3/api/auth/s%2573h", Kind.LOGIN),
        (FASTX3, b"POST", b"/v3%2fapi/auth;a=b/ssh;x", Kind.LOGIN),
        (FASTX3, b"POST", b"/v3\\api\\auth\\ssh", Kind.LOGIN),
        (FASTX3, b"POST", b"/../../v3/api/auth/ssh", Kind.LOGIN),
        (FASTX3, b"PUT", b"/v3/api/auth/ssh", Kind.ORDINARY),
        (FASTX3, b"POST", b"/v3/api/auth/sshx", Kind.ORDINARY),
        (FASTX3, b"POST", b"/v3/api/auth/logout?x", Kind.LOGOUT),
        (FASTX3, b"POST", b"/v3/api/auth//logout", Kind.ORDINARY),  # the service may not take it for one
        (FASTX3, b"POST", b"/v3/api/auth/LOGOUT", Kind.ORDINARY),
        (FORM, b"POST", b"/login", Kind.LOGIN),
        (FORM, b"GET", b"/login", Kind.ORDINARY),  # the page with the form
        (FORM, b"GET", b"/logout", Kind.LOGOUT),
        (replace(OWN, login=Calls(("/in/*",))), b"POST", b"/in/now", Kind.LOGIN),
        (replace(OWN, login=Calls(("/in/*",))), b"POST", b"/inside", Kind.ORDINARY),
        (OWN, b"POST", b"/", Kind.ORDINARY),
    ],
)
def test_what_a_request_is_for(rules: LoginRules, method: bytes, path: bytes, kind: Kind) -> None:
    assert kind_of(rules, method, path) is kind


@given(st.binary(max_size=60))
def test_any_path_has_one_plain_form_which_is_its_own(path: bytes) -> None:
    plain = plain_path(path)
    assert plain.startswith("/")
    assert "//" not in plain
    assert not {"..", "."} & set(plain.split("/"))


@pytest.mark.parametrize(
    ("path", "head", "body", "said"),
    [
        (b"/?username=ann", fields(), b"", Parameters("ann")),
        (b"/", fields(Content_Type="application/x-www-form-urlencoded"), b"username=a%20b&password=x", Parameters("a b")),
        (b"/", fields(Content_Type="application/json"), b'{"username": "ann", "password": "x"}', Parameters("ann")),
        (b"/", fields(), b' {"username": "ann"}', Parameters("ann")),
        (b"/", fields(Content_Type="application/json"), b"username=ann", Parameters(is_ambiguous=True)),
        (b"/?username=bob", fields(Content_Type="multipart/form-data; boundary=x"), b"--x", Parameters("bob", is_ambiguous=True)),
        (b"/?username=bob", fields(), "username=\u00e4nn".encode(), Parameters("bob", is_ambiguous=True)),
        (b"/?username=bob", fields(Content_Encoding="gzip"), b"\x1f\x8b\x08", Parameters("bob", is_ambiguous=True)),
        (b"/", fields(), b"Username=ann", Parameters("ann")),
        (b"/", fields(), b"Username=ann&username=ann", Parameters("ann")),
        (b"/", fields(), b'{"username": ["ann"]}', Parameters()),
        (b"/", fields(Content_Type="application/json"), b"[[[[", Parameters(is_ambiguous=True)),
        (b"/", fields(), b'{"username": ', Parameters(is_ambiguous=True)),
        (b"/", fields(), b"username=" + b"x" * 300, Parameters()),
        (b"/", fields(), b"username=a%0ab", Parameters()),
        (b"/", fields(), b'{"authtoken": "T", "password": "x"}', Parameters("", ("T",))),
        (b"/?token=U", fields(), b"authtoken=T", Parameters("", ("T", "U"))),
        (b"/?username=bob", fields(), b"username=ann", Parameters("", is_ambiguous=True)),
        (b"/?username=ann", fields(), b"username=ann", Parameters("ann")),
    ],
)
def test_what_a_login_says(path: bytes, head: tuple[Field, ...], body: bytes, said: Parameters) -> None:
    assert read_parameters(FASTX3, path, head, body) == said


def test_a_token_in_the_request() -> None:
    for text, head, body in (
        ("bearer", fields(Authorization="bearer T"), b""),
        ("cookie:jwt", fields(Cookie="a=b; jwt=T"), b""),
        ("header:X-Token", fields(X_Token="T"), b""),
        ("field:jwt", fields(), b"jwt=T"),
    ):
        rules = replace(FORM, token=ValueLocation.parse(text), token_in_request=True)
        assert read_parameters(rules, b"/", head, body).token == "T", text


def told(**result: object) -> bytes:
    return json.dumps({"result": result}).encode()


@pytest.mark.parametrize(
    ("rules", "status", "head", "body", "verdict"),
    [
        (FASTX3, 200, fields(), told(stage="login", authtoken="A"), GoesOn("A")),
        (FASTX3, 200, fields(), told(stage="keyboard-interactive", token="B"), GoesOn("B")),
        (FASTX3, 200, fields(), told(stage="password"), GoesOn()),
        (FASTX3, 200, fields(), told(stage="success", token="J"), Succeeded("J")),
        (FASTX3, 200, fields(), told(stage="success", token="a b"), Succeeded()),
        (FASTX3, 500, fields(), told(stage="success", token="J"), Failed()),
        (FASTX3, 200, fields(), b'{"error": {"name": "Denied"}}', Failed()),
        (FASTX3, 200, fields(), told(stage=True), Failed()),
        (FASTX3, 200, fields(), b"<html>", Failed()),
        (COOKIE_FORM, 302, fields(Set_Cookie="session=1; HttpOnly"), b"", Succeeded()),
        (COOKIE_FORM, 200, fields(Set_Cookie="session=1"), b"", Failed()),
        (COOKIE_FORM, 302, fields(Set_Cookie="other=1"), b"", Failed()),
        (COOKIE_FORM, 302, fields(Set_Cookie="session="), b"", Failed()),
        (COOKIE_FORM, 302, fields(Set_Cookie="session=x; Max-Age=0"), b"", Failed()),
        (COOKIE_FORM, 302, fields(Set_Cookie="session=x; expires=Thu, 01 Jan 1970 00:00:00 GMT"), b"", Failed()),
        (replace(COOKIE_FORM, token=ValueLocation(Where.COOKIE, "session")), 302, fields(Set_Cookie="session=S"), b"", Succeeded("S")),
        (replace(FORM, token=ValueLocation(Where.HEADER, "x-token")), 200, fields(X_Token="S"), b"", Succeeded("S")),
        (replace(FORM, signs=Signs(frozenset({303}))), 303, fields(), b"", Succeeded()),
        (replace(OWN, signs=Signs(json_path="ok", json_value="yes")), 200, fields(), b'{"ok": "yes"}', Succeeded()),
    ],
)
def test_what_an_answer_means(rules: LoginRules, status: int, head: tuple[Field, ...], body: bytes, verdict: object) -> None:
    assert judge(rules, status, head, body) == verdict


@given(st.integers(100, 599), st.binary(max_size=200))
def test_no_answer_that_does_not_say_so_lets_anybody_in(status: int, body: bytes) -> None:
    assert not isinstance(judge(FASTX3, status, (), body), Succeeded)
    assert not isinstance(judge(COOKIE_FORM, status, (), body), Succeeded)


VALUES = st.none() | st.booleans() | st.floats() | st.text(max_size=5)


@given(st.recursive(VALUES, lambda found: st.dictionaries(st.text(max_size=6), found), max_leaves=6))
def test_any_json_is_read(document: object) -> None:
    body = json.dumps({"result": document}).encode()
    assert not isinstance(judge(FASTX3, 200, (), body), Succeeded)
    read_parameters(FASTX3, b"/", (), body)


def test_two_users_in_any_case_are_ambiguous() -> None:
    assert read_parameters(FORM, b"/?USERNAME=bob", (), b"username=ann").is_ambiguous
    assert read_parameters(FORM, b"/", (), b'{"username": "ann", "username": "bob"}').is_ambiguous
    assert read_parameters(FORM, b"/", (), b'{"username": "ann", "username": "ann"}') == Parameters("ann")


def test_all_that_a_login_says_is_for_scripts() -> None:
    body = b'{"username": "ann", "admin": true, "start": {"command": "xterm", "password": "x"}, "n": [1]}'
    said = read_parameters(FASTX3, b"/v3/api/user/login?serverId=n2", (), body)
    expected = {"serverId": "n2", "username": "ann", "admin": True, "start": {"command": "xterm", "password": "x"}, "n": [1]}
    assert (said.user, said.data) == ("ann", expected)
    assert without_secrets(said.data)["start"] == {"command": "xterm"}
    assert read_parameters(FASTX3, b"/", fields(Content_Type="application/json"), b"[1]").data == {}


def test_tokens_a_request_shows() -> None:
    rules = replace(FASTX3, token=ValueLocation(Where.COOKIE, "jwt"))
    head = fields(Authorization="Bearer A", X_Fastx_Token="B", Cookie="jwt=C")
    assert shown_tokens(rules, head) == ["A", "B", "C"]
    assert shown_tokens(FASTX3, fields(Authorization="Basic A", Cookie="jwt=C")) == []
    assert shown_tokens(FASTX3, fields(Authorization="Bearer " + "x" * 9_000)) == []
    assert login_id_of("A") != login_id_of("B")


def test_cookies_an_answer_sets() -> None:
    head = (*fields(Set_Cookie="a=1; Path=/"), *fields(Set_Cookie="b=2"), *fields(Set_Cookie="a=; Path=/"), *fields(Set_Cookie="c"))
    assert set_cookies(head) == {"b": "2"}


@pytest.mark.parametrize("text", ["", "bearer:x", "cookie:", "cookie", "body:x", "json:" + "a" * 200, "cookie:a b"])
def test_spots_that_are_none(text: str) -> None:
    with pytest.raises(ValueError, match="expected"):
        ValueLocation.parse(text)


def test_stages_may_be_anywhere() -> None:
    rules = replace(OWN, signs=Signs(json_path="state", json_value="done"), stages=Stages(("a.b.c",), ("next",)))
    assert judge(rules, 200, (), b'{"state": "more", "a": {"b": {"c": "N"}}}') == GoesOn("N")
    assert read_parameters(rules, b"/?next=N", (), b"").repeats == ("N",)
