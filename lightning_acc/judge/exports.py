"""What leaves the package: a ranking as CSV, the ids of the samples to drop, and the training set without them."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from lightning_acc import arguments
from lightning_acc.core import removals
from lightning_acc.core.queries.moments import END, in_words
from lightning_acc.errors import RequestError
from lightning_acc.extras import extra
from lightning_acc.judge.agreement import stored_scores, truth_for
from lightning_acc.judge.fresh_training import visited_samples
from lightning_acc.judge.samples import SampleViews
from lightning_acc.methods import registry
from lightning_acc.record import batches
from lightning_acc.record.record import Record
from lightning_acc.record.samples.names import COLUMN
from lightning_acc.record.store import Store
from lightning_acc.scoring.scores import Scores

if TYPE_CHECKING:
    import datasets

SAMPLE, NAME = "sample", "name"
"""The columns of sample ids, and of what their batches call them, in what is exported."""
_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n")
_DESCRIBED = ("label", "true_label", "corrupted")


def write_ranking_csv(run: Record, scores: Scores, path: str | os.PathLike[str]) -> None:
    """Write a table of scores as CSV, the most harmful removal first.

    The first line, after a ``#``, says whose ranking it is, when its query was read where that is not the end, of how many
    runs it is the mean, and how far it can be trusted. Columns: ``rank``, ``sample`` (the id; the ids of a
    group with blanks between them), ``name`` (where there are groups that have one, or samples that their batches name),
    ``score``, ``source`` (``estimate``, or ``loo`` where that is the truth), ``loo`` (the score by leave-one-out retraining,
    where the run has it stored for the same query; else without this column), ``label``, ``true_label`` and ``corrupted`` of
    single samples, empty where not known, and whatever else ``describe_samples`` told but pictures and texts; a column whose
    name is taken is called ``described_<name>``.

    Args:
        run: the run the scores belong to.
        scores: the table.
        path: the file, a local path or an fsspec URL; it appears whole or not at all.

    Raises:
        RequestError: the scores belong to another run.
        RunError: the file cannot be written.
    """
    if scores.conditions["manifest_hash"] != run.hash:
        raise RequestError(
            f"These scores belong to the record {scores.conditions['manifest_hash'][:12]}, but {run.path} is the record "
            f"{run.hash[:12]}: score this run, or name the run they were computed on."
        )
    truth = None if registry.is_truth(scores.conditions["method"]) else truth_for(stored_scores(run), scores)
    expected = None if truth is None else truth.by_removal()
    views = SampleViews(run)
    buffer = io.StringIO(newline="")
    c = scores.conditions
    when = "" if c["at"] == END else f" {in_words(c['at'])}"
    runs = f", mean of {c['runs']} runs" if "runs" in c else ""
    buffer.write(f"# {c['method']}{when}{runs}, {scores.verdict}\n")
    writer = csv.writer(buffer, lineterminator="\n")
    names, truths = scores.names, [] if expected is None else [registry.TRUTH]
    header = ["rank", SAMPLE, *([NAME] if names else []), "score", "source", *truths, *_DESCRIBED]
    further = {name: values for name, values in views.columns.items() if name not in _DESCRIBED}
    writer.writerow([*header, *(_as_text(f"described_{name}" if name in header else name) for name in further)])
    ranks, sources = scores.table["rank"].to_pylist(), scores.table["source"].to_pylist()
    for rank, removal, score, source in sorted(zip(ranks, scores.removals, scores.values.tolist(), sources, strict=True)):
        name = [names.get(removal)] if names else []
        true = [] if expected is None else [expected.get(removal)]
        seen: list[Any] = [None] * (len(_DESCRIBED) + len(further))
        if len(removal) == 1:
            view = views[removal[0]]
            seen = [*(getattr(view, key) for key in _DESCRIBED), *(values[removal[0]] for values in further.values())]
        cells = [rank, " ".join(map(str, removal)), *name, score, source, *true, *seen]
        writer.writerow([_as_text(cell) if isinstance(cell, str) else cell for cell in cells])
    _write(path, buffer.getvalue())


def _as_text(cell: str) -> str:
    """What a table program would compute as a formula, after an apostrophe; numbers stay numbers."""
    try:
        float(cell)
    except ValueError:
        text = f"'{cell}" if cell.startswith(_FORMULA) else cell
        return text.replace("\r\n", "\n").replace("\r", "\n")  # which csv would take for the end of a row
    return cell


def ids_to_drop(scores: Scores, fraction: float | None = None, count: int | None = None) -> list[int]:
    """The most harmful single samples, the most harmful first; never one whose score is not negative.

    Args:
        scores: a table of scores; removals of groups in it are passed over.
        fraction: how many, as a share of the single samples that have a score, from 0 to 1, rounded.
        count: how many; give either this or ``fraction``.

    Returns:
        Their ids; fewer than asked for where fewer do harm.

    Raises:
        RequestError: neither or both are given, one is out of range, or the table has no single samples.
    """
    single = [(removal[0], score) for removal, score in scores.by_removal().items() if len(removal) == 1]
    if not single:
        raise RequestError(
            f"None of these {len(scores)} removals is of a single sample: score with removals=None, or with ids."
        )
    if (fraction is None) == (count is None):
        raise RequestError(
            f"How many samples to drop is not clear from fraction={arguments.shown(fraction)} and "
            f"count={arguments.shown(count)}: give one of the two."
        )
    if fraction is not None:
        share = arguments.real(fraction)
        if share is None or not 0 <= share <= 1:
            raise RequestError(f"fraction={arguments.shown(fraction)} is no share of the samples: choose from 0 to 1.")
        count = round(share * len(single))
    count = arguments.whole("count", count, "samples cannot be dropped")
    values = np.array([score for _, score in single])
    order = np.argsort(values, kind="stable")[:count]
    return [single[i][0] for i in order if values[i] < 0]


def harmful_first(scores: Scores) -> np.ndarray:
    """The single samples of a table, (n,), the most harmful first by what its method says: no truth stands among estimates."""
    single = sorted((removal[0], value) for removal, value in scores.by_removal("estimate").items() if len(removal) == 1)
    samples, values = np.array([i for i, _ in single], dtype=np.int64), np.array([value for _, value in single])
    return samples[np.argsort(values, kind="stable")]


def dropped(run: Record, scores: Scores, count: int) -> list[int]:
    """The samples that ``clean`` drops by these scores: of those that training saw the ``count`` most harmful, in order."""
    order = harmful_first(scores)
    return [int(i) for i in order[np.isin(order, visited_samples(run).numpy())][:count]]


def write_ids(ids: Iterable[int], path: str | os.PathLike[str]) -> None:
    """Write sample ids, one on each line: as ``--removals FILE`` reads them, each a removal by itself.

    Args:
        ids: the ids, in the order to be written.
        path: the file, a local path or an fsspec URL; it appears whole or not at all.

    Raises:
        RequestError: something in ``ids`` is no sample id.
        RunError: the file cannot be written.
    """
    _write(path, as_lines(ids))


def as_lines(ids: Iterable[int]) -> str:
    """Sample ids as ``write_ids`` writes them.

    Raises:
        RequestError: something in ``ids`` is no sample id.
    """
    lines = []
    for i in arguments.listed("ids", ids, "sample ids"):
        number = arguments.index(i)
        if number is None or number < 0:
            raise RequestError(f"{arguments.shown(i)} is no sample id: ids are whole numbers from 0.")
        lines.append(f"{number}\n")
    return "".join(lines)


def cleaned_dataset(run: Record, drop: Iterable[int], dataset: datasets.Dataset | None = None) -> datasets.Dataset:
    """The training set without the dropped samples, as a Hugging Face data set; nothing is uploaded.

    Args:
        run: the recorded run.
        drop: ids of the samples to leave out.
        dataset: the data set the run was trained on, row i being sample i, or, where its batches named the samples, with a
            column of these names; None takes what the run recorded.

    Returns:
        The rows of ``dataset`` that are kept, in order. Without it, one row per kept sample: ``sample`` (its id), ``name``
        (where its batches named it), the leaves of the sample as it was first seen in training (null where it never was) and
        what the data module described; a leaf whose name is taken is called ``recorded_<name>``, a description
        ``described_<name>``. An ``image`` that the data module described becomes an Image column.

    Raises:
        RequestError: an id does not exist, nothing is left, or ``dataset`` has another length than the training set.
    """
    listed = arguments.listed("drop", drop, "sample ids")
    (dropped,) = removals.parse([listed], run.n_samples, "drop", removals.number_by_name(run))
    gone = set(dropped)
    kept = [i for i in range(run.n_samples) if i not in gone]
    if not kept:
        raise RequestError(f"All {run.n_samples} samples would be dropped and nothing is left to train on: drop fewer.")
    if dataset is not None:
        if not hasattr(dataset, "select"):
            raise RequestError(
                f"dataset={arguments.shown(dataset)} is no Hugging Face data set: give a datasets.Dataset, or none to take "
                "what the run recorded."
            )
        if "sample_id" in run.manifest:
            return _without_the_named(run, gone, dataset)
        if len(dataset) != run.n_samples:
            raise RequestError(
                f"The data set has {len(dataset)} rows, but {run.path} was trained on {run.n_samples} samples: "
                "give the training split that was recorded, or none to take what the run recorded."
            )
        return dataset.select(kept)
    import pyarrow as pa

    with extra():
        import datasets
    described = run.sample_info()
    rows = None if described is None else described.take(kept)
    names = set() if rows is None else set(rows.column_names)
    columns: dict[str, Any] = {SAMPLE: kept}
    if (called := run.sample_names) is not None and NAME not in names:
        columns[NAME] = [called[i] for i in kept]
    for leaf, values in _leaves(run, kept).items():
        columns[f"recorded_{leaf}" if leaf in names or leaf in (SAMPLE, NAME) else leaf] = values
    result = datasets.Dataset.from_dict(columns)
    if rows is not None:
        for name in rows.column_names:
            result = result.add_column(f"described_{name}" if name == SAMPLE else name, rows[name].combine_chunks())
        if "image" in names and pa.types.is_binary(rows.schema.field("image").type):
            result = result.cast_column("image", datasets.Image())
    return result


def _without_the_named(run: Record, gone: set[int], dataset: datasets.Dataset) -> datasets.Dataset:
    """The rows of a data set that are not of the samples ``gone``, known by the ids that the batches had."""
    columns = [name for name in (run.manifest["sample_id"], COLUMN) if name in dataset.column_names]
    if not columns:
        raise RequestError(
            f"The samples of {run.path} are known by the ids in its batches, and the data set has no column {COLUMN!r} to find "
            "its rows by: give one that has it, or none to take what the run recorded."
        )
    names = run.sample_names or range(run.n_samples)
    dropped = {names[i] for i in gone}
    return dataset.select([row for row, name in enumerate(dataset[columns[0]]) if name not in dropped])


def _leaves(run: Record, kept: list[int]) -> dict[str, list[Any]]:
    """The leaves of the kept samples by name; None for a sample, or a leaf of one, that training never saw."""
    columns: dict[str, list[Any]] = {}
    for position, sample in enumerate(kept):
        for name, leaf in batches.readable(run.content_of(sample) or {}).items():
            values = leaf
            if isinstance(leaf, torch.Tensor):
                # NumPy knows no bfloat16. A number, where it has no dimension.
                values = (leaf.float() if leaf.dtype == torch.bfloat16 else leaf).numpy()[()]
            columns.setdefault(name, [None] * len(kept))[position] = values
    return dict(sorted(columns.items()))


def _write(path: str | os.PathLike[str], text: str) -> None:
    where = arguments.path("path", path).replace(os.sep, "/")
    folder, _, name = where.rpartition("/")
    store = Store(folder or ("/" if where.startswith("/") else "."))
    store.write(name, text.encode())
