"""What every transporter does, asked of all of them."""

import sqlite3
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import pytest
from store_rig import NEEDS_REDIS, SYSTEM, Backend, RedisServer, redis_client, wait_until

from fxrelay.cluster import sqlite_bus
from fxrelay.cluster.ports import CONTROLS, MAX_DOCUMENT_BYTES, PLACEMENTS, SERVERS, TOPICS, Message, Subscription
from fxrelay.cluster.redis_bus import RedisTransporter
from fxtunnel.errors import TransporterError

pytestmark = SYSTEM


def hear(subscription: Subscription, count: int, timeout_s: float = 20.0) -> list[Message]:
    deadline = time.monotonic() + timeout_s
    found: list[Message] = []
    while len(found) < count and time.monotonic() < deadline:
        found += subscription.next_batch(0.5)
    return found


def test_everyone_hears_what_was_published_since_they_subscribed(backend: Backend) -> None:
    one, other = backend.transporter(), backend.transporter()
    one.publish(SERVERS, "too early")
    own, others, partly = one.subscribe(TOPICS), other.subscribe(TOPICS), other.subscribe((CONTROLS,))
    messages = [Message(SERVERS, "a"), Message(PLACEMENTS, ""), Message(CONTROLS, "ä€😀\0"), Message(SERVERS, "x" * MAX_DOCUMENT_BYTES)]
    for message in messages:
        one.publish(message.topic, message.text)
    one.publish(PLACEMENTS, *[str(number) for number in range(50)])
    messages += [Message(PLACEMENTS, str(number)) for number in range(50)]
    assert hear(own, 54) == messages
    assert hear(others, 54) == messages
    assert hear(partly, 1) == [messages[2]]
    assert own.next_batch(0) == []


def test_a_change_is_known_in_well_under_a_second(backend: Backend) -> None:
    one, other = backend.transporter(), backend.transporter()
    subscription = other.subscribe(TOPICS)
    delays = []
    with ThreadPoolExecutor(1) as pool:
        for number in range(5):
            heard = pool.submit(lambda: (hear(subscription, 1), time.monotonic()))
            time.sleep(0.05)
            sent_at = time.monotonic()
            one.publish(SERVERS, str(number))
            messages, heard_at = heard.result()
            assert messages == [Message(SERVERS, str(number))]
            delays.append(heard_at - sent_at)
    assert min(delays) < 0.5


def test_a_batch_is_what_has_come_and_has_a_bound(backend: Backend) -> None:
    transporter = backend.transporter()
    subscription = transporter.subscribe(TOPICS)
    backend.publish_many(SERVERS, [str(number) for number in range(2_300)])
    batches = []
    while sum(map(len, batches)) < 2_300:
        batches.append(subscription.next_batch(20))
        assert batches[-1], "waited in vain"
    assert max(map(len, batches)) <= 1_000
    assert len(batches) < 100
    assert [message.text for batch in batches for message in batch] == [str(number) for number in range(2_300)]


def test_long_messages_come_in_batches_of_bounded_size(backend: Backend) -> None:
    subscription = backend.transporter().subscribe(TOPICS)
    long = "x" * MAX_DOCUMENT_BYTES
    backend.publish_many(SERVERS, [long] * 80)
    batches = []
    while sum(map(len, batches)) < 80:
        batches.append(subscription.next_batch(20))
        assert batches[-1], "waited in vain"
    assert max(map(len, batches)) <= 65


def test_what_is_too_long_or_no_text_is_skipped(backend: Backend) -> None:
    transporter = backend.transporter()
    subscription = transporter.subscribe(TOPICS)
    backend.publish_raw(SERVERS, [b"x" * (MAX_DOCUMENT_BYTES + 1), b"\xff\xfe", b"good"])
    transporter.publish(SERVERS, "last")
    assert hear(subscription, 2) == [Message(SERVERS, "good"), Message(SERVERS, "last")]
    for text in ("x" * (MAX_DOCUMENT_BYTES + 1), "\ud800"):
        with pytest.raises(TransporterError):
            transporter.publish(SERVERS, text)
    with pytest.raises(TransporterError):
        transporter.publish("no topic", "x")
    transporter.publish(SERVERS, "still")
    assert hear(subscription, 1) == [Message(SERVERS, "still")]


@pytest.mark.parametrize("through", ["subscription", "transporter"])
def test_closing_wakes_who_waits(backend: Backend, through: str) -> None:
    transporter = backend.transporter()
    subscription = transporter.subscribe(TOPICS)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(subscription.next_batch, 60)
        time.sleep(0.3)  # it waits; nothing says so
        began = time.monotonic()
        (subscription if through == "subscription" else transporter).close()
        assert time.monotonic() - began < 5, "closing waited"
        with pytest.raises(TransporterError, match="was closed"):
            waiting.result(20)
        assert time.monotonic() - began < 20
    subscription.close()
    transporter.close()
    with pytest.raises(TransporterError, match="was closed"):
        subscription.next_batch(0)


def test_a_closed_transporter_says_so(backend: Backend) -> None:
    transporter = backend.transporter()
    transporter.publish(SERVERS, "x")
    transporter.close()
    with pytest.raises(TransporterError, match="was closed"):
        transporter.publish(SERVERS, "x")
    with pytest.raises(TransporterError, match="was closed"):
        transporter.subscribe(TOPICS)


def test_many_publishers_lose_nothing(backend: Backend) -> None:
    transporters = [backend.transporter(), backend.transporter()]
    subscription = backend.transporter().subscribe(TOPICS)

    def work(number: int) -> None:
        for step in range(20):
            transporters[number % 2].publish(SERVERS, f"{number}.{step}")

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    heard = hear(subscription, 80)
    for thread in threads:
        thread.join()
    assert sorted(message.text for message in heard) == sorted(f"{number}.{step}" for number in range(4) for step in range(20))


def test_sqlite_old_messages_go_and_who_missed_them_is_told(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sqlite_bus, "_CLEAN_S", 0.0)
    backend = Backend(tmp_path, None)
    transporter = backend.transporter()
    attentive, slow, silent = (transporter.subscribe(TOPICS) for _ in range(3))
    transporter.publish(SERVERS, "first")
    assert hear(attentive, 1) == [Message(SERVERS, "first")]
    with closing(sqlite3.connect(backend.path)) as database, database:
        database.execute("UPDATE messages SET sent_ms = sent_ms - 61000")
    transporter.publish(SERVERS, "second")
    assert hear(attentive, 1) == [Message(SERVERS, "second")]
    with pytest.raises(TransporterError, match="removed before they were read"):
        slow.next_batch(0)
    with closing(sqlite3.connect(backend.path)) as database, database:
        assert database.execute("SELECT count(*) FROM messages").fetchone() == (1,)
        database.execute("DELETE FROM messages")
    with pytest.raises(TransporterError, match="removed before they were read"):
        silent.next_batch(0)
    assert hear(attentive, 1, 0.5) == []
    assert transporter.subscribe(TOPICS).next_batch(0) == []
    backend.close()


def test_sqlite_a_file_that_was_replaced_ends_subscriptions(tmp_path) -> None:
    backend = Backend(tmp_path, None)
    transporter = backend.transporter()
    subscription = transporter.subscribe(TOPICS)
    backend.path.unlink()
    with pytest.raises(TransporterError, match="was replaced"):
        subscription.next_batch(0)
    again = transporter.subscribe(TOPICS)
    transporter.publish(SERVERS, "x")
    assert hear(again, 1) == [Message(SERVERS, "x")]
    backend.close()


@NEEDS_REDIS
def test_redis_a_subscription_that_is_cut_says_so(server: RedisServer) -> None:
    transporter = RedisTransporter(redis_client(server))
    subscription = transporter.subscribe(TOPICS)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(subscription.next_batch, 60)
        wait_until(lambda: transporter._client.ask(lambda redis: redis.client_kill_filter(_type="pubsub")) == 1)
        with pytest.raises(TransporterError):
            waiting.result(20)
    again = transporter.subscribe(TOPICS)
    transporter.publish(SERVERS, "x")
    assert hear(again, 1) == [Message(SERVERS, "x")]
    transporter.close()
