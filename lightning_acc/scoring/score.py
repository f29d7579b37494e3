"""``score``: from a run and a question to a table of scores."""

from __future__ import annotations

import os
import time
import warnings
from dataclasses import replace
from functools import reduce
from typing import Any

import numpy as np
import torch

from lightning_acc import arguments
from lightning_acc.core import devices, queries, rebuild
from lightning_acc.core import removals as removal_sets
from lightning_acc.core.queries import Query, moments
from lightning_acc.core.queries.moments import At
from lightning_acc.core.ranks import Ranks
from lightning_acc.core.removals import Removal
from lightning_acc.core.replay import Replay, explained
from lightning_acc.methods import registry
from lightning_acc.methods.method import Question
from lightning_acc.record.record import Record, opened
from lightning_acc.scoring import bank, pieces, several, shards
from lightning_acc.scoring.bank import Bank
from lightning_acc.scoring.scores import Scores
from lightning_acc.scoring.trust import check as checks
from lightning_acc.scoring.trust.check import Check
from lightning_acc.scoring.work import READOUTS, Job, Result, compute, table_name


@several.averaging
@explained
def score(
    run: Record | str | os.PathLike[str] | list[Any] | tuple[Any, ...],
    method: str = "acc-sgd-ie",
    removals: removal_sets.Wanted = None,
    query: str | Query = "val",
    readout: str | None = None,
    dtype: str | None = None,
    ray_address: str | None = "local",
    *,
    device: str = "auto",
    at: At = moments.END,
    check: Check = "auto",
    directions: int | None = None,
    followed: int | None = None,
    trainings: int | None = None,
    processes: int = 1,
    confirm: int = 0,
    keep_shifts: bool = False,
    memory_gb: arguments.Budget = "auto",
    bank_gb: float = bank.DEFAULT_GB,
    save: bool = True,
    progress: bool | None = None,
) -> Scores:
    """What would ``query`` have been in this very run without each of ``removals``, minus what it was?

    The experiment that is estimated: the same initial parameters, batches, learning rates and random numbers, but the
    loss weights of the removed samples are 0 in every step, and nothing else changes. ``method="loo"`` carries it out.

    Args:
        run: a recorded run, or its path; or a list of runs on the same data, such as those of ``fit --runs``: the mean of
            their scores, in ids of the first, with its standard error over the runs (see ``lightning_acc.scoring.several``).
        method: ``"loo"`` (the truth), ``"acc-sgd-ie"``, ``"acc-low-rank"``, ``"sgd-ie"`` or ``"tracin"``.
        removals: None for every sample by itself; a list of sample ids; a list of lists of ids, each removed together; or
            such lists by their names, which then stand in the table. A text in place of an id is what the batches call the
            sample (``run.sample_names``).
        query: name of a query recorded with the run, or a ``Query``.
        readout: ``"exact"`` evaluates the query at the shifted parameters; ``"linear"`` takes the shift's product with its
            gradient. None is exact for methods that carry shifts (``loo``, ``acc-sgd-ie``) and linear for ``sgd-ie`` and
            ``tracin``, whose one reverse sweep then answers for all samples; asked for ``"exact"`` these carry shifts too.
            For ``acc-low-rank`` None is exact, for the most influential removals where there are too many to read all so: the
            query's curvature, told by a few directions of it, is read for the others where it helps those. Of an optimizer
            whose update is not affine (Adam, or any that clips) None is linear, and ``"exact"`` this curvature for all, for a
            query that is made of losses of torch (``lightning_acc.core.queries.curvature``).
        dtype: None as recorded; ``"float64"`` replays the run in double precision.
        device: ``"cpu"``, ``"cuda"`` or one of several GPUs (``"cuda:1"``); ``"auto"`` is the GPU where there is one. What
            drew random numbers (dropout) is replayed on the kind of device they were drawn on.
        ray_address: ``"local"`` starts Ray on this machine for this call, ``"auto"`` or ``"ray://..."`` uses a running
            cluster, None computes in this process without Ray.
        directions: of ``acc-low-rank``: in how many it follows the contraction of the training, 0 in none. None chooses by
            ``trainings``; see ``lightning_acc.methods.low_rank.entry``.
        followed: of ``acc-low-rank``: how many removals it follows exactly, the most influential by ``sgd-ie``; others are
            corrected by what these tell (``lightning_acc.methods.low_rank.screened``). Where the update is not affine: how many
            it takes through the optimizer's updates, the rest keeping SGD-IE's scores (``methods.low_rank.defect``).
        trainings: of ``acc-low-rank``: what its ranking of all samples may cost, in trainings of the run; None: 25. Where that
            pays for training again without each of them, this is what it does (``conditions["form"]`` is ``"retrained"``).
        processes: of Ray, that take one sweep back together (``sgd-ie``, ``tracin``), each with some rows of every batch, in
            memory of its own: for steps that are large. Its scores differ by round-off from those of one.
        at: when the query is read: ``"end"``, the papers' question; ``"along"``, the mean over every twentieth step, and 20
            at least, spread evenly over the run: what the samples did to the learning curve, which the last steps' noise weighs
            less in (``"along:K"``: over K); a step, or a list of steps: their mean; a name in ``run.checkpoints``, such as
            ``"best"``; or one in ``run.averages`` (``"ema"``, ``"swa"``): the average of the parameters that a callback kept.
        check: how many removals to retrain without (``loo``), so that the scores can say how far they are to be trusted: two
            thirds at random, for the verdict, which needs 12, and the rest the most extreme. Their true scores stand in the
            table.
            ``"auto"`` is 48, or 18, as the time of the scoring itself or a minute allows; 0 leaves the scores unchecked.
            Groups too large for an estimate (2 % of the samples or more) are all retrained without, unless it is 0.
        confirm: so many of the most harmful removals are also retrained without. Estimates screen, the truth confirms.
        keep_shifts: also return the shifts of the parameters, (n_removals, p), at the end, or at the last step of ``at``; of an
            average, its own.
        memory_gb: budget of each process for what it computes with, beyond the run's data itself; on a GPU, of its memory.
            ``"auto"``: 2 on the CPU, or what one removal needs where that is more; half of what is free of a GPU. States of
            the run beyond it go to a temporary file, on a quarter of what is free there (``TMPDIR``). Where steps
            are large, each also computes on the cores that the others leave, ``torch.get_num_threads()`` at most:
            ``conditions["threads"]`` tells on how many.
        bank_gb: how much the run directory may hold of what retraining ended with (``bank/``): from this, removals that were
            retrained without answer another query at no training, of ``score`` or of ``score_matrix``.
        save: store the scores in the run directory, where ``evaluate`` and the report find them, piece by piece as they
            are done; removals scored before under the same conditions are taken from there.
        progress: show a progress bar; None shows one in a terminal, and elsewhere a line now and then.

    Returns:
        The scores: positive where the samples help, negative where they harm.

    Raises:
        RunError: the run directory cannot be read.
        RequestError: there is no such method, query, sample, readout, dtype or device; or ``processes`` have nothing to share;
            or groups too large for an estimate
            take more than an hour to be retrained without.
    """
    assert not isinstance(run, (list, tuple))  # they are taken apart before
    run = opened(run)
    _tell_of_the_best(run, at)
    confirm = arguments.whole("confirm", confirm, "is no number of removals to retrain without")
    ray_address = arguments.ray_address(ray_address)
    place = devices.chosen(device, run)
    when, portable = moments.find(run, at), rebuild.portable(run)
    configured = registry.find(method).configured(directions=directions, followed=followed, trainings=trainings)
    shared = Ranks(0, arguments.whole("processes", processes, "is no number of processes", least=1))
    # Refuses what cannot be replayed before any worker starts; and tells what one of several processes needs.
    replay = Replay(portable, dtype, when.last, device=place, ranks=shared)
    chosen = configured.settled(replay, keep_shifts)
    memory, bank_bytes = devices.budget(memory_gb, place, registry.least_bytes(chosen, replay)), bank.budget(bank_gb)
    readout = chosen.default_readout(keep_shifts) if readout is None else arguments.choice("readout", readout, READOUTS)
    check = checks.parse(check)
    wanted, names = removal_sets.named(removals, run)
    question = Question(queries.find(run, query), when, readout, keep_shifts, memory)
    job = Job(portable, chosen, question, dtype, place)
    distinct = list(dict.fromkeys(wanted))
    started = time.perf_counter()
    conditions = job.conditions(distinct)
    name = table_name(conditions, run.scored_in)
    # What was retrained is kept, for questions that are still to come.
    kept = Bank(run, conditions, bank_bytes) if chosen.is_truth and save and not keep_shifts else None
    if kept is not None and kept.fits(replay, question.moments, len(distinct)):
        job = replace(job, question=replace(question, keep_shifts=True))
    if processes != 1:
        pieces.refuse_undivided(replay, chosen, question, processes, ray_address)
    parts_of_work = chosen.pieces(replay, distinct, job.question)
    alone = replay if processes == 1 else Replay(portable, dtype, when.last, device=place)
    if check and not chosen.is_truth:
        checks.refuse_too_dear(alone, question.memory, distinct)

    # What a function computes may depend on more than its code and data.
    reusable = save and not keep_shifts and question.query.function is None
    stored = shards.stored(run, conditions, name) if reusable else None
    left = shards.missing(parts_of_work, stored)
    banked = Scores.build([], np.zeros(0), {**conditions, **shards.FREE})
    if kept is not None and left:
        open_ones = [removal for piece in left for removal in piece]
        found, values, threads = kept.answer(replay, question, open_ones)
        banked = Scores.build(found, values, {**conditions, **shards.FREE, "threads": threads})
        known = set(banked.removals)
        for piece in left:  # stored as what is computed is
            if mine := [removal for removal in piece if removal in known]:
                shards.write(run, banked.picked(mine, {**banked.conditions, "n": len(mine)}))
        left = shards.missing(left, banked)
    amount = sum(map(len, left))
    failed: list[tuple[list[Removal], str]] = []
    finished: list[tuple[list[Removal], Result]] = []
    for piece, result in pieces.compute_all(
        replay, job, compute, left, ray_address, progress, amount, failed, processes=processes
    ):
        if save:
            cost = {"n": len(piece), "wall_seconds": result.seconds, **result.cost}
            shards.write(run, Scores.build(piece, result.scores, {**conditions, **cost}, more=result.more))
        if kept is not None:
            kept.keep(question.moments.steps, piece, result)
            result = replace(result, shifts=None)
        finished.append((piece, result))
    if failed:
        if save:
            shards.gather(run, conditions, name, None)
        pieces.refuse_failures([(removal, why) for piece, why in failed for removal in piece], amount, save)

    parts = [
        Scores.build(piece, result.scores, {"seconds": 0.0, "threads": result.threads}, more=result.more)
        for piece, result in finished
    ]
    parts += [banked, *([stored] if stored is not None else [])]
    whole = reduce(Scores.merged, parts)
    conditions.update(
        n=len(distinct),
        reused=len(distinct) - amount - len(banked),
        banked=len(banked),
        seconds=sum(result.seconds for _, result in finished),
        wall_seconds=time.perf_counter() - started,
        peak_memory_gb=max((result.peak_memory_gb for _, result in finished), default=0.0),
        threads=whole.conditions["threads"],
    )
    if finished and processes > 1:
        conditions["processes"] = str(processes)
    told: list[dict[str, Any]] = [result.details for _, result in finished]
    earlier = {} if stored is None else stored.conditions
    of_a_piece = told[0] if told else {key: earlier[key] for key in chosen.details if key in earlier}
    conditions.update(chosen.told(of_a_piece, len(distinct)))
    scores = whole.picked(distinct, conditions).named(names)
    if not chosen.is_truth:

        def retrain(some: list[Removal]) -> Scores:
            return score(
                run, registry.TRUTH, some, query, at=at, dtype=dtype, device=device, ray_address=ray_address,
                memory_gb=memory_gb, bank_gb=bank_gb, save=save, progress=progress,
            )  # fmt: skip

        seconds = scores.conditions["wall_seconds"]
        scores = checks.check_scores(scores, alone, question.memory, check, seconds, retrain, confirm)
    if save and wanted:
        shards.gather(run, conditions, name, scores)
    shifts = _shifts(run, wanted, finished) if keep_shifts else None
    scores = scores.picked(wanted, scores.conditions, shifts)
    for text in [*_without_a_score(scores), *chosen.warnings(told)]:
        warnings.warn(text, UserWarning, stacklevel=4)
    return scores


_told: set[str] = set()
"""Runs of whose best checkpoint was told."""


def _tell_of_the_best(run: Record, at: At) -> None:
    """Where the end is asked about, and another checkpoint was the best: that there is one; once for each run."""
    best = run.checkpoints.get("best", run.n_steps)
    if isinstance(at, str) and at == moments.END and best != run.n_steps and run.hash not in _told:
        _told.add(run.hash)
        what = f'The best checkpoint of {run.path} was written after step {best} of {run.n_steps}: at="best" asks about it.'
        warnings.warn(what, UserWarning, stacklevel=5)


def _shifts(run: Record, wanted: list[Removal], finished: list[tuple[list[Removal], Result]]) -> torch.Tensor:
    """Shifts (n_removals, p) in the order asked for, at the last of the steps that were asked about."""
    rows: dict[Removal, torch.Tensor] = {}
    for piece, result in finished:
        assert result.shifts is not None
        rows.update(zip(piece, result.shifts[-1], strict=True))
    return torch.stack([rows[removal] for removal in wanted]) if wanted else torch.zeros(0, run.n_parameters)


def _without_a_score(scores: Scores) -> list[str]:
    """That removals have no finite score, in a sentence, where some have none."""
    unbounded = [removal for removal, value in scores.by_removal().items() if not np.isfinite(value)]
    if not unbounded:
        return []
    which = f"{len(unbounded)} of {len(set(scores.removals))} removals have no finite score ({pieces.few(unbounded)})"
    return [f"{which}: without them the run, or its estimate, diverges. The others are not affected."]
