"""What systemd does with a unit of Type=notify, KillMode=process and a file descriptor store, for one of our daemons at a time."""

import array
import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil

from tests.system.stack import wait_until

START_S = 90.0
"""Its relays included, for which a gateway waits a minute where tests say so."""
LET_GO_S = 60.0
"""On a busy machine; a tenth of what streams may take, for which nobody waits here."""
# Sockets from descriptor 3 on and the three variables, as sd_listen_fds(3) has them.
_HAND_OVER = """
import os, sys
fds, names, command = [int(fd) for fd in sys.argv[1].split(",") if fd], sys.argv[2], sys.argv[3:]
for number, fd in enumerate([os.dup2(fd, 100 + number) for number, fd in enumerate(fds)]):
    os.dup2(fd, 3 + number, inheritable=True)
os.closerange(3 + len(fds), 200)
if fds:
    os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS=str(len(fds)), LISTEN_FDNAMES=names)
os.execv(command[0], command)
"""


class Unit:
    """`systemctl start`, `stop`, `restart`, `reload` and `kill` of one daemon. Only its main process is ever signalled."""

    def __init__(self, arguments: list[str], log: Path, home: Path, *, with_store: bool = True, prefix: tuple[str, ...] = ()) -> None:
        self.log = log
        self.heard: list[str] = []
        self.stored: dict[str, int] = {}
        self.main: subprocess.Popen[bytes] | None = None
        self._arguments = arguments
        self._prefix = prefix
        self._with_store = with_store
        self._path = home / f"{log.stem}.notify"
        self._notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._notify.bind(str(self._path))
        self._notify.setblocking(False)
        self._processes: list[psutil.Process] = []

    def start(self) -> None:
        """Until it is ready."""
        fds = tuple(self.stored.values())
        hand_over = [sys.executable, "-c", _HAND_OVER, ",".join(map(str, fds)), ":".join(self.stored)]
        self.listen()
        self.heard.clear()
        with self.log.open("ab") as stderr:
            self.main = subprocess.Popen(
                [*self._prefix, *hand_over, sys.executable, "-m", *self._arguments],
                stdout=subprocess.DEVNULL,
                stderr=stderr,
                env={**os.environ, "NOTIFY_SOCKET": str(self._path)},
                start_new_session=True,
                pass_fds=fds,
            )
        wait_until(lambda: self._is_ready(), START_S, f"READY of {self._arguments[0]}")
        self._processes += self.processes()

    def stop(self) -> int:
        """SIGTERM to the main process; its exit code."""
        assert self.main is not None
        self._processes += self.processes()
        self.main.send_signal(signal.SIGTERM)
        code = self.main.wait(LET_GO_S)
        self.listen()
        return code

    def kill(self) -> None:
        """SIGKILL to the main process."""
        assert self.main is not None
        self._processes += self.processes()
        self.main.kill()
        self.main.wait(LET_GO_S)
        self.listen()

    def restart(self) -> None:
        """As an upgrade does it."""
        assert self.stop() == 0, self.log.read_text()[-4000:]
        self.start()

    def reload(self) -> None:
        """Until it is done."""
        assert self.main is not None
        self.heard.clear()
        self.main.send_signal(signal.SIGHUP)
        wait_until(lambda: self._is_ready(), START_S, "READY after a reload")

    def daemon(self) -> psutil.Process:
        """The process that works, below the main one."""
        assert self.main is not None
        return psutil.Process(self.main.pid).children()[-1]

    def processes(self) -> list[psutil.Process]:
        """The main process and what it has started."""
        assert self.main is not None
        with contextlib.suppress(psutil.NoSuchProcess):
            main = psutil.Process(self.main.pid)
            return [main, *main.children(recursive=True)]
        return []

    def left_over(self) -> int:
        """Processes of earlier runs that still live."""
        present = {process.pid for process in self.processes()}
        return sum(process.pid not in present and _lives(process) for process in set(self._processes))

    def listen(self) -> None:
        """Take in what was said so far."""
        while True:
            try:
                data, ancillary, _, _ = self._notify.recvmsg(4096, socket.CMSG_SPACE(4))
            except BlockingIOError:
                return
            fields = dict(line.split("=", 1) for line in data.decode().splitlines())
            fds = [fd for _, _, raw in ancillary for fd in array.array("i", raw)]
            if "FDSTORE" in fields and self._with_store:
                self._drop(fields["FDNAME"])
                self.stored[fields["FDNAME"]] = fds.pop()
            elif "FDSTOREREMOVE" in fields:
                self._drop(fields["FDNAME"])
            for fd in fds:
                os.close(fd)
            self.heard += data.decode().splitlines()

    def close(self) -> None:
        """End everything, by pid. May follow a start that failed."""
        self._processes += self.processes() if self.main is not None else []
        for process in set(self._processes):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        if self.main is not None:
            self.main.wait()
        deadline = time.monotonic() + 30
        while any(_lives(process) for process in set(self._processes)) and time.monotonic() < deadline:
            time.sleep(0.02)
        self.listen()
        for name in list(self.stored):
            self._drop(name)
        self._notify.close()

    def _is_ready(self) -> bool:
        assert self.main is not None
        assert self.main.poll() is None, f"ended with {self.main.returncode}:\n{self.log.read_text()[-4000:]}"
        self.listen()
        return "READY=1" in self.heard

    def _drop(self, name: str) -> None:
        if name in self.stored:
            os.close(self.stored.pop(name))


def _lives(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
