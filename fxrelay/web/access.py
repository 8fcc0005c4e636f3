"""Task: the access log: one event for each request, with what people ask for when something was slow or refused."""

import logging
from dataclasses import dataclass

logger = logging.getLogger("fxrelay.access")


@dataclass(slots=True)
class RequestRecord:
    """One request, as far as it has come. Times are monotonic seconds. `why` is empty as long as nothing ended it early."""

    trace: str
    service: str
    client: str
    began: float
    method: str = ""
    host: str = ""
    path: str = ""
    status: int = 0
    node: str = ""
    way: str = ""
    bytes_in: int = 0
    bytes_out: int = 0
    first_byte_at: float = 0.0
    upgraded: bool = False
    why: str = ""
    user: str = ""
    """A ticket's."""

    def log(self, now: float) -> None:
        """Write the event, if the access log is on."""
        if not logger.isEnabledFor(logging.INFO):
            return
        fields = {
            "trace": self.trace,
            "service": self.service,
            "client": self.client,
            "user": self.user,
            "method": self.method,
            "host": self.host,
            "path": self.path,
            "status": self.status,
            "node": self.node,
            "way": self.way,
            "bytes_in": self.bytes_in,
            "bytes_out": self.bytes_out,
            "first_byte_ms": round((self.first_byte_at - self.began) * 1e3, 1) if self.first_byte_at else None,
            "duration_ms": round((now - self.began) * 1e3, 1),
            "upgraded": self.upgraded,
            "why": self.why,
            "audit": True,
        }
        logger.info("%s %s", self.method or "-", self.status or "-", extra=fields)
