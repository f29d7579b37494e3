"""``write_report``: one self-contained HTML page about a run, readable offline.

``collect`` gathers what the page shows as plain JSON; the files in ``page`` show it.
"""

from __future__ import annotations

import base64
import hashlib
import importlib.resources
import json
import os
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from lightning_acc import arguments
from lightning_acc.core.queries.moments import END
from lightning_acc.errors import RequestError
from lightning_acc.judge.agreement import stored_scores, truth_for
from lightning_acc.judge.samples import SampleViews, detection_precision
from lightning_acc.methods import registry
from lightning_acc.record.record import Record, opened
from lightning_acc.scoring.scores import Scores
from lightning_acc.scoring.trust.figures import shown
from lightning_acc.show.headline import headline
from lightning_acc.show.over_time import follow
from lightning_acc.show.report import curves, groups, predictions, samples
from lightning_acc.show.report.curves import finite
from lightning_acc.show.report.samples import shortened

SHOWN = 24
"""Samples shown as pictures from each end of a ranking."""
CURVE_POINTS, DRAWN = 200, 2000
"""Points of a curve, and of a scatter plot, at most."""
WHOLE = 200_000
"""Rankings up to this long are embedded whole."""
ENDS = 1000
"""Samples embedded from each end of a longer ranking, and whose pictures come first."""
SCRIPTS = (
    *("tools", "samples", "agreement", "charts", "columns", "filters", "table", "selection", "detail", "rankings"),
    *("groups", "over_time", "cleaning", "predictions", "end"),
)
STYLES = ("page", "table", "predictions")
"""Files of ``page``, in the order in which they are read."""


def write_report(run: Record | str | os.PathLike[str], over_time: int = 0) -> str:
    """Write ``report/index.html`` in the run directory: agreement, rankings with pictures, detection, cleaning, cost.

    Args:
        run: a recorded run with scores, or its path.
        over_time: how many samples from each end of the ranking to follow over training, which costs about as much as scoring
            with ``sgd-ie``, three trainings, unless it has been done; with 0 the page shows what has been followed before.

    Returns:
        Where the page is.

    Raises:
        RequestError: there are no scores to show; or ``over_time`` is no such number, or the loss has no second derivative.
    """
    run = opened(run)
    if arguments.whole("over_time", over_time, "is no number of samples: give 0 or more"):
        follow(run, over_time)
    run.store.write("report/index.html", render(run.name, _facts(run), collect(run), str(headline(run) or "")).encode())
    return run.store.locate("report/index.html")


def render(title: str, facts: list[tuple[str, str]], content: dict[str, Any], said: str = "") -> str:
    """The page as HTML.

    Args:
        title: name of the run.
        facts: names and values shown under the title.
        content: what ``collect`` gives.
        said: what to do, in a sentence.
    """
    import jinja2

    files = importlib.resources.files(__name__).joinpath("page")
    page = files.joinpath("page.html").read_text("utf-8")
    style, script = (
        "\n".join(files.joinpath(f"{name}.{kind}").read_text("utf-8") for name in names)
        for kind, names in (("css", STYLES), ("js", SCRIPTS))
    )
    # Whatever a sample's text says, it must not end the script element it stands in; and should anything slip through,
    # the browser runs no script but this one and loads nothing from elsewhere.
    data = json.dumps(content, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    script_hash = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    template = jinja2.Environment(autoescape=True).from_string(page)
    return template.render(title=title, facts=facts, said=said, data=data, style=style, script=script, script_hash=script_hash)


def collect(run: Record) -> dict[str, Any]:
    """Everything the page shows, as plain JSON.

    Raises:
        RequestError: there are no scores to show.
    """
    stored = stored_scores(run)
    tables = {name: table for name, table in stored.items() if table.by_sample()}
    if not tables:
        raise RequestError(f"{run.path} has no scores to report: compute some with score(run, method=...) first.")
    views = SampleViews(run)
    corrupted = views.corrupted
    # The fullest ranking comes first: that of a few removals, such as those retrained for a check, is no ranking of the data.
    fullest = max(len(table.by_sample()) for table in tables.values())
    order = sorted(tables, key=lambda name: (len(tables[name].by_sample()) < fullest, *_prominence(tables[name])))
    methods = [_method(name, tables, corrupted) for name in order]
    ids: Sequence[int] = range(run.n_samples)
    if run.n_samples > WHOLE:
        ids = sorted({s for method in methods for s in (*method["ranking"]["samples"], *_points(method))})
    pictures = samples.pictured(views, _by_prominence(methods))
    single = predictions.collect(run, views, ids if isinstance(ids, range) else set(ids), pictures)
    for sample, fields in {} if single is None else single.pop("samples").items():
        pictures[sample] = {**pictures.get(sample, {}), **fields}
    columns = samples.columns(run, views, ids)
    known = groups.by_word(columns, ids)
    for table in stored.values():  # one table may name what another has the truth of
        known.update(table.names)
    return {
        "methods": methods,
        "ids": len(ids) if isinstance(ids, range) else ids,
        "columns": columns,
        "same": samples.same_inputs(run),
        "samples": pictures,
        "predictions": single,
        "corrupted_share": None if corrupted is None else float(corrupted.mean()),
        "n_corrupted": None if corrupted is None else int(corrupted.sum()),
        "groups": [
            {"name": name, "conditions": _conditions(stored[name]), "rows": rows}
            for name in sorted(stored, key=lambda name: _prominence(stored[name]))
            if (rows := groups.of(stored[name], known))
        ],
        "over_time": curves.over_time(run),
        "cleaning": curves.cleaning(run),
        "shown": SHOWN,
    }


def _points(method: dict[str, Any]) -> list[int]:
    return [point[0] for point in method.get("points", ())]


def _by_prominence(methods: list[dict[str, Any]]) -> list[int]:
    """The samples in the order in which their pictures are wanted: those at an end of a ranking, those drawn, all others."""
    from_ends = [_from_ends(method["ranking"]["samples"]) for method in methods]
    first = [sample for order in from_ends for sample in order[:ENDS]] + [s for method in methods for s in _points(method)]
    return [*first, *(sample for order in from_ends for sample in order)]


def _from_ends(order: list[int]) -> list[int]:
    """An order from both of its ends towards its middle."""
    turned = [sample for pair in zip(order, reversed(order), strict=True) for sample in pair]
    return turned[: len(order)]


def _method(name: str, tables: dict[str, Scores], corrupted: np.ndarray | None) -> dict[str, Any]:
    """One table of scores: its conditions, ranking, agreement with the truth, precision in finding the corrupted.

    The samples of its ranking begin with the most harmful; of a very long one they are those of both ends.
    """
    table = tables[name]
    scores = table.by_sample()
    single, values = list(scores), np.array(list(scores.values()))
    order = [single[i] for i in np.argsort(values, kind="stable")]
    ends = order if len(order) <= WHOLE else order[:ENDS] + order[-ENDS:]
    estimate = not registry.is_truth(table.conditions["method"])
    ranking = {"total": len(order), "samples": ends, "scores": [shortened(scores[sample]) for sample in ends]}
    if estimate:
        retrained = table.truths  # once: it is made of the whole table
        ranking["retrained"] = [s for s in ends if (s,) in retrained]
    for column in ("uncertainty", "diverged"):
        if column in table.more:
            of_each = table.by_removal(column)
            ranking[column] = [finite(of_each[(sample,)]) for sample in ends]
    entry: dict[str, Any] = {
        "name": name,
        "conditions": _conditions(table),
        "truth": not estimate,
        "seconds": table.conditions["seconds"],
        "memory": table.conditions["peak_memory_gb"],
        "verdict": _verdict(table),
        "ranking": ranking,
    }
    truth = truth_for(tables, table) if estimate else None
    if truth is not None:
        _compare(entry, table, scores, truth.by_sample())
    if corrupted is not None:
        precision = detection_precision(values, corrupted[single])
        at = np.unique(np.linspace(1, len(precision), min(CURVE_POINTS, len(precision))).round().astype(int))
        entry["precision"] = [[int(k), float(precision[k - 1])] for k in at]
    return entry


def _compare(entry: dict[str, Any], table: Scores, scores: dict[int, float], expected: dict[int, float]) -> None:
    """Add the truth to the ranking, and how far the estimates agree with it."""
    ends = entry["ranking"]["samples"]
    entry["ranking"]["truth"] = [[sample, finite(expected[sample])] for sample in ends if sample in expected]
    said = table.by_removal("estimate")
    common = [sample for sample in scores if sample in expected]
    if len(common) < 2:
        return
    # As for evaluate: extremes that were picked to be checked would flatter the figures.
    verdict, partial = table.verdict, len(common) < len(scores)
    picked = {r[0] for r in set(verdict.extremes) - set(verdict.random)} if partial else set()
    compared = [sample for sample in common if sample not in picked]
    figures = shown(np.array([said[(s,)] for s in compared]), np.array([expected[s] for s in compared]))
    entry["agreement"] = {key: finite(value) for key, value in figures.items()}
    points = [[sample, finite(expected[sample]), finite(said[(sample,)])] for sample in _drawn(common, ends)]
    entry["points"] = [point for point in points if None not in point]
    entry["n_compared"] = figures["n"]


def _conditions(table: Scores) -> dict[str, Any]:
    """What tells a table from the others of the run."""
    c = table.conditions
    return {**{key: c[key] for key in ("method", "query", "at", "readout", "dtype")}, "runs": int(c.get("runs", 1))}


def _verdict(table: Scores) -> dict[str, str]:
    word, _, rest = str(table.verdict).partition(": ")
    return {"word": word, "text": rest}


def _drawn(common: list[int], ends: list[int]) -> list[int]:
    """The compared samples that are drawn: all of them, or the extremes and as many others, spread evenly."""
    if len(common) <= DRAWN:
        return common
    wanted = set(common)
    order = [sample for sample in ends if sample in wanted]
    half = DRAWN // 4
    extremes = order[:half] + order[-half:]
    chosen = set(extremes)
    others = [sample for sample in common if sample not in chosen]
    spread = np.linspace(0, len(others) - 1, min(len(others), DRAWN - len(extremes))).round().astype(int)
    return extremes + [others[i] for i in spread]


def _prominence(table: Scores) -> tuple[int, str, bool, str, int]:
    c = table.conditions
    return registry.place(c["method"]), c["readout"], c["at"] != END, c["at"], int(c.get("runs", 1))


def _facts(run: Record) -> list[tuple[str, str]]:
    manifest = run.manifest
    shown: Iterable[tuple[str, Any]] = run.steps[0].hyperparameters.items()
    values = ", ".join(f"{key} {value:g}" for key, value in shown if isinstance(value, (int, float)) and value)
    return [
        ("module", manifest["module"]["class"].replace(":", ".")),
        ("training samples", f"{run.n_samples:,}"),
        ("parameters", f"{run.n_parameters:,}"),
        ("steps", f"{run.n_steps:,}"),
        ("optimizer", f"{manifest['optimizer']['name']} ({values})"),
        ("removal", f"{manifest['convention']}: weight 0, nothing else changes"),
        ("record", run.hash[:12]),
    ]
