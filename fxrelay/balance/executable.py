"""Task: runs one FastX 4 balancing executable, in the script process: JSON on stdin, a node id on stdout."""

import os
import signal
import subprocess
import tempfile
from contextlib import suppress
from typing import Any, Final

from fxrelay.balance.script_input import fastx4_input

MAX_OUTPUT_BYTES: Final = 65_536
_ENVIRONMENT: Final = ("PATH", "LANG", "LC_ALL", "HOME", "TZ")


def run_executable(path: str, text: str, limit_s: float) -> dict[str, Any]:
    """Run the file with the FastX 4 form of the input; the answer is as `worker_main` describes it.

    Its output goes through files, so that one that prints for ever fills no memory and one that reads nothing holds nobody up.
    """
    with tempfile.TemporaryFile() as stdin, tempfile.TemporaryFile() as stdout, tempfile.TemporaryFile() as stderr:
        stdin.write(fastx4_input(text).encode())
        stdin.seek(0)
        try:
            process = subprocess.Popen(  # noqa: S603 - the administrator's own program, checked when the chain was made
                [path],
                stdin=stdin,
                stdout=stdout,
                stderr=stderr,
                cwd="/",
                env={key: os.environ[key] for key in _ENVIRONMENT if key in os.environ},
                start_new_session=True,
                preexec_fn=_bound_files,
            )
        except OSError as exc:
            return _failed("ScriptUnreadable", "the balancing script cannot be run", f"{path}: {exc.strerror or exc}")
        try:
            code = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            return _failed("ScriptTimeout", "the balancing script took too long", path)
        finally:
            _kill(process)
        printed, complaint = _read(stdout), _read(stderr).decode(errors="replace").strip()
    last_line = complaint.splitlines()[-1][:500] if complaint else ""
    if code:
        return _failed("ScriptFailed", last_line or f"the balancing script ended with exit code {code}", complaint[-4000:])
    try:
        return {"kind": "output", "text": printed.decode(), "log": complaint[-4000:]}
    except UnicodeDecodeError:
        return _failed("BadReturn", "the balancing script printed no text", path)


def _bound_files() -> None:
    import resource

    resource.setrlimit(resource.RLIMIT_FSIZE, (MAX_OUTPUT_BYTES * 64, MAX_OUTPUT_BYTES * 64))


def _kill(process: "subprocess.Popen[bytes]") -> None:
    """The whole group: what the script has started must not outlive it."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _read(file: Any) -> bytes:
    file.seek(0)
    content: bytes = file.read(MAX_OUTPUT_BYTES)
    return content


def _failed(name: str, message: str, detail: str) -> dict[str, Any]:
    return {"kind": "failed", "name": name, "message": message, "detail": detail}
