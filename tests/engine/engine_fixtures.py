"""What the tests of the data plane share: certificates, and a check that nothing is left open."""

import gc
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from plane import Contexts

from fxtunnel.engine import session, tls_socket
from fxtunnel.kit.certificates import issue_server_certificate, new_authority
from fxtunnel.kit.files import write_secret
from fxtunnel.kit.tls import client_context, server_context


@pytest.fixture(scope="session")
def contexts(tmp_path_factory: pytest.TempPathFactory) -> Contexts:
    return make_contexts(tmp_path_factory.mktemp("tls"))


def make_contexts(directory: Path) -> Contexts:
    authority = new_authority("the gateway's")
    certificate, key = issue_server_certificate(authority, ["gateway.test"])
    (directory / "server.pem").write_text(certificate)
    write_secret(directory / "server.key", key)
    alpn = ["fx-data/1"]
    return Contexts(server_context(directory / "server.pem", directory / "server.key", alpn), client_context(authority.cert_pem, alpn))


@pytest.fixture(autouse=True)
def no_descriptor_leaks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(session, "GOODBYE_S", 0.05)
    gc.collect()
    tls_socket.stand_in()  # which stay
    before = len(os.listdir("/proc/self/fd"))
    yield
    deadline = time.monotonic() + 10
    while (after := len(os.listdir("/proc/self/fd"))) > before and time.monotonic() < deadline:
        time.sleep(0.02)  # trio's idle worker threads hold none; sockets that were just closed are gone at once
    assert after <= before, [
        os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd") if os.path.exists(f"/proc/self/fd/{fd}")
    ]
