"""What is stored is taken for the answer to the same question alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from problems import make, record

import lightning_acc as la
from lightning_acc.scoring import shards

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
