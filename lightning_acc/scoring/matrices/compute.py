"""``score_matrix``: from a question about every example to a matrix of scores, block by block, over Ray, resumable."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch

from lightning_acc import arguments
from lightning_acc.core import devices, queries, rebuild
from lightning_acc.core import removals as removal_sets
from lightning_acc.core.queries import Query, moments
from lightning_acc.core.queries.moments import At
from lightning_acc.core.removals import Removal
from lightning_acc.core.replay import Replay, explained, parameters_at
from lightning_acc.errors import RequestError
from lightning_acc.methods import registry
from lightning_acc.methods.method import Question
from lightning_acc.record.record import Record, opened
from lightning_acc.record.store import digest
from lightning_acc.scoring import bank, pieces, scores, shards
from lightning_acc.scoring.bank import Bank
from lightning_acc.scoring.matrices import matrix as matrices
from lightning_acc.scoring.matrices.matrix import ScoreMatrix
from lightning_acc.scoring.trust import check as checks
from lightning_acc.scoring.trust.check import Check
from lightning_acc.scoring.trust.verdict import UNCHECKED
from lightning_acc.scoring.work import READOUTS, Job, Result, compute, table_name


@dataclass(frozen=True)
class Block:
    """What is worked on at once: some removals, some examples of the query."""

    removals: list[Removal]
    examples: list[int]

    def smaller(self, job: Job) -> list[Block]:
        """The block in two, by examples; of one example, as the method makes pieces smaller."""
        middle = len(self.examples) // 2
        if middle:
            return [Block(self.removals, self.examples[:middle]), Block(self.removals, self.examples[middle:])]
        return [Block(part, self.examples) for part in job.method.smaller(self.removals, job.question)]


def compute_block(job: Job, block: Block, progress: Callable[[float], None], replay: Replay | None = None) -> Result:
    """Score one block in this process."""
    question = replace(job.question, query=job.question.query.picked(block.examples))
    return compute(replace(job, question=question), block.removals, progress, replay)


@explained
def score_matrix(
    run: Record | str | os.PathLike[str],
    method: str = "sgd-ie",
    query: str | Query = "val",
    examples: Iterable[int] | None = None,
    removals: removal_sets.Wanted = None,
    at: At = moments.END,
    readout: str | None = None,
    dtype: str | None = None,
    ray_address: str | None = "local",
    *,
    device: str = "auto",
    check: Check = "auto",
    memory_gb: arguments.Budget = "auto",
    bank_gb: float = bank.DEFAULT_GB,
    save: bool = True,
    progress: bool | None = None,
) -> ScoreMatrix:
    """How much does each removal change the query's value of *each example*: which samples made this prediction what it is?

    The mean over the examples is what ``score`` says of the query. ``sgd-ie`` and ``tracin`` take the adjoints of many examples
    back through the run together, about half a training for each; ``loo`` and ``acc-sgd-ie`` read every example at the shifted
    parameters, at little more than ``score`` costs; ``acc-low-rank`` asks anew for each example.

    Args:
        run: a recorded run, or its path.
        method: as for ``score``.
        query: name of a query recorded with the run, or a ``Query`` whose function gives a value for each example.
        examples: numbers of examples, from 0 in the order of the query's data; None for all.
        removals: as for ``score``.
        at: as for ``score``.
        readout: as for ``score``.
        dtype: as for ``score``; the matrix itself is float32.
        device: as for ``score``.
        ray_address: as for ``score``; blocks are examples, for methods that sweep back, else removals.
        check: how many removals to retrain without, for the matrix' verdict: the mean over the examples of the rank correlation
            with the truth. As for ``score``, whose own check is taken where its shifts are in the bank.
        memory_gb: as for ``score``; the matrix itself takes 4 bytes a number beside it.
        bank_gb: as for ``score``.
        save: store the matrix as ``matrices/<name>.safetensors`` in the run directory, and its blocks as they are done.
        progress: as for ``score``.

    Raises:
        RunError: the run directory cannot be read.
        RequestError: there is no such method, query, example, sample, readout, moment, dtype or device.
    """
    run = opened(run)
    ray_address, place = arguments.ray_address(ray_address), devices.chosen(device, run)
    when, portable = moments.find(run, at), rebuild.portable(run)
    replay = Replay(portable, dtype, when.last, device=place)
    chosen = registry.find(method).configured().settled(replay, False)
    memory = devices.budget(memory_gb, place, registry.least_bytes(chosen, replay, each=True))
    readout = chosen.default_readout(False) if readout is None else arguments.choice("readout", readout, READOUTS)
    check = checks.parse(check)
    wanted, _ = removal_sets.named(removals, run)
    asked = queries.find(run, query)
    columns = _examples(asked, examples)
    question = Question(asked, when, readout, False, memory, each=True)
    job = Job(portable, chosen, question, dtype, place)
    distinct = list(dict.fromkeys(wanted))

    started = time.perf_counter()
    conditions = job.conditions(distinct)
    name = table_name(conditions, run.scored_in)
    every = len(columns) == asked.n_examples and distinct == [(i,) for i in range(run.n_samples)]
    kept = _Kept(run, conditions, name, None if every else (distinct, columns), save and asked.function is None)
    known = kept.found()
    by_example = np.full((len(columns), len(distinct)), np.nan, dtype=np.float32)
    values = by_example.T
    there = np.zeros(values.shape, dtype=bool)
    fill = partial(_fill, values, there, _places(distinct), _places(columns))
    used = [part.conditions for part in known]
    for part in known:
        fill(part.removals, part.examples, part.values)
    left = [removal for removal, row in zip(distinct, there, strict=True) if not row.all()]
    vault = Bank(run, conditions, bank.budget(bank_gb)) if chosen.is_truth and save else None
    if vault is not None and left:
        banked, read, threads = vault.answer(replay, replace(question, query=asked.picked(columns)), left)
        if banked:
            fill(banked, sorted(columns), read)
            used.append({"threads": threads})
            left = [removal for removal in left if removal not in set(banked)]
        job = replace(job, question=replace(question, keep_shifts=vault.fits(replay, question.moments, len(left))))
    open_columns = [example for example, column in zip(columns, there.T, strict=True) if not column.all()]
    blocks = [Block(*parts) for parts in chosen.blocks(replay, left, sorted(open_columns), job.question)] if left else []

    def keep(block: Block, result: Result) -> None:
        fill(block.removals, block.examples, result.scores)
        if save:
            told = {**conditions, "threads": str(result.threads)}
            kept.keep(ScoreMatrix(block.removals, block.examples, told, np.float32(result.scores.T)))
            if vault is not None:
                vault.keep(question.moments.steps, block.removals, result)

    seconds, peak = 0.0, 0.0
    failed: list[tuple[Block, str]] = []
    amount = sum(len(block.examples) for block in blocks)
    for block, result in pieces.compute_all(
        replay, job, compute_block, blocks, ray_address, progress, amount, failed, "examples"
    ):
        keep(block, result)
        used.append({"threads": result.threads})
        seconds, peak = seconds + result.seconds, max(peak, result.peak_memory_gb)
    if failed:
        lost = [((example,), why) for block, why in failed for example in block.examples]
        pieces.refuse_failures(lost, amount, save, "examples")
    conditions.update(
        n=len(distinct),
        reused=int(there.size - sum(len(block.removals) * len(block.examples) for block in blocks)),
        seconds=seconds,
        wall_seconds=time.perf_counter() - started,
        peak_memory_gb=peak,
        threads=scores.threads(*used),
    )
    whole = ScoreMatrix(distinct, columns, conditions, by_example)
    if not chosen.is_truth:

        def retrain(some: list[Removal]) -> ScoreMatrix:
            return score_matrix(
                run, registry.TRUTH, query, columns, some, at, None, dtype, ray_address,
                device=device, memory_gb=memory_gb, bank_gb=bank_gb, save=save, progress=progress,
            )  # fmt: skip

        verdict = checks.check_matrix(
            distinct, whole.values, replay, memory, check, conditions["wall_seconds"], lambda some: retrain(some).values
        )
        before = next((part.verdict for part in known if (part.removals, part.examples) == (distinct, columns)), verdict)
        # What is stored may have been checked before, and is the same.
        kept_verdict = before if verdict.word == UNCHECKED and not blocks else verdict
        conditions["verdict"] = kept_verdict.to_json()
    if save and wanted:
        kept.write(whole)
    return whole.picked(wanted, columns, conditions)


def final_values(replay: Replay, query: Query) -> torch.Tensor:
    """The value of each example of a query at the run's last parameters, (examples,)."""
    theta = parameters_at(replay.run, replay.run.n_steps).to(replay.dtype)
    return query.values(replay.objective, theta[None], each=True)[0].detach()


def worst_examples(run: Record, query: str | Query, count: int) -> list[int]:
    """The ``count`` examples of a query whose value, such as the loss, is highest at the end of the run, the highest first."""
    order: list[int] = (
        final_values(Replay(run), queries.find(run, query)).argsort(descending=True, stable=True)[:count].tolist()
    )
    return order


def _examples(query: Query, examples: Iterable[int] | None) -> list[int]:
    """The examples asked about, each once.

    Raises:
        RequestError: there is no such example.
    """
    if examples is None:
        return list(range(query.n_examples))
    found = []
    for example in arguments.listed("examples", examples, "numbers of examples"):
        number = arguments.index(example)
        if number is None or not 0 <= number < query.n_examples:
            raise RequestError(
                f"There is no example {arguments.shown(example)}: the query {query.name!r} has the examples 0 to "
                f"{query.n_examples - 1}."
            )
        found.append(number)
    return list(dict.fromkeys(found))


def _places(of: Iterable[Any]) -> dict[Any, int]:
    return {one: i for i, one in enumerate(of)}


def _fill(
    values: np.ndarray,
    there: np.ndarray,
    rows: dict[Removal, int],
    columns: dict[int, int],
    removals: list[Removal],
    examples: list[int],
    found: np.ndarray,
) -> None:
    """Put what was found (removals, examples) where it belongs; what is not asked for is left out."""
    mine = [i for i, removal in enumerate(removals) if removal in rows]
    own = [i for i, example in enumerate(examples) if example in columns]
    place = np.ix_([rows[removals[i]] for i in mine], [columns[examples[i]] for i in own])
    values[place] = found[np.ix_(mine, own)]
    there[place] = True


class _Kept:
    """What is stored of matrices under these conditions: whole ones, and the blocks of one that was not finished.

    Args:
        run: the run.
        conditions: of the matrix.
        name: of the table of scores with the same conditions, which the matrix of all samples and examples is named as.
        part: the removals and examples of another one, whose name tells it apart.
        reusable: whether what is stored may be used.
    """

    def __init__(
        self, run: Record, conditions: dict[str, Any], name: str, part: tuple[list[Removal], list[int]] | None, reusable: bool
    ) -> None:
        self._run, self._conditions, self._reusable, self._table = run, conditions, reusable, name
        self._name = name if part is None else f"{name}.{_which(*part)[:8]}"
        self._prefix = f"{matrices.PART}{shards.key(conditions)}-"

    def found(self) -> list[ScoreMatrix]:
        """Everything there is."""
        if not self._reusable:
            return []
        mine = [name for name in matrices.names(self._run.store) if name == self._table or name.startswith(f"{self._table}.")]
        read = [self._read(name) for name in [*mine, *self._blocks()]]
        return [matrix for matrix in read if matrix is not None]

    def _blocks(self) -> list[str]:
        return [name for name in matrices.names(self._run.store, parts=True) if name.startswith(self._prefix)]

    def _read(self, name: str) -> ScoreMatrix | None:
        file = f"{matrices.FOLDER}/{name}.safetensors"
        found = shards.intact(self._run, file, partial(matrices.read, self._run.store, name, self._run.n_samples))
        return found if found is not None and shards.same(found.conditions, self._conditions) else None

    def keep(self, block: ScoreMatrix) -> None:
        """Store a block."""
        matrices.write(self._run.store, self._prefix + _which(block.removals, block.examples), block)

    def write(self, whole: ScoreMatrix) -> None:
        """Store the whole; its blocks are not needed any more, and go."""
        matrices.write(self._run.store, self._name, whole)
        done = [f"{matrices.FOLDER}/{name}.safetensors" for name in self._blocks()]
        if done:
            self._run.store.remove(*done)


def _which(removals: list[Removal], examples: list[int]) -> str:
    """What tells parts of a matrix apart."""
    return digest(json.dumps([removals, examples]).encode())[:16]
