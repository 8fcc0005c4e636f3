"""What a worker hears first, before it has a loop: all of it, and nothing of what comes after it; or why there is no beginning."""

import json
import socket
import subprocess
import sys

import pytest

from fxgateway.workers import worker as module
from fxgateway.workers.channel import PACKET_BYTES, Inbox, pair
from fxgateway.workers.worker import hear_begin
from fxtunnel.errors import FxError
from tests.system.stack import STOP_S

GONE = "this worker ends: the parent process cannot be heard: it is gone"


def say(line: socket.socket, message: dict[str, object], *sockets: socket.socket) -> None:
    """As a channel does it."""
    data = json.dumps(message).encode()
    parts = [data[start : start + PACKET_BYTES - 1] for start in range(0, len(data), PACKET_BYTES - 1)]
    for part in parts[:-1]:
        line.send(b"\1" + part)
    socket.send_fds(line, [b"\0" + parts[-1]], [sock.fileno() for sock in sockets])


def test_what_comes_after_the_beginning_stays_on_the_line() -> None:
    ours, theirs = pair()
    with ours, theirs, socket.create_server(("127.0.0.1", 0)) as one, socket.create_server(("127.0.0.1", 0)) as two:
        say(ours, {"op": "sockets", "addresses": ["one"]}, one)
        say(ours, {"op": "sockets", "addresses": ["two"]}, two)
        say(ours, {"op": "begin", "settings": "x" * 3 * PACKET_BYTES})
        say(ours, {"op": "stop"})
        begin, sockets = hear_begin(theirs)
        with sockets["one"] as first, sockets["two"] as second:
            assert (first.getsockname(), second.getsockname()) == (one.getsockname(), two.getsockname())
        assert len(begin["settings"]) == 3 * PACKET_BYTES
        assert not theirs.getblocking()
        assert Inbox(theirs).read() == ({"op": "stop"}, [])


def test_a_parent_that_says_nothing_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BEGIN_S", 0.01)
    ours, theirs = pair()
    with ours, theirs, pytest.raises(FxError, match=r"the parent process has said nothing for 0\.01 s"):
        hear_begin(theirs)


@pytest.mark.system
@pytest.mark.parametrize(
    ("said", "is_left", "words"),
    [
        (None, True, GONE),
        ({"op": "sockets", "addresses": []}, True, GONE),
        ({"op": "dance"}, False, "this worker ends: the parent process begins with 'dance', which this one does not know"),
    ],
)
def test_a_worker_without_a_beginning_ends_at_once_and_says_why(said: dict[str, object] | None, is_left: bool, words: str) -> None:
    ours, theirs = pair()
    with ours, theirs:
        command = [sys.executable, "-P", "-m", "fxgateway.workers.worker", str(theirs.fileno())]
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, pass_fds=(theirs.fileno(),))
        theirs.close()
        if said is not None:
            say(ours, said)
        if is_left:
            ours.close()
        try:
            _, stderr = process.communicate(timeout=STOP_S)
        finally:
            process.kill()
    assert process.returncode == 1
    assert [json.loads(line)["event"] for line in stderr.splitlines()] == [words]
