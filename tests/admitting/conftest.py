"""Streams that are admitted are tested on a whole data plane: see tests/engine/plane.py."""

import sys
from pathlib import Path

for _room in ("cluster_store", "delivery", "engine"):
    sys.path.insert(0, str(Path(__file__).parents[1] / _room))

from engine_fixtures import contexts, no_descriptor_leaks  # noqa: E402

__all__ = ["contexts", "no_descriptor_leaks"]
