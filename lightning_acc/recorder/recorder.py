"""``TrajectoryRecorder``: the callback that writes a run directory while Lightning trains."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import warnings
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any

import torch
from torch import Tensor

try:
    from pytorch_lightning import Callback
except ModuleNotFoundError:  # the same library under its other name; its Callback has the same hooks
    from lightning.pytorch import Callback  # type: ignore[no-redef]

from lightning_acc.errors import RunError
from lightning_acc.objective import Objective, ParameterLayout
from lightning_acc.optimizers import RULES, State, Update
from lightning_acc.recorder import decomposition, description, refusals
from lightning_acc.recorder.loader import SampleTap
from lightning_acc.recorder.refusals import RecordingRefused
from lightning_acc.step import Batch, Step
from lightning_acc.trajectory import batches, rebuild
from lightning_acc.trajectory import manifest as manifests
from lightning_acc.trajectory.batches import Leaves
from lightning_acc.trajectory.store import Store
from lightning_acc.trajectory.writer import RunWriter

CHECKED_STEPS = 3
"""Steps at the start whose gradient and update are compared with F before anything later is believed."""
CHECKED_BATCH_SIZES = 3


@dataclass
class SeenBatch:
    """A batch of the step in the making.

    Attributes:
        ids: its samples.
        contents: their numbers in the record.
        leaves: its tensors.
        rng: state of the random number generator before it.
        counts: whether it had a backward pass.
        random: whether its forward pass drew random numbers.
    """

    ids: list[int]
    contents: list[int]
    leaves: Leaves
    rng: Tensor
    counts: bool = False
    random: bool = False


class TrajectoryRecorder(Callback):
    """Records what every optimizer step saw, so that influence can be computed afterwards.

    Training itself is not changed: the final weights are bitwise those of a run without the callback. What cannot be
    recorded exactly is refused before training starts.

    Supported: one process, automatic optimisation, ``torch.optim`` SGD, Adam and AdamW with parameter groups (others by
    ``register_optimizer``) under any learning-rate scheduler, gradient accumulation and clipping, map-style datasets under
    any sampler, dropout in modules with ``per_sample_loss``.

    Example::

        recorder = TrajectoryRecorder("runs/adult")
        Trainer(callbacks=[recorder], ...).fit(model, datamodule=dm)

    Args:
        directory: where the run directory is written, a local path or an fsspec URL.
        overwrite: replace a run that is already there; by default it is refused.

    Raises:
        RecordingRefused: in ``setup`` or before the first step, naming the cause and the remedy.
        RunError: while training, when the parameters are not finite any more or the disk is full.
    """

    def __init__(self, directory: str | os.PathLike[str], overwrite: bool = False) -> None:
        self.directory = os.fspath(directory)
        self.overwrite = overwrite

    # ---- before training

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Refuse what cannot be recorded; tap the training loader."""
        if stage != "fit":
            return
        self._refuse_if(refusals.trainer_refusal(trainer, pl_module))
        store = Store(self.directory)
        if store.exists(manifests.NAME):
            if not self.overwrite:
                raise RecordingRefused(
                    f"{store} already holds a run: choose another directory, delete it, or pass overwrite=True."
                )
            store.remove()
        elif store.exists() and store.names("parameters"):
            raise RecordingRefused(f"{store} holds files of another kind: choose another directory.")
        self._writer = RunWriter(store)
        self._begun = False
        self._pending: dict[str, Any] | None = None
        self._seen: list[SeenBatch] = []
        self._with_gradient: list[bool] | None = None
        self._checked_sizes: set[int] = set()
        self._structure: batches.Structure = {}
        self._checked_theta = torch.empty(0)
        self._tap = SampleTap()
        self._tap.install(trainer)

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Give the trainer its own methods back."""
        if stage == "fit" and hasattr(self, "_tap"):
            self._tap.remove()

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Look at what exists only now: optimizers, loaders, parameters."""
        self._refuse_if(refusals.optimizer_refusal(trainer))
        if self._tap.loaders != 1:
            self._refuse_if(f"there are {self._tap.loaders} training loaders: train from exactly one DataLoader")
        optimizer = trainer.optimizers[0]
        group_of = {id(p): i for i, group in enumerate(optimizer.param_groups) for p in group["params"]}
        trained = [(name, p) for name, p in pl_module.named_parameters() if p.requires_grad and id(p) in group_of]
        dtypes = {p.dtype for _, p in trained}
        if len(dtypes) != 1 or not dtypes <= decomposition.GRADIENT_TOLERANCE.keys():
            self._refuse_if(f"the trained parameters are of dtype {sorted(map(str, dtypes))}: use all float32 or all float64")
        self._parameters = [p for _, p in trained]
        self._layout = ParameterLayout([(name, list(p.shape)) for name, p in trained])
        self._group_of = [group_of[id(p)] for p in self._parameters]
        self._rule = RULES[type(optimizer).__name__]
        self._update = Update(
            type(optimizer).__name__,
            self._layout,
            self._group_of,
            max(len(self._rule.slots(group)) for group in optimizer.param_groups),
        )
        self._expect_room(trainer)
        reason = rebuild.why_not_rebuildable(pl_module)
        if reason:
            warnings.warn(reason, UserWarning, stacklevel=2)

    # ---- while training

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Keep what the step will see."""
        ids = self._tap.next_ids()
        try:
            leaves, structure = batches.flatten(batch)
            size = batches.batch_size(leaves)
        except RunError as error:
            raise RecordingRefused(str(error)) from error
        if size != len(ids):
            raise RecordingRefused(
                f"The sampler gave {len(ids)} samples but the batch has {size} rows: the collate_fn must make one row "
                "a sample, in order."
            )
        if self._begun and structure != self._structure:
            raise RunError(
                f"The batch of step {self._writer.n_steps} is built otherwise than the first one: the loader must yield "
                "batches of one structure."
            )
        self._structure = structure
        leaves = {name: leaf.detach().cpu() for name, leaf in leaves.items()}
        self._seen.append(SeenBatch(ids, self._writer.content_ids(leaves), leaves, torch.get_rng_state()))

    def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
        """The batch has a gradient now; see whether its forward pass drew random numbers."""
        batch = self._seen[-1]
        batch.counts = True
        batch.random = not torch.equal(batch.rng, torch.get_rng_state())

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        """Keep the parameters and hyper-parameters of the step; check the first ones against F."""
        missing = [p for p in self._parameters if p.grad is None]
        if len(missing) == len(self._parameters):
            self._seen = []  # training_step returned None: torch.optim leaves everything as it is
            return
        # A batch whose training_step returned None has no part in the step.
        self._seen = [batch for batch in self._seen if batch.counts]
        groups = self._hyperparameters(trainer, optimizer)
        self._refuse_missing_gradients(pl_module, groups, missing)
        theta = self._theta()
        if not self._begun:
            self._begin(trainer, pl_module, theta, groups)
        step = self._step(trainer, groups, self._summed)
        self._check(step, theta, pl_module)
        self._writer.add_state(theta)
        self._pending = {
            "sample_ids": step.sample_ids.tolist(),
            "contents": [number for batch in self._seen for number in batch.contents],
            "weights": self._weights(trainer, self._summed),
            "groups": groups,
            "sizes": [len(batch.ids) for batch in self._seen],
            "rng": [batch.rng if batch.random else None for batch in self._seen],
        }

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """The step is done."""
        if self._pending is not None:
            self._writer.add_step(**self._pending)
            self._pending = None
            self._seen = []

    # ---- after training

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Write the final parameters and the manifest."""
        if not self._begun:
            warnings.warn("No optimizer step was taken, so no run was recorded.", UserWarning, stacklevel=2)
            return
        self._finish(stopped=None)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """After Ctrl-C the run up to the last whole step is kept; after an error it stays unfinished."""
        if getattr(self, "_begun", False) and isinstance(exception, KeyboardInterrupt) and self._writer.n_steps:
            self._finish(stopped="interrupted")

    # ---- parts of the above

    def _refuse_if(self, reason: str | None) -> None:
        if reason:
            raise RecordingRefused(f"TrajectoryRecorder cannot record this training: {reason}.")

    def _theta(self) -> Tensor:
        return torch.cat([p.detach().reshape(-1) for p in self._parameters]).cpu()

    def _gradient(self) -> Tensor:
        parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in self._parameters]
        gradient = torch.cat([part.detach().reshape(-1) for part in parts]).cpu()
        if not torch.isfinite(gradient).all():
            raise RunError(
                f"The loss or its gradient is not finite in step {self._writer.n_steps} of the training, so there is "
                "nothing to attribute: look for NaN or infinite values in the data, or lower the learning rate."
            )
        return gradient

    def _hyperparameters(self, trainer: Any, optimizer: Any) -> list[dict[str, Any]]:
        algorithm = trainer.gradient_clip_algorithm
        for_all = {
            "step": self._writer.n_steps + 1,
            "gradient_clip_val": trainer.gradient_clip_val,
            "gradient_clip_algorithm": str(getattr(algorithm, "value", algorithm or "norm")),
        }
        return [
            {**{key: _plain(group[key]) for key in self._rule.hyperparameters}, **for_all} for group in optimizer.param_groups
        ]

    def _weights(self, trainer: Any, summed: bool) -> list[float]:
        """Loss weights of the batches' samples. The last group of an epoch may be incomplete, but is divided all the same."""
        accumulated = trainer.accumulate_grad_batches
        return [
            weight
            for batch in self._seen
            for weight in [1 / accumulated if summed else 1 / (len(batch.ids) * accumulated)] * len(batch.ids)
        ]

    def _step(self, trainer: Any, groups: list[dict[str, Any]], summed: bool) -> Step:
        return Step(
            self._objective,
            self._update,
            [Batch(batch.leaves, batch.rng if batch.random else None) for batch in self._seen],
            torch.tensor([sample for batch in self._seen for sample in batch.ids]),
            torch.tensor(self._weights(trainer, summed), dtype=torch.float64),
            groups,
        )

    def _begin(self, trainer: Any, pl_module: Any, theta: Tensor, groups: list[dict[str, Any]]) -> None:
        self._refuse_if(refusals.module_refusal(pl_module))
        evaluation_modules = [name for name, part in pl_module.named_modules() if name and not part.training]
        self._objective = Objective(
            pl_module, self._layout, self._structure, evaluation_modules=evaluation_modules, dtype=theta.dtype
        )
        try:
            gradient = self._gradient()
            mean, total = (self._step(trainer, groups, summed) for summed in (False, True))
            self._summed = decomposition.fits_better(total, mean, theta, gradient)
            decomposition.compare_gradients(total if self._summed else mean, theta, gradient, 0)
            first = self._seen[0]
            if not hasattr(pl_module, "per_sample_loss"):
                decomposition.refuse_penalty(self._objective, theta, first.leaves)
            independent = decomposition.rows_are_independent(self._objective, theta, first.leaves, first.random)
        except RunError as error:
            raise RecordingRefused(str(error)) from error
        self._buffers = {name: value.detach().clone() for name, value in pl_module.named_buffers()}
        trained = {name for name, _ in self._layout.shapes}
        frozen = {name: value for name, value in pl_module.state_dict().items() if name not in trained}
        versions = {name: importlib.metadata.version(name) for name in ("lightning-acc", "torch")}
        optimizer = trainer.optimizers[0]
        self._writer.begin(
            {
                "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
                "packages": {**versions, "python": platform.python_version()},
                "world_size": trainer.world_size,
                "threads": torch.get_num_threads(),
                "dtype": str(theta.dtype).removeprefix("torch."),
                "n_samples": self._tap.n_samples,
                "layout": [[name, list(shape)] for name, shape in self._layout.shapes],
                "module": rebuild.describe(pl_module),
                "evaluation_modules": evaluation_modules,
                "loss": {
                    "source": "per_sample_loss" if hasattr(pl_module, "per_sample_loss") else "training_step",
                    "reduction": "sum" if self._summed else "mean",
                    "independent_rows": independent,
                },
                "optimizer": {
                    "name": type(optimizer).__name__,
                    "group_of": self._group_of,
                    "slots": self._update.slots,
                },
                "batch_structure": self._structure,
                "data": description.data(trainer),
                "logger": description.logger(trainer),
            }
        )
        self._begun = True
        description.write_frozen(self._writer, frozen)
        description.write_sample_info(self._writer, trainer)
        description.write_queries(self._writer.store, trainer)

    def _check(self, step: Step, theta: Tensor, module: Any) -> None:
        """Compare this step's gradient, and these parameters, with what F makes of the record so far."""
        number, size = self._writer.n_steps, len(step.sample_ids)
        if number == 0:
            self._replayed: State = self._update.initial(theta)
        elif number <= CHECKED_STEPS:
            tolerance = decomposition.GRADIENT_TOLERANCE[theta.dtype]
            moved = theta - self._checked_theta
            difference = decomposition.relative_difference(self._replayed[0] - self._checked_theta, moved)
            rounding = 8 * torch.finfo(theta.dtype).eps * float(theta.norm() / moved.norm().clamp_min(1e-30))
            if not difference <= tolerance + rounding:
                raise RecordingRefused(
                    f"Step {number - 1} moved the parameters otherwise than {type(self).__name__} understands the training: "
                    f"the recorded step gives a change that differs by {100 * difference:.2g} %. Something outside the "
                    "loss and the optimizer changes parameters or gradients (a hook, another callback): leave it out."
                )
            self._replayed = (theta, *self._replayed[1:])
        if number == 1:
            changed = [name for name, value in module.named_buffers() if not torch.equal(value, self._buffers.get(name, value))]
            self._refuse_if(f"the buffer {changed[0]!r} changes while training, and it is not known how" if changed else None)
        new_size = size not in self._checked_sizes and len(self._checked_sizes) < CHECKED_BATCH_SIZES
        if number < CHECKED_STEPS or new_size:
            self._checked_sizes.add(size)
            decomposition.compare_gradients(step, theta, self._gradient(), number)
        if number < CHECKED_STEPS:
            self._checked_theta = theta
            self._replayed = step(self._replayed)

    def _refuse_missing_gradients(self, module: Any, groups: list[dict[str, Any]], missing: list[Tensor]) -> None:
        # torch.optim skips a parameter without a gradient; F gives it a zero gradient. The two agree unless the parameter
        # would still move, by weight decay or by what its slots have gathered.
        present = [not any(parameter is other for other in missing) for parameter in self._parameters]
        before = self._with_gradient or present
        self._with_gradient = present
        names = {id(parameter): name for name, parameter in module.named_parameters()}
        for parameter, group, now, then in zip(self._parameters, self._group_of, present, before, strict=True):
            if (not now and groups[group].get("weight_decay")) or (now != then and self._rule.slots(groups[group])):
                raise RecordingRefused(
                    f"The parameter {names[id(parameter)]!r} gets no gradient in step {self._writer.n_steps - (now and 1)}, "
                    "but its optimizer has weight decay or a memory: freeze it with requires_grad_(False), or use it always."
                )

    def _expect_room(self, trainer: Any) -> None:
        free = self._writer.store.free_bytes()
        steps = trainer.estimated_stepping_batches
        if free is None or steps == float("inf"):
            return
        size = sum(p.numel() * p.element_size() for p in self._parameters)
        needed = size * (int(steps) + 1)
        if needed > free:
            self._refuse_if(
                f"the parameters of {int(steps)} steps take {needed / 2**30:.2f} GB, but {self._writer.store} has only "
                f"{free / 2**30:.2f} GB free: choose another disk, fewer steps or a smaller model"
            )

    def _finish(self, stopped: str | None) -> None:
        if self._writer.n_states == self._writer.n_steps:
            self._writer.add_state(self._theta())
        self._writer.finish(stopped=stopped)
        self._begun = False


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, Tensor) else value
