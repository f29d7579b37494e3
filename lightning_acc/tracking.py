"""W&B: rankings, agreement, scatter plots and cost as one run. The only part that imports wandb."""

from __future__ import annotations

import io
import netrc
import os
from typing import Any
from urllib.parse import urlparse

import numpy as np

from lightning_acc.agreement import stored_scores, truth_for
from lightning_acc.errors import RequestError
from lightning_acc.samples import SampleView, SampleViews, detection_precision
from lightning_acc.scores import Scores
from lightning_acc.trajectory.run import Run

SHOWN = 100
"""Rows of a ranking table from each end."""
GALLERY = 24
"""Pictures of the most harmful samples."""


def mode() -> Any:
    """``WANDB_MODE`` where it is set; else online where there is a key, and offline where there is none."""
    if os.environ.get("WANDB_MODE"):
        # Lightning's WandbLogger leaves W&B's older word for offline behind.
        return {"dryrun": "offline"}.get(os.environ["WANDB_MODE"], os.environ["WANDB_MODE"])
    if os.environ.get("WANDB_API_KEY"):
        return "online"
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    try:
        return "online" if netrc.netrc().authenticators(host) else "offline"
    except (OSError, netrc.NetrcParseError):
        return "offline"


def logger_options() -> dict[str, Any]:
    """Arguments for Lightning's WandbLogger that make it as quiet as ``track``, and never ask anything."""
    import wandb

    return {"offline": mode() == "offline", "settings": wandb.Settings(silent=True, console="off")}


def finish() -> None:
    """End the W&B run that is open in this process, if there is one."""
    import wandb

    if wandb.run is not None:
        wandb.finish()


def group_of(run: Run) -> str:
    """The W&B group of everything that belongs to a training run: that of its logger, else name and content hash."""
    logger = run.manifest["logger"] or {}
    return str(logger.get("group") or f"{run.name}-{run.hash[:8]}")


def track(run: Run, evaluation: list[dict[str, Any]] | None, project: str | None = None, directory: str = ".") -> str:
    """Log what is known about a run to W&B, never asking anything; offline where there is no key.

    Args:
        run: the recorded run with its scores.
        evaluation: rows of ``evaluate``, or None.
        project: the project; None takes that of the training's logger, else ``lightning-acc``.
        directory: where W&B keeps its files.

    Returns:
        Where the W&B run lies on this machine.
    """
    import wandb

    logger = run.manifest["logger"] or {}
    tables = stored_scores(run)
    if not tables:
        raise RequestError(f"{run.path} has no scores yet: compute some with score(run, method=...) first.")
    os.makedirs(directory, exist_ok=True)
    manifest = {key: value for key, value in run.manifest.items() if key not in ("files", "layout")}
    config = {
        "run": run.path,
        "training_run": logger.get("id"),
        "manifest": {**manifest, "n_parameters": run.n_parameters},
        "scores": {name: table.conditions for name, table in tables.items()},
    }
    with wandb.init(
        project=project or logger.get("project") or "lightning-acc",
        group=group_of(run),
        job_type="influence",
        config=config,
        dir=directory,
        mode=mode(),
        settings=wandb.Settings(silent=True, console="off"),
    ) as tracked:
        views = SampleViews(run)
        pictures: dict[int, Any] = {}
        for name, table in tables.items():
            tracked.log({f"ranking/{name}": _ranking(wandb, table, truth_for(tables, table), views, pictures)})
            gallery = _gallery(wandb, table, views)
            if gallery:
                tracked.log({f"most harmful/{name}": gallery})
        for name, table in tables.items():
            truth = truth_for(tables, table)
            if truth is not None and table.conditions["method"] != "loo":
                tracked.log({f"agreement/{name}-against-loo": _scatter(wandb, name, table, truth, views)})
        if views.corrupted is not None:
            tracked.log({"finding the corrupted": _detection(wandb, tables, views.corrupted)})
        if evaluation:
            columns: Any = list(evaluation[0])
            tracked.log({"agreement": wandb.Table(columns=columns, data=[[row[c] for c in columns] for row in evaluation])})
            cost = wandb.Table(columns=["method", "seconds"], data=[[_label(row), row["seconds"]] for row in evaluation])
            tracked.log({"cost": wandb.plot.bar(cost, "method", "seconds", title="Seconds of work")})
            for row in evaluation:
                for figure in ("rmse", "rmse_sd", "kendall", "spearman", "seconds"):
                    tracked.summary[f"{_label(row)}/{figure}"] = row[figure]
        return str(os.path.dirname(tracked.dir))


def _label(row: dict[str, Any]) -> str:
    return f"{row['method']} ({row['readout']})"


def _single(table: Scores) -> dict[int, float]:
    return {removal[0]: score for removal, score in table.by_removal().items() if len(removal) == 1}


def _ranking(wandb: Any, table: Scores, truth: Scores | None, views: SampleViews, pictures: dict[int, Any]) -> Any:
    """The most harmful and the most helpful removals, each single sample with its picture and label."""
    expected = truth.by_removal() if truth is not None else {}
    rows = sorted(zip(table.table["rank"].to_pylist(), table.removals, table.values.tolist(), strict=True))
    columns = ["rank", "sample", "score", "loo", "label", "true label", "corrupted", "picture", "text"]
    data = []
    for rank, removal, score in rows if len(rows) <= 2 * SHOWN else rows[:SHOWN] + rows[-SHOWN:]:
        view = views[removal[0]] if len(removal) == 1 else SampleView(-1)
        if len(removal) == 1 and removal[0] not in pictures:
            pictures[removal[0]] = _image(wandb, view.image)
        picture = pictures[removal[0]] if len(removal) == 1 else None
        name = " ".join(map(str, removal))
        seen = [view.label, view.true_label, view.corrupted, picture, view.text]
        data.append([rank, name, score, expected.get(removal), *seen])
    return wandb.Table(columns=columns, data=data)


def _gallery(wandb: Any, table: Scores, views: SampleViews) -> list[Any]:
    """Captioned pictures of the most harmful samples."""
    scores = _single(table)
    gallery = []
    for sample in sorted(scores, key=lambda sample: scores[sample])[:GALLERY]:
        view = views[sample]
        if view.image is not None:
            was = f" (was {view.true_label})" if view.corrupted and view.true_label is not None else ""
            gallery.append(_image(wandb, view.image, f"#{sample}: {view.label}{was}, {scores[sample]:+.2e}"))
    return gallery


def _image(wandb: Any, png: bytes | None, caption: str | None = None) -> Any:
    if png is None:
        return None
    from PIL import Image

    return wandb.Image(Image.open(io.BytesIO(png)), caption=caption)


def _scatter(wandb: Any, name: str, table: Scores, truth: Scores, views: SampleViews) -> Any:
    expected, found = truth.by_removal(), table.by_removal()
    data = [[expected[removal], found[removal]] for removal in found if removal in expected]
    points = wandb.Table(columns=["loo", name], data=data)
    return wandb.plot.scatter(points, "loo", name, title=f"{name} against leave-one-out retraining")


def _detection(wandb: Any, tables: dict[str, Scores], corrupted: np.ndarray) -> Any:
    names, curves = [], []
    for name, table in tables.items():
        scores = _single(table)
        if scores:
            names.append(name)
            curves.append(detection_precision(np.array(list(scores.values())), corrupted[list(scores)]).tolist())
    return wandb.plot.line_series(
        xs=[list(range(1, len(curve) + 1)) for curve in curves],
        ys=curves,
        keys=names,
        title="Share of corrupted samples among the k most harmful",
        xname="k",
    )
