"""The harness of the set-ups: each is trained as its users write it, recorded, and held against real retraining.

Retraining shares nothing with lightning_acc: it is Lightning's ``Trainer.fit`` once more, with the same seeds and the same
batches and without the recorder, of the module's subclass ``LeavesOut`` that writes the loss down by hand, where the samples
left out are multiplied by 0 and all denominators stay.
"""

from __future__ import annotations

import random
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.data import IterableDataset

import lightning_acc as la

SEED = 3
LEFT_OUT = (1, 6, 10)
"""Samples that are left out, one at a time; every set-up has at least 12 and sees all of them."""
EXACT = {"float64": 1e-9, "float32": 1e-5}
"""Largest error relative to the truth, beside what round-off does to two trainings that are the same on paper."""
SPREAD = 20.0
"""How many times the difference of two such trainings a third one may be off."""
USELESS = 1e-3
"""Round-off, relative to the truth, above which a number tells nothing."""


class LeavesOut(pl.LightningModule):
    """A training whose loss some samples are left out of, by hand; mixed into a set-up's module."""

    left_out: tuple[int, ...] = ()
    factor = 1.0
    """What the loss is multiplied with: where it is 1 but for its last places, the training is the same on paper."""
    rows: deque[list[int]]
    kept: Tensor

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.kept = torch.tensor([0.0 if i in self.left_out else 1.0 for i in self.ids(batch)], device=self.device)

    def ids(self, batch: Any) -> list[int]:
        """The samples of a batch: what its sampler said."""
        return self.rows.popleft()

    def mean(self, losses: Tensor, weights: Tensor | None = None) -> Tensor:
        """The mean of losses (B, ...), under weights of their shape, without the samples left out and over the same number."""
        weights = torch.ones_like(losses) if weights is None else weights.to(losses.dtype)
        kept = self.kept.to(losses.dtype).view(-1, *[1] * (losses.ndim - 1))
        return self.factor * (losses * weights * kept).sum() / weights.sum()


class Parameters(pl.Callback):
    """Keeps the parameters that were trained: callbacks that average weights put their own in their place at the end."""

    theta: Tensor

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self.theta = torch.cat([p.detach().double().reshape(-1) for p in pl_module.parameters() if p.requires_grad])


class Noted:
    """A sampler of batches that notes what it yields: loaders without workers make batches in that order."""

    def __init__(self, sampler: Any, rows: deque[list[int]]) -> None:
        self.sampler, self.rows = sampler, rows

    def __iter__(self) -> Iterator[Any]:
        self.rows.clear()
        for batch in self.sampler:
            self.rows.append(list(batch))
            yield batch

    def __len__(self) -> int:
        return len(self.sampler)


@dataclass(frozen=True)
class Setup:
    """A training as somebody has it.

    Attributes:
        has: what is particular about it.
        module: makes the LightningModule.
        train: makes the training loader.
        by_hand: the subclass of the module whose loss leaves samples out; None where the set-up is refused.
        validation: makes the validation loader, one batch long, or None.
        trainer: further arguments of the Trainer.
        recorder: further arguments of the recorder.
        logger: makes the logger, of a folder, where the module writes to it.
        callbacks: makes further callbacks.
        double: whether it can be trained in float64 too.
        at: when the validation loss is read: ``"ema"`` where Lightning validates the averaged weights.
        scores: whether the validation loss that Lightning logs is what ``query="val"`` reads: not where it is random, or
            normalised by running statistics that the training left.
        refused: what the recorder's refusal says, a regular expression.
        tolerance: largest error in float32, where it is another than round-off allows; ``has`` tells the reason.
    """

    has: str
    module: Callable[[], pl.LightningModule]
    train: Callable[[], Any]
    by_hand: Callable[[], LeavesOut] | None = None
    validation: Callable[[], Any] | None = None
    trainer: dict[str, Any] = field(default_factory=dict)
    recorder: dict[str, Any] = field(default_factory=dict)
    logger: Callable[[Path], Any] | None = None
    callbacks: Callable[[], list[Any]] = list
    double: bool = True
    at: str = "end"
    scores: bool = True
    refused: str | None = None
    tolerance: float | None = None


@dataclass(frozen=True)
class Trained:
    """What a training ended with: parameters (p,) in float64, and the validation loss that was logged, if any."""

    theta: Tensor
    loss: float


@dataclass(frozen=True)
class Outcome:
    """What recording gave, beside real retraining."""

    unchanged: bool
    audited: bool
    audit: str
    shift_error: float
    """Largest |shift - truth| / |truth| of the samples left out."""
    shift_roundoff: float
    """|theta' - theta| / |truth| of trainings without the recorder that are the same on paper.

    As written, by hand, and by hand with all losses times 1 and a few units in its last place: where a gradient is 0 but
    for round-off, as of a key's bias in attention, Adam answers with steps of the size of lr.
    """
    score_error: float
    """Largest error of a score, relative to the largest true score; 0 where scores are not compared."""
    score_roundoff: float

    def within(self, exact: float) -> bool:
        """Whether the errors are ``exact``, beside round-off; what round-off has drowned is not compared."""
        pairs = [(self.shift_error, self.shift_roundoff), (self.score_error, self.score_roundoff)]
        clear = [(error, roundoff) for error, roundoff in pairs if 0 < roundoff <= max(exact, USELESS)]
        return bool(clear) and all(error <= exact + SPREAD * roundoff for error, roundoff in clear)


def fit(setup: Setup, module: pl.LightningModule, dtype: str, folder: Path, *callbacks: Any) -> Trained:
    """Train as the set-up says, on from where the random numbers stand."""
    options: dict[str, Any] = {
        "max_epochs": 2,
        "logger": setup.logger(folder) if setup.logger else False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "accelerator": "cpu",
        "devices": 1,
        "num_sanity_val_steps": 0,
        **setup.trainer,
    }
    if dtype == "float64":
        options["precision"] = "64-true"
    loader = setup.train()
    if isinstance(module, LeavesOut) and not isinstance(loader.dataset, IterableDataset):
        module.rows = deque()
        object.__setattr__(loader, "batch_sampler", Noted(loader.batch_sampler, module.rows))
    trained = Parameters()
    trainer = pl.Trainer(callbacks=[trained, *setup.callbacks(), *callbacks], default_root_dir=folder, **options)
    with warnings_of_small_trainings():
        trainer.fit(module, loader, setup.validation() if setup.validation else None)
    return Trained(trained.theta, float(trainer.callback_metrics.get("val_loss", float("nan"))))


def seeded(make: Callable[[], Any]) -> Any:
    """What ``make`` makes after all random numbers have been set to their start."""
    random.seed(SEED)
    np.random.seed(SEED)
    torch.manual_seed(SEED)
    return make()


def record(setup: Setup, path: Path, dtype: str) -> tuple[Trained, pl.LightningModule]:
    """Train with the recorder, as the set-up's user does."""
    module = seeded(setup.module)
    recorder = la.TrajectoryRecorder(path, **setup.recorder)
    return fit(setup, module, dtype, path.parent, recorder), module


def retrain(setup: Setup, dtype: str, folder: Path, left_out: Sequence[int] = (), factor: float = 1.0) -> Trained:
    """Train without the recorder and without some samples."""
    assert setup.by_hand is not None
    module = seeded(setup.by_hand)
    module.left_out, module.factor = tuple(left_out), factor
    return fit(setup, module, dtype, folder)


def compare(setup: Setup, folder: Path, dtype: str) -> Outcome:
    """Record the set-up, audit the record, and hold its ``loo`` against retraining."""
    folder.mkdir(exist_ok=True)
    eps = torch.finfo(getattr(torch, dtype)).eps
    recorded, module = record(setup, folder / "run", dtype)
    run = la.Run(folder / "run", module=module)
    report = run.audit()

    plain = fit(setup, seeded(setup.module), dtype, folder)
    base = retrain(setup, dtype, folder)
    same = [plain, retrain(setup, dtype, folder, factor=1 + 4 * eps)]
    without = [retrain(setup, dtype, folder, [i]) for i in LEFT_OUT]
    truths = torch.stack([trained.theta - base.theta for trained in without])
    sizes = truths.norm(dim=1)
    assert bool((sizes > 0).all()), "a sample that is left out changes nothing: the set-up does not see it"
    apart = max(float((other.theta - base.theta).norm()) for other in same) + 0.1 * eps * float(base.theta.norm())

    scored = setup.scores and setup.validation is not None
    scores = loo(run, "val" if scored else _nothing_is_asked(), keep_shifts=True)
    assert scores.shifts is not None
    errors = (scores.shifts.double() - truths).norm(dim=1) / sizes
    score_error = score_roundoff = 0.0
    if scored:
        if setup.at != "end":
            scores = loo(run, "val", at=setup.at)
        expected = np.array([trained.loss - base.loss for trained in without])
        largest = float(np.abs(expected).max())
        score_error = float(np.abs(scores.values - expected).max()) / largest
        score_roundoff = (max(abs(other.loss - base.loss) for other in same) + eps * abs(base.loss)) / largest
    return Outcome(
        unchanged=torch.equal(recorded.theta, plain.theta),
        audited=report.ok,
        audit=str(report),
        shift_error=float(errors.max()),
        shift_roundoff=apart / float(sizes.min()),
        score_error=score_error,
        score_roundoff=score_roundoff,
    )


def loo(run: la.Run, query: str | la.Query, **options: Any) -> la.Scores:
    """The recorded run without each of the samples left out."""
    quiet: dict[str, Any] = {"ray_address": None, "check": 0, "save": False, "progress": False}
    return la.score(run, "loo", [[i] for i in LEFT_OUT], query, **quiet, **options)


def _nothing_is_asked() -> la.Query:
    """A query that reads no output of the module, for where only shifts are compared."""
    return la.Query("nothing", [torch.zeros(1)], _first_parameter)


def _first_parameter(module: torch.nn.Module, batch: Any) -> Tensor:
    return next(iter(module.parameters())).sum()


@contextmanager
def warnings_of_small_trainings() -> Iterator[None]:
    """In here nobody warns of what is small or slow on purpose."""
    with warnings.catch_warnings():
        for message in (
            ".*does not have many workers",
            ".*number of training batches",
            ".*isinstance.treespec, LeafSpec",
            "You defined a .validation_step. but have no",
            ".*cannot be built anew from its hyper-parameters",
            "Training has no validation data",
            ".*Skipping val loop",
        ):
            warnings.filterwarnings("ignore", message=message)
        yield
