"""What ends an uplink, with which words; and what looks final and is not."""

import time
from dataclasses import replace
from pathlib import Path

import pytest
import trio
from uplink_fakes import GATEWAY_ID, OFFERS, QUICK, RELAY_ID, FakeFactory, FakeGateway, deny, make_context, running, until

from fxrelay.uplink.failure_policy import LogBackoff, final_error, retry_after_s
from fxrelay.uplink.identity import load_identity
from fxrelay.uplink.ports import GatewayClosing
from fxrelay.uplink.uplink import Uplink, UplinkEnvironment
from fxtunnel.codes import Code, Refusal
from fxtunnel.control.messages import Closing, Refused
from fxtunnel.errors import ConfigError, PeerRefused, TunnelClosed, TunnelError
from fxtunnel.kit.certificates import Authority, new_authority
from fxtunnel.kit.tls import HandshakeFailed, HandshakeProblem

FINAL = [refusal for refusal in Refusal if refusal.is_final]


@pytest.mark.parametrize(
    ("where", "refusal", "advice"),
    [
        ("enrolling", Refusal.BAD_TOKEN, "fxgateway invite"),
        ("enrolling", Refusal.EXPIRED_TOKEN, "fxgateway invite"),
        ("enrolling", Refusal.NAME_TAKEN, "fxgateway forget node-a on the gateway"),
        ("enrolling", Refusal.BAD_REQUEST, "update"),
        ("upgrading", Refusal.REVOKED, "fxgateway forget node-a on the gateway, then fxgateway invite"),
        ("upgrading", Refusal.UNKNOWN_RELAY, "fxgateway invite"),
        ("upgrading", Refusal.BAD_ASSERTION, "fxgateway invite"),
        ("upgrading", Refusal.VERSION_MISMATCH, "update fxrelay or fxgateway"),
        ("greeting", Refusal.VERSION_MISMATCH, "update fxrelay or fxgateway"),
        ("data", Refusal.REVOKED, "fxgateway invite"),
    ],
)
async def test_final_refusals_end_it_with_one_line_of_advice(
    where: str, refusal: Refusal, advice: str, gateway: FakeGateway, state_dir: Path
) -> None:
    if where == "greeting":
        gateway.greeting = [Refused(code=refusal, message="says the gateway")]
    elif where == "data":
        gateway.data = lambda hello: deny(refusal)
    else:
        setattr(gateway, where, [PeerRefused(refusal, "says the gateway")])
    async with running(gateway, state_dir) as it:
        await it.ended.wait()
        assert isinstance(it.error, PeerRefused)
        assert it.error.refusal is refusal
        assert str(GATEWAY_ID) in str(it.error)
        assert advice in str(it.error)
        assert "\n" not in str(it.error)
        assert it.uplink.statistics().last_error == str(it.error)


@pytest.mark.parametrize(
    ("code", "words"), [(Code.FENCED, "another fxrelay runs with the id node-a"), (Code.REVOKED, "has revoked relay node-a")]
)
@pytest.mark.parametrize("way", ["control", "session"])
async def test_being_fenced_or_revoked_is_final_on_either_link(
    way: str, code: Code, words: str, gateway: FakeGateway, state_dir: Path
) -> None:
    async with running(gateway, state_dir) as it:
        await until(lambda: it.is_carrying)
        if way == "control":
            gateway.controls[0][0].end_soon(Closing(code=code, retry_after_s=0.01))
        else:
            it.session.close(code, "GOAWAY")
        await it.ended.wait()
        assert isinstance(it.error, TunnelClosed)
        assert it.error.code is code
        assert words in str(it.error)
        assert it.session.closed is not None
        assert len(gateway.hellos) == 1


@pytest.mark.parametrize("code", [Code.SHUTDOWN, Code.DRAINING, Code.NORMAL, Code.OVERLOAD])
async def test_other_goodbyes_are_not(code: Code, gateway: FakeGateway, state_dir: Path) -> None:
    async with running(gateway, state_dir) as it:
        await until(lambda: it.is_carrying)
        it.session.close(code, "GOAWAY")
        gateway.controls[0][0].end_soon(Closing(code=code))
        await until(lambda: len(gateway.hellos) == 2 and len(it.factory.sessions) == 2)
        assert not it.ended.is_set()


async def test_the_wrong_authority_is_final(gateway: FakeGateway, state_dir: Path) -> None:
    gateway.authority = new_authority("somebody else")
    async with running(gateway, state_dir) as it:
        await it.ended.wait()
        assert isinstance(it.error, HandshakeFailed)
        assert "not from the pinned authority" in str(it.error)
        assert "fxgateway invite" in str(it.error)


async def test_a_certificate_for_another_name_is_final(tmp_path: Path, authority: Authority, state_dir: Path) -> None:
    gateway = FakeGateway(authority, make_context(tmp_path, authority, "gw.example.com"))
    async with running(gateway, state_dir) as it:
        await it.ended.wait()
        assert "is not for 127.0.0.1" in str(it.error)


async def test_an_impostor_cannot_end_an_uplink_that_was_welcome(
    gateway: FakeGateway, tmp_path: Path, authority: Authority, state_dir: Path
) -> None:
    true_context = gateway.context
    async with running(gateway, state_dir) as it:
        await until(lambda: it.is_carrying)
        gateway.context = make_context(tmp_path, new_authority("impostor"))
        gateway.cut_control()
        await until(lambda: "not from the pinned authority" in it.uplink.statistics().last_error)
        assert it.session.link is not None
        gateway.context = true_context
        await until(lambda: len(gateway.hellos) == 2)


async def test_a_wrong_clock_is_told_by_how_much_and_tried_again(gateway: FakeGateway, state_dir: Path) -> None:
    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            await nursery.start(gateway.serve)
            ahead_s = [600.0]
            environment = UplinkEnvironment(now_unix=lambda: time.time() + ahead_s[0])
            uplink = Uplink(gateway.file, await load_identity(state_dir, RELAY_ID), OFFERS, FakeFactory(), QUICK, environment)
            nursery.start_soon(uplink.run)
            await until(lambda: "clock" in uplink.statistics().last_error)
            assert "set" in uplink.statistics().last_error
            ahead_s[0] = 0.0
            await until(lambda: len(gateway.controls) == 1)
            nursery.cancel_scope.cancel()
    gateway.close()


async def test_a_relay_the_gateway_has_forgotten_enrols_again_when_it_starts(gateway: FakeGateway, state_dir: Path) -> None:
    async with running(gateway, state_dir) as it:
        await it.started.wait()
    gateway.upgrading = [PeerRefused(Refusal.UNKNOWN_RELAY, "who?")]
    async with running(gateway, state_dir) as it:
        await it.started.wait()
        assert len(gateway.enrolments) == 2
        gateway.upgrading = [PeerRefused(Refusal.UNKNOWN_RELAY, "who?")]
        gateway.cut_control()  # but not while it runs
        await it.ended.wait()
        assert len(gateway.enrolments) == 2
        assert isinstance(it.error, PeerRefused)


async def test_a_note_that_cannot_be_read_any_more_ends_no_relay_that_was_welcome(gateway: FakeGateway, state_dir: Path) -> None:
    async with running(gateway, state_dir) as it:
        await it.started.wait()
    async with running(gateway, state_dir) as it:
        await it.started.wait()
        note = state_dir / "enrolled-gw-test.json"
        note.unlink()
        note.mkdir()  # which cannot be read
        gateway.enrolling = [PeerRefused(Refusal.BAD_TOKEN, "it was withdrawn")]
        gateway.cut_control()
        await gateway.wait_controls(3)
        assert len(gateway.enrolments) == 1
        assert it.error is None


async def test_without_a_token_an_unknown_relay_is_told_what_it_needs(gateway: FakeGateway, state_dir: Path) -> None:
    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            await nursery.start(gateway.serve)
            file = replace(gateway.file, enrolment=None)
            uplink = Uplink(file, await load_identity(state_dir, RELAY_ID), OFFERS, FakeFactory(), QUICK)
            with pytest.raises(PeerRefused, match=r"holds no enrolment token.*fxgateway invite"):
                await uplink.run()
            nursery.cancel_scope.cancel()


async def test_another_gateway_behind_the_same_authority_is_final(gateway: FakeGateway, state_dir: Path) -> None:
    gateway.greeting = [gateway.welcome(gateway_id="gw-other")]
    async with running(gateway, state_dir) as it:
        await it.ended.wait()
        assert "calls itself gw-other" in str(it.error)


async def test_a_second_url_is_tried_when_the_first_does_not_answer(gateway: FakeGateway, state_dir: Path) -> None:
    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            await nursery.start(gateway.serve)
            dead = replace(gateway.file.urls[0], port=1)
            file = replace(gateway.file, urls=(dead, *gateway.file.urls))
            uplink = Uplink(file, await load_identity(state_dir, RELAY_ID), OFFERS, FakeFactory(), QUICK)
            await nursery.start(uplink.run)
            assert uplink.statistics().url == str(gateway.file.urls[0])
            nursery.cancel_scope.cancel()
    gateway.close()


@pytest.mark.parametrize("refusal", FINAL)
def test_every_final_refusal_has_advice(refusal: Refusal) -> None:
    final = final_error(PeerRefused(refusal, "no."), RELAY_ID, GATEWAY_ID, was_welcome=False)
    assert str(final).startswith(f"gateway {GATEWAY_ID} refused relay {RELAY_ID}: no; ")


@pytest.mark.parametrize(
    "exc",
    [
        *(PeerRefused(refusal, "later") for refusal in Refusal if not refusal.is_final),
        TunnelClosed(Code.LINK_LOST),
        TunnelClosed(Code.FENCED),  # by ourselves
        TunnelError("cannot connect"),
        GatewayClosing(Code.SHUTDOWN, "bye", 3.0),
        *(HandshakeFailed(p, "x") for p in HandshakeProblem if p not in (HandshakeProblem.UNTRUSTED, HandshakeProblem.WRONG_NAME)),
    ],
    ids=repr,
)
def test_what_can_heal_is_not_final(exc: TunnelError) -> None:
    assert final_error(exc, RELAY_ID, GATEWAY_ID, was_welcome=False) is None


def test_advice_the_gateway_gave_is_not_repeated() -> None:
    told = PeerRefused(Refusal.NAME_TAKEN, "on the gateway run: fxgateway forget node-a")
    assert str(final_error(told, RELAY_ID, GATEWAY_ID, was_welcome=False)).endswith(": on the gateway run: fxgateway forget node-a")


@pytest.mark.parametrize("refusal", FINAL)
def test_a_bad_request_of_a_relay_that_was_welcome_is_tried_again(refusal: Refusal) -> None:
    final = final_error(PeerRefused(refusal, "no"), RELAY_ID, GATEWAY_ID, was_welcome=True)
    assert (final is None) == (refusal is Refusal.BAD_REQUEST)


def test_a_disk_that_cannot_be_written_is_final_as_it_is() -> None:
    error = ConfigError.one("enrolled.json", "", "cannot be written")
    assert final_error(error, RELAY_ID, GATEWAY_ID, was_welcome=False) is error


def test_waits_come_from_refusals_and_goodbyes() -> None:
    assert retry_after_s(PeerRefused(Refusal.TOO_MANY, "", retry_after_s=4.0)) == 4.0
    assert retry_after_s(GatewayClosing(Code.SHUTDOWN, "bye", 3.0)) == 3.0
    assert retry_after_s(TunnelClosed(Code.LINK_LOST)) == 0.0


def test_doubling_makes_every_power_of_two_known() -> None:
    failures = LogBackoff()
    assert [n for n in range(1, 40) if failures.is_due()] == [1, 2, 4, 8, 16, 32]
    failures.reset()
    assert failures.is_due()
