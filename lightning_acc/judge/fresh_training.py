"""Training anew, without some samples: new initial parameters and a new order, otherwise the recorded recipe.

Unlike ``loo`` this is not the recorded run without the samples, but what training would be like after they are deleted:
as many steps, with the recorded batch sizes, learning rates and other hyper-parameters, over the samples that are kept: or
over other samples of the same kind (``Pool``).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightning_acc.core import devices, rebuild
from lightning_acc.core.losses.batch import Batch
from lightning_acc.core.replay import Replay
from lightning_acc.core.step import Step
from lightning_acc.errors import RunError
from lightning_acc.methods.memory import TRAINING, chunk_size, even_pieces
from lightning_acc.record import batches
from lightning_acc.record.batches import Leaves
from lightning_acc.record.record import Record


@dataclass(frozen=True)
class Pool:
    """What there is to train on.

    Attributes:
        leaves: of all samples, (n, ...); a sample's row is its id.
        usable: ids of those that may be trained on, (m,).
    """

    leaves: Leaves
    usable: Tensor

    @property
    def size(self) -> int:
        """How many rows there are, n."""
        return batches.batch_size(self.leaves)


@dataclass(frozen=True)
class Retraining:
    """Trainings from one seed: the same initial parameters and the same shuffling for all of them.

    Attributes:
        seed: of the initial parameters and the order.
        dropped: for each training, the sample ids it goes without.
        validation_added: whether the examples of the query ``val`` are trained on too.
    """

    seed: int
    dropped: list[frozenset[int]]
    validation_added: bool = False

    def pieces(self, size: int) -> list[Retraining]:
        """The trainings in pieces of at most ``size``, as even as can be."""
        return [replace(self, dropped=part) for part in even_pieces(self.dropped, size)]


def retrain(
    run: Record,
    job: Retraining,
    memory: int,
    progress: Callable[[float], None] = lambda _: None,
    pool: Pool | None = None,
    device: torch.device = devices.CPU,
) -> Tensor:
    """Final parameters (m, p) of the m trainings of ``job``.

    Args:
        run: the recorded run, whose recipe is followed.
        job: the seed and the samples to drop.
        memory: bytes to compute with; the trainings are batched as far as they fit.
        progress: told the fraction done.
        pool: what to train on; None: the run's own samples.
        device: where.

    Raises:
        RunError: the module cannot be built anew.
    """
    pool = own_samples(run) if pool is None else pool
    replay = Replay(run, device=device)
    start = fresh_parameters(run, replay, job.seed)
    size = chunk_size(replay, "training anew", TRAINING, memory)
    finals = []
    for first in range(0, len(job.dropped), size):
        part = job.dropped[first : first + size]

        def report(done: float, first: int = first, n: int = len(part)) -> None:
            progress((first + done * n) / len(job.dropped))

        finals.append(_train(replay, start, pool, part, job.seed, report).cpu())
    return torch.cat(finals)


def _train(
    replay: Replay,
    start: Tensor,
    pool: Pool,
    dropped: list[frozenset[int]],
    seed: int,
    progress: Callable[[float], None],
) -> Tensor:
    run = replay.run
    sizes = [len(step.sample_ids) for step in run.steps]
    orders = torch.stack([_order(pool, without, sum(sizes), seed) for without in dropped])
    state = replay.update.initial(replay.placed(start).expand(len(dropped), -1))
    position = 0
    with devices.generators_kept(replay.device):
        devices.seed(replay.device, seed)  # dropout: the same for all trainings from this seed
        for t, size in enumerate(sizes):
            record = run.steps[t]
            ids = orders[:, position : position + size]
            position += size
            # The batch's recorded weights sum to 1 for a mean, to its size for a sum: shared out evenly.
            share = float(record.weights.sum()) / size
            weights = torch.full((len(dropped), size), share, dtype=replay.dtype, device=replay.device)
            leaves = batches.cast(batches.rows(pool.leaves, ids), replay.dtype, replay.device)
            if replay.objective.reduction == "weighted":
                weights = float(record.weights.sum()) * replay.objective.weights_each(state[0], leaves)
            step = Step(replay.objective, replay.update, [Batch(leaves)], ids, weights, record.groups, own_rows=True)
            state = step.update(state, step.gradients(state[0], weights))
            progress((t + 1) / len(sizes))
    return state[0]


def _order(pool: Pool, dropped: frozenset[int], length: int, seed: int) -> Tensor:
    """Sample ids in the order they are visited, (length,): shuffled anew every epoch, those dropped skipped."""
    generator = torch.Generator().manual_seed(seed)
    n = pool.size
    kept = torch.zeros(n, dtype=torch.bool)
    kept[pool.usable] = True
    kept[list(dropped)] = False
    if not kept.any():
        raise RunError(f"Nothing is left to train on: all {len(pool.usable)} samples the run was trained on are dropped.")
    epochs: list[Tensor] = []
    while sum(map(len, epochs)) < length:
        shuffled = torch.randperm(n, generator=generator)
        epochs.append(shuffled[kept[shuffled]])
    return torch.cat(epochs)[:length]


def fresh_parameters(run: Record, replay: Replay, seed: int) -> Tensor:
    """Initial parameters (p,) of the run's module, drawn anew.

    Raises:
        RunError: the module cannot be rebuilt from its hyper-parameters.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = rebuild.build(run.manifest["module"], run.trust)
    return replay.layout.flat(dict(module.named_parameters())).to(replay.dtype)


def own_samples(run: Record) -> Pool:
    """What the run itself was trained on; of an augmented sample the first content.

    Samples that the recorded training never saw (``drop_last``, ``limit_train_batches``, a sampler) have no part in it.
    """
    return Pool(contents(run), visited_samples(run))


def visited_samples(run: Record) -> Tensor:
    """Ids of the samples that any step saw, in order, (m,)."""
    seen = torch.zeros(run.n_samples, dtype=torch.bool)
    for step in run.steps:
        seen[step.sample_ids] = True
    return torch.nonzero(seen)[:, 0]


def contents(run: Record) -> Leaves:
    """The leaves of all samples, (n_samples, ...); those of samples that were never visited mean nothing.

    Raises:
        RunError: the samples differ in shape, so that they cannot be batched anew.
    """
    rows = [run.content_of(sample) for sample in range(run.n_samples)]
    known = [row for row in rows if row is not None]
    shapes = {batches.row_signature(row) for row in known}
    if len(shapes) != 1:
        raise RunError(
            f"The samples of {run.path} differ in shape, so that new batches cannot be put together from them: pad them to "
            "one length in the data set."
        )
    if any(batches.said_of_batch(row) != batches.said_of_batch(known[0]) for row in known):
        raise RunError(
            f"The batches of {run.path} differ in what is said of them as a whole (a number or a text that is no sample's), so "
            "that it is not known for new ones: give it to the module, or to each sample."
        )
    blank = {name: torch.zeros_like(leaf) if leaf.is_floating_point() else leaf for name, leaf in known[0].items()}
    return batches.stacked([row or blank for row in rows])
