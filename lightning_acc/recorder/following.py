"""``Following``: sees the steps of one training, has what is due checked, and hands them to the writers."""

from __future__ import annotations

import contextlib
import copy
import time
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_acc.core import devices
from lightning_acc.errors import RunError
from lightning_acc.record import batches
from lightning_acc.record.steps import SeenStep, integers
from lightning_acc.record.writer import NotFinite, check_finite
from lightning_acc.recorder import description, ranks
from lightning_acc.recorder.beginning import Assembly, understand
from lightning_acc.recorder.checkpoints import resume
from lightning_acc.recorder.checkpoints.averages import Averages
from lightning_acc.recorder.checkpoints.resume import Place
from lightning_acc.recorder.checks import refusals, rows
from lightning_acc.recorder.checks.carried import Shared
from lightning_acc.recorder.checks.identity import Identity
from lightning_acc.recorder.checks.randomness import random_state_kept
from lightning_acc.recorder.checks.refusals import TRAINED_LATER, RecordingRefused, refuse_if
from lightning_acc.recorder.checks.steps import Checks
from lightning_acc.recorder.optimizer import Clipping, TrainedOptimizer
from lightning_acc.recorder.ranks import SeenBatch
from lightning_acc.recorder.snapshots import Snapshots
from lightning_acc.recorder.taps import LossTap, SampleTap
from lightning_acc.recorder.writers import Final, Writers

if TYPE_CHECKING:
    from lightning_acc.recorder.recorder import TrajectoryRecorder


class Following:
    """One training, step by step.

    Args:
        trainer: the Lightning trainer.
        module: the LightningModule.
        options: the recorder, whose arguments say how.
        tap: tells the samples of each batch.
        write: the writers of this process.
        place: where in a record a resumed training goes on.

    Attributes:
        begun: whether the record has its first step, so that the loss and the update are understood.
        ended: whether it has ended before the training.
    """

    def __init__(
        self,
        trainer: Any,
        module: Any,
        options: TrajectoryRecorder,
        tap: SampleTap,
        write: Writers,
        place: Place | None,
    ) -> None:
        self.begun = self.ended = False
        later = options.frozen == TRAINED_LATER or refusals.unfreezes(trainer)
        self.optimizer = TrainedOptimizer(trainer, module, later)
        self._clipping = Clipping(trainer, bool(refusals.overridden(module, ["configure_gradient_clipping"])))
        self.averages = Averages(trainer, () if place is None else place.averages)
        self._kept: tuple[int, Tensor, dict[str, Any]] | None = None
        """After so many steps the parameters and the module's state; where an average may replace them."""
        if place is not None:
            self.optimizer.moved.parameter_steps = place.steps_of(self.optimizer.moved.parameter_steps)
        self.snapshots = Snapshots(
            options.parameters, self.optimizer.parameter_bytes, _expected_steps(trainer), options.budget_gb * 2**30
        )
        self._trainer, self._module, self._options = trainer, module, options
        self._tap, self._write, self._place = tap, write, place
        self.loss = LossTap(trainer, {} if write.main is None else write.main.header.get("settings", {}))
        self._named = options.batch_names  # which tell samples from each other, whatever loader they come from
        self._identity = Identity() if trainer.reload_dataloaders_every_n_epochs and self._named is None else None
        self._structure: batches.Structure = {}
        self._shared = Shared()
        self._seen: list[SeenBatch] = []
        self._step: SeenStep | None = None
        self._within = False
        self._before = 0
        """Steps by Lightning's count before the newest one."""
        self._number = 0
        """The step that is next, in a training whose record has ended."""

    @property
    def within_step(self) -> bool:
        """Whether the optimizer is about to step, or has, and the step is not recorded yet."""
        return self._within

    @property
    def steps_taken(self) -> int | None:
        """How many steps the parameters have taken: within a step, with it once the optimizer has stepped.

        None where an average has taken their place.
        """
        kept = self._kept
        if kept is not None and kept[0] == self._write.own.n_steps and not torch.equal(kept[1], self.optimizer.parameters()):
            return None
        return self._write.own.n_steps + (self._within and self._trainer.global_step > self._before)

    def batch_starts(self, batch: Any) -> None:
        """Keep what the step will see."""
        ids = [] if self._named is not None else self._tap.next_ids()
        first = self._tap.take_first(batch)
        if self.ended:
            return
        self.averages.see(self._write.own.n_steps)
        try:
            leaves, structure = batches.flatten(batch, len(ids) if self._named is None else None, self._structure)
            if self._named is not None:
                ids = self._write.own.names.of(self._named.names(batch, batches.batch_size(leaves)))
        except RecordingRefused:
            raise
        except RunError as error:
            raise RecordingRefused(str(error)) from error
        if self._structure and structure != self._structure:
            raise RecordingRefused(
                f"The batch of step {self._write.own.n_steps} is built otherwise than the first one: "
                f"{batches.first_difference(self._structure, structure)}."
            )
        rows.refuse_transfer(self._trainer, first)
        self._structure = structure
        self._shared.see(batches.shared(leaves), self._write.own.n_steps)
        leaves = {name: leaf.detach().cpu() for name, leaf in leaves.items()}
        contents = self._write.own.content_ids(leaves, ids)
        if self._identity is not None:
            self._write.own.numbered()
            self._identity.check(self._tap.dataset, ids, contents.tolist())
        if not self.begun:
            self._foreign = refusals.foreign_random_state()
        self.loss.observe(len(ids) if self.begun and self._assembly.observable else None)
        self._seen.append(SeenBatch(ids, contents, leaves, devices.states(self.optimizer.device)))

    def gradient_zeroed(self) -> None:
        """What has been accumulated and did not come to a step is forgotten."""
        self._seen = [batch for batch in self._seen if not batch.counts]

    def has_gradient(self) -> None:
        """The batch has a gradient now; see whether its forward pass drew random numbers."""
        if self.ended:
            return
        if not self.begun and self._foreign != refusals.foreign_random_state():
            refuse_if(
                "training_step draws random numbers from Python or NumPy, which are not recorded: draw them with torch, or in "
                "the data set"
            )
        batch = self._seen[-1]
        batch.counts = True
        batch.weights, batch.settings = self.loss.take(), self.loss.settings
        now = devices.states(self.optimizer.device)
        batch.rng = {kind: state for kind, state in batch.rng.items() if not torch.equal(state, now[kind])}

    def step_starts(self) -> None:
        """Keep the parameters and hyper-parameters of the step; check the first ones, and some later, against F."""
        if not self.optimizer.has_gradient():
            self._seen = []  # training_step returned None: torch.optim leaves everything as it is
            return
        if self.optimizer.is_skipped():
            self._seen = []
            self._write.note_skipped()
            return
        self._before = self._trainer.global_step
        if self.ended:
            self._within = True
            if self._due(self._number, 0):  # the other processes wait for what this one saw
                with contextlib.suppress(RunError):
                    ranks.gather(None, self._write.processes)
            return
        # A batch whose training_step returned None has no part in the step.
        self._seen = [batch for batch in self._seen if batch.counts]
        number = self._write.own.n_steps
        groups = self.optimizer.hyperparameters(number, [batch.settings for batch in self._seen])
        self._clipping.begin(groups)
        try:
            self._look(number, groups)
        except RecordingRefused as refusal:
            raise refusals.with_suspects(refusal, self._module) from refusal
        self._write.note(optimizer=description.of_optimizer(self.optimizer), settings=self.loss.settings_at_first())
        self._step = {
            "sample_ids": [integers(batch.ids) for batch in self._seen],
            "contents": [batch.contents for batch in self._seen],
            "weights": self._assembly.weights(self._seen),
            "groups": groups,
            "rng": [batch.rng for batch in self._seen],
            "names": self._write.own.names.new(),
        }
        self._within = True

    def step_ends(self) -> None:
        """The step is done."""
        if not self._within:
            return
        self._clipping.end()
        step, self._step, self._within = self._step, None, False
        self._seen = []
        self._number += 1
        if step is not None:
            self._write.own.add_step(step)

    def epoch_ends(self) -> None:
        """Keep what an averaging callback may be about to replace."""
        number = self._write.own.n_steps
        if self.averages and not self.ended and (self._kept is None or self._kept[0] != number):
            state = {name: copy.deepcopy(value) for name, value in self._module.state_dict().items()}
            self._kept = number, self.optimizer.parameters(), state

    def place(self, run_id: str) -> Place:
        """Where in the record ``run_id`` the training is, after a whole step."""
        self.averages.see(self._write.own.n_steps)
        state, moved = resume.fingerprint(self.optimizer.state()), self.optimizer.moved.parameter_steps
        return Place(run_id, self._write.own.n_steps, state, moved, self.averages.updates, self._write.resumed_at)

    def final(self) -> Final:
        """What is known now, at the end of the training or where it is interrupted."""
        self._write.note(final_settings={} if self.ended else self.loss.settings_now())
        number, going_on = self._write.own.n_steps, self.begun and not self.ended
        # Interrupted within a step, the parameters may already be those after it: then they are left to be replayed.
        known = going_on and not self._within
        if not self.averages:
            return Final(self._module.state_dict(), self._finite(self.optimizer.parameters()) if known else None)
        if known:
            self.averages.see(number)
        after, theta, state = self._kept or (None, None, {})
        theta = self._finite(theta) if known and after == number and theta is not None else None
        # While it validates, a callback has the parameters in the place of their average.
        return Final(state, theta, self.averages if going_on and self._trainer.training else None)

    def _finite(self, theta: Tensor) -> Tensor | None:
        """The final parameters, where they are finite; where not, the records of several processes end, to be merged."""
        try:
            check_finite(theta, self._write.own.n_steps)
        except NotFinite as error:
            if self._write.processes == 1:
                raise
            self._options.end(error, within_step=False)  # in all of them
            return None
        return theta

    def end(self, within_step: bool) -> None:
        """Record no more; in the middle of a step, or after one."""
        self._number = self._write.own.n_steps
        self._step, self._within = None, within_step
        self._seen, self.ended = [], True
        self.loss.observe(None)

    def _due(self, number: int, size: int) -> bool:
        """Whether all processes compare the step."""
        return self._checks.due(number, size, self._trainer.current_epoch, self._trainer.is_last_batch)

    def _look(self, number: int, groups: list[dict[str, Any]]) -> None:
        """Keep and check what is due in step ``number``; the first one begins the record."""
        main = self._write.main
        if not self.begun:
            trained = {name for name, _ in self.optimizer.layout.shapes}
            about = (self._write.processes, number, self.optimizer.state(), self.optimizer.rounded_to)
            self._checks = Checks(self._module, trained, *about)
        begins = self.optimizer.moved.begins and self._write.processes == 1
        compare = self._due(number, sum(len(batch.ids) for batch in self._seen)) or begins
        taken = main is not None and number in main.snapshots[-1:]  # by what this training resumes
        keep = not taken and (not self.begun or self.snapshots.due(number))
        if not (compare or keep or self._checks.followed is not None):
            return
        started = time.perf_counter()
        theta = self.optimizer.parameters()
        if compare and not self._checks.early(number):  # a training that comes to nothing in its first steps is refused
            check_finite(theta, number)
        self._checks.parameters(number, theta, self._module)
        if compare:
            with random_state_kept():
                self._compare(number, groups, theta)
        if keep and main is not None:
            main.add_state(number, theta.cpu())
            self.snapshots.taken(time.perf_counter() - started)
        else:
            check_finite(theta, number)  # as add_state does, so that all processes stop together

    def _compare(self, number: int, groups: list[dict[str, Any]], theta: Tensor) -> None:
        everyone = ranks.gather(self._seen, self._write.processes)
        if not self.begun:
            self._begin(number, groups, everyone, theta)
        step = self._assembly.step(groups, everyone)
        self._checks.gradient(number, self.optimizer.state(), step, self.optimizer.gradient(number))

    def _begin(self, number: int, groups: list[dict[str, Any]], everyone: list[SeenBatch], theta: Tensor) -> None:
        options = self._options
        seen = (self._structure, theta, groups, everyone, number, self.loss.settings_at_first(), options.batch_norm)
        self._assembly: Assembly
        self._assembly, header = understand(self._trainer, self._module, self.optimizer, *seen)
        header["n_samples"] = self._tap.n_samples if self._named is None else len(self._write.own.names)
        if self._named is not None:
            header["sample_id"] = self._named.words
        if options.mixed_rows == rows.AS_THEY_ARE:
            header["loss"]["mixed_rows"] = options.mixed_rows
        self._write.begin(self._trainer, self._module, header, self._place, options.overwrite)
        self._write.shared(self._shared.tensors)
        self.begun = True


def _expected_steps(trainer: Any) -> float:
    """Lightning's own estimate; infinity where nobody knows, as of a stream without a length."""
    steps = float(trainer.estimated_stepping_batches)
    return steps if steps >= 0 else float("inf")
