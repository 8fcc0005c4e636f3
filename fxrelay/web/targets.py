"""Pure: what a request asks for: the forms of its target (RFC 9112, 3.2), its host, and a node named by its path.

A path names a node by its id. Which port it has there only this relay's configuration says: no address is ever read from a URL.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from fxrelay.web.heads import BadHead, RequestHead
from fxtunnel.model import RelayId, is_name

_HOST: Final = re.compile(rb"(\[[0-9A-Fa-f:.]{2,45}\]|[A-Za-z0-9._~!$&'()*+,;=%-]{0,253})(?::([0-9]{0,5}))?")
_ABSOLUTE: Final = re.compile(rb"https?://([^/?#]*)([/?].*)?", re.IGNORECASE)
_KEPT: Final = b"/node/"
_STRIPPED: Final = b"/rnode/"


@dataclass(frozen=True, slots=True)
class Target:
    """What is asked for. `path` is in origin form, with its query; `authority` is the host as it was written, `host` its name in lower case
    without port and closing dot.
    """

    path: bytes
    authority: bytes
    host: str


@dataclass(frozen=True, slots=True)
class NodePath:
    """A path that names a node. `path` is what the node gets; `prefix` what was taken away in front of it. `node` None: no valid id."""

    node: RelayId | None
    path: bytes
    prefix: bytes


def read_target(head: RequestHead) -> Target:
    """What a request asks for.

    Raises:
        BadHead: a target or a host that cannot be served.
    """
    authority = head.get(b"host") or b""
    target = head.target
    if head.method in (b"CONNECT", b"TRACE"):
        raise BadHead(405, "this method is not served")
    if not target.startswith(b"/"):
        found = _ABSOLUTE.fullmatch(target)
        if found is not None:
            # RFC 9112, 3.2.2: the target counts. Where a Host says otherwise, two readers could see two sites.
            if head.version == b"1.1" and found[1].lower() != authority.lower():
                raise BadHead(400, "Host is not the target's host")
            authority, target = found[1], found[2] or b"/"
            if target.startswith(b"?"):
                target = b"/" + target
        elif target != b"*" or head.method != b"OPTIONS":
            raise BadHead(400, "the request's target has no form that is served")
    if b"#" in target:
        raise BadHead(400, "the request's target has a fragment")
    return Target(target, authority, _host_name(authority))


def is_served(host: str, hosts: Sequence[str]) -> bool:
    """Whether `host` is one of `hosts`, exactly or by a leading `*.`; always, if `hosts` is empty."""
    if not hosts:
        return True
    return any(host == name or (name.startswith("*.") and host.endswith(name[1:]) and len(host) >= len(name)) for name in hosts)


def split_node_path(path: bytes) -> NodePath | None:
    """The node that `/node/ID/…` (handed on as it is) or `/rnode/ID/…` (handed on without its beginning) names; None for other paths."""
    if path.startswith(_KEPT):
        start, strip = len(_KEPT), False
    elif path.startswith(_STRIPPED):
        start, strip = len(_STRIPPED), True
    else:
        return None
    end = len(path)
    for mark in (b"/", b"?"):
        at = path.find(mark, start)
        if 0 <= at < end:
            end = at
    name = path[start:end].decode("latin-1")
    node = RelayId(name) if is_name(name) else None
    if not strip:
        return NodePath(node, path, b"")
    rest = path[end:]
    return NodePath(node, rest if rest.startswith(b"/") else b"/" + rest, path[:end])


def _host_name(authority: bytes) -> str:
    found = _HOST.fullmatch(authority)
    if found is None:
        raise BadHead(400, "Host is malformed")
    return found[1].decode("ascii").lower().removesuffix(".")
