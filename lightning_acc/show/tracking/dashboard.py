"""``track``: everything known about a run into one W&B run."""

from __future__ import annotations

import os
from contextlib import nullcontext
from typing import Any

import pyarrow as pa

from lightning_acc.core.queries.moments import END, in_words
from lightning_acc.credentials import without_credentials
from lightning_acc.errors import RequestError
from lightning_acc.judge.agreement import stored_scores, truth_for
from lightning_acc.judge.samples import SampleViews
from lightning_acc.methods import registry
from lightning_acc.record.record import Record
from lightning_acc.scoring.scores import Scores
from lightning_acc.show.headline import headline
from lightning_acc.show.predictions import stored_matrices
from lightning_acc.show.tracking import panels
from lightning_acc.show.tracking.artifacts import results, tie
from lightning_acc.show.tracking.connection import start
from lightning_acc.show.tracking.driver import Live
from lightning_acc.show.tracking.groups import groups
from lightning_acc.show.tracking.predictions import predictions

_CONDITIONS = ("method", "query", "at", "readout", "dtype", "removals", "runs")


def track(
    run: Record,
    evaluation: list[dict[str, Any]] | None,
    project: str | None = None,
    directory: str | None = None,
    *,
    into: Live | None = None,
    over_time: int = 5,
) -> str:
    """Log what is known about a run to W&B, never asking anything; offline where there is no key.

    Its headline (``lightning_acc.show.headline``) stands in the summary, and as the notes. Logged are the rankings with
    pictures or text and all that is described of the samples, the groups these make, what made the worst predictions, the
    agreement with the truth, the removal curves of cleaning, the influence of the most harmful and most helpful samples over
    training time, cost, and the finding of corrupted samples; and as artifacts the results themselves, the ids of the samples
    to drop, and the data without them. Of these, what the run directory holds.

    Args:
        run: the recorded run with its scores.
        evaluation: rows of ``evaluate``, or None.
        project: the project; None takes that of the training's logger, else ``lightning-acc``.
        directory: where W&B keeps its files; None takes ``WANDB_DIR``, else the working directory.
        into: log into this open W&B run instead of one of its own.
        over_time: how many samples from each end of the ranking to follow over training time, which costs about as much
            as scoring with ``sgd-ie``, three trainings, unless it has been done; 0 leaves it out.

    Returns:
        Where the W&B run lies on this machine.

    Raises:
        RequestError: there are no scores to log.
    """
    tables = stored_scores(run)
    if not tables and not stored_matrices(run):
        raise RequestError(f"{run.path} has no scores yet: compute some with score(run, method=...) first.")
    cleaned = _cleaning(run)
    with nullcontext(into.tracked) if into else start(run, "influence", project, directory) as tracked:
        said = headline(run, tables)
        tie(tracked, run, tables, results(run, tables, evaluation, cleaned), said)
        if said is not None:
            tracked.summary["headline"] = tracked.notes = said.text
        views = SampleViews(run)
        pictures = panels.Pictures(views)
        for name, table in tables.items():
            tracked.log({f"ranking/{name}": panels.ranking(table, truth_for(tables, table), pictures)})
            tracked.summary.update(panels.verdict(name, table))
            grouped = groups(run, tables, name)
            if grouped is not None:
                tracked.log({f"groups/{name}": grouped})
            gallery = panels.gallery(table, views)
            if gallery:
                tracked.log({f"most harmful/{name}": gallery})
        for name, table in tables.items():
            truth = truth_for(tables, table)
            if truth is not None and not registry.is_truth(table.conditions["method"]):
                tracked.log({f"agreement/{name}-against-loo": panels.scatter(name, table, truth, views)})
        single = predictions(run, pictures)
        if single is not None:
            shown, verdict = single
            tracked.log({"predictions": shown})
            tracked.summary.update(verdict)
        found = None if views.corrupted is None else panels.detection(tables, views.corrupted)
        if found is not None:
            tracked.log({"finding the corrupted": found})
        if tables:
            tracked.log(panels.cost((_label(run, table.conditions), table) for table in tables.values()))
        if evaluation:
            _log_evaluation(tracked, run, evaluation)
        if cleaned is not None:
            tracked.log(panels.cleaning(cleaned))
            tracked.summary.update(panels.cleaning_summary(cleaned))
        if over_time:
            _log_over_time(tracked, run, tables, over_time)
        return str(os.path.dirname(tracked.dir))


def _cleaning(run: Record) -> pa.Table | None:
    from lightning_acc.judge import cleaning_table

    return cleaning_table.read(run)


def _log_evaluation(tracked: Any, run: Record, evaluation: list[dict[str, Any]]) -> None:
    import wandb

    columns: Any = list(evaluation[0])
    tracked.log({"agreement": wandb.Table(columns=columns, data=[[row[c] for c in columns] for row in evaluation])})
    for row in evaluation:
        for figure, value in row.items():
            if figure not in _CONDITIONS:
                tracked.summary[f"{_label(run, row)}/{figure}"] = value


def _log_over_time(tracked: Any, run: Record, tables: dict[str, Scores], count: int) -> None:
    from lightning_acc.show.over_time import follow

    try:
        followed = follow(run, count, tables)
    except RequestError as error:  # a loss without a second derivative has all the rest
        tracked.summary["over time/left out"] = without_credentials(str(error))
        return
    if followed is None:
        return
    views = SampleViews(run)
    ends = {"harmful": followed.harmful, "helpful": followed.helpful}
    titles = {sample: f"{end} {views[sample].called}" for end, samples in ends.items() for sample in samples}
    logged = panels.over_time(followed.visits, titles)
    if logged:
        tracked.log(logged)


def _label(run: Record, conditions: dict[str, Any]) -> str:
    """Method and readout, and of query, its steps, dtype, kind of removals and number of runs what is not as usual."""
    usual = {"query": "val", "dtype": run.scored_in, "removals": "samples"}
    other = [conditions[key] for key, value in usual.items() if conditions.get(key, value) != value]
    other += [] if conditions["at"] == END else [in_words(conditions["at"])]
    other += [f"mean of {conditions['runs']} runs"] if int(conditions.get("runs", 1)) > 1 else []
    return f"{conditions['method']} ({', '.join([conditions['readout'], *other])})"
