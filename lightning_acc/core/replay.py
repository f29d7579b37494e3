"""The recorded run as a sequence of training steps that can be taken again, in either direction."""

from __future__ import annotations

import timeit
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import cached_property, partial, wraps
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from lightning_acc import arguments
from lightning_acc.core.devices import CPU, generators_kept, recorded_on
from lightning_acc.core.losses.batch import Batch, Draws
from lightning_acc.core.losses.tracing import Multiplications, saved_bytes
from lightning_acc.core.modules.precision import PRECISIONS, rounded_to
from lightning_acc.core.objective import Objective, ParameterLayout
from lightning_acc.core.optimizers import State, Update
from lightning_acc.core.process import as_recorded, as_scored, is_out_of_memory
from lightning_acc.core.ranks import ALONE, Ranks
from lightning_acc.core.rebuild import module_of, not_the_module, refuse_misfit
from lightning_acc.core.stand_in import Place, place_at_end, place_in
from lightning_acc.core.step import Step
from lightning_acc.errors import InfluenceError, RunError
from lightning_acc.record import batches
from lightning_acc.record.batches import Leaves
from lightning_acc.record.record import Record, opened
from lightning_acc.record.schema.keys import DTYPES, SCORED
from lightning_acc.record.steps import StepRecord

CACHE_BYTES = defaultdict(lambda: 2**28, cpu=2**20)
"""Activations that Hessian-vector products work on at once, by kind of device: what a core's second-level cache holds, where
more is slower; what keeps a card busy."""

STATES_BYTES, FEWEST_STATES = defaultdict(lambda: 2**28, cpu=2**24), 8
"""Parameter vectors that are worked on together, by kind of device: beyond so many bytes a CPU maps their memory anew at every
operation, which takes longer than the work itself; fewer than so many are as fast one by one."""

THREADS_BYTES = 2**23
"""Bytes of parameters and activations from which a step may be worth several threads. Below, it is taken on one, here as
anywhere, and its bits are the same. At their best two threads took for a product of 32 rows with 64 x 64 weights 1.6 times what
one takes, with 256 x 256 0.85, of 128 rows 0.83; for an addition of 65k numbers 0.8, of 1M 0.6."""


class Replay:
    """The steps of ``run`` as functions.

    Args:
        run: the record.
        dtype: what they are computed in; None as trained, or in float32 where that was narrower (``Record.scored_in``).
        until: the first so many of them; None: all.
        device: where, see ``core.devices.chosen``; all that is computed with is moved there, and nothing else is.
        as_trained: in the training's own dtype and precision, however narrow, instead: what the record is held against.
        ranks: the processes that take its steps together, each with some rows of every batch; this one takes its own.

    Raises:
        RequestError: the dtype is not known.
        RunError: the module cannot be rebuilt here.
    """

    def __init__(
        self,
        run: Record,
        dtype: str | None = None,
        until: int | None = None,
        *,
        device: torch.device = CPU,
        as_trained: bool = False,
        ranks: Ranks = ALONE,
    ) -> None:
        self.run, self.device, self.ranks = run, device, ranks
        self._until = run.n_steps if until is None else min(until, run.n_steps)
        name = arguments.choice("dtype", run.scored_in if dtype is None else dtype, SCORED, " to replay in")
        self.dtype = DTYPES[run.dtype if as_trained else name]
        manifest, precision = run.manifest, run.manifest.get("precision", "32-true")
        self.rounded_to = rounded_to(precision, self.dtype, manifest.get("compiled", False))
        self.layout = ParameterLayout(manifest["layout"])
        module = module_of(run)
        refuse_misfit(run, module, self.layout.shapes)
        frozen = run.frozen_tensors()
        try:
            self.objective = Objective(
                module,
                self.layout,
                run.structure(),
                source=manifest["loss"]["source"],
                reduction=manifest["loss"]["reduction"],
                evaluation_modules=manifest["evaluation_modules"],
                tensors=frozen,
                dtype=self.dtype,
                trained_in=DTYPES[run.dtype],
                device=device,
                independent_rows=manifest["loss"]["independent_rows"],
                penalised=manifest["loss"].get("penalised", False),
                vectorised=manifest["loss"]["vectorised"],
                precision=precision if as_trained else PRECISIONS[precision].scored_as or precision,
                trainer=manifest.get("trainer"),
                settings=manifest.get("settings"),
            )
        except (RuntimeError, AttributeError) as error:  # tensors of other shapes, submodules that are not there
            if is_out_of_memory(error):
                raise
            raise RunError(not_the_module(run, " ".join(str(error).split())[:300])) from error
        self.objective.settle(lambda: place_at_end(run, len(self)))
        of = manifest["optimizer"]
        self.update = Update(of["name"], self.layout, of["group_of"], of["slots"], of.get("rests", False))

    def __len__(self) -> int:
        return self._until

    @property
    def records(self) -> Iterator[StepRecord]:
        """What was recorded of its steps."""
        return (self.run.steps[t] for t in range(len(self)))

    @cached_property
    def checked_at(self) -> int:
        """The last step before which the parameters were written: what a sweep is held against, see ``core.audit``."""
        return max(t for t in self.run.snapshots if t <= len(self))

    @cached_property
    def initial(self) -> State:
        """The state before the first step."""
        return self.state(self.run.snapshot(0))

    def state(self, theta: Tensor) -> State:
        """The state with parameters ``theta`` and empty slots."""
        return self.update.initial(self.placed(theta))

    def placed(self, tensor: Tensor) -> Tensor:
        """Recorded numbers, as they are computed with."""
        return tensor.to(self.device, self.dtype)

    @cached_property
    def activation_bytes(self) -> int:
        """Bytes autograd keeps for one forward pass over the run's largest batch, beside the batch itself."""
        leaves = self._largest
        shared = [*self.objective.tensors(), *(leaf for batch in leaves for leaf in batch.values())]
        return sum(saved_bytes(partial(self.objective.losses, leaves=batch), self.initial[0], shared) for batch in leaves)

    @cached_property
    def multiplications(self) -> float:
        """Of one forward pass over the run's largest batch: of its matrix products and convolutions, as torch counts them, and
        at least one of each sample by each parameter, as some go uncounted."""
        leaves = self._largest
        with generators_kept(self.device), Multiplications() as counted:
            for batch in leaves:
                self.objective.losses(self.initial[0], batch)
        return float(max(counted.total, sum(map(batches.batch_size, leaves)) * len(self.initial[0])))

    @property
    def _largest(self) -> list[Leaves]:
        """The batches of the step that sees the most samples."""
        largest = max(range(len(self)), key=lambda t: len(self.run.steps[t].sample_ids))
        accumulated, _, _ = self._rows(largest)
        return [batches.cast(batch.leaves, self.dtype, self.device) for batch in accumulated]

    @cached_property
    def states_at_once(self) -> int:
        """How many states a step is taken at together; 1 where parameter vectors are so long that nothing is gained, or where
        together they would draw other random numbers.

        It depends on the run, the dtype and the kind of device alone: so do the bits of the scores.
        """
        fit = STATES_BYTES[self.device.type] // max(1, self.initial[0].nbytes)
        return fit if fit >= FEWEST_STATES and self.draws.alike else 1

    @cached_property
    def threads(self) -> int:
        """On how many threads scores are computed here: as many as torch uses in this process, where steps are large enough
        (``THREADS_BYTES``) and one was done sooner by them just now; else on one.

        Where other processes use the cores, or a container may not, threads wait for each other: on two cores that were in use
        two threads took 3 times as long for a step of MiniLM (22.7M parameters, 16 posts), 8 for a network of 1.9M; once the
        cores were free again, 0.65 and 0.8 times.
        """
        most = torch.get_num_threads()
        if most == 1 or self.device != CPU or self.initial[0].nbytes + self.activation_bytes < THREADS_BYTES:
            return 1
        return most if self.seconds_on(most) < self.seconds_on(1) else 1

    def seconds_on(self, threads: int) -> float:
        """Seconds of the clock that a step takes on so many threads; of several processes, that this one's rows take."""
        step = self.step(0)
        step.ranks = ALONE
        with as_scored(threads):
            return min(timeit.repeat(lambda: step(self.initial), number=1, repeat=2))

    def step(self, t: int) -> Step:
        """The recorded step ``t``."""
        accumulated, sample_ids, weights = self._rows(t)
        return Step(
            self.objective,
            self.update,
            accumulated,
            sample_ids,
            weights,
            self.run.steps[t].groups,
            rows_at_once=1
            if self.states_at_once == 1
            else max(16, CACHE_BYTES[self.device.type] // max(1, self.activation_bytes)),
            states_at_once=self.states_at_once,
            apart=lambda: self.states_at_once == 1 and self.draws.by_row,
            ranks=self.ranks,
        )

    def _rows(self, t: int) -> tuple[list[Batch], Tensor, Tensor]:
        """Of the step ``t`` the batches, the sample ids and the loss weights, (B,): those that this process takes."""
        record = self.run.steps[t]
        if self.ranks.size == 1:
            return self._batches(t), record.sample_ids, record.weights
        shares, weighs = self.ranks.share(record.sizes, self.divisible(record))
        parts = zip(self.run.batches(t, shares), shares, strict=True)
        each = [Batch(leaves, record.rng[i], settings=record.settings[i]) for leaves, (i, _) in parts]
        accumulated = [batch.as_part(rows, record.sizes[i]) for batch, (i, rows) in zip(each, shares, strict=True)]
        numbers = torch.arange(len(record.sample_ids)).split(record.sizes)
        own = torch.cat([numbers[i][rows.start : rows.stop] for i, rows in shares])
        return accumulated, record.sample_ids[own], record.weights[own] * weighs

    def _batches(self, t: int) -> list[Batch]:
        record = self.run.steps[t]
        each = zip(self.run.batches(t), record.rng, record.settings, strict=True)
        return [Batch(leaves, rng, settings=settings) for leaves, rng, settings in each]

    def divisible(self, step: StepRecord) -> bool:
        """Whether rows can be taken out of a batch of this step, and the sum over parts is the whole."""
        if any(step.rng):  # rows were seen to be apart in batches of this size, and in parts of two or more
            alike = len(step.sizes) == 1 and step.sizes == self.run.steps[0].sizes
            return alike and step.sizes[0] >= 2 * self.ranks.size and self.draws.by_row
        return self.objective.undivided is None

    @cached_property
    def draws(self) -> Draws:
        """What is seen of the random numbers (dropout) of three of its steps, at trained parameters."""
        return Draws(self.objective, self._trained, self.rounded_to, self.ranks.size)

    def _trained(self) -> tuple[list[tuple[Batch, Place]], Tensor]:
        places = {t: place_in(self.run.steps[t].groups[0]) for t in (0, len(self) // 2, len(self) - 1)}
        some = [(batch, place) for t, place in places.items() for batch in self._batches(t)]
        return some, self.placed(self.run.snapshot(self.checked_at))


OF_DATA = (RuntimeError, LookupError, TypeError, ValueError, AttributeError)
"""What torch raises where tensors are not such as an operation takes."""
Verb = TypeVar("Verb", bound=Callable[..., Any])


def explained(verb: Verb) -> Verb:
    """``verb``, of a ``run``; where it fails because the module cannot take what is recorded, says so.

    Only what has failed is looked into: until then it costs nothing.

    Raises:
        RunError: the module fails on a recorded batch, at the first parameters.
    """

    @wraps(verb)
    def explaining(*arguments: Any, **options: Any) -> Any:
        try:
            return verb(*arguments, **options)
        except InfluenceError:
            raise
        except OF_DATA as error:
            run = (*arguments, options.get("run"))[0]
            run = run[0] if isinstance(run, (list, tuple)) and run else run  # of several
            if not is_out_of_memory(error) and run is not None:
                _refuse_unusable(opened(run))
            raise

    return cast(Verb, explaining)


def _refuse_unusable(run: Record) -> None:
    replay = Replay(run, device=recorded_on(run), as_trained=True)
    theta = replay.initial[0].detach().requires_grad_()

    with generators_kept(replay.device), torch.enable_grad():
        for t in range(len(replay)):
            try:
                for leaves in run.batches(t):
                    losses = replay.objective.losses(theta, batches.cast(leaves, replay.dtype, replay.device))
                    torch.autograd.grad(losses.sum(), theta)
            except InfluenceError:
                raise
            except OF_DATA as error:
                words = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
                raise RunError(not_the_module(run, f"which fails on the batches of step {t}: {words}")) from error


@explained
def parameters_at(run: Record, t: int) -> Tensor:
    """Flat trained parameters (p,) before step ``t``; ``t = n_steps`` gives the final ones.

    Where no snapshot was taken they are computed again, by replaying the steps before as they were trained.

    Raises:
        RunError: there is no such step.
    """
    if not 0 <= t <= run.n_steps:
        raise RunError(f"There are no parameters at step {t}: this run has the steps 0 to {run.n_steps}.")
    if t in run.snapshots:
        return run.snapshot(t)
    replay = Replay(run, device=recorded_on(run), as_trained=True)
    state = replay.initial
    with as_recorded(run.manifest):
        for earlier in range(t):
            state = replay.step(earlier)(state)
    return state[0].cpu()
