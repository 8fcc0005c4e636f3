"""Task: files that others must not read or see half-written. Blocking, and quick: for start-up, enrolment and the commands."""

import contextlib
import errno
import fcntl
import logging
import os
import secrets
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from fxtunnel.errors import ConfigError, FxError

logger = logging.getLogger(__name__)

LOCK_FILE: Final = "lock"
_MIB: Final = 1 << 20
_PID_BYTES: Final = 20
MAX_FILE_BYTES: Final = _MIB
"""No key comes near this; it keeps a mistyped path from filling the memory."""


def read_secret(path: Path, *, max_bytes: int = MAX_FILE_BYTES) -> bytes:
    """The content of a file that only we (or root) may read; `max_bytes` is a whole number of MiB.

    The checks are made on the open file, not on the path, so nobody can swap it in between.

    Raises:
        ConfigError: missing, a symbolic link, not a regular file, owned by somebody else, larger than `max_bytes`, or accessible by
            group or others (the message holds the `chmod` to run).
    """
    # O_NONBLOCK: a FIFO under that name must not hang the daemon.
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as exc:
        raise ConfigError.one(path, "", _why_not_opened(exc)) from exc
    try:
        _check_private(path, os.fstat(fd))
        with os.fdopen(fd, "rb", closefd=False) as file:
            data = file.read(max_bytes + 1)
    finally:
        os.close(fd)
    if len(data) > max_bytes:
        raise ConfigError.one(path, "", f"is larger than {max_bytes // _MIB} MiB")
    return data


def read_public(path: Path) -> bytes:
    """The content of a file that others may read, and nobody but its owner may change: public keys, which decide who is let in.

    Raises:
        ConfigError: missing, not a regular file, owned by somebody else than us or root, larger than 1 MiB, or writable by group or others.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as exc:
        raise ConfigError.one(path, "", _why_not_opened(exc)) from exc
    with os.fdopen(fd, "rb") as file:
        facts = os.fstat(fd)
        mode = stat.S_IMODE(facts.st_mode)
        if not stat.S_ISREG(facts.st_mode):
            raise ConfigError.one(path, "", "is not a regular file")
        if facts.st_uid not in (os.geteuid(), 0):
            raise ConfigError.one(path, "", f"belongs to uid {facts.st_uid}; run: chown -h {os.geteuid()} {path}")
        if mode & 0o022:
            raise ConfigError.one(path, "", f"others may change it (mode {mode:04o}); run: chmod go-w {path}")
        data = file.read(MAX_FILE_BYTES + 1)
    if len(data) > MAX_FILE_BYTES:
        raise ConfigError.one(path, "", "is larger than 1 MiB")
    return data


def write_secret(path: Path, data: bytes) -> None:
    """Replace or create `path` with mode 0600, all or nothing.

    Raises:
        ConfigError: it cannot be written; the old content, if any, is untouched.
    """
    write_atomic(path, data, 0o600)


def write_atomic(path: Path, data: bytes, mode: int) -> None:
    """Replace or create `path`: whoever reads it, also after a power cut, finds the old bytes or the new ones.

    `mode` holds whatever the umask is. A symbolic link at `path` is replaced, not followed.

    Raises:
        ConfigError: it cannot be written; the old content, if any, is untouched.
    """
    write_together(((path, data, mode),))


def write_together(files: Sequence[tuple[Path, bytes, int]]) -> None:
    """`write_atomic` for files that belong together, such as a certificate and its key: none is replaced before all are on the disk.

    Raises:
        ConfigError: one cannot be written; the old ones are untouched.
    """
    with contextlib.ExitStack() as drafts:
        written = [(path, drafts.enter_context(_draft(path, data, mode))) for path, data, mode in files]
        for path, draft in written:
            with _told_of(path):
                os.replace(draft, path)
        for directory in {path.parent for path, _, _ in files}:
            _sync_directory(directory)


def make_private_dir(path: Path) -> None:
    """Make `path`, and its parents, unless it is there; either way it ends up being a directory that only we can enter.

    Symbolic links are followed: systemd's DynamicUser makes the state directory one.

    Raises:
        ConfigError: it cannot be made, belongs to somebody else, or others may enter it (the message holds the `chmod` to run).
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            path.mkdir(mode=0o700)
        facts = path.stat()
    except OSError as exc:
        raise ConfigError.one(path, "", f"cannot be made: {exc.strerror or exc}") from exc
    if not stat.S_ISDIR(facts.st_mode):
        raise ConfigError.one(path, "", "is not a directory")
    if facts.st_uid not in (os.geteuid(), 0):
        raise ConfigError.one(path, "", f"belongs to uid {facts.st_uid}; run: chown -h {os.geteuid()} {path}")
    if stat.S_IMODE(facts.st_mode) & 0o077:
        raise ConfigError.one(path, "", f"is accessible by others (mode {stat.S_IMODE(facts.st_mode):04o}); run: chmod 700 {path}")


@contextlib.contextmanager
def held_alone(directory: Path) -> Iterator[None]:
    """Hold a state directory exclusively until the block or the process ends, however it does.

    The file `lock` in it stays, with the number of the last process that had the directory, if there was room for it. On file systems that
    know no locks nobody is kept out.

    Raises:
        FxError: another process has it.
        ConfigError: the file cannot be made.
    """
    try:
        fd = os.open(directory / LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except OSError as exc:
        raise ConfigError.one(directory / LOCK_FILE, "", f"cannot be made: {exc.strerror or exc}") from exc
    with os.fdopen(fd, "r+b", buffering=0) as file:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as exc:
            owner = file.read(_PID_BYTES).decode("ascii", "replace").strip()
            what = f"process {owner}" if owner.isdecimal() else "another process"
            raise FxError(f"{directory}: {what} uses it already; stop that one, or name another directory") from exc
        except OSError as exc:
            logger.warning("%s cannot be locked, a second process that uses it would not be noticed: %s", directory, exc.strerror or exc)
        with contextlib.suppress(OSError):  # a disk that is full: the number is only for people
            try:
                file.write(b"%d\n" % os.getpid())  # first: the file may still have its place
            finally:
                file.truncate()
        yield


@contextlib.contextmanager
def _draft(path: Path, data: bytes, mode: int) -> Iterator[Path]:
    """A file beside `path` that holds `data`, on the disk; removed at the end, if it still has that name."""
    draft = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    with _told_of(path):
        fd = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        with _told_of(path), os.fdopen(fd, "wb") as file:
            file.write(data)
            file.flush()
            os.fchmod(fd, mode)
            os.fsync(fd)
        yield draft
    finally:
        with contextlib.suppress(OSError):
            os.unlink(draft)


@contextlib.contextmanager
def _told_of(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as exc:
        raise ConfigError.one(path, "", f"cannot be written: {exc.strerror or exc}") from exc


def _check_private(path: Path, facts: os.stat_result) -> None:
    mode = stat.S_IMODE(facts.st_mode)
    if not stat.S_ISREG(facts.st_mode):
        raise ConfigError.one(path, "", "is not a regular file")
    if facts.st_uid not in (os.geteuid(), 0):
        raise ConfigError.one(path, "", f"belongs to uid {facts.st_uid}; run: chown -h {os.geteuid()} {path}")
    if mode & _forbidden_bits(path, facts):
        raise ConfigError.one(path, "", f"is accessible by others (mode {mode:04o}); run: chmod 600 {path}")


def _forbidden_bits(path: Path, facts: os.stat_result) -> int:
    """The permission bits that make a secret public.

    systemd's LoadCredential= lets the service's user in with an ACL, whose mask shows as group-read on a file of root's.
    """
    credentials = os.environ.get("CREDENTIALS_DIRECTORY")
    if credentials and facts.st_uid == 0 and path.parent == Path(credentials):
        return 0o037
    return 0o077


def _why_not_opened(exc: OSError) -> str:
    match exc.errno:
        case errno.ENOENT:
            return "does not exist"
        case errno.ELOOP:
            return "is a symbolic link; name the file itself"
        case _:
            return f"cannot be read: {exc.strerror or exc}"


def _sync_directory(path: Path) -> None:
    """Make a rename durable. Some file systems cannot, and the rename itself has already happened: no error then."""
    with contextlib.suppress(OSError):
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
