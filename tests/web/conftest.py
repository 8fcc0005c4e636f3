"""HTTP connections are tested on a whole data plane: see tests/engine/plane.py."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "admitting"))
sys.path.insert(0, str(Path(__file__).parents[1] / "delivery"))
sys.path.insert(0, str(Path(__file__).parents[1] / "engine"))

from engine_fixtures import contexts, no_descriptor_leaks

__all__ = ["contexts", "no_descriptor_leaks"]
