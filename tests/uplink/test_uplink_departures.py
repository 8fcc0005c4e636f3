"""An uplink whose gateway changes its process, and one that makes way for a successor of its own."""

import re
import socket
from dataclasses import replace
from pathlib import Path

import pytest
import trio
from uplink_fakes import QUICK, FakeGateway, FakeSession, Running, running, session_id, until

from fxrelay.uplink import redial_backoff, uplink
from fxrelay.uplink.ports import UplinkState
from fxtunnel.codes import Code, Refusal
from fxtunnel.control.messages import CAP_LEAVING, Closing, Drain, Refused


async def left_behind(gateway: FakeGateway, it: Running) -> FakeSession:
    """The session at a process of the gateway that goes away, once there is one at the next process."""
    await until(lambda: it.is_carrying)
    old = it.session
    gateway.controls[0][0].send_nowait(Drain(deadline_s=30))
    await until(lambda: len(it.factory.sessions) == 2 and it.is_carrying)
    return old


async def test_it_makes_before_it_breaks(gateway: FakeGateway, state_dir: Path) -> None:
    async with running(gateway, state_dir) as it:
        await until(lambda: it.is_carrying)
        old, channel = it.session, gateway.controls[0][0]
        channel.send_nowait(Drain(deadline_s=30))
        await until(lambda: len(it.factory.sessions) == 2 and it.is_carrying)
        assert old.link is not None
        assert old.closed is None
        assert gateway.data_hellos[1].session is None
        assert gateway.hellos[0].instance == gateway.hellos[1].instance
        snapshot = it.uplink.statistics()
        assert [session.id for session in snapshot.sessions] == [session_id(2), session_id(1)]
        assert (snapshot.state, snapshot.is_draining) == (UplinkState.UP, False)
        channel.end_soon(Closing(code=Code.SHUTDOWN, message="all streams have ended"))
        await trio.sleep(0.2)
        assert len(gateway.controls) == 2, "nobody looks for the old process"
        assert it.uplink.statistics().state is UplinkState.UP
        old.close(Code.SHUTDOWN)
        await until(lambda: len(it.uplink.statistics().sessions) == 1)
        await trio.sleep(0.1)
        assert (len(it.factory.sessions), len(gateway.controls)) == (2, 2)
        it.session.cut()
        await until(lambda: it.is_carrying)
        assert gateway.data_hellos[2].session == session_id(2)
        await it.uplink.shutdown(Code.SHUTDOWN)
        await it.ended.wait()
        assert it.error is None


async def test_what_is_lost_at_a_process_that_goes_away_is_not_resumed_at_another(gateway: FakeGateway, state_dir: Path) -> None:
    async with running(gateway, state_dir) as it:
        old = await left_behind(gateway, it)
        old.cut()
        await until(lambda: old.closed is not None)
        assert old.closed is not None
        assert old.closed[0] is Code.LINK_LOST
        assert [hello.session for hello in gateway.data_hellos] == [None, None]


async def test_who_names_the_process_that_goes_away_resumes_there(gateway: FakeGateway, state_dir: Path) -> None:
    gateway.take_name("p1")
    async with running(gateway, state_dir) as it:
        old = await left_behind(gateway, it)
        # Only its data link is lost, then both are.
        old.cut()
        await until(lambda: old.link is not None)
        assert gateway.spoken[5:] == ["fx-process/p1/fx-data/1"]
        assert gateway.data_hellos[-1].session == old.id
        socket.socket.shutdown(gateway.controls[0][1].socket, socket.SHUT_RDWR)
        old.cut()
        await until(lambda: old.link is not None)
        assert gateway.spoken[6:] == ["fx-process/p1/http/1.1", "fx-process/p1/fx-data/1"]
        assert old.closed is None
        assert it.uplink.statistics().state is UplinkState.UP
        # Its goodbye is the end of it: nobody looks for it.
        gateway.controls[-1][0].end_soon(Closing(code=Code.SHUTDOWN))
        old.close(Code.SHUTDOWN)
        await until(lambda: len(it.uplink.statistics().sessions) == 1)
        await trio.sleep(0.1)
        assert len(gateway.spoken) == 8


async def test_a_process_that_nobody_reaches_by_its_name_is_given_up_at_once(gateway: FakeGateway, state_dir: Path) -> None:
    gateway.take_name("p1")
    async with running(gateway, state_dir) as it:
        old = await left_behind(gateway, it)
        gateway.take_name("p2")
        socket.socket.shutdown(gateway.controls[0][1].socket, socket.SHUT_RDWR)
        old.cut()
        await until(lambda: old.closed is not None)
        assert old.closed is not None
        assert old.closed[0] is Code.LINK_LOST
        dials = len(gateway.dialled_at)
        await trio.sleep(0.1)
        assert len(gateway.dialled_at) == dials
        assert it.error is None
        assert it.is_carrying


@pytest.mark.parametrize(("leads_back", "streams"), [(True, 3), (True, 0), (False, 3)])
async def test_another_process_is_met_before_the_old_one_has_said_that_it_goes(
    gateway: FakeGateway, state_dir: Path, leads_back: bool, streams: int
) -> None:
    """Also where nothing is open, as far as the relay knows: an OPEN may have been lost with the link, or the end of an answer."""
    gateway.take_name("p1")
    async with running(gateway, state_dir) as it:
        await until(lambda: it.is_carrying)
        old = it.session
        old.streams = streams
        gateway.greeting = [gateway.welcome(process="p2", earlier=("p0", "p1") if leads_back else ("p0",)) for _ in range(2)]
        gateway.cut_control()
        old.cut()
        await until(lambda: len(it.factory.sessions) == 2 and it.is_carrying)
        if leads_back:
            await until(lambda: old.link is not None)
            assert gateway.spoken.count("fx-process/p1/fx-data/1") == 1
            assert old.closed is None
        else:
            await until(lambda: old.closed is not None)
            assert len(gateway.controls) == 2, "the link to the next process is kept"
            assert not any("fx-process" in protocol for protocol in gateway.spoken)


async def test_a_departure_while_no_ticket_comes(gateway: FakeGateway, state_dir: Path) -> None:
    async with running(gateway, state_dir) as it:
        gateway.gives_tickets = False
        await gateway.wait_controls(1)
        await trio.sleep(0.05)
        gateway.controls[0][0].send_nowait(Drain(deadline_s=30))
        gateway.gives_tickets = True
        await until(lambda: it.is_carrying)
        assert len(gateway.controls) == 2


async def test_another_process_that_nobody_announced(gateway: FakeGateway, state_dir: Path) -> None:
    gateway.greeting = [gateway.welcome(process="p1")]
    async with running(gateway, state_dir) as it:
        await until(lambda: it.is_carrying)
        old = it.session
        gateway.greeting = [gateway.welcome(process="p1"), gateway.welcome(process="p2"), gateway.welcome(process="p2")]
        gateway.cut_control()
        await gateway.wait_controls(2)
        await trio.sleep(0.1)
        assert it.session is old, "the same process again"
        gateway.cut_control()
        await until(lambda: len(it.factory.sessions) == 2 and it.is_carrying)
        assert old.closed is None
        assert old.link is not None


async def test_a_gateway_that_was_restarted_gets_one_control_link_and_one_data_link(gateway: FakeGateway, state_dir: Path) -> None:
    gateway.greeting = [gateway.welcome(process="p1")]
    async with running(gateway, state_dir) as it:
        await until(lambda: it.is_carrying)
        old = it.session
        gateway.greeting = [gateway.welcome(process="p2")]
        gateway.cut_control()
        old.cut()
        await until(lambda: len(it.factory.sessions) == 2 and it.is_carrying)
        await trio.sleep(0.1)
        assert old.closed is not None
        assert old.closed[0] is Code.LINK_LOST
        assert len(gateway.controls) == 2
        assert [hello.session for hello in gateway.data_hellos] == [None, None]
        it.session.cut()
        await until(lambda: it.is_carrying)
        assert gateway.data_hellos[2].session == session_id(2)


@pytest.mark.parametrize("says_so", [True, False], ids=["relieved", "older-gateway"])
async def test_an_uplink_that_makes_way_says_so_on_each_link_until_it_is_relieved(
    gateway: FakeGateway, state_dir: Path, says_so: bool
) -> None:
    async with running(gateway, state_dir) as it:
        await until(lambda: it.is_carrying)
        it.uplink.make_way(60)
        await until(lambda: Drain(deadline_s=60, handover=True) in gateway.heard)
        gateway.cut_control()
        await until(lambda: sum(isinstance(message, Drain) and message.handover for message in gateway.heard) == 2)
        assert [CAP_LEAVING in hello.caps for hello in gateway.hellos] == [False, True]
        gateway.controls[-1][0].send_nowait(Drain(deadline_s=30))  # it is replaced itself, and says nothing of our successor
        it.session.cut()
        await until(lambda: it.is_carrying)  # with a ticket that came behind it
        assert not it.uplink.is_relieved
        gateway.controls[-1][0].send_nowait(Drain(deadline_s=0, relieved=says_so))
        await until(lambda: it.uplink.is_relieved)
        it.session.cut()
        await until(lambda: it.is_carrying)  # what is open is still resumed
        await trio.sleep(0.1)
        assert (len(gateway.controls), len(it.factory.sessions)) == (2, 1)
        it.uplink.drain(30)
        await until(lambda: Drain(deadline_s=30) in gateway.heard)


@pytest.mark.parametrize("is_named", [True, False])
async def test_a_gateway_that_was_replaced_while_we_make_way(gateway: FakeGateway, state_dir: Path, is_named: bool) -> None:
    """Its next process lets nobody in who drains, and tells him nothing: he resumes at the one before, if that can be named."""
    if is_named:
        gateway.take_name("p1")
    async with running(gateway, state_dir) as it:
        await until(lambda: it.is_carrying)
        it.uplink.make_way(60)
        await until(lambda: Drain(deadline_s=60, handover=True) in gateway.heard)
        gateway.greeting = [Refused(code=Refusal.DRAINING, message="this relay drains, and has no sessions here"), *gateway.greeting]
        gateway.cut_control()
        it.session.cut()
        await until(lambda: it.is_carrying)
        assert it.session.closed is None
        assert len(it.factory.sessions) == 1
        by_name = ["fx-process/p1/http/1.1", "fx-process/p1/fx-data/1"]
        assert gateway.spoken[-3:] == (["http/1.1", *by_name] if is_named else ["http/1.1", "http/1.1", "fx-data/1"])
        await trio.sleep(0.1)
        assert len(gateway.hellos) == 3, "nobody dials again to be turned away"


@pytest.mark.parametrize(("recent_s", "is_quick"), [(120.0, True), (0.0, False)])
async def test_a_gateway_that_was_there_a_moment_ago_is_looked_for_often(
    gateway: FakeGateway,
    state_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    recent_s: float,
    is_quick: bool,
) -> None:
    monkeypatch.setattr(redial_backoff, "RECENT_S", recent_s)
    monkeypatch.setattr(redial_backoff, "RECENT_CAP_S", 0.1)
    config = replace(QUICK, min_backoff_s=0.1, max_backoff_s=30.0)
    async with running(gateway, state_dir, config) as it:
        await until(lambda: it.is_carrying)
        gateway.greeting = [Closing(code=Code.SHUTDOWN) for _ in range(10)]
        dialled = len(gateway.hellos)

        def longest_s() -> float:
            return max(map(float, re.findall(r"attempt \d+ in ([0-9.]+) s", caplog.text)), default=0.0)

        gateway.cut_control()
        # LongestWaits: 0.1 s each while it is recent, else 0.1, 0.2, 0.4, 0.8 ... more than a minute in all.
        if is_quick:
            await until(lambda: len(gateway.hellos) > dialled + 10, 30)
            assert longest_s() == 0.1
        else:
            await until(lambda: longest_s() > 0.3, 30)


async def test_a_gateway_that_goes_away_again_and_again_is_kept_so_many_times(
    gateway: FakeGateway, state_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It welcomes, says that it goes away, and stays: each time with links that cost this relay descriptors and memory."""
    monkeypatch.setattr(uplink, "DEPARTURE_SPREAD_S", 0.0)
    async with running(gateway, state_dir) as it:
        for number in range(1, 15):
            await until(lambda: len(it.factory.sessions) == number and it.is_carrying)  # noqa: B023 - over before the next one begins
            gateway.controls[-1][0].send_nowait(Drain(deadline_s=86_400))
        await until(lambda: len(it.factory.sessions) == 15 and it.is_carrying)
        await until(lambda: len([session for session in it.factory.sessions if session.closed is None]) == 1 + uplink.MAX_DEPARTING)
        assert it.factory.sessions[0].closed is not None
        assert it.factory.sessions[0].closed[0] is Code.OVERLOAD
        await until(lambda: len(it.uplink.statistics().sessions) == 1 + uplink.MAX_DEPARTING)
        assert it.uplink.statistics().state is UplinkState.UP


async def test_processes_where_nothing_is_open_are_given_up_first(
    gateway: FakeGateway, state_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other relays have clients there; what is open here since many restarts goes on."""
    monkeypatch.setattr(uplink, "DEPARTURE_SPREAD_S", 0.0)
    async with running(gateway, state_dir) as it:
        for number in range(1, uplink.MAX_DEPARTING + 4):
            await until(lambda: len(it.factory.sessions) == number and it.is_carrying)  # noqa: B023 - over before the next one begins
            it.session.streams = 1 if number in (1, 3) else 0
            gateway.controls[-1][0].send_nowait(Drain(deadline_s=86_400))
        sessions = it.factory.sessions
        await until(lambda: len([session for session in sessions if session.closed is None]) == 1 + uplink.MAX_DEPARTING)
        await until(lambda: len(sessions) == uplink.MAX_DEPARTING + 4)
        assert [number for number, session in enumerate(sessions, 1) if session.closed is not None] == [2, 4, 5]
