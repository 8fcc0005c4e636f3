"""Somebody who runs code in a gateway, and tries what there is to gain: as sitecustomize.py, at SIGUSR1."""

import json
import os
import signal
import socket
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fxtunnel.kit.landlock import ABI_SCOPES, supported_abi

ABI = supported_abi()
TOLD_S = 20.0

_TRIES = textwrap.dedent(
    """
    import ctypes, errno, json, os, platform, signal, socket, threading

    def call(number, *arguments):
        libc = ctypes.CDLL(None, use_errno=True)
        whole = [ctypes.c_long(each) if isinstance(each, int) else each for each in arguments]  # not 32 bits and what lay above them
        if libc.syscall(number, *whole) < 0:
            raise OSError(ctypes.get_errno(), "")

    def fast_open_of_many(address):
        number = {"x86_64": 307, "aarch64": 269}[platform.machine()]
        with socket.socket() as sock:
            call(number, sock.fileno(), None, 0, socket.MSG_FASTOPEN)

    def memory_of(pid):
        number = {"x86_64": 310, "aarch64": 270}[platform.machine()]  # process_vm_readv: EFAULT for who may
        one = (ctypes.c_size_t * 2)(4096, 1)
        call(number, pid, one, 1, one, 1, 0)

    def run(program):
        os.waitpid(os.posix_spawn(program, [program], {}), 0)

    def attempt(what):
        try:
            what()
        except OSError as exc:
            return errno.errorcode[exc.errno]
        return "done"

    def tries():
        address, path = ("127.0.0.1", int(os.environ["BURGLAR_PORT"])), os.environ["BURGLAR_SOCKET"]
        IP, STREAM, UDP = socket.AF_INET, socket.SOCK_STREAM, socket.SOCK_DGRAM
        return {
            "connect": attempt(lambda: socket.create_connection(address, 2).close()),
            "connect in a send": attempt(lambda: socket.socket().sendto(b"x", socket.MSG_FASTOPEN, address)),
            "connect in a message": attempt(lambda: socket.socket().sendmsg([b"x"], [], socket.MSG_FASTOPEN, address)),
            "connect in many messages": attempt(lambda: fast_open_of_many(address)),
            "multipath": attempt(lambda: socket.socket(IP, STREAM, 262).connect(address)),
            "SCTP": attempt(lambda: socket.socket(IP, STREAM, socket.IPPROTO_SCTP)),
            "UDP": attempt(lambda: socket.socket(IP, UDP).sendto(b"x", address)),
            "UDP, IPv6": attempt(lambda: socket.socket(socket.AF_INET6, UDP | socket.SOCK_NONBLOCK)),
            "raw": attempt(lambda: socket.socket(IP, socket.SOCK_RAW, socket.IPPROTO_ICMP)),
            "packets": attempt(lambda: socket.socket(socket.AF_PACKET, UDP)),
            "unix socket": attempt(lambda: socket.socket(socket.AF_UNIX).connect(path)),
            "unix datagram": attempt(lambda: socket.socket(socket.AF_UNIX, UDP).sendto(b"", path + ".datagrams")),
            "ring": attempt(lambda: call(425, 1, ctypes.create_string_buffer(256))),
            "read": attempt(lambda: open("/etc/passwd").close()),
            "read of another process": attempt(lambda: open(f"/proc/{os.getppid()}/environ").close()),
            "memory of another process": attempt(lambda: memory_of(os.getppid())),
            "list": attempt(lambda: os.listdir("/etc")),
            "write": attempt(lambda: open(os.environ["BURGLAR_FILE"], "w").close()),
            "run": attempt(lambda: run("/bin/true")),
            "signal": attempt(lambda: os.kill(os.getppid(), 0)),
            "bind": attempt(lambda: socket.socket().bind(("127.0.0.1", 0))),
            "read of itself": attempt(lambda: open("/proc/self/stat").close()),
        }

    def burgle(number, frame):
        found = {"main": tries()}
        def inside():
            found["thread"] = tries()
        thread = threading.Thread(target=inside)
        thread.start()
        thread.join()
        told = json.dumps(found).encode()
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM).sendto(told, os.environ["BURGLAR_SOCKET"] + ".datagrams")

    signal.signal(signal.SIGUSR1, burgle)
    """
)

CONNECTIONS = ("connect", "connect in a send", "connect in a message", "connect in many messages", "multipath", "SCTP")
SOCKETS = ("UDP", "UDP, IPv6", "raw", "packets", "unix socket", "ring")
OTHERS = {
    "read of another process": "EACCES",
    "memory of another process": "EPERM",
    "signal": "EPERM" if ABI >= ABI_SCOPES else "done",
}
FILES = ("read", "list", "write", "run")
LOST = dict.fromkeys((*CONNECTIONS, *SOCKETS, *FILES), "EACCES") | OTHERS
KEPT = {"bind": "done", "read of itself": "done", "unix datagram": "done"}


class Burglar:
    """Loot to be had on this machine, and whoever is in the processes that are started with `env`."""

    def __init__(self, env: dict[str, str], datagrams: socket.socket) -> None:
        self.env = env
        self._datagrams = datagrams

    def let_loose(self, pid: int) -> dict[str, dict[str, str]]:
        """What becomes of each attempt in that process: in its main thread, and in a new one."""
        os.kill(pid, signal.SIGUSR1)
        while not (told := self._datagrams.recv(65_536)):
            pass  # an attempt itself
        found: dict[str, dict[str, str]] = json.loads(told)
        return found


@contextmanager
def burglar_in(home: Path) -> Iterator[Burglar]:
    """For processes that are started meanwhile."""
    (home / "burglar").mkdir()
    (home / "burglar" / "sitecustomize.py").write_text(_TRIES)
    at = str(home / "burgled")
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        socket.create_server(at, family=socket.AF_UNIX),
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as datagrams,
    ):
        datagrams.bind(f"{at}.datagrams")
        datagrams.settimeout(TOLD_S)
        env = {
            "PYTHONPATH": os.pathsep.join([str(home / "burglar"), *filter(None, [os.environ.get("PYTHONPATH")])]),
            "BURGLAR_PORT": str(listener.getsockname()[1]),
            "BURGLAR_SOCKET": at,
            "BURGLAR_FILE": str(home / "left behind"),
        }
        yield Burglar(env, datagrams)
