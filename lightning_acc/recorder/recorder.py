"""``TrajectoryRecorder``: the callback that writes a run directory while Lightning trains."""

from __future__ import annotations

import contextlib
import os
import warnings
from typing import Any, Literal

try:
    from pytorch_lightning import Callback
except ModuleNotFoundError:  # the same library under its other name; its Callback has the same hooks
    from lightning.pytorch import Callback  # type: ignore[no-redef]

from lightning_acc import arguments
from lightning_acc.recorder.checkpoints.resume import Place
from lightning_acc.recorder.checkpoints.written import Checkpoints
from lightning_acc.recorder.checks import refusals, rows
from lightning_acc.recorder.checks.names import BatchNames, SampleId
from lightning_acc.recorder.checks.refusals import TRAINED_LATER, RecordingRefused, refuse_if
from lightning_acc.recorder.description import warn_if_not_rebuildable
from lightning_acc.recorder.ending import costs_no_training, in_words, warn_that_it_ended
from lightning_acc.recorder.following import Following
from lightning_acc.recorder.snapshots import POLICIES
from lightning_acc.recorder.taps import SampleTap
from lightning_acc.recorder.writers import Final, Writers


class TrajectoryRecorder(Callback):
    """Records what every optimizer step saw, so that influence can be computed afterwards.

    Training itself is not changed: the final weights are bitwise those of a run without the callback. What cannot be
    recorded exactly is refused before training starts.

    Supported: one process or several (``ddp``, ``ddp_fork``, ``ddp_spawn``), automatic optimisation, every optimizer of
    ``torch.optim`` but LBFGS and SparseAdam, and Lion, with parameter groups (others by ``register_optimizer``) under any
    learning-rate scheduler, gradient accumulation and clipping, map-style datasets under any sampler, streams whose
    batches hold ids of their samples (``sample_id``), weighted means, penalties, dropout, parameters that are frozen for a
    while or that not every step uses, every precision of torch's own (a step that a loss scaler leaves out is none),
    ``torch.compile``, resuming (``trainer.fit(..., ckpt_path=...)``), weight averaging (the trained weights are recorded,
    ``at="ema"`` reads the averaged ones), callbacks that look for a learning rate or a batch size, and callbacks and module
    hooks that leave gradients and weights alone, which is checked, and set numbers and texts in plain attributes of the
    module and its layers (an annealed weight, a rate of dropout), which are recorded as learning rates are.

    Of a ``WandbLogger`` the W&B run that has no group gets one, which the results are logged in as well.

    Example::

        recorder = TrajectoryRecorder("runs/adult")
        Trainer(callbacks=[recorder], ...).fit(model, datamodule=dm)

    Args:
        directory: where the run directory is written, a local path or an fsspec URL.
        sample_id: for streams: where a batch has the ids of its samples, integers or texts, one a row: a key, an attribute, a
            place in a tuple, or a function of the batch. ``run.sample_names`` has them; numbers go by the first sight.
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
        frozen: what to do about parameters that are frozen when training begins, or not yet given to the optimizer.
            ``"trained-later"``: they are recorded with the others, as they are going to be trained; so they are, unasked, under
            Lightning's ``BackboneFinetuning`` and other ``BaseFinetuning`` callbacks.
        on_error: what happens where the record cannot go on (the disk is full, the storage gone, a parameter not finite any
            more). ``"warn"``: it ends at its last whole step, and the training goes on. ``"stop"``: the training ends too,
            after what checkpoint it is writing.

    Raises:
        RecordingRefused: in ``setup`` or before the first step, naming the cause and the remedy; later, where the training
            turns out to be another one than its record would say.
        RunError: the directory cannot be written to when training begins.
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
        on_error: Literal["warn", "stop"] = "warn",
        sample_id: SampleId | None = None,
        frozen: Literal["left-out", "trained-later"] = "left-out",
    ) -> None:
        arguments.option("parameters", parameters, POLICIES)
        arguments.option("batch_norm", batch_norm, ("refuse", "keep-batch-statistics"))
        arguments.option("mixed_rows", mixed_rows, ("refuse", rows.AS_THEY_ARE))
        arguments.option("on_error", on_error, ("warn", "stop"))
        arguments.option("frozen", frozen, ("left-out", TRAINED_LATER))
        self.directory = arguments.path("directory", directory)
        self.overwrite, self.parameters, self.on_error = overwrite, parameters, on_error
        self.budget_gb = arguments.positive("budget_gb", budget_gb, "leaves no room for parameters")
        self.batch_norm, self.allow_untested, self.mixed_rows = batch_norm, allow_untested, mixed_rows
        self.frozen = frozen
        self.batch_names = None if sample_id is None else BatchNames(sample_id)
        self._tap = SampleTap()
        self._checkpoints = Checkpoints(self._steps_taken, self._list_checkpoints)
        self._writers: Writers | None = None
        self._following: Following | None = None

    # ---- before training

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Refuse what cannot be recorded; tap the training loader."""
        if stage != "fit":
            return
        refuse_if(refusals.trainer_refusal(trainer, pl_module, self.allow_untested))
        self._writers = Writers(self.directory, trainer)
        self._following = None
        self._place: Place | None = None  # where the record goes on, in a training that is resumed
        self._left_open = False  # whether that record is unfinished and nothing has been added to it yet
        self._put_off: Exception | None = None  # what waits until Lightning has written its checkpoint
        self._tap = SampleTap(check_rows=self.mixed_rows != rows.AS_THEY_ARE, count=self.batch_names is None)
        self._tap.install(trainer)
        self._end_of_training: int | None = None  # steps of a record that was finished with its training
        self._checkpoints = Checkpoints(self._steps_taken, self._list_checkpoints)
        if trainer.is_global_zero:
            self._checkpoints.install(trainer)

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """See which record the checkpoint belongs to."""
        self._place = Place.load(checkpoint)

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Take the directory; decide what becomes of a run that is already there."""
        self._left_open = self._write.claim(trainer, self._place, self.overwrite)
        if self._place and self._write.main is not None:
            self._checkpoints.resume(self._write.main.header.get("checkpoints", {}), trainer.ckpt_path, self._place.n_steps)

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Give the trainer its own methods back, and the directory free."""
        if stage == "fit":
            self._untap()
            if self._writers is not None:
                self._writers.release()

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Look at what exists only now: optimizers, loaders, parameters."""
        refuse_if(refusals.optimizer_refusal(trainer, resumed=self._place is not None))
        self._tap.refuse_several()
        following = Following(trainer, pl_module, self, self._tap, self._write, self._place)
        if self._place is not None:
            self._place.refuse_another(following.optimizer.state())
        refuse_if(following.snapshots.no_room(self._write.store))
        warn_if_not_rebuildable(pl_module)
        self._following = following

    # ---- while training

    @costs_no_training
    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Keep what the step will see."""
        self._raise_what_was_put_off()
        self._follow.batch_starts(batch)

    @costs_no_training
    def on_before_zero_grad(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        """Gradients that came to no step are dropped."""
        self._follow.gradient_zeroed()

    @costs_no_training
    def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
        """The batch has a gradient now."""
        self._follow.has_gradient()

    @costs_no_training
    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        """Look at the step."""
        self._follow.step_starts()

    @costs_no_training
    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """The step is done."""
        self._follow.step_ends()

    @costs_no_training
    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """The parameters are the training's; after the last epoch a callback may put an average in their place."""
        self._follow.epoch_ends()

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Write what is recorded so far, and into the checkpoint where that is."""
        number, following = self._write.own.n_steps, self._following
        if following is None or following.ended or following.within_step or not number:
            return
        if following.begun:
            try:
                self._write.checkpoint()
            except Exception as error:  # it costs no checkpoint
                self._put_off = error
                return
        if self._write.main is not None:
            following.place(self._write.main.header["run_id"]).save(checkpoint)

    # ---- after training

    @costs_no_training
    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Write the final parameters and the manifest."""
        self._raise_what_was_put_off()
        if not self._follow.begun and not self._left_open:
            warnings.warn("No optimizer step was taken, so no run was recorded.", UserWarning, stacklevel=2)
            return
        if self.recording or self._left_open or self._write.processes > 1:
            self._finish(trainer, pl_module, stopped=None)

    @costs_no_training
    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        """Finish a record whose training was killed after its last step and has none left to take; look at its checkpoints.

        Lightning writes some after ``on_train_end``, and others are deleted after a record that has ended before.
        """
        if self._left_open:
            self._finish(trainer, pl_module, stopped=None)
        self._list_checkpoints(check=True)
        self._write.amend()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """The run of one process is kept up to its last whole step; what several have recorded, ``repair`` makes a run."""
        self._untap()
        if self._writers is None:
            return
        try:
            if self.recording and self._writers.processes == 1 and self._writers.own.n_steps:
                interrupted = isinstance(exception, KeyboardInterrupt)
                reason = None if interrupted else in_words(exception)
                self._finish(trainer, pl_module, "interrupted" if interrupted else "error", reason)
        except Exception as error:  # the training's own exception is the one to be seen
            self._writers.end(error)
        finally:
            self._writers.release()

    # ---- how the record ends before its training (see ``ending``)

    @property
    def recording(self) -> bool:
        """Whether steps are being recorded."""
        return self._following is not None and self._following.begun and not self._following.ended

    @property
    def ended(self) -> bool:
        """Whether the record has ended before its training."""
        return self._following is not None and self._following.ended

    def end(self, error: Exception, within_step: bool) -> None:
        """End the record at its last whole step, and tell why."""
        kept = self._write.end(error)
        self._follow.end(within_step)
        warn_that_it_ended(error, self._write.store, kept, self._write.processes > 1)

    def refused(self, refusal: RecordingRefused) -> None:
        """Let nobody open what turned out to be no record of this training."""
        if self.recording:
            self._follow.end(within_step=False)
            self._write.refuse(str(refusal))

    def _raise_what_was_put_off(self) -> None:
        error, self._put_off = self._put_off, None
        if error is not None:
            raise error

    # ---- parts of the above

    def _untap(self) -> None:
        self._tap.remove()
        self._checkpoints.remove()
        if self._following is not None:
            self._following.loss.remove()

    @property
    def _write(self) -> Writers:
        assert self._writers is not None
        return self._writers

    @property
    def _follow(self) -> Following:
        assert self._following is not None
        return self._following

    def _steps_taken(self) -> int | None:
        """How many recorded steps the parameters have taken; None where they are not of the record."""
        if self._following is None or self._following.ended:
            return self._end_of_training
        return self._following.steps_taken

    def _list_checkpoints(self, check: bool = False) -> None:
        with contextlib.suppress(Exception):  # a list is no reason to end a record
            self._write.list_checkpoints(self._checkpoints.listed(check))

    def _finish(self, trainer: Any, pl_module: Any, stopped: str | None, reason: str | None = None) -> None:
        final = Final(pl_module.state_dict()) if self._following is None else self._following.final()
        self._left_open = False
        self._list_checkpoints(check=True)
        if stopped is None and self._steps_taken() is not None and final.averages is None:
            self._end_of_training = self._write.own.n_steps
        self._write.finish(trainer, final, stopped, reason)
        if self._following is not None:
            self._following.end(within_step=False)
