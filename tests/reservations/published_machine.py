"""The published algorithm as a machine of its own, literally and with one repair after the other. It shares no code with ours."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

USERS = ("ann", "bob", "cid")
SERVERS = 2


@dataclass(frozen=True)
class Variant:
    """Which repairs are made."""

    atomic: bool = False
    """Check and clear are one step."""
    revoke: bool = False
    """The login of who is rejected is taken back."""
    login_after: bool = False
    """The login is made after the check, not by the authentication before it."""
    reread: bool = False
    """The check asks for the logins of the server, too."""


LITERAL = Variant()
VARIANTS = {
    "literal": LITERAL,
    "atomic check and clear": Variant(atomic=True),
    "rejected login revoked": Variant(atomic=True, revoke=True),
    "login after the check": Variant(atomic=True, revoke=True, login_after=True),
    "logins read again": Variant(atomic=True, revoke=True, login_after=True, reread=True),
}


class User(NamedTuple):
    phase: str = "idle"
    server: int = -1


class Server(NamedTuple):
    """`logins` and `entries` are users; `published` is what balancers believe: whether it is reserved."""

    logins: frozenset[int] = frozenset()
    entries: frozenset[int] = frozenset()
    published: bool = False


class World(NamedTuple):
    users: tuple[User, ...]
    servers: tuple[Server, ...]


START = World((User(),) * len(USERS), (Server(),) * SERVERS)


def steps(variant: Variant, world: World) -> Iterator[tuple[str, World]]:
    for number, server in enumerate(world.servers):
        if server.published != bool(server.logins):
            yield (
                f"server {number} publishes that it is {'reserved' if server.logins else 'free'}",
                _with(world, None, number, server._replace(published=bool(server.logins))),
            )
    for who, user in enumerate(world.users):
        name = USERS[who]
        if user.phase == "idle":
            for number, server in enumerate(world.servers):
                if not server.published:
                    yield f"1 select: {name} gets server {number}", _with(world, (who, User("selected", number)))
            continue
        server = world.servers[user.server]
        at = user.server
        match user.phase:
            case "selected":
                entered = server._replace(entries=server.entries | {who})
                yield f"2 enter: {name} at {at}", _with(world, (who, User("entered", at)), at, entered)
            case "entered":
                yield f"3 forward: {name} to {at}", _with(world, (who, User("forwarded", at)))
            case "forwarded":
                logins = server.logins if variant.login_after else server.logins | {who}
                yield f"4 authenticate: {name} at {at}", _with(world, (who, User("proved", at)), at, server._replace(logins=logins))
            case "proved":
                others = server.logins - {who} if variant.reread else frozenset()
                if who not in server.entries or others:
                    logins = server.logins - {who} if variant.revoke else server.logins
                    after = server._replace(logins=logins, entries=server.entries - {who})
                    yield f"5b reject: {name} at {at}", _with(world, (who, User()), at, after)
                elif variant.atomic:
                    after = server._replace(logins=server.logins | {who}, entries=frozenset())
                    yield f"5a check and clear: {name} is in at {at}", _with(world, (who, User("in", at)), at, after)
                else:
                    yield f"5a check: {name} finds his entry at {at}", _with(world, (who, User("checked", at)))
            case "checked":
                after = server._replace(logins=server.logins | {who}, entries=frozenset())
                yield f"5a clear: {name} is in at {at}", _with(world, (who, User("in", at)), at, after)
            case "in":
                after = server._replace(logins=server.logins - {who})
                yield f"7 log out: {name} from {at}", _with(world, (who, User()), at, after)


def two_users(world: World) -> str:
    for number in range(SERVERS):
        inside = [USERS[who] for who, user in enumerate(world.users) if user == User("in", number)]
        if len(inside) > 1:
            return f"{' and '.join(inside)} are on server {number}"
    return ""


def leaked(world: World) -> str:
    for number, server in enumerate(world.servers):
        for who in server.logins:
            if world.users[who].server != number:
                return f"server {number} stays reserved by a login of {USERS[who]} that nobody has"
    return ""


def _with(world: World, user: tuple[int, User] | None, number: int = -1, server: Server | None = None) -> World:
    users, servers = list(world.users), list(world.servers)
    if user is not None:
        users[user[0]] = user[1]
    if server is not None:
        servers[number] = server
    return World(tuple(users), tuple(servers))
