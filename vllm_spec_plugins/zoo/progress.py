"""Tell a person how training goes; say little where nobody watches."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

logger = logging.getLogger(__name__)

#: Seconds between lines where no bar can be drawn.
_QUIET_INTERVAL = 30.0


@contextmanager
def training_progress(
    name: str, steps: int, console: Console | None = None
) -> Iterator[Callable[[int, float], None]]:
    """A bar with the time left, or a log line now and then where nobody sees a bar.

    Args:
        name: Of the model.
        steps: In all.
        console: Where to draw; stderr by default.

    Yields:
        To be called with the number of steps done and the last loss.
    """
    console = console or Console(stderr=True)
    if not console.is_terminal:
        yield _logged(name, steps)
        return
    columns = (
        TextColumn("training [bold]{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[loss]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as bars:
        task = bars.add_task(name, total=steps, loss="")
        yield lambda done, loss: bars.update(task, completed=done, loss=f"loss {loss:.2f}")


def _logged(name: str, steps: int) -> Callable[[int, float], None]:
    last = time.monotonic()

    def log(done: int, loss: float) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= _QUIET_INTERVAL:
            last = now
            logger.info("training %s: step %d of %d, loss %.2f", name, done, steps, loss)

    return log
