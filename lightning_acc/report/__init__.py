"""``write_report``: one self-contained HTML page about a run, readable offline."""

from __future__ import annotations

import base64
import importlib.resources
import json
import os
from typing import Any

import numpy as np

from lightning_acc.agreement import agreement, stored_scores, truth_for
from lightning_acc.errors import RequestError
from lightning_acc.samples import SampleViews, detection_precision
from lightning_acc.scores import Scores
from lightning_acc.trajectory.run import Run

SHOWN = 24
"""Samples shown from each end of a ranking."""
CURVE_POINTS = 200


def write_report(run: Run | str | os.PathLike[str]) -> str:
    """Write ``report/index.html`` in the run directory: agreement, rankings with pictures, detection, cost.

    Args:
        run: a recorded run with scores, or its path.

    Returns:
        Where the page is.

    Raises:
        RequestError: there are no scores to show.
    """
    import jinja2

    run = run if isinstance(run, Run) else Run(run)
    content = collect(run)
    page = importlib.resources.files(__name__).joinpath("page.html").read_text("utf-8")
    # Whatever a sample's text says, it must not end the script element it stands in.
    data = json.dumps(content, allow_nan=False).replace("<", "\\u003c")
    html = jinja2.Environment(autoescape=True).from_string(page).render(title=run.name, facts=_facts(run), data=data)
    run.store.write("report/index.html", html.encode())
    return run.store.locate("report/index.html")


def collect(run: Run) -> dict[str, Any]:
    """Everything the page shows, as plain JSON.

    Raises:
        RequestError: there are no scores to show.
    """
    tables = {name: table for name, table in stored_scores(run).items() if _single(table)}
    if not tables:
        raise RequestError(f"{run.path} has no scores to report: compute some with score(run, method=...) first.")
    views = SampleViews(run)
    corrupted = views.corrupted
    methods: list[dict[str, Any]] = []
    needed: set[int] = set()
    for name in sorted(tables, key=lambda name: _prominence(tables[name])):
        table = tables[name]
        scores = _single(table)
        order = sorted(scores, key=lambda sample: scores[sample])
        harmful, helpful = order[:SHOWN], order[::-1][:SHOWN]
        entry: dict[str, Any] = {
            "name": name,
            "conditions": {key: table.conditions[key] for key in ("method", "query", "readout", "dtype")},
            "seconds": table.conditions["seconds"],
            "memory": table.conditions["peak_memory_gb"],
            "harmful": [[sample, _plain(scores[sample])] for sample in harmful],
            "helpful": [[sample, _plain(scores[sample])] for sample in helpful],
        }
        needed.update(harmful, helpful)
        truth = truth_for(tables, table)
        if truth is not None and table.conditions["method"] != "loo":
            expected = _single(truth)
            common = [sample for sample in scores if sample in expected]
            pairs = np.array([[expected[sample], scores[sample]] for sample in common]).reshape(-1, 2)
            if len(common) > 1:
                figures = agreement(pairs[:, 1], pairs[:, 0])
                entry["agreement"] = {key: _plain(value) for key, value in figures.items()}
                entry["points"] = [[s, _plain(x), _plain(y)] for s, (x, y) in zip(common, pairs, strict=True)]
                needed.update(common)
        if corrupted is not None:
            precision = detection_precision(np.array(list(scores.values())), corrupted[list(scores)])
            at = np.unique(np.linspace(1, len(precision), min(CURVE_POINTS, len(precision))).round().astype(int))
            entry["precision"] = [[int(k), float(precision[k - 1])] for k in at]
        methods.append(entry)
    return {
        "methods": methods,
        "samples": {sample: _sample(views, sample) for sample in sorted(needed)},
        "corrupted_share": None if corrupted is None else float(corrupted.mean()),
        "n_corrupted": None if corrupted is None else int(corrupted.sum()),
    }


def _single(table: Scores) -> dict[int, float]:
    return {removal[0]: score for removal, score in table.by_removal().items() if len(removal) == 1}


def _prominence(table: Scores) -> tuple[int, str]:
    c = table.conditions
    order = ["loo", "acc-sgd-ie", "sgd-ie", "tracin"]
    return order.index(c["method"]) if c["method"] in order else len(order), c["readout"]


def _plain(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def _sample(views: SampleViews, sample: int) -> dict[str, Any]:
    view = views[sample]
    image = None if view.image is None else "data:image/png;base64," + base64.b64encode(view.image).decode()
    text = None if view.text is None else view.text[:400]
    fields = {
        "image": image,
        "text": text,
        "label": view.label,
        "true_label": view.true_label,
        "corrupted": view.corrupted,
    }
    return {key: value for key, value in fields.items() if value is not None}


def _facts(run: Run) -> list[tuple[str, str]]:
    manifest = run.manifest
    groups = run.steps[0].hyperparameters
    shown = ", ".join(f"{key} {value:g}" for key, value in groups.items() if isinstance(value, (int, float)) and value)
    return [
        ("module", manifest["module"]["class"].replace(":", ".")),
        ("training samples", f"{run.n_samples:,}"),
        ("parameters", f"{run.n_parameters:,}"),
        ("steps", f"{run.n_steps:,}"),
        ("optimizer", f"{manifest['optimizer']['name']} ({shown})"),
        ("removal", f"{manifest['convention']}: weight 0, nothing else changes"),
        ("record", run.hash[:12]),
    ]
