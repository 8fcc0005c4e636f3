"""Cookies that bring users back, and what this relay remembers of logins under way."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fxrelay.logins.attempts import MAX_ONGOING_PER_ADDRESS, Attempts, Ongoing, Quota
from fxrelay.logins.passes import TRY_SUFFIX, Pass, PassCookies
from fxrelay.web.heads import Field
from fxtunnel.kit.answers import Refused
from fxtunnel.model import RelayId

KEY = b"k" * 32
COOKIES = PassCookies("fxlogin", "site", KEY)
FOUND = Pass(RelayId("node-2.x"), "t0123abc", 2_000)


def shown(line: bytes) -> tuple[Field, ...]:
    value = line.removeprefix(b"Set-Cookie: ").partition(b";")[0]
    return (Field(b"cookie", b"Cookie", b"a=b; " + value),)


def test_a_pass_comes_back() -> None:
    line = COOKIES.grant(FOUND, 1_000, secure=True)
    assert line.endswith(b"; Path=/; Max-Age=87400; HttpOnly; SameSite=Lax; Secure\r\n")
    assert COOKIES.read(shown(line)) == [FOUND]
    assert COOKIES.read_tries(shown(line)) == []
    tried = COOKIES.grant_try(FOUND, 600, secure=False)
    assert COOKIES.read_tries(shown(tried)) == [FOUND]
    assert COOKIES.read(shown(tried)) == []
    assert b"Max-Age=0" in COOKIES.withdraw()
    assert TRY_SUFFIX.encode() in COOKIES.withdraw_try()


def test_nobody_else_writes_passes() -> None:
    line = COOKIES.grant(FOUND, 1_000, secure=False)
    for other in (PassCookies("fxlogin", "other", KEY), PassCookies("fxlogin", "site", b"x" * 32)):
        assert other.read(shown(line)) == []
    for change in ((b"node-2", b"node-3"), (b"t0123", b"t1123"), (b":2000", b":3000")):
        assert COOKIES.read(shown(line.replace(*change))) == []
    # A mark of a login under way is no pass, whatever name it is shown under.
    tried = COOKIES.grant_try(FOUND, 600, secure=False).replace(b"fxlogin-try=", b"fxlogin=")
    assert COOKIES.read(shown(tried)) == []


@given(st.binary(max_size=80))
def test_any_cookie_is_read(value: bytes) -> None:
    assert COOKIES.read((Field(b"cookie", b"Cookie", b"fxlogin=" + value),)) == []


def ongoing(address: str, began: float = 0.0) -> Ongoing:
    return Ongoing(RelayId("n"), "ann", address, began, began, None)


def test_a_login_under_way_is_forgotten_in_time() -> None:
    attempts = Attempts()
    found = ongoing("a")
    attempts.keep("k", found, 0)
    assert attempts.find("k", 179) is found
    attempts.keep("l", found, 179)  # its next request repeats something else
    assert attempts.find("l", 358) is found
    assert attempts.find("l", 360) is None
    slow = ongoing("a", 1_000)
    for now in range(1_000, 1_600, 100):
        attempts.keep("s", slow, now)
    assert attempts.find("s", 1_599) is slow
    assert attempts.find("s", 1_601) is None
    assert len(attempts) == 0


def test_who_begins_many_forgets_his_own() -> None:
    attempts = Attempts()
    attempts.keep("other", ongoing("b"), 0)
    for number in range(MAX_ONGOING_PER_ADDRESS + 5):
        attempts.keep(f"k{number}", ongoing("a"), 0)
    assert len(attempts) == MAX_ONGOING_PER_ADDRESS + 1
    assert attempts.find("other", 1) is not None
    assert attempts.find("k4", 1) is None
    assert attempts.find("k5", 1) is not None


def test_places_are_given_back() -> None:
    quota = Quota()
    with quota.place("a", 2), quota.place("a", 2), quota.place("b", 2):
        assert len(quota) == 3
        with pytest.raises(Refused) as caught, quota.place("a", 2):
            pass
        assert caught.value.status == 429
    assert len(quota) == 0
