"""A Redis that dies, hangs, forgets, refuses, or is not who it should be."""

import contextlib
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial

import pytest
import trustme
from store_rig import NEEDS_REDIS, PASSWORD, SYSTEM, RedisServer, plain, redis_client, wait_until

from fxrelay.cluster.ports import SERVERS, TOPICS
from fxrelay.cluster.redis_bus import RedisTransporter
from fxrelay.cluster.redis_client import READ_S
from fxrelay.cluster.redis_store import RedisStore
from fxtunnel.errors import StoreError, TransporterError
from fxtunnel.kit.certificates import new_authority
from fxtunnel.kit.files import write_secret
from tests.ports import free_port

pytestmark = [*SYSTEM, NEEDS_REDIS]

MakeServer = Callable[..., RedisServer]
DEADLINE_S = 20.0
"""Two timeouts of a call are 5 s; the rest is for a busy machine."""


@contextmanager
def fails_soon(match: str = "redis 127.0.0.1") -> Iterator[pytest.ExceptionInfo[StoreError]]:
    began = time.monotonic()
    with pytest.raises(StoreError, match=match) as caught:
        yield caught
    assert time.monotonic() - began < DEADLINE_S
    assert "\n" not in str(caught.value)
    assert PASSWORD not in str(caught.value)


@pytest.fixture
def store(server: RedisServer) -> Iterator[RedisStore]:
    store = RedisStore(redis_client(server))
    yield store
    store.close()


def test_a_killed_server_is_a_store_error_and_then_it_is_back(server: RedisServer, store: RedisStore) -> None:
    transporter = RedisTransporter(redis_client(server))
    subscription = transporter.subscribe(TOPICS)
    epoch = store.epoch()
    store.put(SERVERS, "n", "x")
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(subscription.next_batch, 60)
        time.sleep(0.2)
        server.kill()
        with pytest.raises(TransporterError):
            waiting.result(20)
    for call in (
        store.epoch,
        store.now_ms,
        lambda: store.get(SERVERS, "n"),
        lambda: list(store.documents(SERVERS)),
        lambda: store.add("c", 1),
    ):
        with fails_soon():
            call()
    with pytest.raises(TransporterError):
        transporter.publish(SERVERS, "x")
    with pytest.raises(TransporterError):
        transporter.subscribe(TOPICS)
    server.start()
    wait_until(lambda: answers(store))
    assert store.get(SERVERS, "n") is None
    assert store.epoch() != epoch
    again = transporter.subscribe(TOPICS)
    transporter.publish(SERVERS, "y")
    assert [message.text for message in again.next_batch(20)] == ["y"]
    transporter.close()


def answers(store: RedisStore) -> bool:
    try:
        store.now_ms()
    except StoreError:
        return False
    return True


def test_a_restart_between_two_calls_goes_unnoticed(server: RedisServer, store: RedisStore) -> None:
    """A connection from the pool that is dead meanwhile is not used."""
    store.put(SERVERS, "n", "x")
    server.kill()
    server.start()
    wait_until(lambda: answers(store))
    server.kill()
    server.start()
    store.put(SERVERS, "n", "x")


def test_answers_that_come_after_a_call_was_given_up_are_nobodys(server: RedisServer, store: RedisStore) -> None:
    """As CVE-2023-28858 of redis-py: whoever asked next on that connection was given somebody else's answer."""
    texts = {f"n{number}": f"text {number}" for number in range(20)}
    for key, text in texts.items():
        store.put(SERVERS, key, text)
    server.signal(signal.SIGSTOP)
    try:
        with ThreadPoolExecutor(8) as pool:
            given_up = [pool.submit(store.get, SERVERS, f"n{number}") for number in range(8)]
            for call in given_up:
                with pytest.raises(StoreError):
                    call.result(20)
    finally:
        server.signal(signal.SIGCONT)  # it answers them now
    wait_until(lambda: answers(store))
    with ThreadPoolExecutor(8) as pool:
        for _ in range(10):
            found = dict(zip(texts, pool.map(partial(store.get, SERVERS), texts), strict=True))
            assert {key: document.text for key, document in found.items() if document is not None} == texts


def test_a_hanging_server_is_a_store_error_within_seconds(server: RedisServer, store: RedisStore) -> None:
    transporter = RedisTransporter(redis_client(server))
    subscription = transporter.subscribe(TOPICS)
    found = store.documents(SERVERS)
    store.put(SERVERS, "n", "x")
    server.signal(signal.SIGSTOP)
    try:
        with fails_soon("does not answer within 3 s"):
            store.put(SERVERS, "n", "y")
        with fails_soon():
            next(found)
        fresh = RedisStore(redis_client(server))
        with fails_soon():
            fresh.now_ms()
        fresh.close()
        began = time.monotonic()
        with pytest.raises(TransporterError, match="does not answer"):
            subscription.next_batch(60)
        assert time.monotonic() - began < 20
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(store.now_ms)
            time.sleep(0.3)  # it waits; nothing says so
            began = time.monotonic()
            store.close()
            assert time.monotonic() - began < 0.75 * READ_S
            with pytest.raises(StoreError, match="was closed"):
                waiting.result(20)
    finally:
        server.signal(signal.SIGCONT)
    transporter.close()
    after = RedisStore(redis_client(server))
    assert answers(after)
    after.close()


def test_a_silent_server_is_asked_for_a_sign_of_life(server: RedisServer) -> None:
    transporter = RedisTransporter(redis_client(server))
    subscription = transporter.subscribe(TOPICS)
    subscription._heard_at -= 60

    def has_answered() -> bool:
        assert subscription.next_batch(0.5) == []
        return subscription._pinged_at is None and time.monotonic() - subscription._heard_at < 10

    wait_until(has_answered)
    transporter.close()


def test_a_connection_made_while_the_store_was_closed_is_ended_too(server: RedisServer) -> None:
    client, other = redis_client(server), redis_client(server)
    others = other.ask(lambda redis: len(redis.client_list()))
    with contextlib.suppress(StoreError):
        client.ask(lambda redis: (client.close(), redis.ping()))
    wait_until(lambda: other.ask(lambda redis: len(redis.client_list())) == others)
    other.close()


def test_nobody_there(server: RedisServer) -> None:
    port = free_port()
    store = RedisStore(redis_client(server, port=port))
    with fails_soon() as caught:
        store.now_ms()
    assert str(caught.value) == f"redis 127.0.0.1:{port}: cannot be reached: Connection refused"
    store.close()


@pytest.mark.parametrize("password", ["wrong", "", "pass word"])
def test_a_wrong_password_is_told_without_being_repeated(server: RedisServer, password: str) -> None:
    store = RedisStore(redis_client(server, password=password))
    with fails_soon("refuses the username or password of broker.json"):
        store.now_ms()
    store.close()


def test_a_server_that_repeats_the_password_does_not_bring_it_into_messages(server: RedisServer) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(1_000)
                connection.sendall(f"-ERR unknown command 'AUTH' with args: '{PASSWORD}'\r\n".encode())
                connection.recv(1_000)

        thread = threading.Thread(target=serve)
        thread.start()
        store = RedisStore(redis_client(server, port=listener.getsockname()[1], tls=False))
        with fails_soon("AUTH"):
            store.now_ms()
        store.close()
        thread.join()


@pytest.mark.parametrize("username", ["default", "nobody"])
def test_a_username_is_used(server: RedisServer, username: str) -> None:
    store = RedisStore(redis_client(server, username=username))
    if username == "default":
        assert store.now_ms() > 0
    else:
        with fails_soon("refuses the username or password"):
            store.now_ms()
    store.close()


def test_a_server_with_another_authority_is_refused(server: RedisServer) -> None:
    (server.directory / "other.pem").write_text(new_authority("somebody else").cert_pem)
    store = RedisStore(redis_client(server, ca="other.pem"))
    with fails_soon("certificate is not trusted"):
        store.now_ms()
    store.close()


def test_without_a_ca_the_systems_authorities_count(server: RedisServer) -> None:
    store = RedisStore(redis_client(server, ca=""))
    with fails_soon("certificate is not trusted"):
        store.now_ms()
    store.close()


@pytest.mark.parametrize(("servername", "is_right"), [("redis.test", True), ("other.test", False)])
def test_the_certificate_must_have_the_servers_name(server: RedisServer, servername: str, is_right: bool) -> None:
    store = RedisStore(redis_client(server, servername=servername))
    if is_right:
        assert store.now_ms() > 0
    else:
        with fails_soon("certificate is not trusted"):
            store.now_ms()
    store.close()


def test_reject_unauthorized_false_checks_nothing(server: RedisServer, caplog: pytest.LogCaptureFixture) -> None:
    (server.directory / "other.pem").write_text(new_authority("somebody else").cert_pem)
    store = RedisStore(redis_client(server, ca="other.pem", servername="other.test", rejectUnauthorized=False))
    assert store.now_ms() > 0
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "rejectUnauthorized is false" in caplog.text
    store.close()


def test_a_server_that_asks_for_certificates(make_server: MakeServer) -> None:
    server = make_server(*plain(), "tls-auth-clients yes")
    authority = trustme.CA()
    issued = authority.issue_cert("relay.test")
    with (server.directory / "ca.pem").open("ab") as file:
        file.write(authority.cert_pem.bytes())
    issued.cert_chain_pems[0].write_to_path(str(server.directory / "client.pem"))
    write_secret(server.directory / "client.key", issued.private_key_pem.bytes())
    server.kill()
    server.start()
    with_certificate = RedisStore(redis_client(server, cert="client.pem", key="client.key"))
    assert with_certificate.now_ms() > 0
    without = RedisStore(redis_client(server))
    with fails_soon():
        without.now_ms()
    with_certificate.close()
    without.close()


def test_without_tls_on_this_machine(make_server: MakeServer) -> None:
    port = free_port()
    server = make_server(*plain(), f"port {port}")
    store = RedisStore(redis_client(server, port=port, tls=False))
    assert store.now_ms() > 0
    wrong = RedisStore(redis_client(server, port=port))
    with fails_soon("does not speak TLS"):
        wrong.now_ms()
    store.close()
    wrong.close()


def test_databases_and_namespaces_are_apart(server: RedisServer) -> None:
    stores = [RedisStore(redis_client(server, **more)) for more in ({}, {"db": 3}, {"namespace": "other"})]
    for number, store in enumerate(stores):
        store.put("apart", "n", str(number))
        store.add("apart", number + 1)
    assert [[found.text for found in store.documents("apart")] for store in stores] == [["0"], ["1"], ["2"]]
    assert [store.add("apart", 0) for store in stores] == [1, 2, 3]
    for store in stores:
        store.close()


def test_the_epoch_outlives_a_restart_only_where_nothing_is_forgotten(make_server: MakeServer) -> None:
    for durable, options in ((False, ("appendonly yes", "appendfsync everysec")), (True, ("appendonly yes", "appendfsync always"))):
        server = make_server(f'requirepass "{PASSWORD.replace(chr(34), chr(92) + chr(34))}"', 'save ""', *options)
        store = RedisStore(redis_client(server))
        epoch = store.epoch()
        store.add("c", 5)
        server.kill()
        server.start()
        wait_until(lambda store=store: answers(store))
        assert (store.epoch() == epoch) is durable
        assert store.add("c", 0) == 5
        store.close()


def fill(store: RedisStore) -> None:
    for number in range(200):
        store.put(SERVERS, str(number), "x" * 100_000)


def test_a_full_server_says_so(make_server: MakeServer) -> None:
    server = make_server(*plain(), "maxmemory 1mb", "maxmemory-policy noeviction")
    store = RedisStore(redis_client(server))
    with fails_soon("used memory > 'maxmemory'"):
        fill(store)
    assert store.now_ms() > 0
    store.close()


@pytest.mark.parametrize(
    "answer",
    [b"", b"HTTP/1.1 400 Bad Request\r\n\r\n", b"$99999999999999\r\n", b":abc\r\n", b"*-7\r\n", b"*2000\r\n" * 3_000, b"\xff" * 100_000],
)
def test_who_does_not_speak_redis_is_a_store_error(server: RedisServer, answer: bytes) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        connections = []

        def serve() -> None:
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                connections.append(connection)
                connection.sendall(answer)
                if not answer:
                    connection.close()

        thread = threading.Thread(target=serve)
        thread.start()
        store = RedisStore(redis_client(server, port=listener.getsockname()[1], tls=False, password=""))
        transporter = RedisTransporter(redis_client(server, port=listener.getsockname()[1], tls=False, password=""))
        with fails_soon():
            store.now_ms()
        with pytest.raises(TransporterError):
            transporter.subscribe(TOPICS)
        store.close()
        transporter.close()
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()
        for connection in connections:
            connection.close()
