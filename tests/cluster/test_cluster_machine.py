"""What the machine says, and how sessions are counted."""

import json
import logging
import os
import socket
import time
from contextlib import ExitStack
from pathlib import Path

import psutil
import pytest

from fxrelay.cluster.machine import MAX_LIST_BYTES, MAX_LISTED, MachineReader, SessionCounter, count_connections, session_fields
from fxrelay.cluster.plain_json import size_of
from fxrelay.cluster.programs import ProgramBounds
from tests.ports import free_port

BOUNDS = ProgramBounds(timeout_s=20.0)
HERE, THERE = "127.9.8.2", "127.9.8.3"
"""Nobody else has connections there, whatever else runs on this machine. Anybody may have some at another address and any port."""
HEAD = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n"


def test_the_machine_says_what_it_is() -> None:
    found = MachineReader().read()
    assert found["hostname"] == socket.gethostname()
    assert len(found["loadavg"]) == 3
    assert 0 < found["availmem"] <= found["totalmem"] == psutil.virtual_memory().total
    assert 0 < found["freemem"] <= found["totalmem"]
    assert abs(found["uptime"] - time.clock_gettime(time.CLOCK_BOOTTIME)) < 5
    assert found["logins"] >= found["uniqueUserLogins"] == found["loggedInUsers"]


def test_cpu_is_the_share_since_the_last_call(monkeypatch: pytest.MonkeyPatch) -> None:
    now = psutil.cpu_times()
    reader = MachineReader()
    reader._cpu = now
    busy = now._replace(user=now.user + 20, guest=now.guest + 15, idle=now.idle + 60, iowait=now.iowait + 20)
    monkeypatch.setattr(psutil, "cpu_times", lambda: busy)
    assert reader.read()["cpu"] == 20.0, "time of guests is within that of users"
    assert reader.read()["cpu"] == 0.0
    monkeypatch.setattr(psutil, "cpu_times", lambda: now)
    assert reader.read()["cpu"] == 0.0, "counters that go back"


def test_connections_to_a_port_are_counted_once() -> None:
    with ExitStack() as stack:
        listener, other = (stack.enter_context(socket.create_server((HERE, free_port()))) for _ in range(2))
        ends = [listener.getsockname()]
        assert count_connections(ends) == 0
        for server, clients in ((listener, 3), (other, 2)):
            for _ in range(clients):
                stack.enter_context(socket.create_connection(server.getsockname()))
                stack.enter_context(server.accept()[0])
        assert count_connections(ends) == 3
        assert count_connections([*ends, other.getsockname()]) == 5
        listener.close()
        assert count_connections(ends) == 3, "sessions outlive their listener"
    assert count_connections([]) == 0


@pytest.mark.parametrize("listening", [HERE, "::"])
def test_connections_to_an_address_are_not_those_to_another(listening: str) -> None:
    family, port = socket.AF_INET6 if ":" in listening else socket.AF_INET, free_port()
    with ExitStack() as stack:
        here = stack.enter_context(socket.create_server((listening, port), family=family, dualstack_ipv6=family == socket.AF_INET6))
        there = here if family == socket.AF_INET6 else stack.enter_context(socket.create_server((THERE, port)))
        for server, address in ((here, HERE), (there, THERE), (here, HERE)):
            stack.enter_context(socket.create_connection((address, port)))
            stack.enter_context(server.accept()[0])
        assert (count_connections([(HERE, port)]), count_connections([(THERE, port)])) == (2, 1)
        assert count_connections([(HERE, port), (THERE, port)]) == 3


def test_only_established_ends_at_the_port_count(tmp_path: Path) -> None:
    def line(number: int, local: int, remote: int, state: str) -> str:
        return (
            f"{number:4d}: 0100007F:{local:04X} 0100007F:{remote:04X} {state} 00000000:00000000 00:00000000 00000000     0        0 1 1 0\n"
        )

    table = tmp_path / "tcp"
    lines = [line(0, 8080, 0, "0A"), line(1, 8080, 50_000, "01"), line(2, 50_000, 8080, "01"), line(3, 8080, 50_001, "06")]
    table.write_text(HEAD + "".join(lines))
    assert count_connections([("", 8080)], [table, tmp_path / "no-ipv6"]) == 1
    mapped = f"{4:4d}: {'0' * 16}FFFF00000309097F:1F90 {'0' * 16}FFFF00000100007F:C352 01 00000000:00000000 0 0 0\n"
    (tmp_path / "tcp6").write_text(HEAD + mapped)
    table.write_text(HEAD + "".join(lines) + line(5, 8080, 50_003, "01").replace("0100007F", "0209097F", 1))
    assert count_connections([("", 8080)], [table, tmp_path / "tcp6"]) == 3, "at whatever address"
    table.write_text(HEAD + "".join(lines) + line(9, 8080, 50_000, "01"))
    assert count_connections([("", 8080)], [table]) == 1, "shown twice, as the kernel does while connections come and go"
    many = [line(number, 8080 if number % 2 else 9090, number % 60_000, "01") for number in range(10_000)]
    table.write_text(HEAD + "".join(many))
    assert count_connections([("", 8080)], [table]) == 5_000
    assert count_connections([("", 8080), ("", 9090)], [table]) == 10_000


def test_a_list_of_sessions_becomes_counts() -> None:
    listed = [{"owner": "ann"}, {"owner": "bob"}, {"owner": "ann", "id": 3}, {"id": 4}, {"owner": 5}]
    assert session_fields(listed) == {"sessions": 5, "uniqueUserSessions": 2, "sessionList": listed}


def test_a_long_list_is_counted_whole_and_shown_in_part() -> None:
    fields = session_fields([{"owner": f"u{number}"} for number in range(1_000)])
    assert (fields["sessions"], fields["uniqueUserSessions"], len(fields["sessionList"])) == (1_000, 1_000, MAX_LISTED)
    fields = session_fields([{"owner": "u", "name": "x" * 1_000} for _ in range(50)])
    assert (fields["sessions"], len(fields["sessionList"])) == (50, 15)
    assert size_of(fields["sessionList"]) <= MAX_LIST_BYTES


@pytest.mark.parametrize("listed", [{}, 3, None, [1], [{"owner": "a"}, "b"]])
def test_what_is_no_list_of_sessions_is_refused(listed: object) -> None:
    with pytest.raises(ValueError, match="list of objects"):
        session_fields(listed)


@pytest.fixture
def program(tmp_path: Path) -> Path:
    directory = tmp_path / "bin"
    directory.mkdir(mode=0o755)
    path = directory / "sessions"
    write(path, f"echo '{json.dumps([{'owner': 'ann'}, {'owner': 'ann'}])}'")
    return path


def write(path: Path, body: str, mode: int = 0o755) -> None:
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(mode)


async def test_a_program_lists_the_sessions(program: Path) -> None:
    counter = SessionCounter(f"exec:{program}", (), 10.0, BOUNDS)
    fields = await counter.count(os.environ)
    assert fields == {"sessions": 2, "uniqueUserSessions": 1, "sessionList": [{"owner": "ann"}, {"owner": "ann"}]}


@pytest.mark.parametrize("body", ["exit 1", "echo 3", "echo '[1]'", "echo '['"])
async def test_while_it_fails_its_last_answer_stands_and_then_connections_count(
    program: Path, body: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    now = [1_000.0]
    monkeypatch.setattr("fxrelay.cluster.machine.trio.current_time", lambda: now[0])
    counter = SessionCounter(f"exec:{program}", (), 10.0, BOUNDS)
    await counter.count(os.environ)
    write(program, body)
    with caplog.at_level(logging.WARNING):
        now[0] += 30
        fields = await counter.count(os.environ)
        assert (fields["sessions"], len(fields["sessionErrors"])) == (2, 1)
        now[0] += 0.1
        fields = await counter.count(os.environ)
        assert (set(fields), fields["sessions"]) == ({"sessions", "sessionErrors"}, 0)
    assert len(caplog.records) == 1
    write(program, "echo '[]'")
    assert await counter.count(os.environ) == {"sessions": 0, "uniqueUserSessions": 0, "sessionList": []}


async def test_a_program_that_others_could_have_written_is_not_run(program: Path) -> None:
    write(program, "echo '[]'", 0o757)
    fields = await SessionCounter(f"exec:{program}", (), 10.0, BOUNDS).count(os.environ)
    assert fields["sessionErrors"] == ["is writable by group or others (mode 0757)"]


async def test_connections_are_counted_without_a_program() -> None:
    with socket.create_server((HERE, free_port())) as listener, socket.create_connection(listener.getsockname()):
        counter = SessionCounter("connections", [listener.getsockname()], 10.0, BOUNDS)
        assert await counter.count(os.environ) == {"sessions": 1}
