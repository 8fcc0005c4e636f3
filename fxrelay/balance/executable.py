"""Task: runs one executable of an administrator, in the script process: JSON on stdin, an answer on stdout."""

import math
import os
import resource
import select
import signal
import socket
import subprocess
import time
from contextlib import ExitStack, suppress
from functools import partial
from typing import Any, Final

from fxrelay.balance.answers import failed, refused
from fxrelay.balance.forked import RelayGone, bound, die_with, wait_readable

MAX_OUTPUT_BYTES: Final = 65_536
LOOK_S: Final = 0.01
NOT_RUN: Final = 126
"""From here on exit codes are the shell's: a program cannot be run, is not there, or was killed."""
_ENVIRONMENT: Final = ("PATH", "LANG", "LC_ALL", "HOME", "TZ")


def run_executable(path: str, given: str, limit_s: float, relay: socket.socket) -> dict[str, Any]:
    """Run the file with that on its stdin; the answer is as `worker_main` describes it.

    Its output goes through files, so that one that prints for ever is stopped by a limit and one that reads nothing holds nobody up. They
    are in memory: a full disk keeps nobody from deciding.

    Raises:
        RelayGone: the other end of `relay` was closed meanwhile.
    """
    with ExitStack() as files:
        try:
            stdin, stdout, stderr = (files.enter_context(os.fdopen(os.memfd_create(name), "w+b")) for name in ("in", "out", "err"))
            stdin.write(given.encode())
            stdin.seek(0)
            process = subprocess.Popen(  # noqa: S603 - the administrator's own program, checked when the chain was made
                [path],
                stdin=stdin,
                stdout=stdout,
                stderr=stderr,
                cwd="/",
                env={key: os.environ[key] for key in _ENVIRONMENT if key in os.environ},
                start_new_session=True,
                preexec_fn=partial(_bound, limit_s, os.getpid()),
            )
        except (OSError, subprocess.SubprocessError) as exc:
            return failed("ScriptUnreadable", "the balancing script cannot be run", f"{path}: {getattr(exc, 'strerror', None) or exc}")
        try:
            code = _wait(process, limit_s, relay)
        except subprocess.TimeoutExpired:
            return failed("ScriptTimeout", "the balancing script took too long", path)
        finally:
            _kill(process)
        printed, complaint = _read(stdout), _read(stderr).decode(errors="replace").strip()
    last_line = complaint.splitlines()[-1][:500] if complaint else ""
    if code:
        told = refused if 0 < code < NOT_RUN else failed
        return told("ScriptFailed", last_line or f"the balancing script ended with exit code {code}", complaint[-4000:])
    try:
        return {"kind": "output", "text": printed.decode(), "log": complaint[-4000:]}
    except UnicodeDecodeError:
        return failed("BadReturn", "the balancing script printed no text", path)


def _wait(process: "subprocess.Popen[bytes]", limit_s: float, relay: socket.socket) -> int:
    """Its exit code. Without pidfd_open (Linux before 5.3) its end is noticed up to LOOK_S late."""
    deadline = time.monotonic() + limit_s
    try:
        ended = os.pidfd_open(process.pid)
    except OSError:
        return _look(process, deadline, relay)
    try:
        if not wait_readable(ended, relay, limit_s):
            raise subprocess.TimeoutExpired(process.args, limit_s)
    finally:
        os.close(ended)
    return process.wait()


def _look(process: "subprocess.Popen[bytes]", deadline: float, relay: socket.socket) -> int:
    poller = select.poll()
    poller.register(relay, 0)
    while (code := process.poll()) is None:
        if poller.poll(LOOK_S * 1000):
            raise RelayGone
        if time.monotonic() > deadline:
            raise subprocess.TimeoutExpired(process.args, 0)
    return code


def _bound(limit_s: float, parent: int) -> None:
    """In the child: bounds for its files and its time on the processor, and no life without this process."""
    bound(resource.RLIMIT_FSIZE, MAX_OUTPUT_BYTES * 64)
    bound(resource.RLIMIT_CPU, math.ceil(limit_s) + 1)  # of each process: for those that leave the group
    die_with(parent)


def _kill(process: "subprocess.Popen[bytes]") -> None:
    """The whole group: what the script has started must not outlive it."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _read(file: Any) -> bytes:
    file.seek(0)
    content: bytes = file.read(MAX_OUTPUT_BYTES)
    return content
