"""What is stored is taken for the answer to the same question alone."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from problems import make, record

import lightning_acc as la
from lightning_acc.methods import memory
from lightning_acc.scoring import score as scoring
from lightning_acc.scoring import scores, shards

CONDITIONS: dict[str, Any] = {
    "manifest_hash": "a",
    "method": "acc-low-rank",
    "query_fingerprint": "b",
    "readout": "exact",
    "dtype": "float32",
    "convention": "fixed-denominator",
    "version": "1",
    "form": "screened",
    "directions": "chosen",
    "followed": "3",
    "among": "c",
}


def test_every_condition_counts() -> None:
    assert shards.key({**CONDITIONS, "seconds": 1.0}) == shards.key(CONDITIONS)
    keys = {shards.key({**CONDITIONS, name: "another"}) for name in CONDITIONS}
    assert len(keys | {shards.key(CONDITIONS)}) == len(CONDITIONS) + 1


@pytest.mark.parametrize("first", ["float32", "float64"])
def test_scores_of_one_precision_are_not_taken_for_those_of_the_other(tmp_path: Path, first: str) -> None:
    run = record(tmp_path / "run", make(hidden=4).float(), precision="32-true")
    second = {"float32": "float64", "float64": "float32"}[first]
    fresh = {
        dtype: la.score(run, "loo", dtype=dtype, ray_address=None, save=False, check=0).values for dtype in (first, second)
    }
    assert not np.array_equal(fresh[first], fresh[second])
    for dtype, reused in ((first, 0), (second, 0), (first, len(fresh[first])), (second, len(fresh[first]))):
        found = la.score(run, "loo", dtype=dtype, ray_address=None, check=0)
        assert found.conditions["reused"] == reused
        assert found.conditions["dtype"] == dtype
        assert np.array_equal(found.values, fresh[dtype])


def test_shards_that_are_removed_while_scoring_are_missed_by_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "LARGEST_CHUNK", 4)
    run = record(tmp_path / "run", make(hidden=4))
    undisturbed = la.score(run, "loo", ray_address=None, save=False, check=0)
    honest, pieces = scoring.compute, []

    def disturbed(*arguments: Any) -> Any:
        pieces.append(arguments[1])
        if len(pieces) == 4:
            shutil.rmtree(tmp_path / "run/shards")
        return honest(*arguments)

    monkeypatch.setattr(scoring, "compute", disturbed)
    found = la.score(run, "loo", ray_address=None, check=0)
    assert len(pieces) == 6
    stored = scores.read(run.store, "loo")
    for table in (found, stored):
        assert table.by_removal() == undisturbed.by_removal()
