"""``TrajectoryRecorder``: the callback that writes a run directory while Lightning trains."""

from __future__ import annotations

import os
import time
import warnings
from typing import Any, Literal

import torch
from torch import Tensor

try:
    from pytorch_lightning import Callback
except ModuleNotFoundError:  # the same library under its other name; its Callback has the same hooks
    from lightning.pytorch import Callback  # type: ignore[no-redef]

from lightning_acc.core import rebuild
from lightning_acc.core.objective import AUTOCAST, Objective
from lightning_acc.core.step import Batch, Step
from lightning_acc.errors import RunError
from lightning_acc.record import batches
from lightning_acc.record import manifest as manifests
from lightning_acc.record.store import Store
from lightning_acc.record.writer import RunWriter, check_finite
from lightning_acc.recorder import decomposition, description, ranks, refusals, resume
from lightning_acc.recorder.checks import Checks
from lightning_acc.recorder.loader import SampleTap
from lightning_acc.recorder.optimizer import TrainedOptimizer
from lightning_acc.recorder.ranks import SeenBatch
from lightning_acc.recorder.refusals import RecordingRefused, refuse_if
from lightning_acc.recorder.resume import Place
from lightning_acc.recorder.snapshots import Snapshots


class TrajectoryRecorder(Callback):
    """Records what every optimizer step saw, so that influence can be computed afterwards.

    Training itself is not changed: the final weights are bitwise those of a run without the callback. What cannot be
    recorded exactly is refused before training starts.

    Supported: one process or several (``ddp``, ``ddp_fork``, ``ddp_spawn``), automatic optimisation, ``torch.optim`` SGD,
    Adam and AdamW with parameter groups (others by ``register_optimizer``) under any learning-rate scheduler, gradient
    accumulation and clipping, map-style datasets under any sampler, dropout and ``bf16-mixed`` precision in modules with
    ``per_sample_loss``, resuming from a Lightning checkpoint (``trainer.fit(..., ckpt_path=...)``).

    Example::

        recorder = TrajectoryRecorder("runs/adult")
        Trainer(callbacks=[recorder], ...).fit(model, datamodule=dm)

    Args:
        directory: where the run directory is written, a local path or an fsspec URL.
        overwrite: replace a run that is already there; by default it is refused.
        parameters: how often the parameters are written: ``"every-step"``, ``"every-k"`` (as often as the budget allows), or
            ``"auto"``: every step where the whole trajectory is small, else as often as 2 % of the training's time pays for.
            What is not written is computed again when it is needed.
        budget_gb: disk for the parameters, under ``every-k`` and ``auto``.
        batch_norm: what to do about batch normalisation in training mode, which couples the samples of a batch.
            ``"keep-batch-statistics"``: a removed sample leaves the loss, but stays in the batches, and so in the statistics
            its batches are normalised with; queries read the running statistics the recorded training ended with.
        allow_untested: record under a strategy other than those named above; the first steps are still checked.

    Raises:
        RecordingRefused: in ``setup`` or before the first step, naming the cause and the remedy.
        RunError: while training, when the parameters are not finite any more or the disk is full.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        overwrite: bool = False,
        parameters: Literal["auto", "every-step", "every-k"] = "auto",
        budget_gb: float = 4.0,
        batch_norm: Literal["refuse", "keep-batch-statistics"] = "refuse",
        allow_untested: bool = False,
    ) -> None:
        self.directory = os.fspath(directory)
        self.overwrite = overwrite
        self.parameters = parameters
        self.budget_gb = budget_gb
        self.batch_norm = batch_norm
        self.allow_untested = allow_untested

    # ---- before training

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Refuse what cannot be recorded; tap the training loader."""
        if stage != "fit":
            return
        refuse_if(refusals.trainer_refusal(trainer, pl_module, self.allow_untested))
        self._processes = trainer.world_size
        store = Store(self.directory)
        self._main = RunWriter(store) if trainer.is_global_zero else None
        """The run as it will be read: parameters, queries and, at last, the steps; rank 0 alone writes it."""
        if self._processes == 1 and self._main is not None:
            self._own = self._main
            """The steps this process takes."""
        else:
            self._own = RunWriter(ranks.part_of(store, trainer.global_rank))
        self._begun = False
        self._place: Place | None = None
        """Where the record goes on, in a training that is resumed."""
        self._left_open = False
        """Whether that record is unfinished and nothing has been added to it yet."""
        self._pending: dict[str, Any] | None = None
        self._seen: list[SeenBatch] = []
        self._structure: batches.Structure = {}
        self._tap = SampleTap()
        self._tap.install(trainer)

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """See which record the checkpoint belongs to."""
        self._place = Place.load(checkpoint)

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Decide what becomes of a run that is already in the directory."""
        store = Store(self.directory)
        if not store.exists(manifests.NAME):
            if store.exists() and store.names("parameters"):
                raise RecordingRefused(f"{store} holds files of another kind: choose another directory.")
            if self._place is not None:
                refuse_if(f"the checkpoint continues the record {self._place.run_id}, which is not in {store}")
        elif self._place is not None:
            self._left_open = resume.take_up(store, self._place, self._main, self._own, self._processes)
        elif not self.overwrite:
            raise RecordingRefused(
                f"{store} already holds a run: choose another directory, delete it, pass overwrite=True, or resume it with "
                "trainer.fit(..., ckpt_path=...) from a checkpoint written beside it."
            )

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Give the trainer its own methods back."""
        if stage == "fit" and hasattr(self, "_tap"):
            self._tap.remove()

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Look at what exists only now: optimizers, loaders, parameters."""
        refuse_if(refusals.optimizer_refusal(trainer, resumed=self._place is not None))
        if self._tap.loaders != 1:
            refuse_if(f"there are {self._tap.loaders} training loaders: train from exactly one DataLoader")
        self._optimizer = TrainedOptimizer(trainer, pl_module)
        if self._place is not None:
            self._optimizer.with_gradient = self._place.with_gradient
        if self._place is not None and resume.fingerprint(self._optimizer.state()) != self._place.state:
            refuse_if(
                f"the parameters or the optimizer's state are not those the record has after step {self._place.n_steps}: "
                "resume from the checkpoint as it was written"
            )
        self._snapshots = Snapshots(
            self.parameters, self._optimizer.parameter_bytes, trainer.estimated_stepping_batches, self.budget_gb * 2**30
        )
        refuse_if(self._snapshots.no_room(Store(self.directory)))
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
                f"The batch of step {self._own.n_steps} is built otherwise than the first one: "
                f"{batches.first_difference(self._structure, structure)}."
            )
        self._structure = structure
        leaves = {name: leaf.detach().cpu() for name, leaf in leaves.items()}
        if not self._begun:
            self._foreign = refusals.foreign_random_state()
        self._seen.append(SeenBatch(ids, self._own.content_ids(leaves), leaves, torch.get_rng_state()))

    def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
        """The batch has a gradient now; see whether its forward pass drew random numbers."""
        if not self._begun and self._foreign != refusals.foreign_random_state():
            refuse_if(
                "training_step draws random numbers from Python, NumPy or the GPU, which are not recorded: draw them with "
                "torch on the CPU or in the data set, or switch dropout off on a GPU"
            )
        batch = self._seen[-1]
        batch.counts = True
        batch.random = not torch.equal(batch.rng, torch.get_rng_state())

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        """Keep the parameters and hyper-parameters of the step; check the first ones, and some later, against F."""
        if not self._optimizer.has_gradient():
            self._seen = []  # training_step returned None: torch.optim leaves everything as it is
            return
        # A batch whose training_step returned None has no part in the step.
        self._seen = [batch for batch in self._seen if batch.counts]
        number = self._own.n_steps
        groups = self._optimizer.hyperparameters(number)
        if not self._begun:
            self._checks = Checks(pl_module, self._processes, number, self._optimizer.state())
        size = sum(len(batch.ids) for batch in self._seen)
        compare = self._checks.due(number, size, trainer.current_epoch, trainer.is_last_batch)
        taken = self._main is not None and number in self._main.snapshots  # by what this training resumes
        keep = not taken and (not self._begun or self._snapshots.due(number))
        if compare or keep or self._checks.followed is not None:
            started = time.perf_counter()
            theta = self._optimizer.parameters()
            self._checks.parameters(number, theta, pl_module)
            if compare:
                everyone = ranks.gather(self._seen, self._processes)
                if not self._begun:
                    self._begin(trainer, pl_module, theta, groups, everyone)
                step = self._step(trainer, groups, everyone, self._summed)
                self._checks.gradient(number, self._optimizer.state(), step, self._optimizer.gradient(number))
            if keep and self._main is not None:
                self._main.add_state(number, theta)
                self._snapshots.taken(time.perf_counter() - started)
            else:
                check_finite(theta, number)  # as add_state does, so that all processes stop together
        self._pending = {
            "sample_ids": [sample for batch in self._seen for sample in batch.ids],
            "contents": [number for batch in self._seen for number in batch.contents],
            "weights": self._weights(trainer, self._seen, self._summed),
            "groups": groups,
            "sizes": [len(batch.ids) for batch in self._seen],
            "rng": [batch.rng if batch.random else None for batch in self._seen],
        }

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """The step is done."""
        if self._pending is not None:
            self._own.add_step(**self._pending)
            self._pending = None
            self._seen = []

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Write what is recorded so far, and into the checkpoint where that is."""
        if self._pending is not None or not self._own.n_steps:  # within a step, or before the first
            return
        if self._begun:
            self._own.checkpoint()
            if self._main is not None and self._main is not self._own:
                self._main.checkpoint()
        if self._main is not None:
            state = resume.fingerprint(self._optimizer.state())
            Place(self._main.header["run_id"], self._own.n_steps, state, self._optimizer.with_gradient).save(checkpoint)

    # ---- after training

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Write the final parameters and the manifest."""
        if not self._begun and not self._left_open:
            warnings.warn("No optimizer step was taken, so no run was recorded.", UserWarning, stacklevel=2)
            return
        self._finish(trainer, pl_module, stopped=None)

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        """Finish a record whose training was killed after its last step and has none left to take."""
        if self._left_open:
            self._finish(trainer, pl_module, stopped=None)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """After Ctrl-C the run of one process is kept up to its last whole step; after an error it stays unfinished."""
        interrupted = isinstance(exception, KeyboardInterrupt) and getattr(self, "_processes", 0) == 1
        if interrupted and self._begun and self._own.n_steps:
            self._finish(trainer, pl_module, stopped="interrupted")

    # ---- parts of the above

    def _weights(self, trainer: Any, seen: list[SeenBatch], summed: bool) -> list[float]:
        """Loss weights of the batches' samples.

        Gradients are averaged over processes and accumulated batches; the last group of an epoch may be incomplete, but is
        divided all the same.
        """
        parts = trainer.accumulate_grad_batches * self._processes
        return [weight for batch in seen for weight in [1 / parts if summed else 1 / (len(batch.ids) * parts)] * len(batch.ids)]

    def _step(self, trainer: Any, groups: list[dict[str, Any]], seen: list[SeenBatch], summed: bool) -> Step:
        return Step(
            self._objective,
            self._optimizer.update,
            [Batch(batch.leaves, batch.rng if batch.random else None) for batch in seen],
            torch.tensor([sample for batch in seen for sample in batch.ids]),
            torch.tensor(self._weights(trainer, seen, summed), dtype=torch.float64),
            groups,
        )

    def _begin(
        self, trainer: Any, pl_module: Any, theta: Tensor, groups: list[dict[str, Any]], everyone: list[SeenBatch]
    ) -> None:
        refuse_if(refusals.module_refusal(pl_module, self.batch_norm))
        evaluation_modules = [name for name, part in pl_module.named_modules() if name and not part.training]
        self._objective = Objective(
            pl_module,
            self._optimizer.layout,
            self._structure,
            evaluation_modules=evaluation_modules,
            dtype=theta.dtype,
            autocast=AUTOCAST[str(trainer.precision)],
        )
        try:
            gradient = self._optimizer.gradient(self._own.n_steps)
            mean, total = (self._step(trainer, groups, everyone, summed) for summed in (False, True))
            self._summed = decomposition.fits_better(total, mean, theta, gradient)
            tolerance = decomposition.GRADIENT_TOLERANCE[theta.dtype]
            decomposition.compare_gradients(total if self._summed else mean, theta, gradient, 0, tolerance)
            vectorised = decomposition.can_be_vectorised(mean, theta)
            first = everyone[0]
            if not hasattr(pl_module, "per_sample_loss"):
                decomposition.refuse_penalty(self._objective, theta, first.leaves)
            independent = decomposition.rows_are_independent(
                self._objective, theta, first.leaves, first.random or bool(refusals.batch_norms(pl_module))
            )
        except RunError as error:
            raise RecordingRefused(str(error)) from error
        header = {
            **description.header(trainer, pl_module, self._optimizer, theta.dtype),
            "n_samples": self._tap.n_samples,
            "evaluation_modules": evaluation_modules,
            "loss": {
                "source": "per_sample_loss" if hasattr(pl_module, "per_sample_loss") else "training_step",
                "reduction": "sum" if self._summed else "mean",
                "independent_rows": independent,
                "vectorised": vectorised,
                "batch_norm": self.batch_norm if refusals.batch_norms(pl_module) else None,
            },
            "batch_structure": self._structure,
        }
        self._begun = True
        if self._place is not None:
            resume.go_on(self._main, self._own, header)
            self._left_open = False
            rebuild.LIVE[self._place.run_id] = pl_module
            return
        if self._own is not self._main:
            self._own.store.remove()
            self._own.begin({"batch_structure": self._structure})
        if self._main is None:
            return
        if self.overwrite:
            self._main.store.remove(*manifests.RUN_FILES)
        self._main.begin(header)
        rebuild.LIVE[self._main.header["run_id"]] = pl_module
        description.write_frozen(self._main, pl_module)
        description.write_sample_info(self._main, trainer)
        description.write_queries(self._main.store, trainer)

    def _finish(self, trainer: Any, pl_module: Any, stopped: str | None) -> None:
        last_known = self._begun and self._pending is None
        self._begun = self._left_open = False
        if self._own is not self._main:
            self._own.finish()
            trainer.strategy.barrier("recorded")
        if self._main is not None:
            # Interrupted within a step, the parameters may already be those after it: then they are left to be replayed.
            if last_known and self._own.n_steps not in self._main.snapshots:
                self._main.add_state(self._own.n_steps, self._optimizer.parameters())
            description.write_frozen(self._main, pl_module)  # again, for running statistics have moved
            if self._own is not self._main:
                ranks.merge(self._main, self._processes)
            self._main.finish(stopped=stopped)
        if self._own is not self._main:
            trainer.strategy.barrier("merged")
