"""The table of ``clean``: a row for each method and share dropped, what is told of it, and how it is kept."""

from __future__ import annotations

import json
import textwrap
from typing import Any

import numpy as np
import pyarrow as pa

from lightning_acc.core.queries.moments import END, in_words
from lightning_acc.methods import registry
from lightning_acc.record import seal, tables
from lightning_acc.record.record import Record

NAME = "cleaning.parquet"
REMEDY = "delete it and clean again"
ADDED = "validation added"
"""The control that drops nothing and trains on the validation examples too: one row, at the fraction 0."""
MAY_ERR = (
    "Rankings by influence and by validation know what the labels of the validation examples say: where these are wrong in the "
    "same way as the training's, they find much less"
)
DIFFERENCE = ("difference", "difference_low", "difference_high")
INTERVALS = (
    "95 %, by Student's t over the seeds of new initial parameters and orders, the same ones for all methods; another draw of "
    "the data is not in them"
)
SCHEMA = pa.schema(
    [("method", pa.string()), ("fraction", pa.float64()), ("n_removed", pa.int64()), ("seeds", pa.int64())]
    + [(f"{what}{end}", pa.float64()) for what in ("accuracy", "loss", "gain") for end in ("", "_low", "_high")]
    + [("accuracies", pa.list_(pa.float64())), ("losses", pa.list_(pa.float64())), ("test", pa.string())]
    + [("against", pa.list_(pa.struct([("method", pa.string()), *((end, pa.float64()) for end in DIFFERENCE)])))]
    + [("n_added", pa.int64())]
)
SHOWN = (
    "method",
    "fraction",
    "n_removed",
    "seeds",
    *(f"{what}{end}" for what in ("loss", "gain") for end in ("", "_low", "_high")),
)
"""Columns that no row of a stored table may lack."""


def label(method: str, at: str, runs: int = 1) -> str:
    """What the table calls a method's ranking: ``sgd-ie``, or ``sgd-ie along, 4 runs``."""
    name = method if at == END else f"{method} {in_words(at).replace(',', ' ')}"
    return name if runs == 1 else f"{name}, {runs} runs"


def method_of(name: str) -> str:
    """The method whose ranking a row is, by what ``label`` made of it; of a control its name, or a part of it."""
    return name.partition(",")[0].partition(" ")[0]


def build(rows: list[dict[str, Any]], about: dict[str, str]) -> pa.Table:
    """The table of these rows, each compared with the others of its share, seed by seed; ``about`` is its metadata."""
    rows = [{**one, "against": [_difference(one, other) for other in rows if _comparable(one, other)]} for one in rows]
    return pa.Table.from_pylist(rows, schema=SCHEMA).replace_schema_metadata({**about, "intervals": INTERVALS})


def write(run: Record, table: pa.Table) -> None:
    """Store a table of ``clean`` in the run directory."""
    if b"manifest_hash" not in (table.schema.metadata or {}):
        table = table.replace_schema_metadata({"manifest_hash": run.hash})
    run.store.write(NAME, tables.sealed(table, NAME))


def read(run: Record) -> pa.Table | None:
    """The table of ``clean`` stored with the run; None where there is none that belongs to its present content.

    Raises:
        RunError: it is damaged, or cannot be read.
    """
    if not run.store.exists(NAME):
        return None
    table = tables.opened(run.store, NAME, REMEDY)
    if "n_added" not in table.column_names:  # of a version that added nothing
        table = table.append_column(SCHEMA.field("n_added"), pa.array([0] * len(table), pa.int64()))
    if table.schema.remove_metadata() != SCHEMA or not all(map(_is_whole, table.to_pylist())):
        raise seal.damaged(run.store, NAME, REMEDY)
    return table if (table.schema.metadata or {}).get(b"manifest_hash") == run.hash.encode() else None


def _is_whole(row: dict[str, Any]) -> bool:
    """Whether a row has all that is shown of it; where the accuracy is not known, all of it is not."""
    accuracy = [row[f"accuracy{end}"] for end in ("", "_low", "_high")]
    return (
        accuracy.count(None) in (0, 3) and all(row[name] is not None for name in SHOWN) and None not in (row["against"] or ())
    )


def as_text(table: pa.Table) -> str:
    """The table of ``clean`` for a terminal: gains in percentage points, or in loss."""
    width = max([16, *(len(name) for name in table["method"].to_pylist())])
    lines = [f"{'method':{width}} {'dropped':>8} {'accuracy':>9} {'loss':>8}   gain with 95 % interval"]
    for row in table.to_pylist():
        accuracy = "" if row["accuracy"] is None else f"{100 * row['accuracy']:.2f} %"
        scale, unit = (1, "") if row["accuracy"] is None else (100, " points")
        gain = f"{scale * row['gain']:+.2f} ({scale * row['gain_low']:+.2f} to {scale * row['gain_high']:+.2f}){unit}"
        dropped = f"+{row['n_added']}" if row["method"] == ADDED else f"{100 * row['fraction']:.1f} %"
        lines.append(f"{row['method']:{width}} {dropped:>8} {accuracy:>9} {row['loss']:8.4f}   {gain}")
    about = {key.decode(): value.decode() for key, value in (table.schema.metadata or {}).items()}
    lines += _differences(table)
    missing = json.loads(about.get("missing", "{}"))
    lines += [textwrap.fill(f"{name} is left out: {why}.", 100) for name, why in missing.items()]
    lines += [textwrap.fill(f"{note}.", 100) for note in notes(table)]
    if "intervals" in about:
        lines.append(textwrap.fill(f"Intervals: {about['intervals']}.", 100))
    return "\n".join(lines)


def notes(table: pa.Table) -> list[str]:
    """What must be known to read a table of ``clean``, as sentences without their full stops."""
    rows = table.to_pylist()
    said = [
        f"{ADDED}: nothing is dropped, and the {row['n_added']} examples of val are trained on too, in as many steps"
        for row in rows
        if row["method"] == ADDED
    ]
    rest_on_it = any(method_of(row["method"]) in ("validation", *registry.METHODS) for row in rows)
    return [*said, MAY_ERR] if rest_on_it else said


def _differences(table: pa.Table) -> list[str]:
    """Each ranking of an estimate against the controls at the same share dropped: how much more it gains."""
    lines = []
    for row in table.to_pylist():
        scale = 1 if row["accuracy"] is None else 100
        parts = [
            f"{other['method']} {scale * other['difference']:+.2f} ({scale * other['difference_low']:+.2f} to "
            f"{scale * other['difference_high']:+.2f})"
            for other in row["against"] or ()
            if method_of(other["method"]) not in registry.METHODS
        ]
        method = method_of(row["method"])
        if parts and method in registry.METHODS and not registry.is_truth(method):
            text = f"{row['method']} at {100 * row['fraction']:g} % against {', '.join(parts)}"
            lines.append(textwrap.fill(text, 100, initial_indent="  ", subsequent_indent="      "))
    return ["paired differences in gain:", *lines] if lines else []


def interval(values: np.ndarray) -> tuple[float, float, float]:
    """Mean of values (n,) and the ends of its 95 % confidence interval (Student's t)."""
    from scipy import stats

    mean, spread = float(np.mean(values)), float(stats.sem(values))
    reach = float(stats.t.ppf(0.975, len(values) - 1)) * spread
    return mean, mean - reach, mean + reach


def row(
    key: tuple[str, float],
    removed: int,
    losses: np.ndarray,
    accuracies: np.ndarray,
    losses_before: np.ndarray,
    accuracies_before: np.ndarray,
    test: str,
    added: int = 0,
) -> dict[str, Any]:
    """The row of a method and share dropped ``key``: figures over the seeds, and what is gained over nothing removed.

    ``added`` is the number of samples that are trained on beside the run's own.
    """
    known = not np.isnan(accuracies).any()
    row: dict[str, Any] = {"method": key[0], "fraction": key[1], "n_removed": removed, "seeds": len(losses), "test": test}
    gains = accuracies - accuracies_before if known else losses_before - losses
    for what, values in (("accuracy", accuracies if known else None), ("loss", losses), ("gain", gains)):
        if values is not None:
            ends = interval(values)
            if what == "accuracy":
                ends = (ends[0], max(0.0, ends[1]), min(1.0, ends[2]))
            row.update(zip((what, f"{what}_low", f"{what}_high"), ends, strict=True))
    return {**row, "accuracies": accuracies.tolist() if known else None, "losses": losses.tolist(), "n_added": added}


def _comparable(row: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two rows answer the same question by other methods; what drops nothing is compared with every share."""
    if row["method"] in ("none", ADDED, other["method"]):
        return False
    return other["method"] == ADDED or bool(row["fraction"] == other["fraction"])


def _difference(row: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """By how much a method gains more than another, paired over the seeds: both trained from the same ones."""
    known = row["accuracies"] is not None and other["accuracies"] is not None
    ours, theirs = (np.array(one["accuracies"] if known else one["losses"]) for one in (row, other))
    better = ours - theirs if known else theirs - ours
    return {"method": other["method"], **dict(zip(DIFFERENCE, interval(better), strict=True))}
