"""Task: the process of a Python metric, so that it can be killed: `python -m fxrelay.cluster.metric_main MODULE:FUNCTION`.

It prints the value as JSON. What the function prints itself goes to stderr, whose last line is the error if the function fails.
"""

import importlib
import json
import os
import sys


def main() -> None:
    """Call the function once."""
    answer = os.dup(1)
    os.dup2(2, 1)
    module, _, attribute = sys.argv[1].partition(":")
    try:
        text = json.dumps(getattr(importlib.import_module(module), attribute)())
    except (Exception, SystemExit) as exc:  # whatever the administrator's function does, this is how it is told
        message = " ".join(f"{type(exc).__name__}: {exc}".split())
        sys.stderr.write(f"\n{message}\n")
        sys.stderr.flush()
        os._exit(1)
    with os.fdopen(answer, "w") as stream:
        stream.write(text)
    os._exit(0)  # threads that the function left behind are not waited for


if __name__ == "__main__":
    main()
