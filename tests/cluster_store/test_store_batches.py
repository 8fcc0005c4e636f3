"""Scripts of several threads in one round trip: each has its own answer, and none waits for ever."""

import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from store_rig import NEEDS_REDIS, SYSTEM, RedisServer, redis_client, wait_until

from fxrelay.cluster.redis_batches import MAX_SCRIPTS, TURN_S, Batches
from fxtunnel.errors import StoreError

pytestmark = [*SYSTEM, NEEDS_REDIS]

ECHO = "return {KEYS[1], ARGV[1]}"


def test_threads_that_wait_share_a_round_trip_and_each_gets_its_own_answer(server: RedisServer) -> None:
    client = redis_client(server)
    batches = Batches(client)
    count = MAX_SCRIPTS + 6

    def ask(number: int) -> object:
        script = "return redis.error_reply('no')" if number == 7 else ECHO
        try:
            return batches.eval(script, ["{fx-test}:x"], [number])
        except StoreError as exc:
            return str(exc)

    batches.eval(ECHO, ["{fx-test}:x"], [0])
    server.signal(signal.SIGSTOP)  # whoever is first waits, and all others for him
    with ThreadPoolExecutor(count) as pool:
        asked = [pool.submit(ask, 0)]
        wait_until(lambda: batches.waiting == 0 and batches.is_led)
        asked += [pool.submit(ask, number) for number in range(1, count)]
        wait_until(lambda: batches.waiting == count - 1)
        before = batches.sent
        server.signal(signal.SIGCONT)
        answers = [future.result(20) for future in asked]
    for number, answer in enumerate(answers):
        if number == 7:
            assert "no" in str(answer)
        else:
            assert answer == [b"{fx-test}:x", b"%d" % number]
    assert batches.sent - before == 2, "one write for as many as fit, one for the rest"
    assert not batches.is_led
    client.close()


def test_a_server_that_hangs_holds_nobody_longer_than_one_deadline(server: RedisServer) -> None:
    client = redis_client(server)
    batches = Batches(client)
    batches.eval(ECHO, ["{fx-test}:x"], [0])

    def ask(number: int) -> float:
        began = time.monotonic()
        with pytest.raises(StoreError, match="does not answer"):
            batches.eval(ECHO, ["{fx-test}:x"], [number])
        return time.monotonic() - began

    server.signal(signal.SIGSTOP)
    try:
        with ThreadPoolExecutor(8) as pool:
            assert max(pool.map(ask, range(8))) < TURN_S - 1
    finally:
        server.signal(signal.SIGCONT)
    wait_until(lambda: _answers(batches))
    client.close()


def test_who_waits_for_a_closed_client_is_told(server: RedisServer) -> None:
    client = redis_client(server)
    batches = Batches(client)
    server.signal(signal.SIGSTOP)
    told: list[str] = []

    def ask() -> None:
        try:
            batches.eval(ECHO, ["{fx-test}:x"], [1])
        except StoreError as exc:
            told.append(str(exc))

    threads = [threading.Thread(target=ask) for _ in range(3)]
    try:
        for thread in threads:
            thread.start()
        client.close()
        for thread in threads:
            thread.join(20)
    finally:
        server.signal(signal.SIGCONT)
    assert len(told) == 3


def _answers(batches: Batches) -> bool:
    try:
        return batches.eval(ECHO, ["{fx-test}:x"], [2]) == [b"{fx-test}:x", b"2"]
    except StoreError:
        return False
