"""The keys of [service.login]: what presets say, what goes together, and what is said about the rest."""

import pytest
from cli_samples import RELAY_TOML, Write

import fxrelay.settings
from fxrelay.logins.composing import login_rules
from fxrelay.logins.rules import FASTX3, Retry, Signs, Stages, ValueLocation, Where
from fxtunnel.errors import ConfigError

HTTP = '[[service]]\nname = "site"\nprotocol = "http"\nport = 3300\n'
LOGIN = HTTP + "reservations = true\n[service.login]\n"


def test_a_preset_and_what_is_said_otherwise(relay_toml: Write) -> None:
    path = relay_toml(RELAY_TOML + LOGIN + 'preset = "fastx3"\njwt = {keys = "jwt.pem", algorithms = ["RS256"]}\nretry = "tell"\n')
    service = fxrelay.settings.load(path, {}).services[-1]
    assert service.login is not None
    assert service.login.jwt is not None
    assert service.login.jwt.keys == path.parent / "jwt.pem"
    assert service.is_login
    rules = login_rules(service.login)
    assert rules.retry is Retry.TELL
    assert (rules.login, rules.logout, rules.signs, rules.stages) == (FASTX3.login, FASTX3.logout, FASTX3.signs, FASTX3.stages)


def test_own_rules(relay_toml: Write) -> None:
    path = relay_toml(
        RELAY_TOML
        + LOGIN
        + 'paths = ["/API/In/"]\nmethods = ["PUT"]\nuser = "name"\nsuccess_json = "state=ok"\nstage_json = ["next"]\nstage_fields = ["n"]\n'
        'token = "response:header:X-Token"\ntoken_headers = ["X-Token"]\nlogout_paths = ["/API/Out"]\nlifetime_s = 60\nidle_s = 5\n'
    )
    login = fxrelay.settings.load(path, {}).services[-1].login
    assert login is not None
    rules = login_rules(login)
    assert rules.login.paths == ("/api/in",)
    assert rules.logout.paths == ("/API/Out",)
    assert rules.signs == Signs(json_path="state", json_value="ok")
    assert rules.stages == Stages(("next",), ("n",))
    assert rules.token == ValueLocation(Where.HEADER, "x-token")
    assert rules.headers == ("x-token",)
    assert (rules.bounds.lifetime_s, rules.bounds.idle_s) == (60, 5)


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (HTTP + "reservations = true", "needs [service.login]"),
        ('[[service]]\nname = "s"\nport = 1\n[service.login]\npreset = "fastx3"', 'login: only for protocol = "http"'),
        ('[[service]]\nname = "s"\nprotocol = "http"\ntarget = "a:1"\n[service.login]\npreset = "fastx3"', "login: only for a pool"),
        (HTTP + 'action = "user/login"\n[service.login]\npreset = "fastx3"', "leave `action` out"),
        (LOGIN + "success_status = [200]", "paths: is required"),
        (LOGIN + 'preset = "form"', "which answer lets somebody in"),
        (LOGIN + 'preset = "form"\nsuccess_status = [302]\njwt = {keys = "k"}', "jwt: only with `token`"),
        (LOGIN + 'preset = "fastx3"\njwt = {}', "expected either `keys`"),
        (LOGIN + 'preset = "fastx3"\njwt = {keys = "k", url = "https://a/"}', "expected either `keys`"),
        (LOGIN + 'preset = "fastx3"\njwt = {url = "http://a.example/"}', "expected https://"),
        (LOGIN + 'preset = "fastx3"\njwt = {keys = "k", algorithms = ["HS256"]}', "expected some of EdDSA"),
        (LOGIN + 'preset = "fastx3"\njwt = {keys = "k", algorithms = []}', "algorithms"),
        (LOGIN + 'preset = "fastx3"\ntoken = "response:bearer"', "a response has no bearer"),
        (LOGIN + 'preset = "fastx3"\ntoken = "request:json:a"', "field:NAME"),
        (LOGIN + 'preset = "fastx3"\ntoken = "json:a"', "expected request: or response:"),
        (LOGIN + 'preset = "fastx3"\nsuccess_json = "a"', "path.in.the.answer=value"),
        (LOGIN + 'preset = "fastx3"\npaths = ["login"]', "expected paths that begin with /"),
        (LOGIN + 'preset = "fastx3"\npaths = ["/a?b"]', "expected paths that begin with /"),
        (LOGIN + 'preset = "fastx3"\nmethods = ["LOGIN"]', "expected some of DELETE"),
        (LOGIN + 'preset = "fastx3"\ncookie = "a b"', "expected a cookie's name"),
    ],
)
def test_what_does_not_go_together(relay_toml: Write, lines: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        fxrelay.settings.load(relay_toml(RELAY_TOML + lines), {})
    assert said in str(caught.value)
