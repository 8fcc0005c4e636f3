"""Sockets whose both ends are on this host do not send at the rate that BBR has measured."""

import socket

import pytest

from fxtunnel.kit import unpaced
from fxtunnel.kit.listeners import listen
from fxtunnel.kit.settings import Address
from fxtunnel.kit.unpaced import is_loopback, unpace


def congestion_control(sock: socket.socket) -> str:
    return sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, 16).rstrip(b"\0").decode()


@pytest.fixture
def default() -> str:
    with socket.socket() as sock:
        return congestion_control(sock)


@pytest.fixture
def paced(default: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """What this host has by default, taken for one that paces."""
    monkeypatch.setattr(unpaced, "_PACING", default.encode())
    return default


@pytest.mark.parametrize(("host", "expected"), [("127.0.0.1", True), ("127.9.9.9", True), ("::1", True), ("localhost", True)])
def test_what_loopback_is(host: str, expected: bool):
    assert is_loopback(host) is expected


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "2001:db8::1", "127.example", "None"])
def test_what_loopback_is_not(host: str):
    assert not is_loopback(host)


def test_what_paces_gives_way_and_what_is_accepted_inherits_that(paced: str):
    with listen(Address("127.0.0.1", 0)) as listener, socket.create_connection(listener.getsockname()) as client:
        listener.settimeout(10)
        with listener.accept()[0] as accepted:
            assert [congestion_control(sock) for sock in (listener, accepted, client)] == ["reno", "reno", paced]
            unpace(client)
            assert congestion_control(client) == "reno"


def test_who_listens_for_everybody_keeps_what_the_host_has_chosen(paced: str):
    with listen(Address("0.0.0.0", 0)) as listener:
        assert congestion_control(listener) == paced


def test_any_other_congestion_control_stays():
    with socket.socket() as sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, b"reno")
        unpace(sock)
        assert congestion_control(sock) == "reno"


def test_a_socket_without_congestion_control_is_left_alone():
    with socket.socket(socket.AF_UNIX) as sock:
        unpace(sock)
