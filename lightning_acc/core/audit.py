"""The audit: does F, replayed over the record, give the recorded parameters? (DESIGN section 2, fact 7)"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from lightning_acc.core.process import threads
from lightning_acc.core.replay import Replay
from lightning_acc.errors import RunError
from lightning_acc.record.record import Record

TOLERANCE = {"float32": 1e-6, "float64": 1e-12}
"""Largest error of one step, relative to the largest parameter, that still counts as round-off."""
DOUBT = 1e-5
"""A sweep that ends further from the recorded run's end, relative to the way that went, is looked into."""


@dataclass(frozen=True)
class AuditReport:
    """What the audit found; true in a condition exactly where the run passed.

    Attributes:
        ok: whether every step reproduced the recorded parameters within ``tolerance``.
        max_abs_error: largest difference of any parameter after any step; 0.0 is bit-exact.
        first_bad_step: the first step whose result was outside the tolerance, or None.
        n_steps: number of steps replayed.
        tolerance: largest absolute error that passes.
    """

    ok: bool
    max_abs_error: float
    first_bad_step: int | None
    n_steps: int
    tolerance: float

    def __bool__(self) -> bool:
        return self.ok

    def __str__(self) -> str:
        if self.ok:
            exact = "bit for bit" if self.max_abs_error == 0 else f"to {self.max_abs_error:.1e}"
            return f"audit passed: {self.n_steps} steps reproduce the recorded parameters {exact}"
        return (
            f"audit FAILED: step {self.first_bad_step} of {self.n_steps} does not reproduce the recorded parameters "
            f"(error {self.max_abs_error:.1e}, tolerance {self.tolerance:.1e}): something outside the recorded step changed "
            "them, so no score of this run can be trusted"
        )


def audit(run: Record) -> AuditReport:
    """Replay every step from the recorded parameters before it and compare with the recorded parameters after it.

    The optimizer's slots are carried along by the replay. An error therefore points at the step that made it, or, where the
    parameters were not written at every step, at the one before the snapshot that shows it.
    """
    replay = Replay(run)
    state = replay.initial
    scale = 0.0
    errors: dict[int, float] = {}
    snapshots = set(run.snapshots)
    with threads(run.manifest["threads"]):
        for t in range(len(replay)):
            state = replay.step(t)(state)
            if t + 1 not in snapshots:
                continue
            recorded = run.snapshot(t + 1).to(replay.dtype)
            errors[t] = float((state[0] - recorded).abs().max())
            scale = max(scale, float(recorded.abs().max()))
            state = (recorded, *state[1:])
    worst = max(errors.values(), default=0.0)
    tolerance = TOLERANCE[run.dtype] * max(scale, 1e-30)
    bad = next((t for t, error in errors.items() if not error <= tolerance), None)
    return AuditReport(bad is None, worst, bad, len(replay), tolerance)


def confirm(replay: Replay, theta: Tensor) -> None:
    """See that a sweep has come to the end of the recorded run, at parameters ``theta`` (p,); in doubt, audit the run.

    Training may amplify round-off, so that a difference alone condemns nothing; a step that is not reproduced does.

    Raises:
        RunError: the record does not reproduce the training.
    """
    run = replay.run
    if len(replay) not in run.snapshots:  # interrupted within its last step
        return
    first, last = (run.snapshot(t).to(replay.dtype) for t in (0, len(replay)))
    if float((theta - last).norm()) <= DOUBT * float((last - first).norm()):
        return
    report = audit(run)
    if not report.ok:
        raise RunError(f"{run.store}: {report}.")
