"""``write_report``: one self-contained HTML page about a run, readable offline.

``collect`` gathers what the page shows as plain JSON; ``page.html``, ``page.css`` and ``page.js`` beside this file show it, and
``predictions.*`` the section on single predictions.
"""

from __future__ import annotations

import base64
import hashlib
import importlib.resources
import io
import json
import os
from collections.abc import Iterable
from typing import Any

import numpy as np

from lightning_acc.core.queries.moments import END
from lightning_acc.errors import RequestError
from lightning_acc.judge.agreement import stored_scores, truth_for
from lightning_acc.judge.samples import SampleView, SampleViews, detection_precision, opened_picture
from lightning_acc.methods import registry
from lightning_acc.record.record import Record, opened
from lightning_acc.scoring.scores import Scores
from lightning_acc.scoring.trust.figures import shown
from lightning_acc.show.report import predictions

SHOWN = 24
"""Samples shown as pictures from each end of a ranking."""
CURVE_POINTS = 200
WHOLE = 2000
"""Rankings up to this long are embedded whole, and so are scatter plots of so many points."""
ENDS = 500
"""Samples embedded from each end of a longer ranking."""
THUMBNAIL, THUMBNAIL_BYTES = 96, 2**17
"""Longest side of an embedded picture, in pixels, and its largest file: what is larger is made smaller."""
TEXT = 400
"""Characters of a sample's text that are embedded."""
CONTROLS = ("none", "random", "loss", "self-influence", "cleanlab", "validation", "validation added", "oracle")
"""Ways to choose what to remove that the removal curves of the estimates are held against."""


def write_report(run: Record | str | os.PathLike[str]) -> str:
    """Write ``report/index.html`` in the run directory: agreement, rankings with pictures, detection, cleaning, cost.

    Args:
        run: a recorded run with scores, or its path.

    Returns:
        Where the page is.

    Raises:
        RequestError: there are no scores to show.
    """
    run = opened(run)
    run.store.write("report/index.html", render(run.name, _facts(run), collect(run)).encode())
    return run.store.locate("report/index.html")


def render(title: str, facts: list[tuple[str, str]], content: dict[str, Any]) -> str:
    """The page as HTML.

    Args:
        title: name of the run.
        facts: names and values shown under the title.
        content: what ``collect`` gives.
    """
    import jinja2

    files = importlib.resources.files(__name__)
    page = files.joinpath("page.html").read_text("utf-8")
    style, script = (
        "\n".join(files.joinpath(f"{part}.{kind}").read_text("utf-8") for part in ("page", "predictions"))
        for kind in ("css", "js")
    )
    # Whatever a sample's text says, it must not end the script element it stands in; and should anything slip through,
    # the browser runs no script but this one and loads nothing from elsewhere.
    data = json.dumps(content, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    script_hash = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    template = jinja2.Environment(autoescape=True).from_string(page)
    return template.render(title=title, facts=facts, data=data, style=style, script=script, script_hash=script_hash)


def collect(run: Record) -> dict[str, Any]:
    """Everything the page shows, as plain JSON.

    Raises:
        RequestError: there are no scores to show.
    """
    tables = {name: table for name, table in stored_scores(run).items() if _single(table)}
    if not tables:
        raise RequestError(f"{run.path} has no scores to report: compute some with score(run, method=...) first.")
    views = SampleViews(run)
    corrupted = views.corrupted
    # The fullest ranking comes first: that of a few removals, such as those retrained for a check, is no ranking of the data.
    fullest = max(map(len, map(_single, tables.values())))
    order = sorted(tables, key=lambda name: (len(_single(tables[name])) < fullest, *_prominence(tables[name])))
    methods = [_method(name, tables, corrupted) for name in order]
    needed = {sample for method in methods for sample in method["ranking"]["samples"]}
    needed.update(point[0] for method in methods for point in method.get("points", ()))
    samples = {sample: _shown(views[sample]) for sample in sorted(needed)}
    single = predictions.collect(run, views, _shown, samples)
    if single is not None:
        samples.update(single.pop("samples"))
    return {
        "methods": methods,
        "samples": samples,
        "predictions": single,
        "corrupted_share": None if corrupted is None else float(corrupted.mean()),
        "n_corrupted": None if corrupted is None else int(corrupted.sum()),
        "groups": [found for name in order if (found := _groups(name, tables[name]))],
        "cleaning": _cleaning(run),
        "shown": SHOWN,
    }


def _method(name: str, tables: dict[str, Scores], corrupted: np.ndarray | None) -> dict[str, Any]:
    """One table of scores: its conditions, ranking, agreement with the truth, precision in finding the corrupted."""
    table = tables[name]
    scores = _single(table)
    samples, values = list(scores), np.array(list(scores.values()))
    order = [samples[i] for i in np.argsort(values, kind="stable")]
    whole = len(order) <= WHOLE
    ends = order if whole else order[:ENDS] + order[-ENDS:]
    ranks = np.arange(1, len(order) + 1)
    truths = {} if registry.is_truth(table.conditions["method"]) else table.truths
    entry: dict[str, Any] = {
        "name": name,
        "conditions": _conditions(table),
        "seconds": table.conditions["seconds"],
        "memory": table.conditions["peak_memory_gb"],
        "verdict": _verdict(table),
        "ranking": {
            "total": len(order),
            "ranks": (ranks if whole else np.r_[ranks[:ENDS], ranks[-ENDS:]]).tolist(),
            "samples": ends,
            "scores": [_plain(scores[sample]) for sample in ends],
            "retrained": [s for s in ends if (s,) in truths],
        },
    }
    truth = truth_for(tables, table)
    if truth is not None and not registry.is_truth(table.conditions["method"]):
        expected = _single(truth)
        entry["ranking"]["truth"] = [_plain(expected.get(sample)) for sample in ends]
        said = table.by_removal("estimate")
        common = [sample for sample in scores if sample in expected]
        if len(common) > 1:
            # As for evaluate: extremes that were picked to be checked would flatter the figures.
            verdict, partial = table.verdict, len(common) < len(scores)
            picked = {r[0] for r in set(verdict.extremes) - set(verdict.random)} if partial else set()
            compared = [sample for sample in common if sample not in picked]
            figures = shown(np.array([said[(s,)] for s in compared]), np.array([expected[s] for s in compared]))
            entry["agreement"] = {key: _plain(value) for key, value in figures.items()}
            drawn = _drawn(common, set(ends))
            entry["points"] = [
                [sample, _plain(expected[sample]), _plain(said[(sample,)])]
                for sample in drawn
                if _plain(expected[sample]) is not None and _plain(said[(sample,)]) is not None
            ]
            entry["n_compared"] = figures["n"]
    if corrupted is not None:
        precision = detection_precision(values, corrupted[samples])
        at = np.unique(np.linspace(1, len(precision), min(CURVE_POINTS, len(precision))).round().astype(int))
        entry["precision"] = [[int(k), float(precision[k - 1])] for k in at]
    return entry


def _conditions(table: Scores) -> dict[str, Any]:
    """What tells a table from the others of the run."""
    c = table.conditions
    return {**{key: c[key] for key in ("method", "query", "at", "readout", "dtype")}, "runs": int(c.get("runs", 1))}


def _verdict(table: Scores) -> dict[str, str]:
    word, _, rest = str(table.verdict).partition(": ")
    return {"word": word, "text": rest}


def _groups(name: str, table: Scores) -> dict[str, Any] | None:
    """Removals of several samples, by name; None where there are none."""
    columns = ("score", "source", "estimate")
    rows = zip(table.labels, table.removals, *(table.table[column].to_pylist() for column in columns), strict=True)
    found = [
        {"name": label, "samples": len(removal), "score": _plain(score), "source": source, "estimate": _plain(estimate)}
        for label, removal, score, source, estimate in rows
        if len(removal) > 1
    ]
    found.sort(key=lambda group: (group["score"] is None, group["score"]))
    return {"name": name, "conditions": _conditions(table), "rows": found} if found else None


def _drawn(common: list[int], extremes: set[int]) -> list[int]:
    """The compared samples that are drawn: all of them, or the extremes and as many others, spread evenly."""
    if len(common) <= WHOLE:
        return common
    others = [sample for sample in common if sample not in extremes]
    spread = np.linspace(0, len(others) - 1, min(len(others), WHOLE - 2 * ENDS)).round().astype(int)
    return [sample for sample in common if sample in extremes] + [others[i] for i in spread]


def _cleaning(run: Record) -> dict[str, Any] | None:
    """Removal curves of the methods, each point with mean and 95 % interval of each figure; None where there are none."""
    from lightning_acc.judge import cleaning_table

    table = cleaning_table.read(run)
    if table is None:
        return None
    curves: dict[str, list[dict[str, Any]]] = {}
    for row in table.to_pylist():
        point = {key: row[key] for key in ("fraction", "n_removed", "seeds")}
        for figure in ("accuracy", "gain", "loss"):
            point[figure] = [_plain(row[key]) for key in (figure, f"{figure}_low", f"{figure}_high")]
        curves.setdefault(row["method"], []).append(point)
    methods = [
        {"name": name, "control": name in CONTROLS, "points": sorted(points, key=lambda point: float(point["fraction"]))}
        for name, points in sorted(curves.items(), key=lambda curve: _curve_order(curve[0]))
    ]
    tested = sorted(set(table["test"].to_pylist())) if "test" in table.column_names else []
    notes = " ".join(f"{note}." for note in cleaning_table.notes(table))
    return {"methods": methods, "tested": ", ".join(map(str, tested)) or "test", "notes": notes}


def _curve_order(name: str) -> tuple[int, str]:
    from lightning_acc.judge import cleaning_table

    order = [*registry.METHODS, *CONTROLS]
    known = name if name in CONTROLS else cleaning_table.method_of(name)
    return order.index(known) if known in order else len(registry.METHODS), name


def _single(table: Scores) -> dict[int, float]:
    return {removal[0]: score for removal, score in table.by_removal().items() if len(removal) == 1}


def _prominence(table: Scores) -> tuple[int, str, bool, str, int]:
    c = table.conditions
    return registry.place(c["method"]), c["readout"], c["at"] != END, c["at"], int(c.get("runs", 1))


def _plain(value: float | None) -> float | None:
    return None if value is None or not np.isfinite(value) else float(value)


def _shown(view: SampleView) -> dict[str, Any]:
    text = view.text if view.text is None or len(view.text) <= TEXT else view.text[:TEXT] + " …"
    fields = {
        "image": None if view.image is None else _thumbnail(view.image),
        "text": text,
        "name": view.name,
        "label": view.label,
        "true_label": view.true_label,
        "corrupted": view.corrupted,
    }
    return {key: value for key, value in fields.items() if value is not None}


def _thumbnail(image: bytes) -> str | None:
    """A picture file as a data URL, made smaller where it is large; None if it cannot be read."""
    picture = opened_picture(image)
    if picture is None:
        return None
    kind = str(picture.format).lower()
    if max(picture.size) > THUMBNAIL or len(image) > THUMBNAIL_BYTES:
        small = picture.convert("RGB")
        small.thumbnail((THUMBNAIL, THUMBNAIL))
        buffer = io.BytesIO()
        small.save(buffer, "JPEG", quality=85)
        image, kind = buffer.getvalue(), "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(image).decode()}"


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
