"""Users, servers, relays that crash or stall, lists that are stale: around the real rule of fxrelay.balance.reservations.

Time has two sides: what was renewed since the last `time passes` is alive, everything else is over. Of fences only the order counts, users
and servers have no names, and logins of which nothing is left have no number.
"""

from collections.abc import Iterator
from dataclasses import replace
from functools import cache, lru_cache
from typing import NamedTuple

from fxrelay.balance import reservations as rule
from fxrelay.balance.reservations import ENTRY_TTL_MS, Granted, Login, Moment, OwnerRelogin, Record, Rejected, Token

USERS = ("ann", "bob", "cid")
NOW, LATER = 10_000_000, 10_000_000 + ENTRY_TTL_MS + 1
NEXT = 1_000


class User(NamedTuple):
    """`turn` tells this login from the one before; `fence` is the token of one who is in."""

    phase: str = "idle"
    server: int = -1
    turn: int = 0
    fence: int = 0


class World(NamedTuple):
    users: tuple[User, ...]
    records: tuple[Record, ...]
    published: tuple[bool, ...]


def start(users: int, servers: int) -> World:
    return World((User(),) * users, (Record("e", 0),) * servers, (False,) * servers)


@cache
def moment(now_ms: int = NOW) -> Moment:
    return Moment(now_ms, "e", NEXT, now_ms)


@cache
def login_of(who: int, user: User, now_ms: int = NOW) -> Login:
    return Login(f"{USERS[who]}{user.turn}", USERS[who], "r", now_ms + ENTRY_TTL_MS, ENTRY_TTL_MS)


def steps(world: World) -> Iterator[tuple[str, World]]:
    for action, after in _moves(world):
        yield action, canonical(after)


def _moves(world: World) -> Iterator[tuple[str, World]]:
    for number, record in enumerate(world.records):
        reserved = bool(_purge(record, moment()).logins)
        if world.published[number] != reserved:
            published = list(world.published)
            published[number] = reserved
            yield f"server {number} publishes that it is {'reserved' if reserved else 'free'}", world._replace(published=tuple(published))
    yield "time passes", _time_passes(world)
    for who, user in enumerate(world.users):
        yield from _user_moves(world, who, user)


def _user_moves(world: World, who: int, user: User) -> Iterator[tuple[str, World]]:
    name = USERS[who]
    if user.phase == "idle":
        for number in range(len(world.records)):
            if not world.published[number]:
                yield f"1 select: {name} gets server {number}", _with(world, who, user._replace(phase="selected", server=number))
        return
    at, record, login = user.server, world.records[user.server], login_of(who, user)
    gone = User(turn=1 - user.turn)
    match user.phase:
        case "selected":
            entered = _enter(record, login.login_id, name, "192.0.2.1", "r", moment())
            assert isinstance(entered, Record)
            yield f"2 enter: {name} at {at}", _with(world, who, user._replace(phase="entered"), entered)
        case "entered":
            yield f"3 forward: {name} to {at}", _with(world, who, user._replace(phase="forwarded"))
        case "forwarded":
            yield f"4 authenticate: {name} at {at}", _with(world, who, user._replace(phase="proved"))
            yield f"4 fail to authenticate: {name} at {at}", _with(world, who, gone, _abandon(record, login.login_id, moment()))
        case "proved":
            match _commit(record, login.login_id, login, OwnerRelogin.PREFER, moment()):
                case Granted(after, token):
                    inside = user._replace(phase="in", fence=token.fence)
                    yield f"5a commit: {name} is in at {at}", _with(world, who, inside, after)
                    # The answer is lost: nobody is let in, and the record thinks otherwise.
                    yield f"5a commit: {name} at {at}, the answer is lost", _with(world, who, gone, after)
                case Rejected(after, reason):
                    yield f"5b reject: {name} at {at}: {reason}", _with(world, who, gone, after)
        case "in":
            yield f"7 log out: {name} from {at}", _with(world, who, gone, _release(record, login.login_id, 0, moment()))
            yield f"{name}'s relay stalls", _with(world, who, user._replace(phase="stalled"))
        case "stalled":
            match _renew(record, login, Token("e", user.fence), NOW, moment()):
                case Granted(after, _):
                    yield f"6 {name}'s relay goes on, and renews at {at}", _with(world, who, user._replace(phase="in"), after)
                case Rejected(after, reason):
                    yield f"{name}'s relay goes on, and is told: {reason}", _with(world, who, gone, after)
    if user.phase != "stalled":
        yield f"{name}'s relay crashes", _with(world, who, gone)


def _time_passes(world: World) -> World:
    """Who is in renews in time (step 6); everything else is over."""
    records = list(world.records)
    for who, user in enumerate(world.users):
        if user.phase == "in":
            renewed = _renew(records[user.server], login_of(who, user, LATER), Token("e", user.fence), NOW, moment())
            assert isinstance(renewed, Granted), "who is in was not renewed"
            records[user.server] = renewed.record
    back_ms = LATER - NOW
    return world._replace(
        records=tuple(
            replace(
                record,
                logins=tuple(replace(each, expires_ms=each.expires_ms - back_ms) for each in record.logins),
                entries=tuple(
                    replace(each, expires_ms=each.expires_ms - back_ms, created_ms=each.created_ms - back_ms) for each in record.entries
                ),
            )
            for record in records
        )
    )


def canonical(world: World) -> World:
    """The same world with small numbers, and users and servers in an order that does not depend on their names."""
    users, records = list(world.users), []
    for number, record in enumerate(world.records):
        held = tuple(sorted({user.fence for user in users if user.fence and user.server == number}))
        small_record, small = _canonical_record(record, held)
        users = [user._replace(fence=small[user.fence]) if user.server == number else user for user in users]
        records.append(small_record)
    published = world.published
    if len(records) == 2 and (published, _key(records[0])) > (published[::-1], _key(records[1])):
        records.reverse()
        published = published[::-1]
        users = [user._replace(server=1 - user.server) if user.server >= 0 else user for user in users]
    signed = []
    for who, user in enumerate(users):
        traces = tuple(_traces(record, who) for record in records)
        if user.phase == "idle" and not any(traces):
            user = User()
        signed.append((user, traces, who))
    signed.sort()
    order = tuple(who for _, _, who in signed)
    return World(tuple(user for user, _, _ in signed), tuple(_renamed(record, order) for record in records), published)


@cache
def _key(record: Record) -> tuple[object, ...]:
    logins, entries = (
        tuple(sorted((each.expires_ms, each.login_id[-1]) for each in record.logins)),
        tuple(sorted((each.expires_ms, each.entry_id[-1]) for each in record.entries)),
    )
    return record.fence, logins, entries


@cache
def _traces(record: Record, who: int) -> tuple[tuple[str, str, int], ...]:
    """What is left of a user in a record."""
    name = USERS[who]
    logins = [("login", each.login_id[-1], each.expires_ms) for each in record.logins if each.user == name]
    return tuple(logins + [("entry", each.entry_id[-1], each.expires_ms) for each in record.entries if each.user == name])


@cache
def _renamed(record: Record, order: tuple[int, ...]) -> Record:
    """The record when user `order[n]` is called USERS[n]."""
    names = {USERS[who]: USERS[index] for index, who in enumerate(order)}
    logins = [replace(each, login_id=names[each.user] + each.login_id[-1], user=names[each.user]) for each in record.logins]
    entries = [replace(each, entry_id=names[each.user] + each.entry_id[-1], user=names[each.user]) for each in record.entries]
    logins.sort(key=lambda login: login.login_id)
    entries.sort(key=lambda entry: entry.entry_id)
    return replace(record, logins=tuple(logins), entries=tuple(entries))


@cache
def _canonical_record(record: Record, held: tuple[int, ...]) -> tuple[Record, dict[int, int]]:
    small = {fence: index for index, fence in enumerate(sorted({record.fence, *held} - {0}), 1)} | {0: 0}
    logins = [replace(each, expires_ms=NOW + ENTRY_TTL_MS if each.expires_ms > NOW else 0) for each in record.logins]
    entries = [replace(each, expires_ms=NOW + ENTRY_TTL_MS if each.expires_ms > NOW else 0, created_ms=NOW) for each in record.entries]
    logins.sort(key=lambda login: login.login_id)
    entries.sort(key=lambda entry: entry.entry_id)
    changed = replace(record, fence=small[record.fence], since_ms=0, revision=0, logins=tuple(logins), entries=tuple(entries))
    return changed, small


# The rule is pure, so the same question has the same answer: asking it once makes the search ten times as quick.
_purge, _enter, _abandon, _commit, _renew, _release = map(
    lru_cache(maxsize=None), (rule.purge, rule.enter, rule.abandon, rule.commit, rule.renew, rule.release)
)


def problem(world: World) -> str:
    """Two users at once; a record that does not know who is in; a server that time does not free."""
    for number, record in enumerate(world.records):
        inside = [who for who, user in enumerate(world.users) if user.phase == "in" and user.server == number]
        if len(inside) > 1:
            return f"{' and '.join(USERS[who] for who in inside)} are on server {number}"
        if inside and _purge(record, moment()).holder != USERS[inside[0]]:
            return f"server {number} does not know that {USERS[inside[0]]} is in"
        if not inside and _purge(record, moment(LATER)).logins:
            return f"server {number} stays reserved with nobody in"
    return ""


def _with(world: World, who: int, user: User, record: Record | None = None) -> World:
    users, records = list(world.users), list(world.records)
    if record is not None:
        records[world.users[who].server] = record
    users[who] = user
    return World(tuple(users), tuple(records), world.published)
