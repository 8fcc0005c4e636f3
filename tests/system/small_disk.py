"""A file system that is soon full."""

import shutil
import subprocess
from pathlib import Path


def can_mount() -> bool:
    """Whether there are private mount namespaces here."""
    if shutil.which("unshare") is None or shutil.which("nsenter") is None:
        return False
    done = subprocess.run(["unshare", "-Urm", "mount", "-t", "tmpfs", "tmpfs", "/mnt"], capture_output=True, check=False)
    return done.returncode == 0


class SmallDisk:
    """A file system of its own in a mount namespace of its own, which other processes can enter."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        directory.mkdir(mode=0o700)
        script = f"mount -t tmpfs -o size=512k,mode=700 tmpfs {directory} && echo ready && exec sleep 1000"
        self._holder = subprocess.Popen(["unshare", "-Urm", "sh", "-c", script], stdout=subprocess.PIPE, text=True)
        assert self._holder.stdout is not None
        assert self._holder.stdout.readline() == "ready\n"
        self.prefix = ("nsenter", "--preserve-credentials", "-U", "-m", "-t", str(self._holder.pid))

    def fill(self) -> None:
        """Until nothing can be written any more."""
        # SQLite keeps its journal file and writes over it, so the store would go on in the room it has: take that, too.
        filler, journal = self.directory / "filler", self.directory / "cluster.db-journal"
        # A relay may write just between the two; so it is done again.
        script = f"cat /dev/zero > {filler}; for n in 1 2 3; do : > {journal}; cat /dev/zero >> {filler}; sleep 0.4; done"
        subprocess.run([*self.prefix, "sh", "-c", script], capture_output=True, check=False)

    def free(self) -> None:
        """There is room again."""
        subprocess.run([*self.prefix, "rm", f"{self.directory}/filler"], check=True)

    def close(self) -> None:
        """Gone, with all that is on it."""
        self._holder.kill()
        self._holder.wait()
        assert self._holder.stdout is not None
        self._holder.stdout.close()
