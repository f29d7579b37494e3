"""The study of cleaning: its figures are what they are said to be, a cell runs and goes on, its tables are those of its CSV."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "scripts"))
pytest.importorskip("matplotlib")
import study_cleaning  # noqa: E402
import study_cleaning_tables  # noqa: E402

CELL = "digits-100-class-20"
INFLUENCE = [f"sgd-ie {at}{of}" for at in ("end", "along") for of in ("", " of 4 runs")]
WORDS = ["--cells", CELL, "--seeds", "2", "--rankings", *INFLUENCE, "loss", "validation", "oracle"]


def test_figures_of_a_case_by_hand() -> None:
    corrupted = np.array([True, False, False, True, False])
    order = np.array([3, 1, 0, 2, 4])
    assert study_cleaning.precision(order, corrupted, 0.4) == 0.5
    # Of the six pairs of a corrupted and another sample only 0 behind 1 is the wrong way round.
    assert study_cleaning.auc(order, corrupted) == pytest.approx(5 / 6)
    assert study_cleaning.auc(np.array([0, 3]), corrupted) == 1
    assert study_cleaning.auc(np.array([3]), corrupted) == pytest.approx((3 + 1.5) / 6)  # what is left out stands last, alike

    results = {
        ("none", 0.0, 0): (1.0, 0.50),
        ("none", 0.0, 1): (1.2, 0.60),
        ("loss", 0.1, 0): (0.9, 0.51),
        ("loss", 0.1, 1): (1.0, 0.64),
    }
    gain = study_cleaning.gain(results, "loss", 0.1, seeds=2)
    # Gains of 1 and 4 points: 2.5 with a standard error of 1.5; Student's t of one degree of freedom is 12.706.
    assert gain["accuracy"] == pytest.approx((2.5, 2.5 - 1.5 * 12.706, 2.5 + 1.5 * 12.706), rel=1e-4)
    assert gain["loss"] == pytest.approx((0.15, 0.15 - 0.05 * 12.706, 0.15 + 0.05 * 12.706), rel=1e-4)


def test_cells_are_what_their_names_say() -> None:
    cells = study_cleaning.cells()
    assert all(cell.name == name for name, cell in cells.items())
    assert cells["mnist-1000-class-20"].rate == cells["adult-1000-feature-20"].rate == 0.2
    assert cells["mnist-all-uniform-10"].fractions == (0.1,)
    clean, wrong = (cells[name].module() for name in (CELL, f"{CELL}-val-wrong"))
    assert clean.corrupted.sum() == wrong.corrupted.sum() == 20
    assert (clean.splits["train"].labels == wrong.splits["train"].labels).all()
    assert (clean.splits["val"].labels != wrong.splits["val"].labels).sum() == 20


@pytest.mark.filterwarnings("ignore")
def test_a_cell_runs_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study_cleaning.main([*WORDS, "--out", str(tmp_path)])
    path = tmp_path / f"{CELL}.json"
    figures = json.loads(path.read_text())
    rankings = figures["rankings"]
    assert set(rankings) == {*INFLUENCE, "loss", "validation", "oracle", "random", "validation added"}
    assert (rankings["oracle"]["precision"], rankings["oracle"]["auc"], rankings["random"]["precision"]) == (1, 1, 0.2)
    assert rankings["oracle"]["gains"]["20 %"] == rankings["oracle"]["gains"]["30 %"]  # there are no more to drop
    assert rankings["oracle"]["gains"]["20 %"]["accuracy"][0] > 0
    assert rankings["sgd-ie along of 4 runs"]["auc"] > 0.7

    def refuse(*_: Any) -> None:
        raise AssertionError("it trains anew what is there")

    monkeypatch.setattr(study_cleaning, "retrain", refuse)
    monkeypatch.setattr(study_cleaning, "mean_scores", refuse)
    path.unlink()
    study_cleaning.main([*WORDS, "--out", str(tmp_path)])
    assert json.loads(path.read_text()) == figures
    frame = study_cleaning_tables.frame([figures])
    assert len(frame) == 3 * (len(rankings) - 1) + 1
    assert frame[frame["ranking"] == "validation added"]["dropped"].tolist() == ["0 %"]
    study_cleaning.main([*WORDS, "--out", str(tmp_path), "--seeds", "0"])
    untried = study_cleaning_tables.frame([json.loads(path.read_text())])
    assert set(untried["dropped"]) == {study_cleaning_tables.UNTRIED}
    assert study_cleaning_tables.in_words(untried[untried["ranking"] == "oracle"].iloc[0]) == "1.00 (1.00)"


def test_the_study_shows_its_figures() -> None:
    if not study_cleaning_tables.CSV.exists():
        pytest.skip("nothing has been run")
    figures = study_cleaning_tables.pd.read_csv(study_cleaning_tables.CSV)
    lines = [*study_cleaning_tables.tables(figures), *study_cleaning_tables.sentences(figures)]
    assert "\n".join(lines).strip() in (ROOT / "scripts/study/README.md").read_text()
    assert (ROOT / "scripts/study/cleaning.png").stat().st_size <= 100_000
