"""Executables where the host has no room for what they usually take."""

import socket
import subprocess
import tempfile
from pathlib import Path

import pytest

from fxrelay.balance.executable import run_executable

pytestmark = pytest.mark.xdist_group("balance-workers")


def test_an_executable_needs_no_room_on_a_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "nowhere"))
    path = tmp_path / "f"
    path.write_text("#!/bin/sh\ncat\n")
    path.chmod(0o755)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        assert run_executable(str(path), '{"a": 1}', 20.0, ours)["text"] == '{"a": 1}'


def test_an_executable_for_which_there_can_be_no_process_is_told_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise subprocess.SubprocessError("Exception occurred in preexec_fn.")

    monkeypatch.setattr(subprocess, "Popen", refuse)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        assert run_executable(str(tmp_path / "f"), "{}", 20.0, ours)["name"] == "ScriptUnreadable"
