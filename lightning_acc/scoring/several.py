"""Several runs on the same data: the mean of their scores, and how far it may be off.

The scores of one run are of one seed: its initial parameters, its order of the samples. What the runs agree on is of the data.

Samples are told by their content, as each run saw them first, and not by their ids. Where every sample that two runs saw
agrees id by id, their ids mean the same, those of samples that one of them never saw included. Otherwise a sample's counterpart
is the one of the same content; equal ones are matched in the order of their ids. A sample that one of the runs never saw then
has none, and a removal that lacks one in any run is refused: the mean over some of the runs alone is no rank among the others.
Augmented at random, a sample looks different in every run, and cannot be told.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import wraps
from typing import Any, TypeVar, cast

import numpy as np

from lightning_acc import arguments
from lightning_acc.core import queries
from lightning_acc.core import removals as removal_sets
from lightning_acc.core.queries import Query, moments
from lightning_acc.core.queries.moments import At
from lightning_acc.core.removals import Removal
from lightning_acc.errors import RequestError
from lightning_acc.methods import registry
from lightning_acc.record.record import Record, opened
from lightning_acc.scoring import cluster, pieces, shards
from lightning_acc.scoring.scores import Scores, threads
from lightning_acc.scoring.trust.verdict import FAITHFUL, Verdict, judge, unchecked
from lightning_acc.scoring.work import table_name

Verb = TypeVar("Verb", bound=Callable[..., Scores])
Counterparts = dict[int, int]
"""The samples of another run, by the ids of the first."""


def averaging(verb: Verb) -> Verb:
    """``verb``, which scores a ``run``, that also takes a list of runs: then it scores each, and gives their mean.

    Ray starts once for all of them, and for the retrainings that check them.
    """
    signature = inspect.signature(verb)

    @wraps(verb)
    def of_any(*given: Any, **options: Any) -> Scores:
        with cluster.kept():
            if not isinstance((*given, options.get("run"))[0], (list, tuple)):
                return verb(*given, **options)
            bound = signature.bind(*given, **options)
            bound.apply_defaults()
            return mean_of_runs(verb, **bound.arguments)

    return cast(Verb, of_any)


def mean_of_runs(verb: Callable[..., Scores], run: Sequence[Any], **asked: Any) -> Scores:
    """The mean of the scores of several runs, by ``verb``, which is asked for each of them in turn.

    Returns:
        The mean scores, in ids of the first run, with their standard error over the runs as ``uncertainty``. A score is the
        truth where all runs were retrained without the removal.

    Raises:
        RequestError: the runs share too little, or ask different questions by the same words.
    """
    runs = [opened(one) for one in run]
    if len(runs) < 2:
        if not runs:
            raise RequestError("run=[] is no run: give a recorded run, or a list of runs on the same data.")
        return verb(runs[0], **asked)
    _refuse_twice(runs)
    if asked["keep_shifts"]:
        raise RequestError(
            f"keep_shifts=True asks for one shift, but each of {len(runs)} runs has its own: score them one by one."
        )
    confirm = arguments.whole("confirm", asked["confirm"], "is no number of removals to retrain without")
    first = runs[0]
    wanted, names = removal_sets.named(asked["removals"], first)
    distinct = list(dict.fromkeys(wanted))
    _refuse_other_questions(runs, asked["query"])
    at = asked["at"] = asked["at"] if isinstance(asked["at"], str) or not np.iterable(asked["at"]) else list(asked["at"])
    when = _when(runs, at)
    maps = _counterparts_of(runs)
    for other, known in zip(runs, maps, strict=True):
        _refuse_missing(first, other, distinct, known)

    def of_all(some: list[Removal], **more: Any) -> list[Scores]:
        theirs = [[tuple(sorted(known[i] for i in removal)) for removal in some] for known in maps]
        return [verb(one, **{**asked, "removals": ids, **more}) for one, ids in zip(runs, theirs, strict=True)]

    tables = of_all(distinct, confirm=0)
    truths = _truths(tables)
    conditions = _conditions(runs, tables, when)
    scores = _mean(distinct, tables, truths, conditions)
    if not registry.is_truth(conditions["method"]):
        verdict = _verdict(scores, tables, asked["check"])
        more = [removal for removal in scores.most_harmful(confirm) if removal not in scores.truths]
        if more:
            plain = {"readout": None, "directions": None, "followed": None, "trainings": None, "processes": 1, "confirm": 0}
            found = _truths(of_all(more, method=registry.TRUTH, **plain))
            truths.update({distinct.index(removal): found[i] for i, removal in enumerate(more)})
        scores = _mean(distinct, tables, truths, {**conditions, "verdict": verdict.to_json()})
    scores = scores.named(names)
    if asked["save"] and wanted:
        shards.gather(first, conditions, table_name(conditions, first.scored_in), scores)
    return scores.picked(wanted, scores.conditions)


def _mean(removals: list[Removal], tables: list[Scores], truths: dict[int, np.ndarray], conditions: dict[str, Any]) -> Scores:
    """The mean of tables whose rows are the same removals, with true scores (runs,) of some rows."""
    estimates = np.array([table.estimates for table in tables])
    values = estimates.copy()
    for row, true in truths.items():
        values[:, row] = true
    with np.errstate(invalid="ignore"):  # of what diverged in one run or another
        uncertainty = values.std(0, ddof=1) / np.sqrt(len(tables))
        more: dict[str, np.ndarray] = {"uncertainty": uncertainty}
        if any("diverged" in table.more for table in tables):
            more["diverged"] = np.any([table.more.get("diverged", np.zeros(len(table), bool)) == True for table in tables], 0)  # noqa: E712
        means = {removals[row]: float(np.mean(true)) for row, true in truths.items()}
        return Scores.build(removals, estimates.mean(0), conditions, None, more, means)


def _truths(tables: list[Scores]) -> dict[int, np.ndarray]:
    """By row the true scores (runs,) of what all runs were retrained without."""
    known = [table.truths for table in tables]
    rows = zip(*(table.removals for table in tables), strict=True)
    found = {i: [some.get(removal) for some, removal in zip(known, row, strict=True)] for i, row in enumerate(rows)}
    return {i: np.array(scores) for i, scores in found.items() if None not in scores}


def _verdict(scores: Scores, tables: list[Scores], check: object) -> Verdict:
    """The verdict on a mean: what all runs were retrained without tells of the mean as of each."""
    if check == 0 or not len(scores):
        return unchecked("nothing was retrained without, as check=0" if len(scores) else "there are no removals")
    # The same draw in each run, but for how many it could afford; of these the first is a part of the other.
    random, extremes = (_common(scores, tables, kind) for kind in ("random", "extremes"))
    if random:
        verdict = judge(scores.by_removal("estimate"), scores.truths, random, extremes)
        if verdict.spearman is not None and verdict.word != FAITHFUL:
            verdict = verdict.because(f"what would help: method={registry.TRUTH!r}, for all removals or for the top alone")
    elif len(scores.truths) == len(scores):
        verdict = Verdict(FAITHFUL, reason=f"all {len(scores)} removals were retrained without: these are true scores")
    else:
        reasons = [table.verdict.reason for table in tables if table.verdict.spearman is None]
        verdict = unchecked(reasons[0] if reasons else "the runs were retrained without different removals")
    marked = scores.more.get("diverged", np.zeros(len(scores), dtype=bool))
    return replace(verdict, n_diverged=int((marked | ~np.isfinite(scores.estimates)).sum()))


def _common(scores: Scores, tables: list[Scores], kind: str) -> list[Removal]:
    """Removals that the check of every run picked as one ``kind``, and that all were retrained without."""
    picked = [set(getattr(table.verdict, kind)) for table in tables]
    rows = zip(scores.removals, *(table.removals for table in tables), strict=True)
    truths = scores.truths
    return [ours for ours, *row in rows if ours in truths and all(one in some for one, some in zip(row, picked, strict=True))]


def _conditions(runs: list[Record], tables: list[Scores], when: str) -> dict[str, Any]:
    """Those of the first run's table, with what is of all of them."""
    each = [table.conditions for table in tables]
    first, *others = (run.hash for run in runs)
    cost = {name: sum(one[name] for one in each) for name in ("seconds", "wall_seconds")}
    conditions = {
        **each[0],
        **cost,
        "peak_memory_gb": max(one["peak_memory_gb"] for one in each),
        "threads": threads(*each),
        "reused": min(one["reused"] for one in each),
        "at": when,
        "runs": len(runs),
        "run_hashes": " ".join([first, *sorted(others)]),
    }
    conditions.pop("verdict", None)
    return conditions


def _when(runs: list[Record], at: At) -> str:
    """What the steps are called: as of one run where all call them the same, else as they were asked for."""
    found = {moments.find(run, at).name for run in runs}
    if len(found) == 1:
        return found.pop()
    asked = ",".join(map(str, at)) if isinstance(at, list) else str(at)
    return re.sub(r"[^\w.,:-]", "_", asked)


def _counterparts_of(runs: list[Record]) -> list[Counterparts]:
    """For every run its samples by the ids of the first."""
    ours = runs[0].content_digests()
    found = [{i: i for i in range(runs[0].n_samples)}]
    return found + [counterparts(ours, other.content_digests(), runs[0].n_samples, other.n_samples) for other in runs[1:]]


def counterparts(ours: dict[int, str], theirs: dict[int, str], n_ours: int, n_theirs: int) -> Counterparts:
    """The sample of another run with the same content, by the id of this one's.

    Args:
        ours: hash of the content of every sample that was seen, by its id.
        theirs: the other run's.
        n_ours: how many samples there are, seen or not.
        n_theirs: the other run's.
    """
    both = ours.keys() & theirs.keys()
    # A few that agree may do so by chance, where most were seen by one of the runs alone.
    if n_ours == n_theirs and 2 * len(both) >= max(len(ours), len(theirs), 1) and all(ours[i] == theirs[i] for i in both):
        return {i: i for i in range(n_ours)}
    places: dict[str, list[int]] = {}
    for sample in sorted(theirs, reverse=True):
        places.setdefault(theirs[sample], []).append(sample)
    return {sample: places[ours[sample]].pop() for sample in sorted(ours) if places.get(ours[sample])}


def _refuse_twice(runs: list[Record]) -> None:
    seen: dict[str, Record] = {}
    for run in runs:
        if run.hash in seen:
            raise RequestError(
                f"{run.path} and {seen[run.hash].path} are one and the same run: give each once, as a mean over runs tells "
                "nothing where they are the same."
            )
        seen[run.hash] = run


def _refuse_other_questions(runs: list[Record], query: str | Query) -> None:
    if isinstance(query, Query):
        return
    ours = queries.find(runs[0], query).fingerprint
    for other in runs[1:]:
        if queries.find(other, query).fingerprint != ours:
            raise RequestError(
                f"The query {query!r} of {other.path} has other examples than that of {runs[0].path}: pass one Query(name, "
                "loader) for all runs."
            )


def _refuse_missing(first: Record, other: Record, removals: list[Removal], known: Counterparts) -> None:
    missing = [removal for removal in removals if any(i not in known for i in removal)]
    if missing:
        raise RequestError(
            f"{len(missing)} of the {len(removals)} removals ({pieces.few(missing)}) hold samples of {first.path} that have no "
            f"counterpart of the same content among those that {other.path} saw, which shares {len(known)} samples with it: "
            "give runs on the same data, without random augmentation, or removals= of what all of them saw."
        )
