"""Delivery is tested on a whole data plane: see tests/engine/plane.py."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "engine"))

from delivery_rig import ScriptedChooser
from engine_fixtures import contexts, no_descriptor_leaks

__all__ = ["contexts", "no_descriptor_leaks"]


@pytest.fixture(autouse=True, params=["by-a-task", "at-once", "soon"])
def how_nodes_are_told(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every stream of a pool goes the same ways, whether its node is known when it opens, is told later, or a task waits for it."""
    monkeypatch.setattr(ScriptedChooser, "is_instant", request.param == "at-once")
    monkeypatch.setattr(ScriptedChooser, "is_soon", request.param == "soon")
