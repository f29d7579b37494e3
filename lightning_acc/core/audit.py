"""The audit: does F, replayed over the record, give the recorded parameters?

An error is judged number by number. What round-off explains follows from how the update answers round-off in the gradient:
Adam answers with a step of the size of lr where a gradient is near 0, SGD with next to nothing. And errors too small to be
seen in any one number are seen where they all point the same way: along the parameters (another weight decay), or along the
steps (another learning rate).
"""

from __future__ import annotations

from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from lightning_acc.core.devices import CPU, recorded_on
from lightning_acc.core.modules.precision import rounded_to
from lightning_acc.core.optimizers import State
from lightning_acc.core.process import as_recorded
from lightning_acc.core.replay import Replay, explained
from lightning_acc.core.step import Step
from lightning_acc.errors import RunError
from lightning_acc.record.record import Record
from lightning_acc.record.schema.keys import DTYPES

IN_GRADIENT = 16
"""Round-off in a number of the gradient, in units of the last place of its largest number: what cancels is as large."""
ACROSS_DEVICES = 16
"""By so much more where the training was on another kind of device, which adds up in another order."""
IN_PARAMETER = 4
"""Round-off a step leaves in a parameter by itself, in units of its last place."""
IN_NARROW = {torch.bfloat16: 0.25, torch.float16: 0.25}
"""The part of both that is left in a narrow dtype: sums are taken in float32 and rounded once, at their end."""
SURE = 6.0
"""Standard deviations from which what all errors have in common is no chance."""
OF_A_STEP = 1e-4
"""A share of the steps that all errors may have in common: rounded weights make it, and no other learning rate."""
AT_ONCE = 2**20
"""Numbers that are looked at in float64 together: of large models all would take many times their memory."""
OF_AN_AVERAGE = 1e-2
"""A share of the way of an average that a callback's rounding, and a replay's, may make."""
DOUBT = 1e-5
"""A sweep that ends further from the recorded run's end, relative to the way that went, is looked into."""
EARLY = 8
"""Its own first steps are then held against the record, so many of them: until there round-off has not grown."""


_PASSED: WeakKeyDictionary[Record, AuditReport] = WeakKeyDictionary()
"""What the audit said of runs that are open here: it takes a training, and holds for every sweep through the run."""


@dataclass(frozen=True)
class AuditReport:
    """What the audit found; true in a condition exactly where the run passed.

    Attributes:
        ok: whether every step reproduced the recorded parameters within ``tolerance``.
        max_abs_error: largest difference of any parameter after any step; 0.0 is bit-exact.
        first_bad_step: the first step whose result was outside the tolerance, or None.
        n_steps: number of steps replayed.
        tolerance: largest absolute error that was let pass for any parameter; each has one of its own.
        apart: where the run was recorded and where it was replayed, in words, where these differ; the tolerance is larger then.
        drift: where no single error is beyond round-off, but all of them together are: what they have in common.
    """

    ok: bool
    max_abs_error: float
    first_bad_step: int | None
    n_steps: int
    tolerance: float
    drift: str | None = None
    apart: str | None = None

    def __bool__(self) -> bool:
        return self.ok

    def __str__(self) -> str:
        if self.ok:
            exact = "bit for bit" if self.max_abs_error == 0 else f"to {self.max_abs_error:.1e}"
            apart = f" ({self.apart}: round-off explains up to {self.tolerance:.1e})" if self.apart else ""
            return f"audit passed: {self.n_steps} steps reproduce the recorded parameters {exact}{apart}"
        what = self.drift or f"error {self.max_abs_error:.1e}, where round-off explains at most {self.tolerance:.1e}"
        what += f"; {self.apart}" if self.apart else ""
        return (
            f"audit FAILED: step {self.first_bad_step} of {self.n_steps} does not reproduce the recorded parameters ({what}): "
            "something outside the recorded step changed them, so no score of this run can be trusted"
        )


@explained
def audit(run: Record) -> AuditReport:
    """Replay every step from the recorded parameters before it and compare with the recorded parameters after it.

    The optimizer's slots are carried along by the replay. An error therefore points at the step that made it, or, where the
    parameters were not written at every step, at the one before the snapshot that shows it.
    """
    replay = Replay(run, device=recorded_on(run), as_trained=True)
    state = replay.initial
    recorded_there, apart = run.manifest.get("device", CPU.type), None
    if recorded_there != replay.device.type:
        apart = f"recorded on {recorded_there}, replayed on {replay.device.type}"
    elif _is_exact(replay):
        report = _PASSED[run] = AuditReport(True, 0.0, None, len(replay), 0.0)
        return report
    roundoff = RoundOff(replay.initial, _rounded(run, replay, apart is not None), apart is not None)
    common = _Common(replay.dtype)
    snapshots = set(run.snapshots)
    worst = tolerance = 0.0
    bad: int | None = None
    with as_recorded(run.manifest):
        before = state[0]
        for t in range(len(replay)):
            step = replay.step(t)
            gradient = step.gradient(state[0])
            roundoff.advance(step, state, gradient)
            state = step.update(state, gradient)
            if t + 1 not in snapshots:
                continue
            recorded = replay.placed(run.snapshot(t + 1))
            error = state[0] - recorded
            allowed = roundoff.allowed
            worst = max(worst, float(error.abs().max().nan_to_num(torch.inf)))
            tolerance = max(tolerance, float(allowed.max()))
            common.add(error, allowed, recorded - before, recorded, step.groups[0].get("lr", 1.0))
            if bad is None and not bool((error.abs() <= allowed).all()):
                bad = t
            if bad is None and common.found():
                bad = t
            state = (recorded, *state[1:])
            roundoff.restart(recorded)
            before = recorded
    drift = common.found() if worst <= tolerance else None
    report = AuditReport(bad is None, worst, bad, len(replay), tolerance, drift if bad is not None else None, apart)
    if report:
        _PASSED[run] = report
    return report


def _is_exact(replay: Replay) -> bool:
    """Whether a replay comes by all recorded parameters, bit for bit: then there is no round-off to tell from more, which
    costs as much as several steps."""
    run, state, snapshots = replay.run, replay.initial, set(replay.run.snapshots)
    with as_recorded(run.manifest):
        for t in range(len(replay)):
            state = replay.step(t)(state)
            if t + 1 in snapshots and not torch.equal(state[0], replay.placed(run.snapshot(t + 1))):
                return False
    return True


def _rounded(run: Record, replay: Replay, apart: bool) -> torch.dtype:
    """By whose rounding the gradients of training and replay may differ.

    Products in TF32, which has the ten bits of float16, round what they multiply: numbers that differ in their last place, as
    sums on a GPU do from one time to the next, are then apart by one of those bits.
    """
    whole = torch.float16 if run.manifest.get("tf32") else None
    if not apart:
        return whole or replay.rounded_to
    return rounded_to(run.manifest.get("precision", "32-true"), whole or DTYPES[run.dtype], True)


class RoundOff:
    """Tells for every parameter of a replay from ``state`` on which error round-off explains, in gradients of ``dtype``,
    which were computed ``apart``, on another kind of device, for parameters that are ``kept`` in a dtype of their own.

    That follows from the same updates on gradients that are moved by their round-off, up and down: Adam answers a gradient
    near 0, such as that of a key's bias in attention, which is 0 but for round-off, with a step of the size of lr.
    """

    def __init__(self, state: State, dtype: torch.dtype, apart: bool = False, kept: torch.dtype | None = None) -> None:
        kinds = (kept or state[0].dtype, dtype)
        of_parameter, of_gradient = (torch.finfo(kind).eps * IN_NARROW.get(kind, 1) for kind in kinds)
        self._in_parameter, self._in_gradient = IN_PARAMETER * of_parameter, IN_GRADIENT * of_gradient
        self._in_gradient *= ACROSS_DEVICES if apart else 1
        self._states = (state, state)
        self._response = torch.zeros_like(state[0])
        self._rounded = torch.zeros_like(state[0])

    def advance(self, step: Step, state: State, gradient: Tensor) -> None:
        """Take a step beside the replay, which is at ``state`` and has this gradient (p,)."""
        moved = self._in_gradient * gradient.abs().max()
        after = step.update(state, gradient)[0]
        up, down = (step.update(s, gradient + m) for s, m in zip(self._states, (moved, -moved), strict=True))
        self._states = up, down
        self._response = torch.maximum((up[0] - after).abs(), (down[0] - after).abs())
        # A parameter that comes near 0 keeps the round-off of what it was.
        self._rounded = self._rounded + self._in_parameter * torch.maximum(state[0].abs(), after.abs())

    @property
    def allowed(self) -> Tensor:
        """The error of each parameter (p,) that round-off explains since the start, or the last ``restart``."""
        return self._rounded + 2 * self._response

    def restart(self, theta: Tensor) -> None:
        """Go on from parameters (p,) that are known, with the slots as they are."""
        up, down = self._states
        self._states = (theta, *up[1:]), (theta, *down[1:])
        self._rounded = torch.zeros_like(theta)


class _Common:
    """What the errors of all numbers and steps have in common: ``error ~ a (its step) + b (lr * parameter)``, by least squares.

    The errors that round-off explains are taken for the standard deviations of the single errors, which they exceed.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self._normal = torch.zeros(2, 2, dtype=torch.float64)
        self._right = torch.zeros(2, dtype=torch.float64)
        self._eps = torch.finfo(dtype).eps

    def add(self, error: Tensor, allowed: Tensor, moved: Tensor, theta: Tensor, lr: float) -> None:
        """One comparison; all (p,)."""
        if not bool(error.any()) or not bool(torch.isfinite(error).all()):
            return
        for part in zip(*(one.split(AT_ONCE) for one in (error, allowed, moved, theta)), strict=True):
            error, allowed, moved, theta = (one.double() for one in part)
            weight = 1 / allowed.clamp_min(torch.finfo(torch.float64).tiny ** 0.5)
            columns = torch.stack([moved, lr * theta]) * weight
            self._normal += (columns @ columns.T).cpu()
            self._right += (columns @ (error * weight)).cpu()

    def found(self) -> str | None:
        """In words, what all errors have in common; None where it may be chance."""
        if not bool(self._normal.diagonal().all()):
            return None
        inverse = torch.linalg.pinv(self._normal, hermitian=True)
        (a, b), (sd_a, sd_b) = (inverse @ self._right).tolist(), inverse.diagonal().clamp_min(0).sqrt().tolist()
        if abs(a) > OF_A_STEP + SURE * sd_a:
            return f"all errors together are {abs(a):.2g} of the steps, as of another learning rate"
        if abs(b) > SURE * sd_b:
            return f"all errors together are {abs(b):.2g} lr of the parameters, as of another weight decay"
        return None


def confirm_average(replay: Replay, name: str, theta: Tensor) -> None:
    """See that the recorded average ``name`` is what its weights make of the parameters of a sweep, ``theta`` (p,).

    Raises:
        RunError: it is not, as where the rule that made it is not the one that was seen.
    """
    recorded = replay.placed(replay.run.averages[name]["theta"])
    way = float((recorded - replay.initial[0]).norm())
    rounding = OF_AN_AVERAGE * torch.finfo(replay.rounded_to).eps * float(recorded.norm())
    off = float((theta - recorded).norm())
    if not off <= OF_AN_AVERAGE * way + rounding:
        raise RunError(
            f"{replay.run.store}: The average {name!r} that a callback kept is not the sum of parameters that its weights make "
            f"(it is {100 * off / max(way, 1e-300):.2g} % of the way from the first parameters off), so no score read there "
            "can be trusted. Ask at='end' or at='along', or use an averaging function of its arguments alone."
        )


def confirm(replay: Replay, theta: Tensor, linear: bool = True) -> None:
    """See that a sweep, whose steps are ``linear``-ised or not, has gone the way of the recorded run, by its parameters
    ``theta`` (p,) at the step ``replay.checked_at``; in doubt, audit the run, and then the sweep's own first steps.

    Training may amplify round-off, so that a difference alone condemns nothing; a step that is not reproduced does.

    Raises:
        RunError: the record does not reproduce the training, or the sweep does not follow it.
    """
    run = replay.run
    first, last = (replay.placed(run.snapshot(t)) for t in (0, replay.checked_at))
    if replay.checked_at and float((theta - last).norm()) <= DOUBT * float((last - first).norm()):  # which NaN is not
        return
    report = _PASSED.get(run) or audit(run)
    if not report.ok:
        raise RunError(f"{run.store}: {report}.")
    lost = int((~torch.isfinite(theta)).sum())
    if lost:
        raise RunError(
            f"{run.store}: the replay ends in parameters that are not finite ({lost} of {theta.numel()}), though each recorded "
            "step by itself is reproduced: the training amplifies round-off beyond all bounds, so no score of this run can be "
            "trusted. Record it at a lower learning rate, or replay it in dtype='float64'."
        )
    elsewhere = _goes_elsewhere(replay, linear)
    if elsewhere:
        raise RunError(
            f"{run.store}: {elsewhere}, though the steps as trained do: the module computes something else there, so no score "
            "computed so can be trusted. Score it in the dtype and on the device of its training."
        )


def _goes_elsewhere(replay: Replay, linear: bool) -> str | None:
    """In words, where the first steps of a replay, taken as a sweep takes them, leave the record by more than round-off."""
    run, state = replay.run, replay.initial
    roundoff = RoundOff(state, _rounded(run, replay, True), apart=True, kept=DTYPES[run.dtype])
    for t in range(min(EARLY, len(replay))):
        step = replay.step(t)
        gradient = step.at(state).gradient if linear else step.gradient(state[0])
        roundoff.advance(step, state, gradient)
        state = step.update(state, gradient)
        if t + 1 in run.snapshots:
            recorded = replay.placed(run.snapshot(t + 1))
            error = (state[0] - recorded).abs()
            if not bool((error <= roundoff.allowed).all()):
                dtype = str(replay.dtype).removeprefix("torch.")
                return (
                    f"a sweep does not come by the recorded parameters at step {t + 1} of {len(replay)} in {dtype} on "
                    f"{replay.device.type} (error {float(error.max()):.1e})"
                )
            state = (recorded, *state[1:])
            roundoff.restart(recorded)
    return None
