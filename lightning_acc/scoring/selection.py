"""Removals and moments in words, as the command line and configurations give them."""

from __future__ import annotations

import os
import random
import re

from lightning_acc.core.queries.moments import At
from lightning_acc.core.removals import Removal, number_by_name, parse
from lightning_acc.errors import RequestError
from lightning_acc.record.record import Record
from lightning_acc.scoring import scores
from lightning_acc.scoring.matrices import worst_examples


def select(run: Record, words: str) -> list[Removal] | dict[str, Removal] | None:
    """The removals ``words`` names.

    * ``all``: every sample by itself; ``random:64``: 64 samples drawn at random, the same ones every time;
    * ``top:50@sgd-ie``: the 50 most harmful by the stored scores of a method; ``top-group:1%@sgd-ie``: one group, the 1 % of
      the samples that help most by them;
    * ``group:label``: one removal for each value of a column that the data module tells of its samples
      (``describe_samples``), such as a label or a source;
    * ``random-groups:100x5%``: 100 groups of 5 % of the samples each, drawn at random, the same ones every time;
    * anything else is a file with one removal on each line, its sample ids, or the names that the batches gave the samples,
      separated by blanks or commas; empty lines and what follows a ``#`` are passed over.

    Raises:
        RequestError: the words mean nothing, or there is no such file, method or sample.
    """
    if words == "all":
        return None
    if match := re.fullmatch(r"random:(\d+)", words):
        count = int(match[1])
        if not 0 < count <= run.n_samples:
            raise RequestError(f"{words} asks for {count} samples, but this run has {run.n_samples}.")
        return [(i,) for i in sorted(random.Random(0).sample(range(run.n_samples), count))]
    if match := re.fullmatch(r"top:(\d+)@(.+)", words):
        return _stored(run, words, match[2]).most_harmful(int(match[1]))
    if match := re.fullmatch(r"random-groups:(\d+)x(\d+(?:\.\d+)?)%", words):
        return random_groups(run, int(match[1]), _share(run, words, match[2]))
    if match := re.fullmatch(r"top-group:(\d+(?:\.\d+)?)%@(.+)", words):
        helpful = _stored(run, words, match[2]).most_helpful(_share(run, words, match[1]))
        return {f"the {match[1]} % that help most by {match[2]}": tuple(sorted(i for removal in helpful for i in removal))}
    if match := re.fullmatch(r"group:(.+)", words):
        return {f"{match[1]} {value}": samples for value, samples in groups(run, match[1]).items()}
    if not os.path.isfile(words):
        raise RequestError(
            f"{words!r} names no removals and no file: use all, random:N, top:N@METHOD, group:COLUMN, random-groups:NxSHARE%, "
            "top-group:SHARE%@METHOD, or a file with a removal on each line."
        )
    try:
        with open(words, encoding="utf-8") as file:
            lines = [line.partition("#")[0].replace(",", " ").split() for line in file]
        number = number_by_name(run)
        removals = [[int(word) if word.isdecimal() or number is None else word for word in line] for line in lines if line]
        return parse(removals, run.n_samples, number=number)
    except ValueError as error:
        raise RequestError(f"The file {words} names no removals, lines of sample ids: {str(error).rstrip('.')}.") from error


RANDOM_GROUP = "random group"
"""What names of groups begin with that were drawn at random."""


def random_groups(run: Record, count: int, size: int, seed: int = 0) -> dict[str, Removal]:
    """``count`` groups of ``size`` samples each, drawn at random, by name."""
    draw = random.Random(seed)
    return {f"{RANDOM_GROUP} {k}": tuple(sorted(draw.sample(range(run.n_samples), size))) for k in range(count)}


def _share(run: Record, words: str, percent: str) -> int:
    """So many percent of the samples.

    Raises:
        RequestError: that is none of them, or all.
    """
    size = round(float(percent) / 100 * run.n_samples)
    if not 0 < size < run.n_samples:
        raise RequestError(f"{words} asks for {size} of the {run.n_samples} samples of this run: give another share.")
    return size


def _stored(run: Record, words: str, name: str) -> scores.Scores:
    known = scores.names(run.store)
    if name not in known:
        has = f"it has {', '.join(known)}" if known else "it has none yet"
        raise RequestError(f"{words} needs the scores of {name}, but this run has none of them: {has}. Score them first.")
    table = scores.read(run.store, name, n_samples=run.n_samples)
    if table.conditions["manifest_hash"] != run.hash:
        raise RequestError(f"The scores of {name} belong to a run that was here before: score this one first.")
    return table


def groups(run: Record, column: str) -> dict[str, Removal]:
    """The samples of each value of a column that is known of them, such as ``label``.

    Raises:
        RequestError: there is no such column.
    """
    info = run.sample_info()
    known = [] if info is None else [name for name in info.column_names if name != "image"]
    if column not in known:
        has = f"known are {', '.join(known)}" if known else "nothing is known of them (define describe_samples)"
        raise RequestError(f"The samples of this run have no column {column!r}: {has}.")
    found: dict[str, list[int]] = {}
    for sample, value in enumerate(info[column].to_pylist() if info is not None else []):
        found.setdefault(str(value), []).append(sample)
    return {value: tuple(samples) for value, samples in sorted(found.items())}


def most(words: str) -> int:
    """The number in ``top:N``.

    Raises:
        RequestError: the words are others.
    """
    match = re.fullmatch(r"top:(\d+)", words)
    if match is None:
        raise RequestError(f"{words!r} does not say what to confirm: use top:N, such as top:50.")
    return int(match[1])


def some_examples(run: Record, query: str, words: str) -> list[int] | None:
    """The examples of a query that ``words`` name: ``all`` (None), ``worst:20``, or their numbers with commas between.

    Raises:
        RequestError: the words mean nothing.
    """
    if words == "all":
        return None
    if match := re.fullmatch(r"worst:(\d{1,9})", words):
        return worst_examples(run, query, int(match[1]))
    if re.fullmatch(r"\d{1,9}(,\d{1,9})*", words):
        return [int(word) for word in words.split(",")]
    raise RequestError(f"{words!r} names no examples: use all, worst:N, or their numbers with commas between.")


def moment(at: str) -> At:
    """``at`` in words: a number is a step, several with commas between them are several; all else is as ``score`` takes it."""
    if re.fullmatch(r"\d+(,\d+)*", at):
        steps = [int(step) for step in at.split(",")]
        return steps if len(steps) > 1 else steps[0]
    return at
