"""The study's grid: small here, the whole of it by the command."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from lightning_acc.errors import RequestError
from lightning_acc.grid import Study
from lightning_acc.study import run_study, summary


def small(path: Path, **options: object) -> Study:
    settings = {"data": ["digits"], "models": ["logistic", "gelu"], "corruptions": ["labels"], "lengths": [(3, 30)]}
    return Study(str(path), **{**settings, "seeds": [0], "n_train": 60, **options})  # type: ignore[arg-type]


def test_cells_are_scored_and_not_computed_twice(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = run_study(small(tmp_path), ray_address=None)
    frame = table.to_pandas()
    assert len(frame) == 2 * 5
    assert set(zip(frame["method"], frame["readout"], strict=True)) == {
        ("loo", "exact"),
        ("acc-sgd-ie", "exact"),
        ("acc-sgd-ie", "linear"),
        ("sgd-ie", "linear"),
        ("tracin", "linear"),
    }
    exact = frame[(frame["method"] == "acc-sgd-ie") & (frame["readout"] == "exact")]
    assert (exact["kendall"] > 0.98).all()
    assert (frame[frame["method"] == "sgd-ie"]["rmse"].to_numpy() > exact["rmse"].to_numpy()).all()
    assert (frame["audit_error"] == 0).all()
    assert "acc-sgd-ie" in summary(table)

    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "cells").iterdir()}
    more = run_study(small(tmp_path, seeds=[0, 1]), ray_address="local")
    assert "2 of 4 cells are there already" in capsys.readouterr().out
    assert len(more) == 4 * 5
    assert all(path.stat().st_mtime_ns == time for path, time in files.items())
    assert more.slice(0, 10).equals(table.cast(more.schema))

    run_study(small(tmp_path, lr=0.05), ray_address=None)  # another study in the same place: nothing is taken over
    assert "there already" not in capsys.readouterr().out


@pytest.mark.skipif("LIGHTNING_ACC_DATA" not in os.environ, reason="needs LIGHTNING_ACC_DATA")
@pytest.mark.parametrize("data", ["adult", "newsgroups", "mnist"])
def test_logistic_cells_on_real_data(tmp_path: Path, data: str) -> None:
    """What the paper's convex cells must show: the exact readout is all but the truth."""
    grid = small(tmp_path, data=[data], models=["logistic"], corruptions=["labels", "features"], lengths=[(5, 50)], n_train=100)
    frame = run_study(grid, ray_address=None).to_pandas()
    exact = frame[(frame["method"] == "acc-sgd-ie") & (frame["readout"] == "exact")]
    sgd = frame[frame["method"] == "sgd-ie"]
    assert (exact["kendall"] >= 0.98).all()
    assert (exact["rmse"].to_numpy() <= sgd["rmse"].to_numpy() / 5).all()
    assert np.isfinite(frame["rmse"]).all()


def test_an_unknown_name_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="models has 'transformer', which the study does not know: choose from logistic"):
        small(tmp_path, models=["transformer"]).cells()
