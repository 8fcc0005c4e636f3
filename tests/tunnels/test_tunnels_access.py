"""Who may come in through the port: enrolment and assertions, with real TLS on loopback."""

import time
from pathlib import Path

import pytest
from tunnels_rig import NODE, refused, running, until, warnings_of

from fxtunnel.codes import Refusal
from fxtunnel.control.messages import Refused, Welcome
from fxtunnel.kit.tls import TlsStream
from fxtunnel.kit.tokens import new_key
from fxtunnel.model import RelayId


async def test_while_the_gateway_drains_only_who_is_here_comes_back(tmp_path: Path) -> None:
    async with running(tmp_path) as rig:
        await rig.enrol()
        async with rig.control("i1"):
            rig.registry.is_draining = rig.registry.full = True
            async with rig.control("i2") as (_, answered):
                assert isinstance(answered, Refused)
                assert answered.code is Refusal.DRAINING
            async with rig.control("i1") as (_, answered):
                assert isinstance(answered, Welcome)
            await until(lambda: not rig.registry.here)
            assert (await refused(rig)).refusal is Refusal.DRAINING


async def test_an_assertion_is_good_for_its_connection_alone(tmp_path: Path) -> None:
    async with running(tmp_path) as rig:
        await rig.enrol()
        made: list[str] = []

        def prove(stream: TlsStream) -> str:
            made.append(rig.assertion()(stream))
            return made[-1]

        async with rig.websocket(prove):
            pass
        again = await refused(rig, lambda _: made[0])
        assert (again.refusal, "not this connection's" in str(again)) == (Refusal.BAD_ASSERTION, True)
        assert (await rig.enrol(assertion=prove))[0] == 200
        assert (await refused(rig, lambda _: made[1])).refusal is Refusal.BAD_ASSERTION
        status, answered = await rig.enrol(assertion=made[0])
        assert (status, answered["error"]) == (401, "bad-assertion")
        unused = await rig.dial()
        stolen = prove(unused)  # never shown by the relay
        assert (await refused(rig, lambda _: stolen)).refusal is Refusal.BAD_ASSERTION
        await unused.aclose()


async def test_who_may_not_come_in(tmp_path: Path) -> None:
    async with running(tmp_path) as rig:
        assert (await refused(rig)).refusal is Refusal.UNKNOWN_RELAY
        await rig.enrol()
        stranger = new_key()
        assert (await refused(rig, rig.assertion(key=stranger))).refusal is Refusal.UNKNOWN_RELAY
        assert (await refused(rig, rig.assertion(relay_id=RelayId("node-b")))).refusal is Refusal.UNKNOWN_RELAY
        assert (await refused(rig, lambda _: "a.b.c")).refusal is Refusal.BAD_ASSERTION
        assert (await refused(rig, lambda stream: rig.assertion()(stream)[:-4] + "AAAA")).refusal is Refusal.BAD_ASSERTION
        skewed = await refused(rig, rig.assertion(skew_s=300))
        assert skewed.refusal is Refusal.CLOCK_SKEW
        rig.registry.full = True
        assert (await refused(rig)).refusal is Refusal.TOO_MANY
        rig.registry.full = False
        rig.registry.is_draining = True
        draining = await refused(rig)
        assert (draining.refusal, draining.retry_after_s > 0) == (Refusal.DRAINING, True)
        rig.registry.is_draining = False
        rig.identities.revoke(NODE)
        assert (await refused(rig)).refusal is Refusal.REVOKED
        assert rig.registry.calls == []


async def test_clock_skew_comes_with_the_gateways_time(tmp_path: Path) -> None:
    async with running(tmp_path) as rig:
        status, answered = await rig.enrol(assertion=rig.assertion(skew_s=-300))
        assert (status, answered["error"]) == (401, "clock-skew")
        assert abs(answered["gateway_time_unix"] - time.time()) < 3


async def test_enrolments_that_fail(tmp_path: Path) -> None:
    async with running(tmp_path) as rig:
        other = new_key()
        rig.identities.add_token("fxe_old", 1_700_000_000)
        for changed, expected in [
            ({"token": "fxe_wrong"}, (401, "bad-token")),
            ({"token": "fxe_old"}, (401, "expired-token")),
            ({"assertion": rig.assertion(key=other)}, (401, "bad-assertion")),
            ({"assertion": rig.assertion(relay_id=RelayId("x"))}, (401, "bad-assertion")),
            ({"v": 2}, (426, "version-mismatch")),
            ({"relay_id": "a b"}, (400, "bad-request")),
            ({"public_key": "AAAA"}, (400, "bad-request")),
            ({"token": None}, (400, "bad-request")),
            ({"pad": "x" * 9000}, (400, "bad-request")),
        ]:
            status, answered = await rig.enrol(**changed)
            assert (status, answered["error"]) == expected
        assert "2023-11-14" in (await rig.enrol(token="fxe_old"))[1]["message"]
        assert rig.identities.known() == ()
        assert (await rig.enrol())[0] == 200
        taken = await rig.enrol(key=other)
        assert (taken[0], taken[1]["error"]) == (409, "name-taken")
        assert "fxgateway forget node-a" in taken[1]["message"]
        rig.identities.revoke(NODE)
        assert (await rig.enrol())[1]["error"] == "revoked"


async def test_an_unwritable_state_is_told_to_try_again(tmp_path: Path) -> None:
    async with running(tmp_path) as rig:
        (tmp_path / "relays.json.lock").unlink()
        (tmp_path / "relays.json.lock").symlink_to(tmp_path / "elsewhere")
        status, answered = await rig.enrol()
        assert (status, answered["retry_after_s"] > 0) == (429, True)


async def test_tokens_and_assertions_never_reach_the_log(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG", "fxgateway")
    async with running(tmp_path) as rig:
        await rig.enrol(token="fxe_canary")
        await rig.enrol()
        made: list[str] = []

        def prove(stream: TlsStream) -> str:
            made.append(rig.assertion()(stream))
            return made[-1]

        async with rig.websocket(prove):
            pass
        await refused(rig, lambda _: made[0])
        async with rig.tickets() as ticket:
            text = await ticket()
            await (await rig.data_link(text))[0].aclose()
    assert "127.0.0.1" in warnings_of(caplog)
    assert not any(secret in caplog.text for secret in ("canary", rig.token, *made, text))
