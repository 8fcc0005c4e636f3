"""Wall clocks that jump, one for each daemon."""

from pathlib import Path

LIBRARY = next(iter(Path("/usr/lib").glob("*/faketime/libfaketime.so.1")), None)
"""None: libfaketime is not installed."""


class Clock:
    """The wall clock of one daemon."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.step(0)
        self.env = {
            "LD_PRELOAD": str(LIBRARY),
            "FAKETIME_TIMESTAMP_FILE": str(path),
            "FAKETIME_NO_CACHE": "1",
            "FAKETIME_DONT_FAKE_MONOTONIC": "1",
            "DONT_FAKE_MONOTONIC": "1",
            "FXGATEWAY__SANDBOX__MODE": "off",  # the library opens the file below again and again
        }

    def step(self, offset_s: int) -> None:
        """Right plus this."""
        fresh = self._path.with_suffix(".new")
        fresh.write_text(f"{offset_s:+d}\n")
        fresh.replace(self._path)
