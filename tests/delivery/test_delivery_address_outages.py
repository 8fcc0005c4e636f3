"""A service that is down is in the log: once, and once more when it is back."""

import logging
import socket

import pytest
from delivery_rig import NOBODY, ScriptedChooser, Spec, add_pool_relay
from plane import Contexts, open_plane
from test_delivery_endings import refused

from fxrelay.delivery import address_outages
from fxrelay.delivery.address_outages import AddressOutages
from fxrelay.delivery.services import Endpoint

SSHD = Endpoint(socket.AF_INET, ("127.0.0.1", 22))


def test_an_outage_is_two_lines_however_many_come(caplog: pytest.LogCaptureFixture) -> None:
    it = AddressOutages()
    it.note_reached(SSHD)
    for _ in range(3):
        it.note(SSHD, "Connection refused")
    it.note_reached(SSHD)
    it.note_reached(SSHD)
    assert [record.getMessage() for record in caplog.records] == [
        "a service cannot be reached at 127.0.0.1:22: Connection refused",
        "the service at 127.0.0.1:22 is reached again; attempts that failed: 3",
    ]


def test_addresses_of_every_kind_and_no_more_than_can_be_kept(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(address_outages, "MAX_ADDRESSES", 2)
    it = AddressOutages()
    for endpoint in (Endpoint(socket.AF_INET6, ("::1", 22, 0, 0)), Endpoint(socket.AF_UNIX, "/run/desk.sock"), SSHD):
        it.note(endpoint, "no")
    assert [record.getMessage().removeprefix("a service cannot be reached at ") for record in caplog.records] == [
        "[::1]:22: no",
        "/run/desk.sock: no",
    ]


async def test_whoever_runs_the_relay_reads_which_address_is_dead(contexts: Contexts, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    async with open_plane(contexts) as plane:
        await add_pool_relay(plane, "a", ScriptedChooser(Spec("b", address=NOBODY)), 9)
        port = plane.add_door()
        for _ in range(2):
            await refused(port)
    assert caplog.text.count(f"a service cannot be reached at {NOBODY}:9: Connection refused") == 1
