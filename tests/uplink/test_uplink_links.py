"""An uplink against a gateway on loopback: what it does when links are lost, refused, silent or slow."""

import logging
import ssl
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import trio
from uplink_fakes import OFFERS, QUICK, FakeGateway, deny, make_context, running, session_id, until

from fxrelay.uplink.control_link import MIN_HEARTBEAT_S
from fxrelay.uplink.ports import UplinkState
from fxrelay.uplink.process_links import ProcessLinks
from fxtunnel.codes import Code, Refusal
from fxtunnel.control.messages import Closing, Drain, Load, Refused, Services, TicketRequest
from fxtunnel.errors import PeerRefused
from fxtunnel.kit.certificates import new_authority
from fxtunnel.kit.link_tls import LinkSocket
from fxtunnel.model import Offer, ServiceName, SessionId
from fxtunnel.protocol.hello import Denied, Hello, Welcome


async def test_it_enrols_once_and_brings_its_links_up(gateway: FakeGateway, state_dir: Path) -> None:
    async with running(gateway, state_dir, replace(QUICK, links=2)) as it:
        await it.started.wait()
        await until(lambda: len(gateway.data_links) == 2)
        (enrolment,) = gateway.enrolments
        assert (enrolment["v"], enrolment["token"], enrolment["relay_id"]) == (1, "fxe_secret", "node-a")
        assert gateway.hellos[0].services == OFFERS
        assert [(h.session, h.received) for h in gateway.data_hellos] == [(None, 0), (None, 0)]
        await until(lambda: [s.calls for s in it.factory.sessions] == [["attach", "received, up"]] * 2)
        assert {s.id for s in it.factory.sessions} == {session_id(1), session_id(2)}
        assert it.session.peer_received == [1000]
        snapshot = it.uplink.statistics()
        assert (snapshot.state, snapshot.epoch, len(snapshot.sessions)) == (UplinkState.UP, 7, 2)
        await until(lambda: any(isinstance(m, Load) and m.streams == 6 for m in gateway.heard), 3)
    async with running(gateway, state_dir) as it:
        await it.started.wait()
        assert len(gateway.enrolments) == 1
        assert gateway.hellos[0].instance != gateway.hellos[1].instance


async def test_a_lost_control_link_is_dialled_again_and_sessions_live_on(gateway: FakeGateway, state_dir: Path) -> None:
    async with running(gateway, state_dir) as it:
        await until(lambda: it.is_carrying)
        gateway.cut_control()
        await until(lambda: len(gateway.controls) == 2)
        assert gateway.hellos[0].instance == gateway.hellos[1].instance
        assert len(gateway.data_links) == 1
        assert it.session.link is not None
        assert it.session.closed is None


async def test_a_control_link_that_keeps_breaking_is_not_left_for_long(
    gateway: FakeGateway, state_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fxrelay.uplink.redial_backoff.FLAP_CAP_S", 0.02)
    async with running(gateway, state_dir, replace(QUICK, max_backoff_s=30.0)) as it:
        for count in range(1, 12):  # uncapped waits would add up to 20 s
            await gateway.wait_controls(count)
            gateway.cut_control()
        assert not it.ended.is_set()


async def test_waits_double_while_nobody_welcomes(gateway: FakeGateway, state_dir: Path) -> None:
    gateway.upgrading = [PeerRefused(Refusal.DRAINING, "not yet") for _ in range(9)]
    async with running(gateway, state_dir, replace(QUICK, min_backoff_s=0.02, max_backoff_s=0.16)) as it:
        await it.started.wait()
        waits = [later - sooner for sooner, later in pairwise(gateway.dialled_at[1:11])]  # the first dial enrols
        for wait_s, expected_s in zip(waits, (0.02, 0.04, 0.08, *[0.16] * 6), strict=True):
            assert wait_s >= expected_s
        assert sum(waits) < 5  # without that cap they would add up to 10 s


async def test_a_cut_data_link_is_resumed_with_the_counter_read_after_detach(
    gateway: FakeGateway, state_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    async with running(gateway, state_dir) as it:
        await until(lambda: it.is_carrying)
        it.session.counter = 4711
        it.session.calls.clear()
        it.session.cut()
        await until(lambda: it.is_carrying)
        hello = gateway.data_hellos[1]
        assert (hello.session, hello.received, hello.ticket) == (session_id(1), 4711, f"{session_id(1)}/2")
        at = it.session.calls.index("detach")
        assert it.session.calls[at : at + 3] == ["detach", "received", "attach"]
        assert len(it.factory.sessions) == 1
    assert "link to gw-test lost: cut; streams held: 3" in caplog.text


async def test_nothing_is_kept_for_a_gateway_that_does_not_resume(gateway: FakeGateway, state_dir: Path) -> None:
    gateway.data = lambda hello: Welcome(session_id(1), caps=())
    async with running(gateway, state_dir) as it:
        await until(lambda: it.is_carrying)
        assert it.session.calls[:2] == ["forgo", "attach"]


async def test_many_cuts_are_each_resumed(gateway: FakeGateway, state_dir: Path) -> None:
    async with running(gateway, state_dir) as it:
        for count in range(1, 11):
            await until(lambda: it.is_carrying)
            assert len(gateway.data_hellos) == count
            it.session.cut()
        await until(lambda: it.is_carrying)
        assert len(it.factory.sessions) == 1


@pytest.mark.parametrize("refusal", [Refusal.UNKNOWN_SESSION, Refusal.BAD_RESUME])
async def test_a_session_the_gateway_cannot_resume_makes_way_for_a_new_one(refusal: Refusal, gateway: FakeGateway, state_dir: Path) -> None:
    async with running(gateway, state_dir) as it:
        await until(lambda: it.is_carrying)
        old, welcome = it.session, gateway.data
        gateway.data = lambda hello: deny(refusal) if hello.session else welcome(hello)
        old.cut()
        await until(lambda: len(it.factory.sessions) == 2 and it.session.link is not None)
        assert old.closed is not None
        assert old.closed[0] is Code.LINK_LOST
        assert it.session.id == session_id(2)


async def test_a_session_is_given_up_when_its_hold_is_over(gateway: FakeGateway, state_dir: Path) -> None:
    gateway.hold_s = 0.2
    async with running(gateway, state_dir) as it:
        await until(lambda: it.is_carrying)
        old, welcome = it.session, gateway.data
        gateway.data = lambda hello: deny(Refusal.TOO_MANY) if hello.session else welcome(hello)
        cut_at = trio.current_time()
        old.cut()
        await until(lambda: old.closed is not None)
        assert 0.2 <= trio.current_time() - cut_at < 10  # the gateway said 0.2, the default is 30
        assert old.closed == (Code.LINK_LOST, "no link for 0.2 s")
        await until(lambda: len(it.factory.sessions) == 2)


async def test_who_asks_for_a_new_session_says_which_it_has(gateway: FakeGateway, state_dir: Path) -> None:
    """So that the gateway need not hold what nobody will resume."""
    async with running(gateway, state_dir, replace(QUICK, links=2)) as it:
        await until(lambda: len(it.factory.sessions) == 2 and all(session.link for session in it.factory.sessions))
        gone, kept = it.factory.sessions
        welcome = gateway.data
        gateway.data = lambda hello: deny(Refusal.UNKNOWN_SESSION) if hello.session == gone.id else welcome(hello)
        gateway.heard.clear()
        gone.cut()
        await until(lambda: len(it.factory.sessions) == 3)
        resuming, anew = (message for message in gateway.heard if isinstance(message, TicketRequest))
        assert (resuming.session, resuming.sessions) == (gone.id, None)
        assert (anew.session, anew.sessions) == (None, (kept.id,))


async def test_a_session_that_ends_by_itself_while_waiting_for_control_is_made_anew(gateway: FakeGateway, state_dir: Path) -> None:
    async with running(gateway, state_dir) as it:
        await until(lambda: it.is_carrying)
        gateway.gives_tickets = False
        old = it.session
        old.cut()
        await until(lambda: TicketRequest(request=2, session=old.id) in gateway.heard)
        old.close(Code.LINK_LOST, "hold over")
        gateway.gives_tickets = True
        await until(lambda: len(it.factory.sessions) == 2)
        assert gateway.data_hellos[-1].session is None


async def test_a_ticket_is_waited_for_until_the_control_link_is_back(gateway: FakeGateway, state_dir: Path) -> None:
    async with running(gateway, state_dir) as it:
        await until(lambda: it.is_carrying)
        gateway.upgrading = [PeerRefused(Refusal.DRAINING, "back soon", retry_after_s=0.2)]
        gateway.cut_control()
        it.session.cut()
        await until(lambda: it.is_carrying)
        assert len(gateway.hellos) == 2
        assert gateway.data_hellos[1].session == session_id(1)


async def test_a_link_the_session_does_not_take_ends_the_session(gateway: FakeGateway, state_dir: Path) -> None:
    async with running(gateway, state_dir) as it:
        await until(lambda: it.is_carrying)
        old = it.session
        old.refuses_to_attach = True
        old.cut()
        await until(lambda: len(it.factory.sessions) == 2)
        assert old.closed == (Code.PROTOCOL_ERROR, "the peer wants bytes that were never sent")
        with pytest.raises(ssl.SSLError):  # its socket was closed, not leaked
            await _read_end(gateway.data_links[1])


async def _read_end(link: LinkSocket) -> None:
    while True:
        try:
            if link.recv(1) == b"":
                raise ssl.SSLEOFError
        except ssl.SSLWantReadError:
            await trio.lowlevel.wait_readable(link)


async def test_another_session_than_asked_for_is_not_taken(gateway: FakeGateway, state_dir: Path) -> None:
    async with running(gateway, state_dir) as it:
        await until(lambda: it.is_carrying)
        welcome = gateway.data
        gateway.data = lambda hello: Welcome(SessionId("f" * 32))
        it.session.cut()
        await until(lambda: len(gateway.data_hellos) >= 3)
        assert it.session.link is None
        gateway.data = welcome
        await until(lambda: it.is_carrying)


@pytest.mark.parametrize("where", ["enrolling", "upgrading", "greeting", "closing"])
async def test_retry_after_is_honoured(where: str, gateway: FakeGateway, state_dir: Path) -> None:
    if where == "greeting":
        gateway.greeting = [Refused(code=Refusal.TOO_MANY, message="full", retry_after_s=0.3)]
    elif where != "closing":
        setattr(gateway, where, [PeerRefused(Refusal.TOO_MANY, "full", retry_after_s=0.3)])
    async with running(gateway, state_dir) as it:
        if where == "closing":
            await until(lambda: it.is_carrying)
            gateway.controls[0][0].end_soon(Closing(code=Code.SHUTDOWN, message="restarting", retry_after_s=0.3))
            refused_at = trio.current_time()
            await until(lambda: len(gateway.hellos) == 2)
        else:
            await until(lambda: it.uplink.statistics().state is UplinkState.WAITING)
            refused_at = gateway.dialled_at[0]  # a moment sooner, but not later, however busy the machine is
            assert "full" in it.uplink.statistics().last_error
            await it.started.wait()
        assert 0.3 <= trio.current_time() - refused_at < 10  # less than it may be by itself is 0.01, more 30
        assert not it.ended.is_set()


async def test_retry_after_is_honoured_on_data_links(gateway: FakeGateway, state_dir: Path) -> None:
    welcome = gateway.data
    times: list[float] = []

    def full_at_first(hello: Hello) -> Welcome | Denied:
        times.append(trio.current_time())
        return deny(Refusal.TOO_MANY, 0.3) if len(times) == 1 else welcome(hello)

    gateway.data = full_at_first
    async with running(gateway, state_dir) as it:
        await until(lambda: it.is_carrying)
        assert times[1] - times[0] >= 0.3


async def test_a_silent_control_path_is_noticed_and_dialled_again(gateway: FakeGateway, state_dir: Path) -> None:
    gateway.is_mute = True
    async with running(gateway, state_dir, replace(QUICK, dead_after_s=0.3)) as it:
        await it.started.wait()
        await until(lambda: "nothing heard" in it.uplink.statistics().last_error)
        assert trio.current_time() - gateway.dialled_at[0] >= 0.3
        gateway.is_mute = False
        await until(lambda: len(gateway.hellos) >= 2)
        await until(lambda: it.is_carrying)


async def test_a_gateway_that_pings_rarely_is_not_taken_for_dead(gateway: FakeGateway, state_dir: Path) -> None:
    gateway.greeting = [gateway.welcome(heartbeat_s=600.0, dead_after_s=1800.0)]
    async with running(gateway, state_dir, replace(QUICK, dead_after_s=0.3)) as it:
        await it.started.wait()
        await trio.sleep(0.9)
        assert len(gateway.hellos) == 1


async def test_a_gateway_that_asks_for_a_beat_every_moment_gets_none_so_fast(
    gateway: FakeGateway, state_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A relay that did nothing but beat would have no time for its other gateways."""
    beats = 0

    def count(links: ProcessLinks) -> int:
        nonlocal beats
        beats += 1
        return 0

    monkeypatch.setattr(ProcessLinks, "streams", property(count))
    gateway.greeting = [gateway.welcome(heartbeat_s=1e-9)]
    async with running(gateway, state_dir) as it:
        await it.started.wait()
        await trio.sleep(0.5)
        assert 1 < beats <= 0.6 / MIN_HEARTBEAT_S


async def test_garbage_on_the_control_link_costs_only_that_link(gateway: FakeGateway, state_dir: Path) -> None:
    async with running(gateway, state_dir) as it:
        await until(lambda: it.is_carrying)
        gateway.controls[0][0].send_nowait(Services(services=OFFERS))  # a gateway never sends that
        await until(lambda: len(gateway.controls) == 2)
        assert it.session.link is not None


async def test_failures_are_logged_at_the_first_second_fourth_time(
    gateway: FakeGateway, state_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    gateway.upgrading = [PeerRefused(Refusal.TOO_MANY, "full") for _ in range(9)]
    async with running(gateway, state_dir) as it:
        await it.started.wait()
        await until(lambda: it.is_carrying)
    warnings = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING and "no control link" in r.getMessage()]
    assert [text.split("attempt ")[1].split(" ")[0] for text in warnings] == ["2", "3", "5", "9"]
    assert all("full" in text for text in warnings)
    tunnels = [r.getMessage() for r in caplog.records if r.levelno == logging.INFO and r.getMessage().startswith("tunnel to")]
    assert [text.split(" ")[3] for text in tunnels] == ["open", "closed"]
    assert not [r for r in caplog.records if "fxe_secret" in r.getMessage()]


async def test_services_and_drain_are_told_now_and_after_a_reconnect(gateway: FakeGateway, state_dir: Path) -> None:
    async with running(gateway, state_dir) as it:
        await until(lambda: it.is_carrying)
        changed = (Offer(ServiceName("ssh")), Offer(ServiceName("web")))
        it.uplink.update_services(changed)
        it.uplink.drain(60)
        await until(lambda: Drain(deadline_s=60) in gateway.heard)
        assert Services(services=changed) in gateway.heard
        gateway.cut_control()
        await until(lambda: len(gateway.hellos) == 2)
        assert gateway.hellos[1].services == changed
        await until(lambda: sum(isinstance(m, Drain) for m in gateway.heard) == 2)
        it.session.cut()
        await until(lambda: it.is_carrying)  # draining sessions are still resumed
        it.session.close(Code.NORMAL)
        await trio.sleep(0.1)
        assert len(it.factory.sessions) == 1  # but not made anew
        assert it.uplink.statistics().is_draining


async def test_shutdown_says_goodbye_on_both_links_and_run_returns(gateway: FakeGateway, state_dir: Path) -> None:
    async with running(gateway, state_dir) as it:
        await until(lambda: it.is_carrying)
        began = trio.current_time()
        await it.uplink.shutdown(Code.SHUTDOWN, "the relay stops")
        await it.ended.wait()
        assert trio.current_time() - began < 8
        assert it.error is None
        assert it.session.closed == (Code.SHUTDOWN, "the relay stops")
        await until(lambda: Closing(code=Code.SHUTDOWN, message="the relay stops") in gateway.heard)
        assert it.uplink.statistics().state is UplinkState.STOPPED
        await it.uplink.shutdown(Code.SHUTDOWN)


async def test_shutdown_ends_an_uplink_that_never_got_through(gateway: FakeGateway, state_dir: Path) -> None:
    gateway.upgrading = [PeerRefused(Refusal.TOO_MANY, "full", retry_after_s=60)]
    async with running(gateway, state_dir) as it:
        await until(lambda: bool(it.uplink.statistics().last_error))
        waiting = it.uplink.statistics()
        assert (waiting.state, waiting.attempts) == (UplinkState.WAITING, 1)
        assert waiting.next_try_unix > time.time() + 5
        await it.uplink.shutdown(Code.SHUTDOWN)
        await it.ended.wait()
        assert it.error is None


async def test_cancelling_says_goodbye_too(gateway: FakeGateway, state_dir: Path) -> None:
    async with running(gateway, state_dir) as it:
        await until(lambda: it.is_carrying)
        it.uplink._scope.cancel()
        await it.ended.wait()
        assert it.session.closed is not None
        await until(lambda: any(isinstance(m, Closing) for m in gateway.heard))


class RestartingGateway(FakeGateway):
    """Goes away for `AWAY_S` when it is told to; nobody listens then."""

    AWAY_S = 0.5
    back_at = 0.0

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.life = trio.CancelScope()

    async def serve(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        with self.life:
            await super().serve(task_status=task_status)
        await trio.sleep(self.AWAY_S)
        self.back_at = trio.current_time()
        await super().serve()


async def test_a_gateway_that_restarts_is_soon_found_again(state_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fxrelay.uplink.redial_backoff.SETTLED_S", 0.0)
    monkeypatch.setattr("fxrelay.uplink.redial_backoff.FLAP_CAP_S", 0.05)
    monkeypatch.setattr("fxrelay.uplink.redial_backoff.RECENT_CAP_S", 30.0)
    monkeypatch.setattr("fxrelay.uplink.redial_backoff.ABSENT_CAP_S", 0.05)
    authority = new_authority("test authority")
    gateway = RestartingGateway(authority, make_context(tmp_path, authority))
    async with running(gateway, state_dir, replace(QUICK, min_backoff_s=8.0, max_backoff_s=30.0)) as it:
        await until(lambda: it.is_carrying)
        gateway.life.cancel()
        await gateway.wait_controls(2)
        assert gateway.dialled_at[-1] - gateway.back_at < 4  # the first wait without that cap would be 8 s
    gateway.close()
