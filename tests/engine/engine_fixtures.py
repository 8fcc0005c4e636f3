"""What the tests of the data plane share: certificates, and a check that nothing is left open."""

import gc
import os
import ssl
import time
from collections.abc import Iterator

import pytest
import trustme
from plane import Contexts

from fxtunnel.engine import session


@pytest.fixture(scope="session")
def contexts() -> Contexts:
    authority = trustme.CA()
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("gateway.test").configure_cert(server)
    client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    authority.configure_trust(client)
    for context in (server, client):
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.set_alpn_protocols(["fx-data/1"])
    return Contexts(server, client)


@pytest.fixture(autouse=True)
def no_descriptor_leaks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(session, "GOODBYE_S", 0.05)
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    yield
    deadline = time.monotonic() + 10
    while (after := len(os.listdir("/proc/self/fd"))) > before and time.monotonic() < deadline:
        time.sleep(0.02)  # trio's idle worker threads hold none; sockets that were just closed are gone at once
    assert after <= before, [
        os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd") if os.path.exists(f"/proc/self/fd/{fd}")
    ]
