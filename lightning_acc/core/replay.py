"""The recorded run as a sequence of training steps that can be taken again, in either direction."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cached_property, partial

import torch
from torch import Tensor

from lightning_acc.core.objective import AUTOCAST, Objective, ParameterLayout
from lightning_acc.core.optimizers import State, Update
from lightning_acc.core.step import Batch, Step
from lightning_acc.errors import RequestError, RunError
from lightning_acc.record import batches
from lightning_acc.record.record import Run

CACHE_BYTES = 2**20
"""Activations that Hessian-vector products work on at once: what a core's second-level cache holds. More is slower."""
DOUBT = 1e-5
"""A replay that ends further from the recorded run's end, relative to the way that went, is looked into."""
DTYPES = {"float32": torch.float32, "float64": torch.float64}


class Replay:
    """The steps of ``run`` as functions, in ``dtype`` (None: as recorded).

    Raises:
        RequestError: the dtype is not known.
        RunError: the module cannot be rebuilt here.
    """

    def __init__(self, run: Run, dtype: str | None = None) -> None:
        self.run = run
        name = dtype or run.dtype
        if name not in DTYPES:
            raise RequestError(f"There is no dtype {name!r} to replay in; choose {' or '.join(DTYPES)}.")
        self.dtype = DTYPES[name]
        manifest = run.manifest
        self.layout = ParameterLayout(manifest["layout"])
        self.objective = Objective(
            run.module(),
            self.layout,
            run.structure(),
            evaluation_modules=manifest["evaluation_modules"],
            tensors=run.frozen_tensors(),
            dtype=self.dtype,
            independent_rows=manifest["loss"]["independent_rows"],
            vectorised=manifest["loss"]["vectorised"],
            autocast=AUTOCAST[manifest.get("precision", "32-true")],
        )
        optimizer = manifest["optimizer"]
        self.update = Update(optimizer["name"], self.layout, optimizer["group_of"], optimizer["slots"])

    def __len__(self) -> int:
        return self.run.n_steps

    @cached_property
    def initial(self) -> State:
        """The state before the first step."""
        return self.state(self.run.parameters(0))

    def state(self, theta: Tensor) -> State:
        """The state with parameters ``theta`` and empty slots."""
        return self.update.initial(theta.to(self.dtype))

    def confirm(self, theta: Tensor) -> None:
        """See that the parameters ``theta`` (p,) after the last step are those of the recorded run; in doubt, audit it.

        Training may amplify round-off, so that a difference alone condemns nothing; a step that is not reproduced does.

        Raises:
            RunError: the record does not reproduce the training, or the replay ends in parameters that are not finite.
        """
        if len(self) not in self.run.snapshots:  # interrupted within its last step
            return
        first, last = (self.run.parameters(t).to(self.dtype) for t in (0, len(self)))
        if float((theta - last).norm()) <= DOUBT * float((last - first).norm()):  # which NaN is not
            return
        report = self.run.audit()
        if not report.ok:
            raise RunError(f"{self.run.store}: {report}.")
        lost = int((~torch.isfinite(theta)).sum())
        if lost:
            raise RunError(
                f"{self.run.store}: the replay ends in parameters that are not finite ({lost} of {theta.numel()}), though each "
                "recorded step by itself is reproduced: the training amplifies round-off beyond all bounds, so no score of "
                "this run can be trusted. Record it at a lower learning rate, or replay it in dtype='float64'."
            )

    @cached_property
    def activation_bytes(self) -> int:
        """Bytes autograd keeps for one forward pass over the run's largest batch, beside the batch itself."""
        largest = max(range(len(self)), key=lambda t: len(self.run.steps[t].sample_ids))
        leaves = [batches.cast(leaves, self.dtype) for leaves in self.run.batches(largest)]
        shared = [*self.objective.tensors(), *(leaf for batch in leaves for leaf in batch.values())]
        total = 0
        for batch in leaves:
            total += saved_bytes(partial(self.objective.losses, leaves=batch), self.initial[0], shared)
        return total

    def step(self, t: int) -> Step:
        """The recorded step ``t``."""
        record = self.run.steps[t]
        return Step(
            self.objective,
            self.update,
            [Batch(leaves, rng) for leaves, rng in zip(self.run.batches(t), record.rng, strict=True)],
            record.sample_ids,
            record.weights,
            record.groups,
            rows_at_once=max(16, CACHE_BYTES // max(1, self.activation_bytes)),
        )


def parameters_at(run: Run, t: int) -> Tensor:
    """Parameters (p,) before step ``t``, by replaying the steps before it as they were trained."""
    replay = Replay(run)
    state = replay.initial
    with as_trained(run):
        for earlier in range(t):
            state = replay.step(earlier)(state)
    return state[0]


@contextmanager
def as_trained(run: Run) -> Iterator[None]:
    """In here torch uses as many threads as the training: the last bits of a product depend on how it is divided."""
    threads = torch.get_num_threads()
    torch.set_num_threads(run.manifest["threads"])
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def saved_bytes(function: Callable[[Tensor], Tensor], theta: Tensor, shared: Iterable[Tensor] = ()) -> int:
    """Bytes autograd keeps to differentiate ``function`` at ``theta`` (p,), without those of ``theta`` and ``shared``."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    leaf = theta.detach().requires_grad_()
    with torch.random.fork_rng(devices=[]), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = function(leaf)
    for tensor in (leaf, *shared):
        kept.pop(tensor.untyped_storage().data_ptr(), None)
    del output
    return sum(kept.values())


class Tape:
    """The states of a replay, kept so that its steps can be visited from the last to the first.

    Where the T states do not fit into ``memory`` bytes, about sqrt(T) of them are kept, evenly spaced, and the others are
    computed again, a segment at a time.

    Attributes:
        final: the state after the last step.
    """

    def __init__(self, replay: Replay, memory: int) -> None:
        self._replay = replay
        total, size = len(replay), sum(part.nbytes for part in replay.initial)
        self._segment = 1 if total * size <= memory else math.ceil(math.sqrt(total))
        self._kept: list[State] = []
        self.final = replay.initial
        for t in range(total):
            if t % self._segment == 0:
                self._kept.append(self.final)
            self.final = replay.step(t)(self.final)
        replay.confirm(self.final[0])

    def backwards(self) -> Iterator[tuple[Step, State]]:
        """The steps from the last to the first, each with the state before it; can be gone through once."""
        for first in reversed(range(0, len(self._replay), self._segment)):
            states = [self._kept.pop()]
            last = min(first + self._segment, len(self._replay))
            for t in range(first, last - 1):
                states.append(self._replay.step(t)(states[-1]))
            for t in reversed(range(first, last)):
                yield self._replay.step(t), states.pop()
