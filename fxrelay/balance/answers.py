"""Pure: what a script process answers: `{"kind": "value", "value"}`, `{"kind": "output", "text"}`, or a failure."""

from typing import Any

Answer = dict[str, Any]


def failed(name: str, message: str, detail: str = "") -> Answer:
    """The answer of a script that did not work. `detail` is for the log only."""
    return {"kind": "failed", "name": name, "message": message, "detail": detail}


def refused(name: str, message: str, detail: str = "") -> Answer:
    """The answer of a script that ran without error and refused the request."""
    return failed(name, message, detail) | {"kind": "refused"}
