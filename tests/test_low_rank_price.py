"""acc-low-rank costs what is asked for, in trainings of the run; where that pays for the truth, this is what it gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from problems import N, data, make, record

import lightning_acc as la
from lightning_acc.cli.shown import shown
from lightning_acc.core.queries import find
from lightning_acc.core.replay import Replay
from lightning_acc.methods.low_rank import budget
from lightning_acc.methods.low_rank.entry import LowRank
from lightning_acc.methods.low_rank.prices import Prices

ADAMW = {"class": "AdamW", "lr": 0.02, "weight_decay": 0.1}
ROUND_OFF = 1e-12


def scored(run: la.Run, method: str = "acc-low-rank", **options: Any) -> la.Scores:
    return la.score(run, method, ray_address=None, **{"check": 0, "save": False, **options})


def form(run: la.Run, trainings: int | None = None) -> str | None:
    return LowRank(trainings=trainings).settled(Replay(run), keep_shifts=False).form


@pytest.mark.parametrize(("optimizer", "usual"), [({"momentum": 0.9, "lr": 0.05}, "tracked"), (ADAMW, "defect")])
def test_where_it_pays_for_the_truth_and_for_no_better_it_is_the_truth(
    tmp_path: Path, optimizer: dict[str, Any], usual: str
) -> None:
    run = record(tmp_path / "run", make(hidden=4, optimizer=optimizer))
    assert (form(run), form(run, 1)) == (usual, "retrained")
    found, truth = scored(run, trainings=1, save=True), scored(run, "loo")
    np.testing.assert_allclose(found.values, truth.values, rtol=0, atol=ROUND_OFF)
    told = [found.conditions[name] for name in ("method", "form", "trainings", "label", "readout")]
    assert told == ["acc-low-rank", "retrained", "1", "acc-low-rank.1-trainings", "exact"]
    assert "each was retrained without, as the 1 trainings that acc-low-rank may cost pay for it" in shown(found, 3)
    assert "each was retrained without" not in shown(scored(run), 3)
    assert "among" not in found.conditions  # each is what it is, whatever else is asked about
    assert scored(run, trainings=1, removals=[3], save=True).conditions["reused"] == 1
    assert scored(run, removals=[3], save=True).conditions["reused"] == 0  # another form
    assert scored(run, trainings=1, check=N).verdict.spearman == pytest.approx(1.0)
    examples = la.score_matrix(run, "loo", examples=[0, 1], ray_address=None, check=0, save=False).values
    assert np.abs(examples).max() > 0


def test_more_trainings_never_give_less_than_the_truth(tmp_path: Path) -> None:
    run = record(tmp_path / "run", make(hidden=16, activation="gelu"), data(n=60), batch_size=10)
    whole = Prices(Replay(run)).tracked(run.n_samples, run.n_parameters)
    assert Prices(Replay(run)).retrained(run.n_samples) < whole
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(budget, "TRAININGS", int(whole) - 1)
        assert [form(run, trainings) for trainings in (None, int(whole) + 1)] == ["retrained", "retrained"]
    assert form(run, int(whole) + 1) == ("tracked" if whole <= budget.TRAININGS else "retrained")


def test_a_price_is_what_the_work_is(tmp_path: Path) -> None:
    run = record(tmp_path / "run", make(hidden=4, optimizer={"momentum": 0.9, "lr": 0.05}))
    price = Prices(Replay(run))
    # 39 parameters with a momentum each; 12 steps of 6 samples.
    work = 6 * 39 / 25
    assert price.retrained(N) == pytest.approx(N * (work + 6000 + 39) / (200_000 + work))
    assert price.reading(8) == pytest.approx(8 * 39 / 75 / (12 * (200_000 + work)))
    assert price.tracked(N, 39) < price.tracked(N, 38)  # no basis is searched
    assert price.tracked(N, 10) < price.tracked(N, 11)
    assert price.followed(8) > price.followed(0) > 0


def test_as_much_is_done_as_is_affordable_and_no_more(tmp_path: Path) -> None:
    run = record(tmp_path / "run", make(hidden=64, activation="gelu"), data(n=60), batch_size=10)
    replay, query, n = Replay(run), find(run, "val"), run.n_samples
    price = Prices(replay)
    for directions in (20, 60, 120):
        trainings = (price.tracked(n, directions) + price.tracked(n, directions + 1)) / 2
        assert budget.most_directions(replay, trainings) == directions
        followed = budget.most_followed(replay, trainings, query)
        spent = price.screening() + price.modelling() * budget.models(replay, trainings)
        each = price.followed(query.n_examples)
        assert spent + followed * each <= trainings < spent + (followed + 1) * each
    assert budget.most_directions(replay, 10**6) == run.n_parameters
    assert budget.most_directions(replay, 1) == 0
    assert budget.most_followed(replay, 1, query) == budget.FEWEST_FOLLOWED
    # A query that is read at more steps leaves less to follow.
    assert budget.most_followed(replay, 90, query, 1000) < budget.most_followed(replay, 90, query)


@pytest.mark.parametrize("value", [0, -3, 2.5, "25", True])
def test_what_is_no_number_of_trainings_is_refused(tmp_path: Path, value: Any) -> None:
    run = record(tmp_path / "run", make())
    with pytest.raises(la.RequestError, match=r"trainings=.* is no number for acc-low-rank: give a whole one, 1 or more"):
        scored(run, trainings=value)
    with pytest.raises(la.RequestError, match="followed=3 and trainings=20 each say"):
        scored(run, trainings=20, followed=3)
    with pytest.raises(la.RequestError, match="trainings=20 is no option of sgd-ie"):
        scored(run, "sgd-ie", trainings=20)


def test_a_plan_forecasts_the_form_that_it_would_have(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = record(tmp_path / "run", make(hidden=4, optimizer=ADAMW))
    monkeypatch.setattr(budget, "TRAININGS", 1)
    rows = {row["method"]: row for row in la.plan(run, ray_address=None).table.to_pylist()}
    assert rows["acc-low-rank"]["readout"] == "exact"
    assert rows["acc-low-rank"]["disk_gb"] == rows["loo"]["disk_gb"]  # no temporary file
    assert rows["acc-low-rank"]["seconds"] > 0
