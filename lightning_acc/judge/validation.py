"""Controls that are given what influence is given, the validation examples, and nothing cleverer.

*Validation*: train on the query's examples alone, and distrust the training samples that model has the highest loss on.
*Validation added*: drop nothing, and train on the query's examples too. Both, like influence, take the validation labels at
their word, which may itself be wrong.
"""

from __future__ import annotations

import json

import numpy as np
import torch

from lightning_acc.core import queries
from lightning_acc.core.devices import CPU
from lightning_acc.core.objective import Objective
from lightning_acc.core.queries import Query
from lightning_acc.core.replay import Replay
from lightning_acc.judge.fresh_training import Pool, Retraining, own_samples, retrain
from lightning_acc.record import batches
from lightning_acc.record.batches import Leaves, Structure
from lightning_acc.record.record import Record

QUERY = "val"
"""The recorded query whose examples are trained on."""
SEEDS = 3
"""Trainings on the validation examples that the losses are averaged over."""


class Untrainable(Exception):
    """Why the validation examples cannot be trained on as the training samples are, as part of a sentence."""


def validation_losses(run: Record, memory: int, device: torch.device = CPU) -> np.ndarray:
    """Losses (n_samples,) of the training samples under models trained on the validation examples alone.

    These are trained by the recorded recipe, over as many steps of the same sizes, from ``SEEDS`` seeds; the losses are
    averaged, in evaluation mode.

    Args:
        run: a recorded run.
        memory: bytes to compute with.
        device: where to train.

    Raises:
        Untrainable: the run has no such examples, or they are not of the kind of the training samples.
    """
    own = own_samples(run)
    pool = validation_pool(run, own)
    trainings = [Retraining(seed, [frozenset()]) for seed in range(SEEDS)]
    thetas = torch.cat([retrain(run, one, memory, pool=pool, device=device) for one in trainings])
    objective = Replay(run).objective
    losses: np.ndarray = np.mean([losses_at(objective, theta, own) for theta in thetas], axis=0)
    return losses


def losses_at(objective: Objective, theta: torch.Tensor, pool: Pool) -> np.ndarray:
    """Losses (n,) of all samples of ``pool`` at parameters ``theta`` (p,), in evaluation mode."""
    leaves = batches.cast(pool.leaves, objective.dtype)
    with objective.evaluating():
        parts = [objective.losses(theta, batches.rows(leaves, rows)).detach() for rows in torch.arange(pool.size).split(1000)]
    losses: np.ndarray = torch.cat(parts).double().numpy()
    return losses


def validation_pool(run: Record, own: Pool) -> Pool:
    """The examples of the query ``val``, as samples to train on.

    Args:
        run: a recorded run.
        own: its own samples, which they must be like.

    Raises:
        Untrainable: there are none, or they are of another kind.
    """
    if QUERY not in run.query_names():
        raise Untrainable(f"the run has no query {QUERY}, as training had no validation data")
    query = queries.find(run, QUERY)
    wanted = _kind(own.leaves, run.structure())
    for leaves, structure in query.batches:
        if _kind(leaves, structure) != wanted:
            raise Untrainable(f"the batches of {QUERY} are not of the tensors and shapes that training batches are of")
    leaves = {name: torch.cat([part[name] for part, _ in query.batches]).to(leaf.dtype) for name, leaf in own.leaves.items()}
    return Pool(leaves, torch.arange(query.n_examples))


def with_validation(run: Record) -> Pool:
    """The run's own samples and, after them, the examples of the query ``val``.

    Raises:
        Untrainable: there are none, or they are of another kind.
    """
    own = own_samples(run)
    added = validation_pool(run, own)
    leaves = {name: torch.cat([leaf, added.leaves[name]]) for name, leaf in own.leaves.items()}
    return Pool(leaves, torch.cat([own.usable, own.size + added.usable]))


def why_not_added(run: Record, test: Query) -> str | None:
    """Why the validation examples cannot be added to the training samples, as part of a sentence; None where they can."""
    try:
        validation_pool(run, own_samples(run))
    except Untrainable as why:
        return str(why)
    if test.fingerprint == queries.find(run, QUERY).fingerprint:
        return f"it would be tested on {QUERY}, the very examples it is trained on"
    return None


def _kind(leaves: Leaves, structure: Structure) -> tuple[object, ...]:
    """What two batches must have in common: not the width of floating-point leaves, nor whether they are a tuple or a list."""
    return json.dumps(structure).replace('"tuple"', '"list"'), batches.signature(batches.cast(leaves, torch.float64))
