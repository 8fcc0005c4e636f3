"""What a relay's process leaves to its successor, so that gateways which did not hear that it makes way do not fence it off."""

import dataclasses
from pathlib import Path

import pytest

from fxrelay.uplink.forerunners import FILE, MAX_KEPT, MAX_LEFT_S, Forerunners
from fxrelay.uplink.identity import Identity, load_identity
from fxtunnel.model import InstanceId, RelayId

NOW_UNIX = 2_000_000_000.0


async def identity_of(state_dir: Path, instance: str) -> Identity:
    return dataclasses.replace(await load_identity(state_dir, RelayId("node-a")), instance=InstanceId(instance))


async def test_successors_hear_of_all_that_may_still_have_streams(state_dir: Path) -> None:
    now_unix = NOW_UNIX
    for number in range(1, MAX_KEPT + 3):
        process = Forerunners(await identity_of(state_dir, f"i{number}"), lambda: now_unix)
        process.load()
        await process.add_ourselves(20.0, handover=number > 2)
    last = Forerunners(await identity_of(state_dir, "last"), lambda: now_unix)
    assert last.earlier() == ()
    last.load()
    told = last.earlier()
    assert [earlier.instance for earlier in told] == [f"i{number}" for number in range(3, MAX_KEPT + 3)]
    assert {(earlier.deadline_s, earlier.handover) for earlier in told} == {(20.0, True)}
    now_unix += 15.0
    assert last.earlier()[0].deadline_s == 5.0
    await last.add_ourselves(20.0, handover=False)
    now_unix += 10.0
    successor = Forerunners(await identity_of(state_dir, "successor"), lambda: now_unix)
    successor.load()
    assert [(earlier.instance, earlier.deadline_s, earlier.handover) for earlier in successor.earlier()] == [("last", 10.0, False)]
    now_unix -= 10 * MAX_LEFT_S  # a clock that is set back
    assert successor.earlier()[0].deadline_s == MAX_LEFT_S


@pytest.mark.parametrize("text", ["", "{", "7", "[7]", '[{"instance": "i"}]', '[{"instance": "a b", "until_unix": 9e9, "handover": true}]'])
async def test_a_file_that_is_none_is_ignored(state_dir: Path, text: str, caplog: pytest.LogCaptureFixture) -> None:
    process = Forerunners(await identity_of(state_dir, "i2"), lambda: NOW_UNIX)
    process.load()
    assert not caplog.records
    (state_dir / FILE).write_text(text)
    (state_dir / FILE).chmod(0o600)
    process.load()
    assert process.earlier() == ()
    assert FILE in caplog.text


async def test_a_directory_that_cannot_be_written_stops_nobody(state_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    process = Forerunners(await identity_of(state_dir, "i1"), lambda: NOW_UNIX)
    (state_dir / FILE).mkdir()
    await process.add_ourselves(20.0, handover=True)
    assert "does not hear that we make way" in caplog.text
