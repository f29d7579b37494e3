"""The study: a grid of small trainings, in each of which every method is held against the truth.

A cell is one training (data, model, corruption, length, seed). Its rows are the agreement of each method and readout with
leave-one-out retraining of all its samples. Cells are independent, farmed out over workers, and written as they finish, so
that a study that was stopped goes on where it was.
"""

from __future__ import annotations

import importlib.metadata
import json
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import asdict
from datetime import datetime, timezone
from typing import Any

import pyarrow as pa
import torch

from lightning_acc.core.replay import Replay
from lightning_acc.errors import RunError
from lightning_acc.methods import registry
from lightning_acc.progress import Progress
from lightning_acc.record.store import Store
from lightning_acc.run import Run
from lightning_acc.scoring import cluster
from lightning_acc.scoring.score import score
from lightning_acc.scoring.trust.figures import agreement
from lightning_acc.studies.grid import CORRUPTIONS, DATA, MODELS, Cell, Study


def run_study(study: Study, ray_address: str | None = "local", progress: bool | None = None) -> pa.Table:
    """Compute the cells that are missing, and return the rows of all.

    Args:
        study: the grid.
        ray_address: where to compute, as for ``score``.
        progress: show a progress bar; None shows one in a terminal.

    Returns:
        One row per cell, method and readout: the cell's fields, method, readout, the figures of ``agreement``, n, seconds,
        audit_error. Also stored as ``study.parquet`` in the study's directory.
    """
    store = Store(study.directory)
    cells = study.cells()
    missing = [cell for cell in cells if _stored(store, study, cell) is None]
    if len(missing) < len(cells):
        print(f"{len(cells) - len(missing)} of {len(cells)} cells are there already")
    with Progress(f"study · {len(missing)} trainings", len(missing), progress, unit="trainings") as bar:
        for cell, result in cluster.each(run_cell, study, missing, ray_address, bar):
            if isinstance(result, cluster.Failure):
                raise RunError(f"The cell {cell.name} failed: {result.reason}. The others are stored; start the study again.")
    rows = [row for cell in cells for row in _stored(store, study, cell) or []]
    table = pa.Table.from_pylist(rows)
    _write(store, table)
    return table


def run_cell(study: Study, cell: Cell, progress: Callable[[float], None]) -> None:
    """Train, record and score one cell, and store its rows."""
    import pytorch_lightning as pl

    from lightning_acc.recorder import TrajectoryRecorder
    from lightning_acc.studies.models import Classifier

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as directory, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        data = data_of(study, cell)
        data.setup("fit")
        pl.seed_everything(cell.seed, verbose=False)
        classes = len(data.class_names)
        module = Classifier(data.n_features, classes, lr=study.lr, **MODELS[cell.model])
        trainer = pl.Trainer(
            max_epochs=cell.epochs,
            callbacks=[TrajectoryRecorder(directory)],
            accelerator="cpu",
            devices=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
        )
        trainer.fit(module, datamodule=data)
        run = Run(directory)
        rows = _rows(study, cell, run, progress)
    Store(study.directory).write(f"cells/{cell.name}.json", json.dumps({"key": study.key, "rows": rows}).encode())


def data_of(study: Study, cell: Cell) -> Any:
    """The cell's data module."""
    from lightning_acc.studies import data

    name, options = DATA[cell.data]
    noise = CORRUPTIONS[cell.corruption]
    shares = {noise: study.share} if noise else {}
    options = {**options, **shares, "n_train": study.n_train, "batch_size": cell.batch_size, "seed": cell.seed}
    return getattr(data, name)(**options)


def _rows(study: Study, cell: Cell, run: Run, progress: Callable[[float], None]) -> list[dict[str, Any]]:
    report = run.audit()
    if not report:
        raise RunError(f"The record of the cell {cell.name} does not reproduce its training: {report}.")
    options: dict[str, Any] = {
        "ray_address": None,
        "dtype": study.dtype,
        "memory_gb": study.memory_gb,
        "save": False,
        "progress": False,
        "check": 0,  # the truth of all is at hand
    }
    truth = score(run, registry.TRUTH, **options)
    progress(0.4)
    found = {(registry.TRUTH, "exact"): (truth.values, truth.conditions["seconds"])}
    # One sweep, read in both ways.
    accumulated = score(run, "acc-sgd-ie", keep_shifts=True, **options)
    progress(0.9)
    seconds = accumulated.conditions["seconds"]
    replay = Replay(run, study.dtype)
    gradient = run.query("val").gradient(replay.objective, run.parameters(run.n_steps).to(replay.dtype))
    assert accumulated.shifts is not None
    found["acc-sgd-ie", "exact"] = accumulated.values, seconds
    found["acc-sgd-ie", "linear"] = (accumulated.shifts @ gradient).numpy(), seconds
    scores = score(run, "acc-low-rank", readout="exact", **options)
    found["acc-low-rank", "exact"] = scores.values, scores.conditions["seconds"]
    for method in ("sgd-ie", "tracin"):
        scores = score(run, method, **options)
        found[method, "linear"] = scores.values, scores.conditions["seconds"]
    progress(1.0)
    shared = {**asdict(cell), "n_parameters": run.n_parameters, "n_steps": run.n_steps, "audit_error": report.max_abs_error}
    return [
        {**shared, "method": method, "readout": readout, **agreement(values, truth.values), "n": len(values), "seconds": cost}
        for (method, readout), (values, cost) in found.items()
    ]


def _stored(store: Store, study: Study, cell: Cell) -> list[dict[str, Any]] | None:
    name = f"cells/{cell.name}.json"
    if not store.exists(name):
        return None
    content = json.loads(store.read(name))
    return content["rows"] if content["key"] == study.key else None


def _write(store: Store, table: pa.Table) -> None:
    import io

    import pyarrow.parquet

    versions = {name: importlib.metadata.version(name) for name in ("lightning-acc", "torch", "pytorch-lightning")}
    facts = {"date": datetime.now(timezone.utc).date().isoformat(), **versions}
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(table.replace_schema_metadata(facts), buffer)
    store.write("study.parquet", buffer.getvalue())


def summary(table: pa.Table) -> str:
    """Medians over the cells of each data set, model, method and readout, for a terminal."""
    frame = table.to_pandas()
    frame = frame[frame["method"] != registry.TRUTH]
    keys = ["data", "model", "method", "readout"]
    text: str = frame.groupby(keys)[["rmse_sd", "kendall", "spearman", "seconds"]].median().round(4).to_string()
    return text
