"""Task: one look at the cluster, for commands: no relay has to run, and nothing is written unless it is asked for."""

import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, Final

from fxrelay.cluster.members import NOTHING_OFF, Ages, Control, Member, MemberState
from fxrelay.cluster.opening import open_cluster
from fxrelay.cluster.ports import CONTROLS, SERVERS, Store, Transporter
from fxrelay.cluster.view import ClusterView, encode_control
from fxrelay.settings import RelaySettings
from fxtunnel.errors import FxError, TransporterError
from fxtunnel.model import is_name

_MAX_RIVALS: Final = 8
_MAX_SHOWN: Final = 20


@contextmanager
def cluster_of(settings: RelaySettings) -> Iterator[tuple[Store, Transporter]]:
    """The store and the transporter of a configuration, closed at the end. Both block."""
    store, transporter = open_cluster(settings.cluster, settings.relay.state_dir)
    try:
        yield store, transporter
    finally:
        transporter.close()
        store.close()


def read_view(settings: RelaySettings, store: Store) -> ClusterView:
    """The whole cluster as the store has it now. Raises StoreError."""
    view = ClusterView(Ages(settings.cluster.stale_s, settings.cluster.down_s))
    view.store_said(store.now_ms())
    view.read_controls(store.documents(CONTROLS))
    seen = []
    for document in store.documents(SERVERS):
        view.read_servers([document])
        seen.append(document.key)
    view.read_everything(frozenset(seen))
    return view


def unknown_node(store: Store, server_id: str) -> FxError:
    """The error for a node that the store does not have; it names some that it has. Raises StoreError."""
    known = ", ".join(sorted(document.key for document in store.documents(SERVERS))[:_MAX_SHOWN])
    return FxError(f"the cluster knows no node {server_id!r}; it knows: {known or 'none'}")


def change_control(settings: RelaySettings, server_id: str, change: "Control | None") -> Control:
    """Switch off for a server what `change` names, besides what is off already; None switches everything on again. Returns what is off now.

    Every relay knows within a second; one that misses the message reads it from the store.

    Raises:
        StoreError: nothing was changed.
        FxError: no such server has ever been seen.
    """
    with cluster_of(settings) as (store, transporter):
        found = store.get(CONTROLS, server_id)
        if change is not None and found is None and store.get(SERVERS, server_id) is None:
            raise unknown_node(store, server_id)
        before = Control.parse(found.text) if found is not None else NOTHING_OFF
        after = NOTHING_OFF if change is None else Control(before.draining or change.draining, before.disable | change.disable)
        if after == NOTHING_OFF:
            store.delete(CONTROLS, server_id)
        else:
            store.put(CONTROLS, server_id, after.encode())
        with suppress(TransporterError):  # it stands in the store: relays read it there
            transporter.publish(CONTROLS, encode_control(server_id, after))
        return after


def describe(member: Member, now: float, holder: str | None = None) -> dict[str, Any]:
    """A member as JSON for other programs; `now` on the clock of its table. `holder`: the user who has it reserved."""
    return {
        "serverId": member.server.server_id,
        "state": member.standing,
        "ageS": round(now - member.heard_at, 1),
        "drained": member.is_drained,
        "disabled": sorted(member.disabled),
        "reserved": holder,
        "rivals": rivals_of(member),
        "server": member.server.document(),
    }


def rivals_of(member: Member) -> list[str]:
    """Other processes that call themselves so, as was heard, or as the one that is shown says: the store has the word of one only."""
    said = json.loads(member.server.text)["agent"].get("rivals") if member.state is MemberState.UP else None
    found = [name for name in said if isinstance(name, str) and is_name(name)] if isinstance(said, list) else []
    return sorted({*member.rivals, *found[:_MAX_RIVALS]})
