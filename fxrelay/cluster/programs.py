"""Task: runs an administrator's executable within bounds of time and output, and refuses one that somebody else could have written."""

import os
import signal
import stat
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import trio

from fxrelay.cluster.plain_json import read_json
from fxrelay.cluster.priority import AGAIN_S, ATTEMPTS, interrupt_nobody, set_session_nice
from fxtunnel.errors import ScriptError

NICE: Final = 10
_BLOCK_BYTES: Final = 16_384
_STDERR_BYTES: Final = 4_096
_REAP_S: Final = 1.0
_MAX_ERROR: Final = 200


@dataclass(frozen=True, slots=True)
class ProgramBounds:
    """What one run may take. Functions are looked for in `module_dir` as well, after everything that this process can import."""

    timeout_s: float = 5.0
    output_bytes: int = 65_536
    module_dir: Path | None = None


def why_not_run(path: Path) -> str:
    """Empty if `path` may be run with this relay's rights, else what is wrong. Blocks.

    It has to be a regular file with an execute bit, and nobody but root and the relay's user may be able to change or replace it.
    """
    try:
        facts, directory = path.lstat(), path.parent.stat()
    except OSError as exc:
        return f"cannot be examined: {exc.strerror or exc}"
    if not stat.S_ISREG(facts.st_mode):
        return "is not a regular file"
    if not facts.st_mode & 0o111:
        return "is not executable"
    return _why_not_trusted(facts, "") or _why_not_trusted(directory, "its directory ")


def _why_not_trusted(facts: os.stat_result, what: str) -> str:
    if facts.st_uid not in (0, os.geteuid()):
        return f"{what}belongs to uid {facts.st_uid}, not to root or the relay's user"
    if facts.st_mode & 0o022:
        return f"{what}is writable by group or others (mode {stat.S_IMODE(facts.st_mode):04o})"
    return ""


def clean_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """What programs see of the relay's environment."""
    return {"PATH": "/usr/local/bin:/usr/bin:/bin", "LANG": "C.UTF-8", "HOME": "/"} | {
        name: environ[name] for name in ("PATH", "LANG", "HOME") if name in environ
    }


async def json_of(path: Path, bounds: ProgramBounds, environ: Mapping[str, str]) -> Any:
    """The JSON value that the executable prints.

    It runs in a process group of its own, with lower priority, in `/`. The group is killed when the time is over, when it prints too
    much, and when this call is cancelled.

    Raises:
        ScriptError: it did not start, failed, took too long, printed too much or no JSON.
    """
    return await _json_of([str(path)], path.name, bounds, clean_environment(environ))


async def json_from_function(function: str, bounds: ProgramBounds, environ: Mapping[str, str]) -> Any:
    """The value that MODULE:FUNCTION returns in a process of its own, which sees the modules that this one sees, and those in
    `bounds.module_dir`. Otherwise as `json_of`.
    """
    command = [sys.executable, "-P", "-m", "fxrelay.cluster.metric_main", function]
    return await _json_of(command, function, bounds, clean_environment(environ) | {"PYTHONPATH": _module_paths(bounds.module_dir)})


def _module_paths(last: Path | None) -> str:
    paths = [*sys.path, *([str(last)] if last is not None else [])]
    return os.pathsep.join(map(os.path.abspath, paths))


async def _json_of(command: Sequence[str], name: str, bounds: ProgramBounds, environ: Mapping[str, str]) -> Any:
    text = await _output_of(command, name, bounds, environ)
    try:
        return read_json(text.decode())
    except ValueError as exc:
        raise ScriptError(name, one_line(f"printed no JSON: {exc}")) from exc


def one_line(text: str) -> str:
    """The text as it may be published and logged: short and printable."""
    shown = "".join(character if character.isprintable() else " " for character in text).strip()
    return shown if len(shown) <= _MAX_ERROR else f"{shown[: _MAX_ERROR - 1]}…"


async def _output_of(command: Sequence[str], name: str, bounds: ProgramBounds, environ: Mapping[str, str]) -> bytes:
    try:
        process = await trio.lowlevel.open_process(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
            cwd="/",
            env=environ,
        )
    except OSError as exc:
        raise ScriptError(name, f"does not start: {exc.strerror or exc}") from exc
    assert process.stdout is not None
    assert process.stderr is not None
    output, complaints = bytearray(), bytearray()
    is_over = False
    try:
        with trio.move_on_after(bounds.timeout_s) as scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(_lower_priority, process.pid)
                nursery.start_soon(_keep_last, process.stderr, complaints)
                fits = await _read_all(process.stdout, output, bounds.output_bytes)
                if not fits:
                    nursery.cancel_scope.cancel()
            if fits:
                await process.wait()
                is_over = True
    finally:
        if not is_over:
            _kill_group(process.pid)
        with trio.move_on_after(_REAP_S, shield=True):
            await process.wait()
        with trio.CancelScope(shield=True):
            await trio.aclose_forcefully(process.stdout)
            await trio.aclose_forcefully(process.stderr)
    if scope.cancelled_caught:
        raise ScriptError(name, f"took longer than {bounds.timeout_s:g} s")
    if not fits:
        raise ScriptError(name, f"printed more than {bounds.output_bytes} bytes")
    if process.returncode != 0:
        lines = complaints.decode(errors="replace").strip().splitlines()
        raise ScriptError(name, one_line(f"exit status {process.returncode}{f': {lines[-1]}' if lines else ''}"))
    return bytes(output)


async def _read_all(stream: trio.abc.ReceiveStream, into: bytearray, limit_bytes: int) -> bool:
    async for block in stream:
        into += block
        if len(into) > limit_bytes:
            return False
    return True


async def _keep_last(stream: trio.abc.ReceiveStream, into: bytearray) -> None:
    while block := await stream.receive_some(_BLOCK_BYTES):
        into += block
        del into[:-_STDERR_BYTES]


async def _lower_priority(leader: int) -> None:
    """Of the leader of a session and a process group; takes half a second at most."""
    # Not in the child before it starts: code between fork and exec is not safe in a process with threads.
    nice = min(19, os.getpriority(os.PRIO_PROCESS, 0) + NICE)
    with suppress(OSError):  # it has ended already
        os.setpriority(os.PRIO_PGRP, leader, nice)
    interrupt_nobody(leader, nice)
    for _ in range(ATTEMPTS):
        if set_session_nice(leader, nice):
            break
        await trio.sleep(AGAIN_S)


def _kill_group(group: int) -> None:
    with suppress(OSError):
        os.killpg(group, signal.SIGKILL)
