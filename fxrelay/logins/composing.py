"""Task: the rules of logins from the configuration; keys are read here. Blocking: for a worker thread."""

from fxrelay.cluster_agent import seat_rules
from fxrelay.login_settings import JwtSection, LoginSection
from fxrelay.logins.gate import LoginService
from fxrelay.logins.passes import PassCookies
from fxrelay.logins.recognising import plain_path
from fxrelay.logins.rules import PRESETS, Bounds, Calls, LoginRules, Retry, Signs, Stages, ValueLocation
from fxrelay.settings import RelaySettings
from fxrelay.web.composing import cookie_key
from fxtunnel.errors import ConfigError, ConfigProblem
from fxtunnel.kit.jwt_keys import KeySource, TokenVerifier, read_key_file
from fxtunnel.kit.jwt_verifying import TokenRules
from fxtunnel.model import ServiceName


def login_services(settings: RelaySettings) -> dict[ServiceName, LoginService]:
    """What the configuration says about the logins of each service. Makes the cookies' key at its first use.

    Raises:
        ConfigError: every key that cannot be used.
    """
    found: dict[ServiceName, LoginService] = {}
    problems: list[ConfigProblem] = []
    for section in settings.services:
        login, name = section.login, ServiceName(section.name)
        if login is None:
            continue
        try:
            passes = PassCookies(login.cookie, name, cookie_key(section.cookie_key, settings.relay.state_dir))
            verifier = _verifier(login.jwt) if login.jwt is not None else None
        except ConfigError as exc:
            problems += exc.problems
            continue
        user_claim = login.jwt.user_claim if login.jwt is not None else "sub"
        found[name] = LoginService(login_rules(login), passes, seat_rules(section), verifier, user_claim)
    if problems:
        raise ConfigError(problems)
    return found


def guarded_services(settings: RelaySettings) -> frozenset[ServiceName]:
    """HTTP services without logins of their own that keep off nodes which are somebody's."""
    return frozenset(
        ServiceName(section.name)
        for section in settings.services
        if section.protocol == "http" and section.guard_start and section.login is None
    )


def verify_login_files(settings: RelaySettings) -> list[ConfigProblem]:
    """What `login_services` would refuse; makes and fetches nothing."""
    problems: list[ConfigProblem] = []
    for section in settings.services:
        if section.login is not None and section.login.jwt is not None and section.login.jwt.keys is not None:
            try:
                read_key_file(section.login.jwt.keys)
            except ConfigError as exc:
                problems += exc.problems
    return problems


def login_rules(section: LoginSection) -> LoginRules:
    """The preset, with what the section says otherwise."""
    preset = PRESETS[section.preset]
    signs = preset.signs
    if section.success_status or section.success_cookie or section.success_json:
        path, _, value = (section.success_json or "").partition("=")
        signs = Signs(frozenset(section.success_status or ()), section.success_cookie or "", path, value)
    token, in_request = preset.token, preset.token_in_request
    if section.token is not None:
        side, _, location = section.token.partition(":")
        token, in_request = ValueLocation.parse(location), side == "request"
    return LoginRules(
        _calls(preset.login, tuple(plain_path(path.encode()) for path in section.paths or ()) or None, section.methods),
        _calls(preset.logout, section.logout_paths, section.logout_methods),
        section.user or preset.user,
        signs,
        Stages(
            section.stage_json if section.stage_json is not None else preset.stages.given,
            section.stage_fields if section.stage_fields is not None else preset.stages.returned,
        ),
        token,
        in_request,
        tuple(name.lower() for name in section.token_headers) if section.token_headers is not None else preset.headers,
        Retry(section.retry) if section.retry is not None else preset.retry,
        Bounds(max_body_bytes=section.max_body, lifetime_s=section.lifetime_s, idle_s=section.idle_s, per_address=section.per_address),
    )


def _calls(preset: Calls, paths: tuple[str, ...] | None, methods: tuple[str, ...] | None) -> Calls:
    return Calls(paths if paths is not None else preset.paths, frozenset(methods) if methods is not None else preset.methods)


def _verifier(section: JwtSection) -> TokenVerifier:
    rules = TokenRules(section.algorithms, section.issuer, section.audience)
    return TokenVerifier(rules, KeySource(section.keys, section.url, section.ca))
