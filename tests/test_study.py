"""The study's grid: small here, the whole of it by the command."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from lightning_acc.errors import RequestError
from lightning_acc.studies.grid import Study
from lightning_acc.studies.study import run_study, summary


def small(path: Path, **options: object) -> Study:
    settings = {"data": ["digits"], "models": ["logistic", "gelu"], "corruptions": ["labels"], "lengths": [(3, 30)]}
    return Study(str(path), **{**settings, "seeds": [0], "n_train": 60, **options})  # type: ignore[arg-type]


def test_cells_are_scored_and_not_computed_twice(tmp_path: Path, local_ray: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = run_study(small(tmp_path), ray_address=None)
    frame = table.to_pandas()
    assert len(frame) == 2 * 6
    assert set(zip(frame["method"], frame["readout"], strict=True)) == {
        ("loo", "exact"),
        ("acc-sgd-ie", "exact"),
        ("acc-sgd-ie", "linear"),
        ("acc-low-rank", "exact"),
        ("sgd-ie", "linear"),
        ("tracin", "linear"),
    }
    exact = frame[(frame["method"] == "acc-sgd-ie") & (frame["readout"] == "exact")]
    assert (exact["kendall"] > 0.98).all()
    low_rank = frame[frame["method"] == "acc-low-rank"]
    assert (low_rank["rmse"].to_numpy() < 1.3 * exact["rmse"].to_numpy()).all()
    assert (frame[frame["method"] == "sgd-ie"]["rmse"].to_numpy() > exact["rmse"].to_numpy()).all()
    assert (frame["audit_error"] == 0).all()
    assert "acc-sgd-ie" in summary(table)

    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "cells").iterdir()}
    more = run_study(small(tmp_path, seeds=[0, 1]), ray_address="local")
    assert "2 of 4 cells are there already" in capsys.readouterr().out
    assert len(more) == 4 * 6
    assert all(path.stat().st_mtime_ns == time for path, time in files.items())
    assert more.slice(0, 12).equals(table.cast(more.schema))

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


def test_what_is_said_of_the_study_follows_from_its_table() -> None:
    """The README of the studies and the list of what failed, against every cell."""
    root = Path(__file__).parent.parent
    sys.path.insert(0, str(root / "scripts"))
    import study_figures

    frame = pd.read_csv(root / "scripts/study/paper.csv", comment="#")
    frame["way"] = frame["method"] + ", " + frame["readout"]
    estimates = frame[frame["method"] != "loo"]
    expected, cost = study_figures.expectations(estimates), study_figures.cost(frame)
    claims, readme = ((root / "scripts/study" / name).read_text() for name in ("claims.md", "README.md"))
    cleaning = claims.partition(cost[0])[2].strip()
    assert "\n".join([*expected, "", *cost]) in claims
    assert "\n".join(expected[: expected.index("")]) in readme
    assert cleaning in readme
    said = " ".join(readme.split())
    assert f"took {cost[0].split()[-1].rstrip('.')} times the work" in said
    error = estimates.pivot_table(index=study_figures.KEYS, columns="way", values="rmse")
    logistic = error.xs("logistic", level="model")
    failing = (logistic["acc-sgd-ie, exact"] / logistic["sgd-ie, linear"] > 0.2).groupby("data").sum()
    assert f"{failing.sum()} fail it: {failing['mnist']} on MNIST, {failing['adult']} on Adult." in said
    times = (error["sgd-ie, linear"] / error["acc-sgd-ie, exact"]).groupby(["model", "epochs"]).median()
    assert re.search(
        rf"38 epochs {times['logistic', 38]:.0f} times \(logistic\) and {times['gelu', 38]:.0f} times \(GELU\)", said
    )
    assert min(times["logistic", 2], times["gelu", 2]) > 100
    better = (100 * (error["acc-sgd-ie, exact"] < error["sgd-ie, linear"]).groupby("model").mean()).round()
    assert better["logistic"] == 100
    assert (
        f"in {len(error)} small trainings ACC-SGD-IE, read exactly, is truer than SGD-IE in all convex models, "
        f"{better['gelu']:.0f} % of the smooth networks and {better['relu']:.0f} % of the ReLU networks."
    ) in " ".join((root / "README.md").read_text().split())
    gain = {  # the first table is that of MNIST: dropping a fifth "gains as much as knowing the wrong labels"
        words[1].strip(" `"): float(words[4].split()[0]) for words in (line.split("|") for line in cleaning.splitlines()[2:9])
    }
    assert gain["oracle"] > 3
    assert min(gain["acc-sgd-ie"], gain["sgd-ie"]) >= gain["oracle"]


def test_what_is_said_of_full_mnist_is_what_its_script_wrote() -> None:
    root = Path(__file__).parent.parent
    _, _, tables = (root / "scripts/study/mnist-full.md").read_text().partition("\n\n")
    readme = (root / "scripts/study/README.md").read_text()
    found = re.search(r"<!-- mnist-full: .* -->\n(.*)<!-- end of mnist-full -->", readme, re.DOTALL)
    assert found is not None
    assert found[1] == tables
    error, tau = (
        {cells[1].strip(" `"): float(cells[place]) for cells in (line.split("|") for line in tables.splitlines()[2:6])}
        for place in (2, 3)
    )
    assert error["acc-low-rank"] <= 1.3 * error["acc-sgd-ie.float64"]  # "nearly as truly as exact ACC-SGD-IE"
    assert tau["acc-low-rank"] >= tau["acc-sgd-ie.float64"] - 0.02
