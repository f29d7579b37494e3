"""``ScoreMatrix``: scores of removals for single examples, with the conditions they were computed under, as one file."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch

from lightning_acc import arguments
from lightning_acc.core.removals import Removal
from lightning_acc.errors import RequestError
from lightning_acc.methods.registry import METHODS, TRUTH
from lightning_acc.record import seal
from lightning_acc.record.schema import files
from lightning_acc.record.store import Store
from lightning_acc.scoring.scores import threads
from lightning_acc.scoring.trust.verdict import FAITHFUL, Verdict, unchecked

FOLDER = "matrices"
PART = "part-"
"""What names of parts begin with: of matrices that are not finished."""
REMEDY = "delete it and score again"


class ScoreMatrix:
    """How much each removal changes the query's value of each example.

    Positive: without the samples the example's loss would be higher, they help this prediction. Negative: they harm it.

    Attributes:
        removals: n removals, the rows.
        examples: numbers of the examples of the query, from 0 in the order of its data: the columns.
        conditions: method, query, moments, readout, dtype and so on, as of a table of scores.
    """

    def __init__(
        self,
        removals: Sequence[Removal],
        examples: Sequence[int],
        conditions: dict[str, Any],
        by_example: np.ndarray | None = None,
        stored: tuple[Store, str] | None = None,
    ) -> None:
        self.removals = list(removals)
        self.examples = list(examples)
        self.conditions = conditions
        self._given, self._stored = by_example, stored

    def __repr__(self) -> str:
        c = self.conditions
        shape = f"{len(self.removals)} removals x {len(self.examples)} examples"
        what = f"ScoreMatrix({c['method']}: {shape} of query {c['query']} at {c['at']}, {c['readout']} readout, {c['dtype']})"
        return what if c["method"] == TRUTH else f"{what}\n{self.verdict}"

    @cached_property
    def _by_example(self) -> np.ndarray:
        """(examples, removals): what is said of one example lies together."""
        if self._given is not None:
            return self._given
        assert self._stored is not None
        return _read(*self._stored)[0]

    @property
    def values(self) -> np.ndarray:
        """The scores, (n_removals, n_examples), float32; read from their file when they are first asked for."""
        return np.asarray(self._by_example.T)

    @property
    def verdict(self) -> Verdict:
        """How far these scores can be trusted: rank correlations are those of single examples, on average."""
        if self.conditions["method"] == TRUTH:
            return Verdict(FAITHFUL, reason="these are true scores: each removal was retrained without")
        text = self.conditions.get("verdict")
        return unchecked("nothing was retrained without: check was 0") if text is None else Verdict.from_json(text)

    def of(self, example: int) -> np.ndarray:
        """The scores (n_removals,) for one example.

        Raises:
            RequestError: it is none of ``examples``.
        """
        number = arguments.index(example)
        if number not in self._column:
            raise RequestError(
                f"There is no example {arguments.shown(example)} in this matrix: it has {len(self.examples)} of the query "
                f"{self.conditions['query']!r}, from {min(self.examples, default=0)} to {max(self.examples, default=0)}."
            )
        found: np.ndarray = self._by_example[self._column[number]]
        return found

    def top(self, example: int, k: int = 10) -> tuple[list[Removal], np.ndarray]:
        """The ``k`` removals that move an example most, the strongest first, with their scores, (k,): whether they help or harm
        it, the sign tells.
        """
        return self._first(example, k, -np.abs(self.of(example)))

    def helpful(self, example: int, k: int = 10) -> tuple[list[Removal], np.ndarray]:
        """The ``k`` removals whose samples help an example most, with scores (k,): without them its loss would be highest."""
        return self._first(example, k, -self.of(example))

    def harmful(self, example: int, k: int = 10) -> tuple[list[Removal], np.ndarray]:
        """The ``k`` removals whose samples harm an example most, with scores (k,): without them its loss would be lowest."""
        return self._first(example, k, self.of(example))

    def _first(self, example: int, k: int, keys: np.ndarray) -> tuple[list[Removal], np.ndarray]:
        count = arguments.whole("k", k, "is no number of removals")
        scores = self.of(example)
        # The whole order of 60 000 is not needed for the first ten; of what is no number nothing is said.
        keys = np.where(np.isfinite(keys), keys, np.inf)
        near = np.argpartition(keys, count - 1)[:count] if count < len(keys) else np.arange(len(keys))
        order = [i for i in near[np.lexsort((near, keys[near]))].tolist() if np.isfinite(scores[i])]
        return [self.removals[i] for i in order], scores[order]

    @cached_property
    def _column(self) -> dict[int | None, int]:
        return {example: i for i, example in enumerate(self.examples)}

    def picked(self, removals: Sequence[Removal], examples: Sequence[int], conditions: dict[str, Any]) -> ScoreMatrix:
        """Some of its rows and columns, in another order."""
        if list(removals) == self.removals and list(examples) == self.examples:
            return ScoreMatrix(removals, examples, conditions, self._given, self._stored)
        row = {removal: i for i, removal in enumerate(self.removals)}
        columns = np.array([self._column[example] for example in examples], dtype=np.int64)
        rows = np.array([row[removal] for removal in removals], dtype=np.int64)
        return ScoreMatrix(removals, examples, conditions, self._by_example[columns][:, rows])


def write(store: Store, name: str, matrix: ScoreMatrix) -> None:
    """Store a matrix in a run directory as ``matrices/<name>.safetensors``."""
    file = f"{FOLDER}/{name}.safetensors"
    # Every sample by itself, which is the most that is asked about, needs no list.
    singles = [removal[0] for removal in matrix.removals if len(removal) == 1]
    simple = len(singles) == len(matrix.removals) and singles == list(range(len(singles)))
    head = {
        "removals": len(singles) if simple else matrix.removals,
        "examples": matrix.examples,
        "conditions": {
            key: value if isinstance(value, (int, float)) else str(value) for key, value in matrix.conditions.items()
        },
    }
    values = torch.from_numpy(np.ascontiguousarray(matrix.values.T, dtype=np.float32))
    store.write(file, files.sealed_tensors({"scores": values}, head, file))


def read(store: Store, name: str, n_samples: int | None = None) -> ScoreMatrix:
    """The matrix stored as ``matrices/<name>.safetensors``, of a run with ``n_samples`` where that is known.

    Raises:
        DamagedResult: it is not what was written there.
        RunError: it cannot be read.
    """
    file = f"{FOLDER}/{name}.safetensors"
    _, head = _read(store, file, n_samples)
    return ScoreMatrix(head["removals"], head["examples"], head["conditions"], stored=(store, file))


def names(store: Store, parts: bool = False) -> list[str]:
    """Names of the stored matrices, or of the parts of those that are not finished."""
    found = [name.split("/")[1] for name in store.names(FOLDER)]
    stems = sorted(file.removesuffix(".safetensors") for file in found if file.endswith(".safetensors"))
    return [stem for stem in stems if stem.startswith(PART) == parts]


def _read(store: Store, file: str, n_samples: int | None = None) -> tuple[np.ndarray, dict[str, Any]]:
    tensors, head = files.opened_tensors(store, file, REMEDY)
    try:
        removals, examples, conditions = head["removals"], head["examples"], head["conditions"]
        head["removals"] = [(i,) for i in range(removals)] if isinstance(removals, int) else [tuple(r) for r in removals]
        _check(tensors, head["removals"], examples, conditions, math.inf if n_samples is None else n_samples)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise seal.damaged(store, file, REMEDY) from error
    return tensors["scores"].numpy(), head


def _check(
    tensors: dict[str, torch.Tensor], removals: list[Removal], examples: list[int], conditions: dict[str, Any], n_samples: float
) -> None:
    """See that a file with a seal is a matrix of scores.

    Raises:
        KeyError, TypeError, ValueError: it is not.
    """
    scores = tensors["scores"]
    if scores.dtype != torch.float32 or scores.shape != (len(examples), len(removals)) or len(tensors) > 1:
        raise ValueError("its scores are of another kind")
    if any(type(i) is not int or not 0 <= i < n_samples for removal in removals for i in removal):
        raise ValueError("its removals are none of this run")
    if any(type(i) is not int or i < 0 for i in examples) or len(set(examples)) < len(examples):
        raise ValueError("its examples are none")
    if conditions["method"] not in METHODS or not all(
        isinstance(conditions[key], str) for key in ("query", "query_fingerprint", "at", "readout", "dtype", "manifest_hash")
    ):
        raise ValueError("its conditions are others")
    threads(conditions)
    if "verdict" in conditions:
        Verdict.from_json(conditions["verdict"])


def as_text(matrix: ScoreMatrix, examples: Sequence[int], k: int) -> str:
    """The strongest removals of some examples, for a terminal."""
    lines = [str(matrix)]
    for example in examples:
        lines.append(f"example {example}:")
        for word, (removals, scores) in (("helped", matrix.helpful(example, k)), ("harmed", matrix.harmful(example, k))):
            said = [f"{' '.join(map(str, r[:5]))} ({s:+.2e})" for r, s in zip(removals, scores.tolist(), strict=True)]
            lines.append(f"  {word} most by  {', '.join(said)}")
    return "\n".join(lines)
