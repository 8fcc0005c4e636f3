"""Pure: recognises logins in HTTP messages: requests that begin, go on with, or end one, and answers that let somebody in.

A request counts as a login's when any reading of its path is one: services decode, fold and case paths in their own ways, and a login that
goes by unrecognised would be one without a reservation. A logout's path has to be exact: a server must not get free while its user
is still logged in.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Final
from urllib.parse import parse_qsl, unquote_to_bytes

from fxrelay.logins.rules import Calls, LoginRules, ValueLocation, Where
from fxrelay.web.heads import Field, cookie_values

MAX_USER_CHARS: Final = 256
MAX_PARAMETERS: Final = 256
MAX_TOKEN_CHARS: Final = 8_192
_CONTROL: Final = re.compile(r"[\x00-\x1f\x7f]")
_TOKEN: Final = re.compile(r"[!-~]+")


class Kind(Enum):
    """What a request is for."""

    ORDINARY = "ordinary"
    LOGIN = "login"
    LOGOUT = "logout"


@dataclass(frozen=True, slots=True)
class Parameters:
    """What a request of a login says. `user` is only what the client claims. `repeats` is what an earlier answer gave, in the order of the
    rules; empty: the login begins. `is_ambiguous`: it names two users, or has a body that cannot be read here: who knows whom the service
    finds in it. `data` is all that it says, for balancing scripts.
    """

    user: str = ""
    repeats: tuple[str, ...] = ()
    token: str = ""
    is_ambiguous: bool = False
    data: Mapping[str, Any] = field(default_factory=dict, compare=False)


@dataclass(frozen=True, slots=True)
class Succeeded:
    """This answer would let the user in. `token` is what later requests would show, if it is known."""

    token: str = ""


@dataclass(frozen=True, slots=True)
class GoesOn:
    """The login needs more requests; the next one repeats `token`, if there is one."""

    token: str = ""


@dataclass(frozen=True, slots=True)
class Failed:
    """This answer lets nobody in."""


Verdict = Succeeded | GoesOn | Failed


def kind_of(rules: LoginRules, method: bytes, path: bytes) -> Kind:
    """What a request is for. `path` may have a query."""
    plain = plain_path(path)
    if _is_meant(rules.login, method, plain):
        return Kind.LOGIN
    if _is_meant(rules.logout, method, path.partition(b"?")[0].decode("latin-1")):
        return Kind.LOGOUT
    return Kind.ORDINARY


def plain_path(path: bytes) -> str:
    """The path as the most generous service would read it: decoded, without query, empty and dot segments, in lower case."""
    found = path.partition(b"?")[0]
    for _ in range(3):
        decoded = unquote_to_bytes(found)
        if decoded == found:
            break
        found = decoded
    segments: list[str] = []
    for segment in found.decode("utf-8", "replace").replace("\\", "/").lower().split("/"):
        name = segment.partition(";")[0]
        if name == "..":
            del segments[-1:]
        elif name not in ("", "."):
            segments.append(name)
    return "/" + "/".join(segments)


def read_parameters(rules: LoginRules, path: bytes, fields: Sequence[Field], body: bytes) -> Parameters:
    """What a request of a login says, from its query, its form or JSON, and its head. What cannot be read is not there."""
    in_body = _in_body(fields, body)
    is_read = in_body is not None
    said = [*(_pairs(path.partition(b"?")[2]) or []), *(in_body or [])]
    pairs = [(name, value) for name, value in said if isinstance(value, str)]
    found = dict(pairs)
    users = {value for name, value in pairs if name.lower() == rules.user.lower()}
    user = next(iter(users)) if len(users) == 1 else ""
    if not is_user(user):
        user = ""
    token = ""
    if rules.token is not None and rules.token_in_request:
        token = _in_request(rules.token, fields, found)
    repeats = tuple(found[name] for name in rules.stages.returned if found.get(name))
    return Parameters(user, repeats, token, len(users) > 1 or not is_read, dict(said))


def judge(rules: LoginRules, status: int, fields: Sequence[Field], body: bytes) -> Verdict:
    """What an answer to a request of a login means. `body` is whole."""
    signs = rules.signs
    document = _loads(body) if signs.json_path or (rules.token is not None and rules.token.where is Where.JSON) else None
    if status not in signs.status if signs.status else not 200 <= status < 400:
        return Failed()
    if signs.json_path:
        said = _at(document, signs.json_path)
        if said != signs.json_value:
            return GoesOn(next(filter(None, (_text(document, path) for path in rules.stages.given)), "")) if said else Failed()
    if signs.cookie and not set_cookies(fields).get(signs.cookie):
        return Failed()
    token = ""
    if rules.token is not None and not rules.token_in_request:
        token = _in_answer(rules.token, fields, document)
    return Succeeded(token)


def shown_tokens(rules: LoginRules, fields: Sequence[Field]) -> list[str]:
    """Everything in a request's head that may be the token of a login, the likeliest first."""
    found = [value for each in fields if each.name == b"authorization" and (value := _bearer(each.value))]
    for name in rules.headers:
        found += [_ascii(each.value) for each in fields if each.name == name.encode()]
    location = rules.token
    if location is not None and location.where is Where.COOKIE:
        found += list(cookies(fields, location.name))
    elif location is not None and location.where is Where.HEADER:
        found += [_ascii(each.value) for each in fields if each.name == location.name.encode()]
    return [token for token in found if token and len(token) <= MAX_TOKEN_CHARS][:8]


def is_user(text: str) -> bool:
    """Whether this may be a user's name in a record and a log."""
    return 0 < len(text) <= MAX_USER_CHARS and _CONTROL.search(text) is None


def login_id_of(token: str) -> str:
    """The id of the login whose token this is. Who knows the id cannot make the token of it."""
    return "t" + hashlib.sha256(token.encode("utf-8", "surrogatepass")).hexdigest()[:40]


def cookies(fields: Sequence[Field], name: str) -> Iterator[str]:
    """The values of a cookie in a request's head, without quotes; empty texts for those that are not ASCII."""
    for value in cookie_values(fields, name.encode()):
        yield _ascii(value.strip(b'"'))


def set_cookies(fields: Sequence[Field]) -> dict[str, str]:
    """The cookies that an answer sets; those it takes away are not among them."""
    found: dict[str, str] = {}
    for each in fields:
        if each.name != b"set-cookie":
            continue
        pair, _, attributes = each.value.partition(b";")
        name, _, value = pair.partition(b"=")
        ended = re.search(rb"max-age\s*=\s*(-|0\s*(;|$))|expires\s*=[^;]*\b1970\b", attributes, re.IGNORECASE)
        text = _ascii(value.strip(b' \t"'))
        if ended or not text:
            found.pop(_ascii(name.strip()), None)
        else:
            found[_ascii(name.strip())] = text
    return found


def _is_meant(calls: Calls, method: bytes, path: str) -> bool:
    name = method.decode("latin-1").upper()
    if ("GET" if name == "HEAD" else name) not in calls.methods:
        return False
    return any(path == wanted or (wanted.endswith("*") and path.startswith(wanted[:-1])) for wanted in calls.paths)


def _in_body(fields: Sequence[Field], body: bytes) -> Sequence[tuple[str, Any]] | None:
    """The parameters of a form or a JSON object; None for anything else."""
    if not body.strip():
        return []
    kind = next((each.value for each in fields if each.name == b"content-type"), b"").lower()
    if b"json" in kind or body.lstrip()[:1] == b"{":
        document = _loads(body, _Object)
        return document.members if isinstance(document, _Object) else None
    return _pairs(body) if not kind or kind.startswith(b"application/x-www-form-urlencoded") else None


def _pairs(text: bytes) -> list[tuple[str, str]] | None:
    try:
        return parse_qsl(text.decode("ascii"), keep_blank_values=True, max_num_fields=MAX_PARAMETERS)
    except (UnicodeDecodeError, ValueError):
        return None


class _Object(dict[str, Any]):
    """A JSON object with all its members: which of two with one name a service takes is not known (RFC 8259, 4)."""

    def __init__(self, members: list[tuple[str, Any]]) -> None:
        super().__init__(members)
        self.members = members


def _loads(body: bytes, hook: Callable[[list[tuple[str, Any]]], Any] | None = None) -> Any:
    try:
        return json.loads(body, object_pairs_hook=hook)
    except (ValueError, RecursionError):
        return None


def _at(document: Any, path: str) -> str:
    """The text at a dotted path; empty if there is none."""
    for name in path.split("."):
        if not isinstance(document, Mapping):
            return ""
        document = document.get(name)
    return document if isinstance(document, str) else ""


def _text(document: Any, path: str) -> str:
    found = _at(document, path)
    return found if _TOKEN.fullmatch(found) and len(found) <= MAX_TOKEN_CHARS else ""


def _in_answer(location: ValueLocation, fields: Sequence[Field], document: Any) -> str:
    match location.where:
        case Where.JSON:
            found = _text(document, location.name)
        case Where.COOKIE:
            found = set_cookies(fields).get(location.name, "")
        case Where.HEADER:
            found = next((_ascii(each.value) for each in fields if each.name == location.name.encode()), "")
        case _:
            found = ""
    return found if len(found) <= MAX_TOKEN_CHARS else ""


def _in_request(location: ValueLocation, fields: Sequence[Field], parameters: Mapping[str, str]) -> str:
    match location.where:
        case Where.BEARER:
            found = next((value for each in fields if each.name == b"authorization" and (value := _bearer(each.value))), "")
        case Where.COOKIE:
            found = next(cookies(fields, location.name), "")
        case Where.HEADER:
            found = next((_ascii(each.value) for each in fields if each.name == location.name.encode()), "")
        case _:
            found = parameters.get(location.name, "")
    return found if len(found) <= MAX_TOKEN_CHARS else ""


def _bearer(value: bytes) -> str:
    scheme, _, token = value.partition(b" ")
    return _ascii(token.strip(b" ")) if scheme.lower() == b"bearer" else ""


def _ascii(value: bytes) -> str:
    """Empty for what is not ASCII: no token of ours to look for."""
    try:
        return value.decode("ascii")
    except UnicodeDecodeError:
        return ""
