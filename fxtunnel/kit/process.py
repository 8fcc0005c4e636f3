"""Task: the process itself: its file limit, its garbage collector, its memory, the signals that end or reload it."""

import gc
import resource
import signal
from collections.abc import Callable
from typing import Final

import psutil
import trio

from fxtunnel.kit.notify import Notifier

GC_THRESHOLD: Final = (50_000, 20, 20)
"""The data plane makes no reference cycles; frequent collections would only cost latency."""


def raise_file_limit() -> int:
    """Lift the soft limit of open files to the hard one; returns what holds now."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard


def open_files() -> int:
    """How many descriptors this process holds."""
    return psutil.Process().num_fds()


def memory_bytes() -> int:
    """Resident memory of this process."""
    rss: int = psutil.Process().memory_info().rss
    return rss


def settle_memory() -> None:
    """Call once start-up is over: what exists now is never looked at by the collector again."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(*GC_THRESHOLD)


async def watch_signals(on_reload: Callable[[], None], on_stop: Callable[[], None], *, task_status: trio.TaskStatus[None]) -> None:
    """SIGHUP calls `on_reload`, SIGTERM and SIGINT call `on_stop`, until cancelled."""
    with trio.open_signal_receiver(signal.SIGHUP, signal.SIGTERM, signal.SIGINT) as signals:
        task_status.started()
        async for number in signals:
            if number == signal.SIGHUP:
                on_reload()
            else:
                on_stop()


async def feed_watchdog(notifier: Notifier) -> None:
    """Tell systemd's watchdog that the loop turns; returns at once if systemd did not ask."""
    interval_s = notifier.watchdog_interval_s
    while interval_s is not None:
        notifier.watchdog()
        await trio.sleep(interval_s / 2)
