"""A relay's session that has had half of its stream ids makes way for another, and nothing that is open on it is lost."""

from pathlib import Path

import pytest
import trio
from uplink_fakes import FakeGateway, running, until

from fxrelay.uplink import process_links
from fxtunnel.codes import Code
from fxtunnel.protocol.frames import WORN_STREAMS


@pytest.fixture(autouse=True)
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    """Worn sessions are looked for all the time."""
    monkeypatch.setattr(process_links, "RENEWAL_S", 0.01)


async def test_a_worn_session_is_closed_when_another_is_up_and_its_streams_have_ended(gateway: FakeGateway, state_dir: Path) -> None:
    async with running(gateway, state_dir) as it:
        await until(lambda: it.is_carrying)
        old = it.session
        old.opened, old.has_delivered = WORN_STREAMS, False
        await until(lambda: len(it.factory.sessions) == 2 and it.factory.sessions[1].link is not None)
        await trio.sleep(0.1)  # so often that a third one would have been made
        assert (old.closed, "press" in old.calls, len(it.uplink.sessions())) == (None, False, 2)
        old.streams = 0
        await until(lambda: "press" in old.calls)
        assert old.closed is None
        old.has_delivered = True
        await until(lambda: old.closed is not None)
        assert old.closed == (Code.NORMAL, "another has taken its place")
        await trio.sleep(0.1)
        assert it.uplink.sessions() == [it.factory.sessions[1]]
        assert len(it.factory.sessions) == 2


async def test_a_worn_session_without_streams_waits_for_its_successor(gateway: FakeGateway, state_dir: Path) -> None:
    async with running(gateway, state_dir) as it:
        await until(lambda: it.is_carrying)
        gateway.gives_tickets = False
        it.session.opened, it.session.streams = WORN_STREAMS, 0
        await trio.sleep(0.1)
        assert it.session.closed is None
        gateway.gives_tickets = True


async def test_a_worn_session_is_resumed_when_its_link_is_lost(gateway: FakeGateway, state_dir: Path) -> None:
    async with running(gateway, state_dir) as it:
        await until(lambda: it.is_carrying)
        old = it.session
        old.opened = WORN_STREAMS
        await until(lambda: len(it.factory.sessions) == 2)
        old.cut()
        await until(lambda: old.link is not None)
        assert gateway.data_hellos[-1].session == old.id
