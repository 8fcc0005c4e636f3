"""A reload reads certificates beside the loop, once, and one reload after the other."""

import os
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from fxgateway import app, settings
from fxgateway.app import Gateway
from fxgateway.certificates import Certificates, load_certificates
from fxgateway.sandbox import Sandbox
from fxtunnel.engine.reactor import Reactor
from fxtunnel.kit.certificates import expires_unix, issue_server_certificate, new_authority
from fxtunnel.kit.files import write_secret
from fxtunnel.kit.notify import Notifier
from fxtunnel.protocol.alpn import ALPN_SPOKEN

CONFIG = """
[tunnel]
listen = "127.0.0.1:0"
public_url = "wss://gateway.example.com:8443"
certificate = "gateway.pem"
key = "gateway.key"
state_dir = "state"
"""


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(app.logs, "configure", lambda *_: None)  # a reload's, for the whole process
    issue(tmp_path, 30)
    (tmp_path / "gateway.toml").write_text(CONFIG)
    return tmp_path / "gateway.toml"


def issue(directory: Path, valid_days: int) -> float:
    certificate, key = issue_server_certificate(new_authority("a"), ["gateway.example.com"], valid_days=valid_days)
    (directory / "gateway.pem").write_text(certificate)
    (directory / "gateway.key").unlink(missing_ok=True)
    write_secret(directory / "gateway.key", key)
    return expires_unix(certificate.encode())


@pytest.fixture
def gateway(config: Path) -> Iterator[Gateway]:
    reactor, loaded = Reactor(), settings.load(config, {})
    gateway = Gateway(reactor, loaded, config, Notifier(), 1_024, Sandbox(loaded, config))
    gateway._view.listening = ("tunnel", "admin")  # as once it serves
    yield gateway
    reactor.close()


async def test_a_slow_disk_holds_up_no_client_and_two_reloads_come_one_after_the_other(
    gateway: Gateway, config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    go, threads, expected = threading.Event(), list[threading.Thread](), []

    def read(fresh: settings.GatewaySettings, alpn: Sequence[str]) -> Certificates:
        threads.append(threading.current_thread())
        go.wait(30)
        return load_certificates(fresh, alpn)

    monkeypatch.setattr(app, "load_certificates", read)
    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(gateway._reloads.run, gateway._load_again, Notifier())
            gateway._reloads.ask()
            while not threads:
                await trio.sleep(0.01)
            gateway._reloads.ask()
            await wait_all_tasks_blocked()  # which the loop can see to, as it is not the one that reads
            assert len(threads) == 1
            expected.append(issue(config.parent, 60))
            go.set()
            while len(threads) < 2 or gateway._view.certificate_expires_unix != expected[0]:
                await trio.sleep(0.01)
            nursery.cancel_scope.cancel()
    assert threading.main_thread() not in threads


async def test_what_has_been_read_is_taken_up_though_the_files_are_others_by_then(gateway: Gateway, config: Path) -> None:
    expires = issue(config.parent, 60)
    fresh = settings.load(config, os.environ)
    certificates = load_certificates(fresh, ALPN_SPOKEN)
    (config.parent / "gateway.pem").unlink()
    gateway._apply(fresh, certificates)
    assert gateway._view.certificate_expires_unix == expires
