import errno
import fcntl
import os
import resource
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from fxtunnel.errors import ConfigError, FxError
from fxtunnel.kit.files import (
    LOCK_FILE,
    MAX_FILE_BYTES,
    held_alone,
    make_private_dir,
    read_secret,
    write_atomic,
    write_secret,
    write_together,
)


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    path = tmp_path / "secret"
    write_secret(path, b"value")
    return path


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.parametrize("umask", [0o000, 0o077, 0o777])
def test_a_secret_is_0600_whatever_the_umask_and_reads_back(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        write_secret(tmp_path / "secret", b"value")
    finally:
        os.umask(before)
    assert mode_of(tmp_path / "secret") == 0o600
    assert read_secret(tmp_path / "secret") == b"value"


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o666, 0o601])
def test_a_secret_others_can_touch_is_refused_with_the_command_to_run(secret: Path, mode: int) -> None:
    secret.chmod(mode)
    with pytest.raises(ConfigError, match=rf"mode {mode:04o}\); run: chmod 600 {secret}$"):
        read_secret(secret)


@pytest.mark.parametrize("mode", [0o600, 0o400, 0o700])
def test_the_owners_own_bits_do_not_matter(secret: Path, mode: int) -> None:
    secret.chmod(mode)
    assert read_secret(secret) == b"value"


def test_links_directories_pipes_and_missing_files_are_refused_at_once(secret: Path) -> None:
    link, pipe = secret.with_name("link"), secret.with_name("pipe")
    link.symlink_to(secret)
    os.mkfifo(pipe, 0o600)
    for path, text in (
        (link, "symbolic link"),
        (pipe, "not a regular file"),
        (secret.parent, "not a regular file"),
        (secret.with_name("gone"), "does not exist"),
        (secret / "below", "cannot be read"),
    ):
        with pytest.raises(ConfigError, match=text):
            read_secret(path)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to give a file away")
def test_somebody_elses_file_is_refused(secret: Path) -> None:
    os.chown(secret, 12345, -1)
    with pytest.raises(ConfigError, match="belongs to uid 12345"):
        read_secret(secret)


@pytest.mark.skipif(os.geteuid() != 0, reason="systemd makes credentials root's")
def test_a_systemd_credential_may_show_its_acl_mask_as_group_read(secret: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    secret.chmod(0o440)
    with pytest.raises(ConfigError):
        read_secret(secret)
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(secret.parent))
    assert read_secret(secret) == b"value"
    secret.chmod(0o444)
    with pytest.raises(ConfigError):
        read_secret(secret)


def test_a_file_that_is_no_secret_of_ours_is_not_read_into_memory(secret: Path) -> None:
    write_secret(secret, bytes(MAX_FILE_BYTES))
    assert len(read_secret(secret)) == MAX_FILE_BYTES
    write_secret(secret, bytes(MAX_FILE_BYTES + 1))
    with pytest.raises(ConfigError, match="larger than 1 MiB"):
        read_secret(secret)


def test_writing_replaces_a_link_instead_of_following_it(secret: Path) -> None:
    link = secret.with_name("link")
    link.symlink_to(secret)
    write_atomic(link, b"new", 0o644)
    assert not link.is_symlink()
    assert (link.read_bytes(), secret.read_bytes()) == (b"new", b"value")
    assert mode_of(link) == 0o644


def test_a_write_that_fails_leaves_the_old_content_and_no_draft(secret: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ConfigError, match="No space left"):
        write_secret(secret, b"new")
    assert secret.read_bytes() == b"value"
    assert os.listdir(secret.parent) == ["secret"]


def test_files_that_belong_together_are_replaced_together(tmp_path: Path) -> None:
    key, certificate = tmp_path / "key", tmp_path / "gone" / "certificate"
    key.write_bytes(b"old")
    with pytest.raises(ConfigError, match="certificate"):
        write_together([(key, b"new", 0o600), (certificate, b"new", 0o644)])
    assert key.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [key]
    certificate.parent.mkdir()
    write_together([(key, b"new", 0o600), (certificate, b"new", 0o644)])
    assert (key.read_bytes(), certificate.read_bytes()) == (b"new", b"new")
    assert [path.name for path in (*tmp_path.iterdir(), *certificate.parent.iterdir()) if path.name.startswith(".")] == []


def test_writing_where_one_cannot_is_explained(secret: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be written"):
        write_secret(secret / "below", b"x")


def test_private_directories_are_made_0700_with_their_parents(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b"
    make_private_dir(path)
    make_private_dir(path)
    assert mode_of(path) == 0o700


def test_a_directory_others_can_enter_or_that_is_a_file_is_refused(tmp_path: Path, secret: Path) -> None:
    path = tmp_path / "open"
    path.mkdir()
    path.chmod(0o750)
    with pytest.raises(ConfigError, match=rf"chmod 700 {path}"):
        make_private_dir(path)
    with pytest.raises(ConfigError, match="not a directory"):
        make_private_dir(secret)
    with pytest.raises(ConfigError, match="cannot be made"):
        make_private_dir(secret / "below")


def test_a_link_to_a_private_directory_is_one(tmp_path: Path) -> None:
    make_private_dir(tmp_path / "real")
    (tmp_path / "link").symlink_to("real")
    make_private_dir(tmp_path / "link")


def test_a_directory_is_one_process_s_at_a_time(tmp_path: Path) -> None:
    with held_alone(tmp_path):
        for _ in range(2):
            with pytest.raises(FxError, match=f"{tmp_path}: process {os.getpid()} uses it already"), held_alone(tmp_path):
                raise AssertionError("it was had twice")
    (tmp_path / LOCK_FILE).write_text("1234567890 of a process that had it before")
    with held_alone(tmp_path):
        assert (tmp_path / LOCK_FILE).read_text() == f"{os.getpid()}\n"
    assert mode_of(tmp_path / LOCK_FILE) == 0o600


def test_a_process_that_is_killed_leaves_no_lock(tmp_path: Path) -> None:
    code = """import pathlib, sys, time
from fxtunnel.kit.files import held_alone
with held_alone(pathlib.Path(sys.argv[1])):
    print(flush=True)
    time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == b"\n"
            with pytest.raises(FxError, match=f"process {process.pid} "), held_alone(tmp_path):
                raise AssertionError("it was had twice")
        finally:
            process.kill()
    with held_alone(tmp_path):
        pass


def test_a_directory_on_a_full_disk_is_held_all_the_same(tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))  # nothing can be written, which is an error as that of a full disk
    try:
        with held_alone(tmp_path), pytest.raises(FxError, match="another process uses it"), held_alone(tmp_path):
            raise AssertionError("it was had twice")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_lock_that_cannot_be_made_is_told_of(tmp_path: Path) -> None:
    (tmp_path / LOCK_FILE).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match="lock: cannot be made"), held_alone(tmp_path):
        raise AssertionError("it was had")


def test_a_file_system_without_locks_keeps_nobody_out_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def no_locks(fd: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with held_alone(tmp_path):
        pass
    assert "No locks available" in caplog.text
