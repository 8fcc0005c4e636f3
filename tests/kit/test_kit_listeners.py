"""Sockets with a path: what a process that is gone left behind is replaced, what another process has is not."""

import socket
from pathlib import Path

import pytest

from fxtunnel.kit.listeners import ListenError, listen
from fxtunnel.kit.settings import Address


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "s"


def test_a_socket_left_behind_is_replaced(path: Path):
    listen(Address(path=path)).close()
    assert path.is_socket()
    with listen(Address(path=path)), socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))


@pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_DGRAM])
def test_a_socket_of_another_process_stays(path: Path, kind: socket.SocketKind):
    with socket.socket(socket.AF_UNIX, kind) as other:
        other.bind(str(path))
        if kind == socket.SOCK_STREAM:
            other.listen()
        with pytest.raises(ListenError):
            listen(Address(path=path))
        with socket.socket(socket.AF_UNIX, kind) as client:
            client.connect(str(path))
