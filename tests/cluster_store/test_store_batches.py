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


class Hesitant:
    """A lock after whose release one of the threads hesitates, as the scheduler of a busy machine makes it do."""

    def __init__(self, hesitates: threading.Event, until: threading.Event) -> None:
        self._lock = threading.Lock()
        self._hesitates, self._until = hesitates, until
        self.slow: threading.Thread | None = None

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()
        if threading.current_thread() is self.slow and not self._hesitates.is_set():
            self._hesitates.set()
            assert self._until.wait(20)


@pytest.mark.parametrize("hesitates_at", ["its entry", "its deadline"])
def test_who_is_handed_the_lead_before_he_looks_has_his_answer_all_the_same(
    server: RedisServer, monkeypatch: pytest.MonkeyPatch, hesitates_at: str
) -> None:
    client = redis_client(server)
    batches = Batches(client)
    batches.eval(ECHO, ["{fx-test}:x"], [0])
    hesitates, has_led = threading.Event(), threading.Event()
    lock = Hesitant(hesitates, has_led)
    batches._lock = lock  # tells when it was let go of
    answers: list[object] = []

    def ask(number: int) -> None:
        if number:
            lock.slow = threading.current_thread()
            if hesitates_at == "its deadline":
                hesitates.set()  # not at its entry
        answers.append(batches.eval(ECHO, ["{fx-test}:x"], [number]))

    give_up = batches._give_up

    def give_up_late(call: object) -> None:
        has_led.wait(20)
        give_up(call)

    if hesitates_at == "its deadline":
        monkeypatch.setattr("fxrelay.cluster.redis_batches.TURN_S", 0.0)
        monkeypatch.setattr(batches, "_give_up", give_up_late)
    server.signal(signal.SIGSTOP)
    threads = [threading.Thread(target=ask, args=(number,)) for number in range(2)]
    threads[0].start()
    wait_until(lambda: batches.waiting == 0 and batches.is_led)
    threads[1].start()
    wait_until(lambda: batches.waiting == 1)
    assert hesitates.wait(20)
    server.signal(signal.SIGCONT)
    wait_until(lambda: len(answers) == 1)
    has_led.set()
    for thread in threads:
        thread.join(20)
    assert answers == [[b"{fx-test}:x", b"0"], [b"{fx-test}:x", b"1"]]
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
