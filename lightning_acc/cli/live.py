"""What a command tells W&B while it works, and of what it found."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from lightning_acc.progress import watched_by
from lightning_acc.record.record import Record


@contextmanager
def live(run: Record, job: str, what: str, wandb: bool) -> Iterator[None]:
    """In here W&B follows the progress, if ``wandb`` says so, in a run that is then given all results of ``run``.

    Args:
        run: the recorded run.
        job: the verb: the job type.
        what: what tells it from others, such as the method.
        wandb: whether.
    """
    if not wandb:
        yield
        return
    from lightning_acc.judge import agreement
    from lightning_acc.show import tracking

    with tracking.live(run, job, what=what) as shown, watched_by(shown.update):
        yield
        path = tracking.track(run, agreement.read(run), into=shown, over_time=0)
    print(f"W&B ({tracking.mode()}): {path}")
