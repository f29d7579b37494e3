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
from lightning_acc.errors import RunError
from lightning_acc.record import batches
from lightning_acc.record.writer import check_finite
from lightning_acc.recorder import ranks, resume
from lightning_acc.recorder.beginning import understand
from lightning_acc.recorder.checks import refusals, rows
from lightning_acc.recorder.checks.identity import Identity
from lightning_acc.recorder.checks.randomness import random_state_kept
from lightning_acc.recorder.checks.refusals import RecordingRefused, refuse_if
from lightning_acc.recorder.checks.steps import Checks
from lightning_acc.recorder.loader import SampleTap
from lightning_acc.recorder.optimizer import TrainedOptimizer
from lightning_acc.recorder.ranks import SeenBatch
from lightning_acc.recorder.resume import Place
from lightning_acc.recorder.snapshots import Snapshots
from lightning_acc.recorder.writers import Writers


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
        mixed_rows: what to do about rows of a batch that are made of several samples (mixup, cutmix) or are not in the order
            of its samples. ``"as-they-are"``: a row counts as the sample whose index led to it, and removing that sample
            takes the whole row out of the loss.
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
        mixed_rows: Literal["refuse", "as-they-are"] = "refuse",
    ) -> None:
        self.directory = os.fspath(directory)
        self.overwrite = overwrite
        self.parameters = parameters
        self.budget_gb = budget_gb
        self.batch_norm = batch_norm
        self.allow_untested = allow_untested
        self.mixed_rows = mixed_rows
        self._tap = SampleTap()
        self._writers: Writers | None = None
        self._begun = False

    # ---- before training

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Refuse what cannot be recorded; tap the training loader."""
        if stage != "fit":
            return
        refuse_if(refusals.trainer_refusal(trainer, pl_module, self.allow_untested))
        self._writers = Writers(self.directory, trainer)
        self._begun = False
        self._place: Place | None = None  # where the record goes on, in a training that is resumed
        self._left_open = False  # whether that record is unfinished and nothing has been added to it yet
        self._pending: dict[str, Any] | None = None
        self._seen: list[SeenBatch] = []
        self._structure: batches.Structure = {}
        self._tap = SampleTap(check_rows=self.mixed_rows != rows.AS_THEY_ARE)
        self._tap.install(trainer)
        self._identity = Identity() if trainer.reload_dataloaders_every_n_epochs else None

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """See which record the checkpoint belongs to."""
        self._place = Place.load(checkpoint)

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Take the directory; decide what becomes of a run that is already there."""
        self._left_open = self._write.claim(trainer, self._place, self.overwrite)

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Give the trainer its own methods back, and the directory free."""
        if stage == "fit":
            self._tap.remove()
            if self._writers is not None:
                self._writers.release()

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
        refuse_if(self._snapshots.no_room(self._write.store))
        with random_state_kept():  # making the module draws its first parameters
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
                f"The batch of step {self._write.own.n_steps} is built otherwise than the first one: "
                f"{batches.first_difference(self._structure, structure)}."
            )
        rows.refuse_transfer(trainer, self._tap.take_first())
        self._structure = structure
        leaves = {name: leaf.detach().cpu() for name, leaf in leaves.items()}
        contents = self._write.own.content_ids(leaves)
        if self._identity is not None:
            self._identity.check(self._tap.dataset, ids, contents)
        if not self._begun:
            self._foreign = refusals.foreign_random_state()
        self._seen.append(SeenBatch(ids, contents, leaves, torch.get_rng_state()))

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
        number = self._write.own.n_steps
        groups = self._optimizer.hyperparameters(number)
        self._look(trainer, pl_module, number, groups)
        self._pending = {
            "sample_ids": [sample for batch in self._seen for sample in batch.ids],
            "contents": [number for batch in self._seen for number in batch.contents],
            "weights": self._assembly.weights(self._seen),
            "groups": groups,
            "sizes": [len(batch.ids) for batch in self._seen],
            "rng": [batch.rng if batch.random else None for batch in self._seen],
        }

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """The step is done."""
        if self._pending is not None:
            self._write.own.add_step(**self._pending)
            self._pending = None
            self._seen = []

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Write what is recorded so far, and into the checkpoint where that is."""
        number = self._write.own.n_steps
        if self._pending is not None or not number:  # within a step, or before the first
            return
        if self._begun:
            self._write.checkpoint()
        if self._write.main is not None:
            state = resume.fingerprint(self._optimizer.state())
            Place(self._write.main.header["run_id"], number, state, self._optimizer.with_gradient).save(checkpoint)

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
        self._tap.remove()
        if self._writers is None:
            return
        try:
            interrupted = isinstance(exception, KeyboardInterrupt) and self._writers.processes == 1
            if interrupted and self._begun and self._writers.own.n_steps:
                self._finish(trainer, pl_module, stopped="interrupted")
        finally:
            self._writers.release()

    # ---- parts of the above

    @property
    def _write(self) -> Writers:
        assert self._writers is not None
        return self._writers

    def _look(self, trainer: Any, pl_module: Any, number: int, groups: list[dict[str, Any]]) -> None:
        """Keep and check what is due in step ``number``; the first one begins the record."""
        main = self._write.main
        if not self._begun:
            self._checks = Checks(pl_module, self._write.processes, number, self._optimizer.state())
        size = sum(len(batch.ids) for batch in self._seen)
        compare = self._checks.due(number, size, trainer.current_epoch, trainer.is_last_batch)
        taken = main is not None and number in main.snapshots  # by what this training resumes
        keep = not taken and (not self._begun or self._snapshots.due(number))
        if not (compare or keep or self._checks.followed is not None):
            return
        started = time.perf_counter()
        theta = self._optimizer.parameters()
        self._checks.parameters(number, theta, pl_module)
        if compare:
            with random_state_kept():
                self._compare(trainer, pl_module, number, groups, theta)
        if keep and main is not None:
            main.add_state(number, theta)
            self._snapshots.taken(time.perf_counter() - started)
        else:
            check_finite(theta, number)  # as add_state does, so that all processes stop together

    def _compare(self, trainer: Any, pl_module: Any, number: int, groups: list[dict[str, Any]], theta: Tensor) -> None:
        everyone = ranks.gather(self._seen, self._write.processes)
        if not self._begun:
            seen = (self._structure, theta, groups, everyone, number, self.batch_norm)
            self._assembly, header = understand(trainer, pl_module, self._optimizer, *seen)
            header["n_samples"] = self._tap.n_samples
            if self.mixed_rows == rows.AS_THEY_ARE:
                header["loss"]["mixed_rows"] = self.mixed_rows
            self._write.begin(trainer, pl_module, header, self._place, self.overwrite)
            self._begun, self._left_open = True, False
        step = self._assembly.step(groups, everyone)
        self._checks.gradient(number, self._optimizer.state(), step, self._optimizer.gradient(number))

    def _finish(self, trainer: Any, pl_module: Any, stopped: str | None) -> None:
        # Interrupted within a step, the parameters may already be those after it: then they are left to be replayed.
        known = self._begun and self._pending is None and self._write.main is not None
        self._begun = self._left_open = False
        self._write.finish(trainer, pl_module, self._optimizer.parameters() if known else None, stopped)
