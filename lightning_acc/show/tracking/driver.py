"""Progress of a long computation as a W&B run that stays open until the results are in it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cached_property
from typing import Any

from lightning_acc.extras import required
from lightning_acc.record.record import Record
from lightning_acc.show.tracking.connection import start

SECONDS_BETWEEN_LOGS = 2.0


class Live:
    """One W&B run that is told how far the work is, and begins with the first that it is told.

    Args:
        begin: opens the W&B run.
    """

    def __init__(self, begin: Callable[[], Any]) -> None:
        self._begin = begin
        self._logged = float("-inf")
        self._done = False

    @cached_property
    def tracked(self) -> Any:
        """The W&B run, which is open from now on."""
        return self._begin()

    def update(self, fraction: float, rate: float | None = None, seconds_left: float | None = None) -> None:
        """Log the progress, at most every two seconds, and at the end.

        Args:
            fraction: how much of the work is done, from 0 to 1.
            rate: pieces of work done a second.
            seconds_left: until the work is done.
        """
        now = time.monotonic()
        ended = fraction >= 1 and not self._done
        if now - self._logged < SECONDS_BETWEEN_LOGS and not ended:
            return
        self._logged, self._done = now, fraction >= 1
        figures = {"fraction": fraction, "rate": rate, "seconds_left": seconds_left}
        self.tracked.log({f"progress/{name}": value for name, value in figures.items() if value is not None})


@contextmanager
def live(run: Record, job: str, project: str | None = None, directory: str | None = None, *, what: str = "") -> Iterator[Live]:
    """A W&B run that shows the progress of ``job``, and can be given the results before it ends.

    It is one run for both as a run that is offline cannot be resumed. What is refused before any work is done leaves none.

    Example::

        with live(run, "scoring") as shown:
            shown.update(0.5, rate=12.0, seconds_left=30.0)
            ...
            track(run, rows, into=shown)

    Args:
        run: the recorded run that is worked on.
        job: what is done: the job type of the W&B run.
        project: None takes that of the training's logger, else ``lightning-acc``.
        directory: where W&B keeps its files; None takes ``WANDB_DIR``, else the working directory.
        what: what else tells it from others of this job, such as the method; stands in its name.

    Raises:
        RequestError: W&B is not installed.
    """
    required({"wandb": ""})
    with ExitStack() as stack:
        yield Live(lambda: stack.enter_context(start(run, job, project, directory, what)))
