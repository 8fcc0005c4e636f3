"""relays.json: who may come in, through enrolment, revocation, other processes and broken files."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import trio
import trio.testing

from fxgateway.settings import LimitSettings
from fxgateway.tunnels import identities as module
from fxgateway.tunnels.identities import EnrolOutcome, EnrolResult, Identities
from fxtunnel.errors import ConfigError
from fxtunnel.kit.tokens import KeyProblem, new_key, public_to_text, thumbprint
from fxtunnel.model import RelayId

A, B = RelayId("a"), RelayId("b")
NOW = 1_700_000_000.0
KEY, OTHER = new_key().public_key(), new_key().public_key()
KID = thumbprint(KEY)


def store(tmp_path: Path) -> Identities:
    return Identities(tmp_path / "relays.json", now_unix=lambda: NOW)


@pytest.fixture
def ids(tmp_path: Path) -> Identities:
    identities = store(tmp_path)
    identities.add_token("fxe_good", int(NOW) + 60)
    return identities


def outcome(ids: Identities, relay: RelayId = A, key: object = KEY, token: str = "fxe_good") -> EnrolOutcome:
    return ids.enrol(relay, key, token).outcome


def test_an_enrolled_key_is_found_and_survives_a_restart(ids: Identities, tmp_path: Path) -> None:
    assert outcome(ids) is EnrolOutcome.ENROLLED
    again = store(tmp_path)
    assert again.find_key(A, KID) is KeyProblem.UNKNOWN
    again.load()
    for one in (ids, again):
        found = one.find_key(A, KID)
        assert not isinstance(found, KeyProblem)
        assert public_to_text(found) == public_to_text(KEY)
        assert one.find_key(A, thumbprint(OTHER)) is KeyProblem.UNKNOWN
        assert one.find_key(B, KID) is KeyProblem.UNKNOWN


def test_the_file_has_the_agreed_form_and_holds_no_secret(ids: Identities, tmp_path: Path) -> None:
    outcome(ids)
    path = tmp_path / "relays.json"
    content = json.loads(path.read_text())
    assert path.stat().st_mode & 0o777 == 0o600
    assert "fxe_" not in path.read_text()
    token_id = content["tokens"][0]["id"]
    key = {"kid": KID, "public_key": public_to_text(KEY), "enrolled_unix": int(NOW), "token_id": token_id}
    assert content["relays"] == {"a": {"keys": [key], "revoked": None}}
    assert set(content["tokens"][0]) == {"id", "sha256", "expires_unix"}


def test_outcomes_of_enrolling(ids: Identities) -> None:
    assert outcome(ids, token="fxe_wrong") is EnrolOutcome.BAD_TOKEN
    assert outcome(ids) is EnrolOutcome.ENROLLED
    assert outcome(ids) is EnrolOutcome.ALREADY
    assert outcome(ids, key=OTHER) is EnrolOutcome.NAME_TAKEN
    assert outcome(ids, relay=B, key=OTHER) is EnrolOutcome.ENROLLED


def test_an_expired_token_says_since_when(ids: Identities) -> None:
    ids.add_token("fxe_old", int(NOW) - 5)
    assert ids.enrol(A, KEY, "fxe_old") == EnrolResult(EnrolOutcome.EXPIRED_TOKEN, int(NOW) - 5)
    assert outcome(ids) is EnrolOutcome.ENROLLED
    assert outcome(ids, token="fxe_old") is EnrolOutcome.ALREADY


def test_a_token_ends_at_its_second(ids: Identities) -> None:
    ids.add_token("fxe_ends_now", int(NOW))
    ids.add_token("fxe_ends_next", int(NOW) + 1)
    assert outcome(ids, token="fxe_ends_now") is EnrolOutcome.EXPIRED_TOKEN
    assert outcome(ids, token="fxe_ends_next") is EnrolOutcome.ENROLLED


def test_expired_tokens_are_kept_for_a_month(ids: Identities, tmp_path: Path) -> None:
    month_s = 30 * 86_400
    ids.add_token("fxe_forgotten", int(NOW) - month_s)
    ids.add_token("fxe_remembered", int(NOW) - month_s + 1)
    ids.add_token("fxe_new", int(NOW) + 60)
    kept = [token["expires_unix"] - int(NOW) for token in json.loads((tmp_path / "relays.json").read_text())["tokens"]]
    assert kept == [60, 1 - month_s, 60]


def test_what_another_process_has_changed_counts_for_the_next_relay(ids: Identities, tmp_path: Path) -> None:
    command = store(tmp_path)
    command.add_token("fxe_theirs", int(NOW) + 60)
    assert outcome(ids, token="fxe_theirs") is EnrolOutcome.ENROLLED
    assert command.withdraw_token("fxe_theirs")
    assert not command.withdraw_token("fxe_theirs")
    assert outcome(ids, relay=B, key=OTHER, token="fxe_theirs") is EnrolOutcome.BAD_TOKEN
    command.revoke(A)
    assert not isinstance(ids.find_key(A, KID), KeyProblem)
    ids.look_again()
    assert ids.find_key(A, KID) is KeyProblem.REVOKED


def test_a_second_look_at_an_unusable_file_changes_nothing(ids: Identities, tmp_path: Path) -> None:
    outcome(ids)
    (tmp_path / "relays.json").write_text("{")
    ids.look_again()
    assert not isinstance(ids.find_key(A, KID), KeyProblem)


def test_a_relay_is_revoked_once(ids: Identities, tmp_path: Path) -> None:
    outcome(ids)
    ids.revoke(A)
    assert Identities(tmp_path / "relays.json", now_unix=lambda: NOW + 100).revoke(A) == 0
    ids.load()
    assert [relay.revoked_unix for relay in ids.known()] == [int(NOW)]


def test_a_lock_that_is_a_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "relays.json.lock").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match="cannot be opened"):
        store(tmp_path).add_token("fxe_new", 1)
    assert not (tmp_path / "elsewhere").exists()


def test_revoking_withdraws_the_token_too(ids: Identities) -> None:
    ids.add_token("fxe_other", int(NOW) + 60)
    outcome(ids)
    assert ids.revoke(A) == 1
    assert ids.find_key(A, KID) is KeyProblem.REVOKED
    assert outcome(ids) is EnrolOutcome.REVOKED
    assert outcome(ids, relay=B, key=OTHER) is EnrolOutcome.BAD_TOKEN
    assert outcome(ids, key=OTHER, token="fxe_other") is EnrolOutcome.REVOKED
    assert outcome(ids, relay=B, key=OTHER, token="fxe_other") is EnrolOutcome.ENROLLED
    assert [(relay.relay_id, relay.kids, relay.revoked_unix) for relay in ids.known()] == [
        (A, (KID,), int(NOW)),
        (B, (thumbprint(OTHER),), None),
    ]


def test_forgetting_makes_room_for_another_key(ids: Identities) -> None:
    outcome(ids)
    assert ids.forget(A)
    assert ids.find_key(A, KID) is KeyProblem.UNKNOWN
    assert outcome(ids, key=OTHER) is EnrolOutcome.ENROLLED


def test_unknown_names_change_nothing(ids: Identities, tmp_path: Path) -> None:
    before = (tmp_path / "relays.json").stat().st_ino
    assert ids.revoke(A) is None
    assert not ids.forget(A)
    assert not ids.withdraw_token("nope")
    assert (tmp_path / "relays.json").stat().st_ino == before


def test_a_withdrawn_token_lets_nobody_in(tmp_path: Path) -> None:
    ids = store(tmp_path)
    ids.add_token("fxe_x", int(NOW) + 9)
    assert ids.withdraw_token("fxe_x")
    assert outcome(ids, token="fxe_x") is EnrolOutcome.BAD_TOKEN


def test_strangers_never_cause_a_write(ids: Identities, tmp_path: Path) -> None:
    before = (tmp_path / "relays.json").stat()
    for _ in range(5):
        outcome(ids, token="fxe_wrong")
    assert (tmp_path / "relays.json").stat() == before


def test_the_number_of_relays_is_bounded(ids: Identities, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_RELAYS", 1)
    assert outcome(ids) is EnrolOutcome.ENROLLED
    assert outcome(ids, relay=B, key=OTHER) is EnrolOutcome.TOO_MANY_KEYS


def test_as_many_relays_as_may_enrol_fit_into_the_file(tmp_path: Path) -> None:
    key = {"kid": "k" * 43, "public_key": "p" * 43, "enrolled_unix": 2_000_000_000, "token_id": "0" * 8}
    relay = {"keys": [key], "revoked": {"unix": 2_000_000_000}}
    path = tmp_path / "relays.json"
    path.write_text(json.dumps({"relays": {f"{number:064}": relay for number in range(module.MAX_RELAYS)}}, indent=1))
    path.chmod(0o600)
    ids = Identities(path)
    ids.load()
    assert len(ids.known()) == module.MAX_RELAYS >= LimitSettings().relays


@pytest.mark.parametrize("content", ["", "[]", '{"relays": {"a b": {}}}', '{"relays": {"a": {"keys": 1}}}', '{"tokens": [{}]}', "[" * 9000])
def test_a_broken_file_is_named_and_kept(ids: Identities, tmp_path: Path, content: str) -> None:
    path = tmp_path / "relays.json"
    path.write_text(content)
    with pytest.raises(ConfigError, match=r"relays\.json"):
        ids.load()
    with pytest.raises(ConfigError):
        ids.add_token("fxe_new", 1)
    assert path.read_text() == content


def test_a_file_others_can_read_is_refused(ids: Identities, tmp_path: Path) -> None:
    (tmp_path / "relays.json").chmod(0o644)
    with pytest.raises(ConfigError, match="chmod 600"):
        ids.load()


def test_a_lock_held_for_too_long_is_an_error(ids: Identities, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fcntl

    monkeypatch.setattr(module, "_LOCK_S", 0.05)
    with (tmp_path / "relays.json.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ConfigError, match="another process"):
            ids.revoke(A)


def test_processes_do_not_lose_each_others_changes(ids: Identities, tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from fxgateway.tunnels.identities import Identities\n"
        "for i in range(6): Identities(Path(sys.argv[1])).add_token(f'fxe_{sys.argv[2]}_{i}', 4000000000)"
    )
    environ = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    children = [subprocess.Popen([sys.executable, "-c", program, tmp_path / "relays.json", name], env=environ) for name in "xy"]
    assert [child.wait() for child in children] == [0, 0]
    tokens = json.loads((tmp_path / "relays.json").read_text())["tokens"]
    assert sum(token["expires_unix"] == 4000000000 for token in tokens) == 12


async def test_the_watcher_reports_who_is_gone(ids: Identities, tmp_path: Path) -> None:
    for relay in ("a", "b", "c"):
        ids.enrol(RelayId(relay), KEY, "fxe_good")
    gone: list[str] = []
    async with trio.open_nursery() as nursery:

        async def watch() -> None:
            await ids.watch(gone.append, poll_s=0.01)

        nursery.start_soon(watch)
        await trio.sleep(0.05)
        assert gone == []
        command = store(tmp_path)  # another process
        command.revoke(A)
        command.forget(B)
        with trio.fail_after(20):
            while len(gone) < 2:
                await trio.sleep(0.01)
            assert sorted(gone) == ["a", "b"]
            ids.revoke(RelayId("c"))  # this process
            while len(gone) < 3:
                await trio.sleep(0.01)
        assert sorted(gone) == ["a", "b", "c"]
        nursery.cancel_scope.cancel()


async def test_the_watcher_reports_who_came_and_went_between_two_looks(ids: Identities, tmp_path: Path) -> None:
    gone: list[str] = []
    async with trio.open_nursery() as nursery:

        async def watch() -> None:
            await ids.watch(gone.append, poll_s=0.05)

        nursery.start_soon(watch)
        await trio.testing.wait_all_tasks_blocked()
        for relay in ("a", "b"):
            ids.enrol(RelayId(relay), KEY, "fxe_good")
        store(tmp_path).revoke(A)  # another process
        ids.forget(B)
        with trio.fail_after(20):
            while len(gone) < 2:
                await trio.sleep(0.01)
        assert sorted(gone) == ["a", "b"]
        nursery.cancel_scope.cancel()


async def test_an_unusable_file_revokes_nobody(ids: Identities, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    outcome(ids)
    gone: list[str] = []
    async with trio.open_nursery() as nursery:

        async def watch() -> None:
            await ids.watch(gone.append, poll_s=0.01)

        nursery.start_soon(watch)
        (tmp_path / "relays.json").write_text("{")
        await trio.sleep(0.1)
        nursery.cancel_scope.cancel()
    assert gone == []
    assert not isinstance(ids.find_key(A, KID), KeyProblem)
    assert "stays in force" in caplog.text
