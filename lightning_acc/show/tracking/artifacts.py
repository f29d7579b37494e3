"""Artifacts in W&B: the results, the samples to drop, and the data without them; tied together by the hashes of their content.

A W&B run that is offline cannot name the artifacts it used. So each artifact tells in its metadata what it holds (``content``)
and what that was made of (``made_of``), by file and SHA-256: from the cleaned set to the ids that were dropped, from these to
the scores, from the scores to the record.
"""

from __future__ import annotations

import importlib.util
import io
import tempfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as parquet
from torch import Tensor

from lightning_acc.credentials import without_credentials
from lightning_acc.judge import agreement, cleaning_table, exports
from lightning_acc.judge.fresh_training import visited_samples
from lightning_acc.record import tables as sealing
from lightning_acc.record.record import Record
from lightning_acc.record.store import digest
from lightning_acc.scoring.scores import Scores
from lightning_acc.show.headline import Headline
from lightning_acc.show.tracking.connection import MARK, group_of, training_of

DROP, KEPT, CLEANED = "drop.txt", "kept.txt", "cleaned.parquet"
SHARE = 0.1
"""Of the samples that are named to be dropped where no cleaning has told how many."""
LARGEST = 2**26
"""Bytes of a training set that is logged without the dropped samples; of a larger one the ids that are kept."""


def results(
    run: Record, tables: dict[str, Scores], evaluation: list[dict[str, Any]] | None, cleaning: pa.Table | None
) -> dict[str, bytes]:
    """The files of the run directory that hold its results, by name: score tables, evaluation and cleaning."""
    files = {f"scores/{name}.parquet": run.store.read(f"scores/{name}.parquet") for name in tables}
    if evaluation:
        files[agreement.NAME] = agreement.as_json(run, evaluation)
    if cleaning is not None:
        name = cleaning_table.NAME
        files[name] = run.store.read(name) if run.store.exists(name) else sealing.sealed(cleaning, name)
    return files


def tie(tracked: Any, run: Record, tables: dict[str, Scores], files: dict[str, bytes], said: Headline | None) -> None:
    """Log the results, the samples to drop and the cleaned set, and write all hashes into the configuration too."""
    record = {"manifest": run.hash}
    content = record | _log(tracked, run, "influence", files, record, "Score tables and evaluation")
    table = tables.get(said.scores) if said is not None and said.scores is not None else None
    if said is not None and table is not None and table.by_sample():
        drop = exports.dropped(run, table, said.n_dropped) if said.n_dropped else exports.ids_to_drop(table, SHARE)
        used = [f"scores/{said.scores}.parquet", *([cleaning_table.NAME] if said.n_dropped else [])]
        sources = record | {name: content[name] for name in used}
        ids = {DROP: exports.as_lines(drop).encode()}
        content |= _log(tracked, run, "drop", ids, sources, f"{len(drop)} samples to drop, the most harmful first. {said}")
        sources = record | {DROP: content[DROP]}
        content |= _log(tracked, run, "cleaned", _kept(run, drop), sources, f"The data without {len(drop)} samples. {said}")
    conditions = {name: table.conditions for name, table in tables.items()}
    tracked.config.update({"content": content, "scores": without_credentials(conditions)}, allow_val_change=True)


def _log(
    tracked: Any, run: Record, kind: str, files: dict[str, bytes], made_of: dict[str, str], description: str
) -> dict[str, str]:
    """Log files as one artifact; returns their hashes."""
    import wandb

    content = {name: digest(data) for name, data in files.items()}
    artifact = wandb.Artifact(
        f"{kind}-{run.hash[:12]}",
        type=kind,
        description=f"{group_of(run)}: {description}",
        metadata={
            "content": content,
            "made_of": made_of,
            MARK: training_of(run).get("id"),
            "group": group_of(run),
        },
    )
    with tempfile.TemporaryDirectory() as folder:  # W&B takes copies; its own folder would lie about for a while
        for i, (name, data) in enumerate(files.items()):
            path = Path(folder, str(i))
            path.write_bytes(data)
            artifact.add_file(str(path), name)
    tracked.log_artifact(artifact)
    return content


def _kept(run: Record, drop: list[int]) -> dict[str, bytes]:
    """The ids of the samples that are kept, and their data where it is not too much."""
    gone = set(drop)
    files = {KEPT: exports.as_lines([i for i in range(run.n_samples) if i not in gone]).encode()}
    if importlib.util.find_spec("datasets") and _size(run) <= LARGEST:
        buffer = io.BytesIO()
        parquet.write_table(exports.cleaned_dataset(run, drop).with_format("arrow")[:], buffer)  # without a progress bar
        files[CLEANED] = buffer.getvalue()
    return files


def _size(run: Record) -> int:
    """About how many bytes the samples of a run take: all as many as one of them, with what is described."""
    seen = run.content_of(int(visited_samples(run)[0])) or {}
    one = sum(leaf.numel() * leaf.element_size() for leaf in seen.values() if isinstance(leaf, Tensor))
    described = run.sample_info()
    return run.n_samples * one + (0 if described is None else int(described.nbytes))
