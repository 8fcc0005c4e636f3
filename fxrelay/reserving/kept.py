"""Pump: logins that the store keeps until they end: those of HTTP services, which are not tied to a stream.

They outlive the relay that committed them. What relays remember of them is for one case only: a store that has forgotten is told again.
"""

from fxrelay.balance.login_attempt import Attempt, AttemptEvent
from fxrelay.balance.reservations import Login, Record
from fxrelay.reserving.event_reporter import RELEASED, EventReporter
from fxrelay.reserving.leases import Hold, Leases, LeaseTerms
from fxtunnel.model import RelayId

_COMMITTED = (AttemptEvent.ENTER, AttemptEvent.FORWARD, AttemptEvent.SUCCESS, AttemptEvent.GRANT)


def hold_of(server_id: RelayId, record: Record, login: Login, terms: LeaseTerms) -> Hold:
    """The hold of a login that some relay has committed."""
    attempt = Attempt(login.login_id)
    for happening in _COMMITTED:
        attempt = attempt.after(happening)
    return Hold(server_id, login.user, attempt, terms, record.token, record.since_ms, 0.0, ends_ms=login.expires_ms)


def learn_kept(leases: Leases, reporter: EventReporter, standings: dict[RelayId, Record], now_ms: int) -> None:
    """Forget what has ended, as the newest records say; of another epoch's records nothing is believed."""
    for hold in leases.kept():
        record = standings.get(hold.server_id)
        if record is not None:
            tell_cleared(leases, reporter, hold.server_id, record)
        if record is not None and record.epoch == hold.token.epoch:
            login = find_login(record, hold.login_id)
            if login is None:
                leases.forget(hold)
                continue
            hold.ends_ms = login.expires_ms
        if hold.ends_ms <= now_ms:
            leases.forget(hold)


def tell_cleared(leases: Leases, reporter: EventReporter, server_id: RelayId, record: Record) -> None:
    """If an administrator has taken the server from its user: say so of the logins that this relay let in. Who comes by streams is lost
    when he is not renewed; of kept logins nobody else would tell.
    """
    if record.logins or not 0 < record.fence == record.revision:  # only `clear` makes a grant to nobody
        return
    for hold in leases.kept():
        if hold.server_id == server_id and hold.token.epoch == record.epoch and hold.token.fence < record.fence:
            reporter.happened(RELEASED, server_id, hold.user, hold.login_id, record)
            leases.forget(hold)


def adopt_kept(leases: Leases, relay_id: RelayId, server_id: RelayId, record: Record, lease_ms: int) -> None:
    """Remember again what this relay committed before it was restarted."""
    for login in record.logins:
        if login.relay == relay_id and is_kept(login, lease_ms) and leases.get(login.login_id) is None:
            leases.add(hold_of(server_id, record, login, LeaseTerms(lifetime_ms=login.ttl_ms)))


def find_login(record: Record, login_id: str) -> Login | None:
    """The login of that id, if it is one that counts."""
    return next((login for login in record.logins if login.login_id == login_id and not login.is_lingering), None)


def is_kept(login: Login, lease_ms: int) -> bool:
    """Whether the store keeps it by itself: nobody renews it."""
    return login.ttl_ms > lease_ms and not login.is_lingering
