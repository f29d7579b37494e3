"""Where a run stands: what is there, what is missing, and the command that is next."""

from __future__ import annotations

import os
import shlex
import textwrap
from collections.abc import Iterator

from lightning_acc import arguments
from lightning_acc.core.rebuild import OWN, PROGRAM, TRUST_VARIABLE, place_of
from lightning_acc.credentials import without_credentials
from lightning_acc.judge import agreement, cleaning_table
from lightning_acc.judge.cleaning import BEST
from lightning_acc.methods import registry
from lightning_acc.progress import duration
from lightning_acc.record import manifest
from lightning_acc.record.record import Record
from lightning_acc.record.store import Store
from lightning_acc.scoring.scores import Scores
from lightning_acc.show import over_time
from lightning_acc.show.headline import fullest, headline
from lightning_acc.show.predictions import stored_matrices

PAGE = "report/index.html"
WIDTH = 100
CHECKED = 64
"""Samples to retrain without, to hold all estimates against."""
Row = tuple[str, ...]


def status(path: str | os.PathLike[str]) -> str:
    """What is there of a run, what is missing, and the next command, as text of at most 100 columns where its names are short.

    Nothing is imported for it and nothing computed.

    Args:
        path: the run directory, a local path or an fsspec URL.

    Raises:
        RunError: there is no run, none of its steps is there in whole, or a file of it is damaged.
    """
    where = arguments.path("run", path)
    store = Store(where)
    unfinished = manifest.identify(store).get("status") == "recording"
    run = Record(where, partial=unfinished)
    named = shlex.quote(str(without_credentials(where)))
    module = str(run.manifest["module"]["class"]).rpartition(":")[2]
    sizes = f"{run.n_samples:,} samples, {run.n_steps:,} steps, {run.n_parameters:,} parameters of {module}, {run.dtype}"
    lines = [run.path, sizes, f"queries: {', '.join(run.query_names()) or 'none'}"]
    if unfinished:
        lines.append("half written: its training goes on, or was killed; then the whole steps that are there become a run by")
        return "\n".join([*lines, f"next: lightning-acc repair {named}"])
    if run.manifest.get("stopped"):
        lines.append(f"ended early ({run.manifest['stopped']}) {run.manifest.get('reason', '')}".rstrip())
    tables = agreement.stored_scores(run)
    there, missing = list(_there(run, tables)), list(_missing(run, tables))
    if (said := headline(run, tables)) is not None:
        lines.append(textwrap.fill(said.text, WIDTH))
    command = f"export --scores {fullest(tables)} --csv ranking.csv --ids drop.txt"
    if there:
        lines += ["there:", *_aligned(there)]
    if missing:
        lines += ["missing:", *_aligned([(what, words) for what, words, _ in missing])]
        command = missing[0][2]
    verb, _, options = command.partition(" ")
    needs = _trust(run) if verb in ("score", "retrain", "matrix", "clean") else ""
    return "\n".join([*lines, f"next: lightning-acc {verb} {named} {options}{needs}".rstrip()])


def _there(run: Record, tables: dict[str, Scores]) -> Iterator[Row]:
    for table in sorted(tables.values(), key=lambda table: registry.place(table.conditions["method"])):
        c = table.conditions
        word = "truth" if registry.is_truth(c["method"]) else table.verdict.word
        yield "scores", c["method"], f"{len(table)} removals", f"{c['query']} at {c['at']}", word, duration(c["seconds"])
    for matrix in stored_matrices(run).values():
        c, size = matrix.conditions, f"{len(matrix.removals)} x {len(matrix.examples)}"
        word = "truth" if registry.is_truth(c["method"]) else matrix.verdict.word
        yield "matrix", c["method"], size, f"{c['query']} at {c['at']}", word, duration(c["seconds"])
    if (rows := agreement.read(run)) is not None:
        yield "evaluation", "", f"{len(rows)} rows"
    if (cleaned := cleaning_table.read(run)) is not None:
        yield "cleaning", "", f"{len(set(cleaned['method'].to_pylist()))} rankings"
    if (followed := over_time.stored(run)) is not None:
        yield "over time", "", f"{len(followed.samples)} samples", followed.query
    if run.store.exists(PAGE):
        yield "page", "", PAGE


def _missing(run: Record, tables: dict[str, Scores]) -> Iterator[tuple[str, str, str]]:
    """What is missing, in the order in which it is best made: its name, what it tells, and the command without the run."""
    estimates = [table for table in tables.values() if not registry.is_truth(table.conditions["method"])]
    if not tables:
        yield "scores", "which samples help, and which harm", f"score --method {BEST[0]} --at {BEST[1]}"
    for table in estimates:
        if agreement.truth_for(tables, table) is None:
            c = table.conditions
            question = "".join(f" --{name} {c[name]}" for name, usual in (("query", "val"), ("at", "end")) if c[name] != usual)
            what = f"how far {c['method']} holds ({c['query']} at {c['at']})"
            yield "truth", what, f"retrain --removals random:{min(CHECKED, run.n_samples)}{question}"
            break
    if estimates and agreement.read(run) is None:
        yield "evaluation", "agreement with retraining, and cost", "evaluate"
    if not stored_matrices(run):
        yield "matrix", "which samples made single predictions", "matrix --examples worst:20"
    if cleaning_table.read(run) is None:
        yield "cleaning", "what dropping the most harmful gains", "clean"
    if not run.store.exists(PAGE):
        yield "page", "all of this to look at", "report"


def _trust(run: Record) -> str:
    """What a new process must be told to import the run's module."""
    package = place_of(run.manifest["module"]).partition(".")[0]
    known = (OWN, PROGRAM, *os.environ.get(TRUST_VARIABLE, "").split(","))
    return "" if package in known else f" --trust {package}"


def _aligned(rows: list[Row]) -> list[str]:
    widths = [max(len(row[i]) if i < len(row) else 0 for row in rows) for i in range(max(map(len, rows)))]
    return ["  " + "  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=False)).rstrip() for row in rows]
