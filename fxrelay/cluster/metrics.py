"""Task: measures what administrators want measured, beside publishing: a slow metric delays no update, only itself.

Executables are bounded in time, output and priority and see little of the relay's environment. Python functions run as such, in a process
of their own for each measuring: in a thread of the relay one that hangs could not be ended, and one that computes would hold up streams.
"""

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import trio

from fxrelay.cluster.machine import KEPT_PERIODS
from fxrelay.cluster.plain_json import size_of
from fxrelay.cluster.programs import ProgramBounds, json_from_function, json_of, one_line, why_not_run
from fxrelay.cluster.server import MAX_METRICS_BYTES
from fxtunnel.errors import ScriptError
from fxtunnel.model import is_name

logger = logging.getLogger(__name__)

MAX_METRICS: Final = 64
AT_ONCE: Final = 4
MAX_ERRORS_BYTES: Final = 4_096


@dataclass(slots=True)
class _Metric:
    """The last good value, when that was, and why there is no newer one."""

    value: Any = None
    good_at: float = float("-inf")
    error: str = ""


class Metrics:
    """Measures. `run` it once; `fields` may be called at any time."""

    def __init__(
        self, directory: Path, functions: Mapping[str, str], period_s: float, bounds: ProgramBounds, environ: Mapping[str, str]
    ) -> None:
        self._directory = directory
        self._functions = dict(sorted(functions.items()))
        self._period_s = period_s
        self._bounds = bounds
        self._environ = environ
        self._known: dict[str, _Metric] = {}
        self._at_once = trio.CapacityLimiter(AT_ONCE)
        self._warnings: frozenset[str] = frozenset()

    async def run(self) -> None:
        """Measure every period until cancelled; programs that run then are killed."""
        while True:
            began = trio.current_time()
            await self.measure_once()
            await trio.sleep(max(began + self._period_s - trio.current_time(), self._period_s / 10))

    async def measure_once(self) -> None:
        """Every metric once, a few at a time."""
        programs, warnings = await trio.to_thread.run_sync(_find_programs, self._directory, frozenset(self._functions))
        for warning in sorted(warnings - self._warnings):
            logger.warning("%s", warning)
        self._warnings = warnings
        for gone in [name for name in self._known if name not in programs and name not in self._functions]:
            del self._known[gone]
        async with trio.open_nursery() as nursery:
            for name, function in self._functions.items():
                nursery.start_soon(self._measure, name, function)
            for name, path in programs.items():
                nursery.start_soon(self._measure, name, path)

    def fields(self) -> dict[str, Any]:
        """The fields `metrics`, `metricErrors` and `metricAges` (seconds, of values that are not from the last measuring)."""
        now = trio.current_time()
        values: dict[str, Any] = {}
        errors: dict[str, str] = {}
        ages: dict[str, float] = {}
        left = MAX_METRICS_BYTES - 2
        for name, metric in sorted(self._known.items()):
            age_s = now - metric.good_at
            value, error = metric.value, metric.error
            if error and age_s > KEPT_PERIODS * self._period_s:
                value = None
            size = size_of({name: value})
            if size > left - _reserved_bytes(self._known, name):
                value, error = None, f"does not fit: all metrics together may take {MAX_METRICS_BYTES} bytes"
                size = size_of({name: None})
            elif error and value is not None:
                ages[name] = round(age_s, 1)
            left -= size
            values[name] = value
            if error and size_of({**errors, name: error}) <= MAX_ERRORS_BYTES:
                errors[name] = error
        return {"metrics": values, "metricErrors": errors, **({"metricAges": ages} if ages else {})}

    async def _measure(self, name: str, source: str | Path) -> None:
        metric = self._known.setdefault(name, _Metric())
        how = (self._bounds, self._environ)
        try:
            async with self._at_once:
                ask = json_from_function(source, *how) if isinstance(source, str) else json_of(source, *how)
                metric.value = await ask
            metric.good_at = trio.current_time()
            metric.error = ""
        except ScriptError as exc:
            if exc.message != metric.error:
                logger.warning("metric %s: %s", name, exc.message)
            metric.error = exc.message
        except Exception as exc:  # one metric ends neither the others nor the relay
            logger.exception("metric %s", name)
            metric.error = one_line(f"{type(exc).__name__}: {exc}")


def _reserved_bytes(known: Mapping[str, _Metric], before: str) -> int:
    """What the metrics that come later need at least: each its name and `null`."""
    return sum(len(name) + len('"": null, ') for name in known if name > before)


def _find_programs(directory: Path, taken: frozenset[str]) -> tuple[dict[str, Path], frozenset[str]]:
    """The executables by metric name, in order, and what is wrong with the other files."""
    programs: dict[str, Path] = {}
    warnings: set[str] = set()
    try:
        paths = sorted(path for path in directory.iterdir() if not path.name.startswith("."))
    except FileNotFoundError:
        return programs, frozenset()
    except OSError as exc:
        return programs, frozenset({f"{directory}: no metrics: {exc.strerror or exc}"})
    for path in paths:
        if not os.path.lexists(path) or path.is_dir():
            continue
        name = path.stem
        why_not = why_not_run(path)
        if not why_not and not is_name(name):
            why_not = "its name is no metric's name: 1 to 64 of the characters A-Z a-z 0-9 . _ -"
        if not why_not and (name in programs or name in taken):
            why_not = f"there is another metric {name}"
        if not why_not and len(programs) + len(taken) >= MAX_METRICS:
            why_not = f"there are {MAX_METRICS} metrics already"
        if why_not:
            warnings.add(f"{path} is skipped: {why_not}")
        else:
            programs[name] = path
    return programs, frozenset(warnings)
