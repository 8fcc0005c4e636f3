"""The rigs of the parts that are hurt here: see the folders named below."""

import sys
from pathlib import Path

for folder in ("admitting", "cluster", "delivery", "engine", "tunnels", "uplink", "web"):
    sys.path.insert(0, str(Path(__file__).parents[1] / folder))

from engine_fixtures import contexts, no_descriptor_leaks  # noqa: E402 - a path comes first

__all__ = ["contexts", "no_descriptor_leaks"]
