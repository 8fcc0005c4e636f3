"""Task: a task that waits for a callback of its own thread, as those of the reactor are."""

import trio


class Waiter:
    """Where one task waits, again and again. Cheaper than a `trio.Event`, of which every wait needs a new one."""

    __slots__ = ("_task",)

    def __init__(self) -> None:
        self._task: trio.lowlevel.Task | None = None

    async def wait(self) -> None:
        """Wait for the next `wake`: an earlier one is not remembered. For one task at once; cancelling it is safe."""
        self._task = trio.lowlevel.current_task()
        await trio.lowlevel.wait_task_rescheduled(self._stop)

    def wake(self) -> None:
        """Let the task go on, if one waits."""
        task, self._task = self._task, None
        if task is not None:
            trio.lowlevel.reschedule(task)

    def _stop(self, _: object) -> trio.lowlevel.Abort:
        self._task = None
        return trio.lowlevel.Abort.SUCCEEDED
