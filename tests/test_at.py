"""``at``: the moments a query is read at."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from problems import N, make, record

import lightning_acc as la
from lightning_acc.core.queries import moments
from lightning_acc.methods.registry import METHODS
from lightning_acc.record import store

SGD = {"momentum": 0.9, "lr": 0.05, "weight_decay": 0.01}
GROUPS = [[0], [5], [1, 2, 3], [], [23, 7]]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> la.Run:
    return record(tmp_path_factory.mktemp("at") / "run", make(hidden=4, activation="gelu", optimizer=SGD, decay_lr=0.8))


def scored(run: la.Run, method: str = "sgd-ie", **options: Any) -> la.Scores:
    return la.score(run, method, **{"ray_address": None, "save": False, "check": 0, **options})


FORMS: list[dict[str, Any]] = [{"method": method, "readout": readout} for method in METHODS for readout in ("exact", "linear")]
FORMS.append({"method": "acc-low-rank", "followed": N})
FORMS.append({"method": "acc-low-rank", "directions": 0, "readout": "linear"})


@pytest.mark.filterwarnings("ignore:In . directions")
@pytest.mark.parametrize("form", FORMS, ids=lambda form: " ".join(map(str, form.values())))
@pytest.mark.parametrize("removals", [None, GROUPS])
def test_several_steps_are_the_mean_of_each(run: la.Run, form: dict[str, Any], removals: Any) -> None:
    steps = [2, 5, 9]
    alone = [scored(run, removals=removals, at=t, **form).values for t in steps]
    assert np.abs(alone[0] - alone[1]).max() > 1e-4
    together = scored(run, removals=removals, at=steps[::-1], **form)
    np.testing.assert_allclose(together.values, np.mean(alone, 0), rtol=0, atol=1e-12)
    assert together.conditions["at"] == "2,5,9"


@pytest.mark.filterwarnings("ignore:In . directions")
@pytest.mark.parametrize("method", METHODS)
def test_a_step_is_the_end_of_a_training_of_so_many(run: la.Run, tmp_path: Path, method: str) -> None:
    """Also where other steps follow, and whatever they saw."""
    shorter = record(tmp_path / "run", make(hidden=4, activation="gelu", optimizer=SGD, decay_lr=0.8), max_epochs=2)
    for t in range(shorter.n_steps + 1):
        assert np.array_equal(shorter.parameters(t), run.parameters(t))
    at = scored(run, method, at=shorter.n_steps, keep_shifts=True)
    end = scored(shorter, method, keep_shifts=True)
    assert np.array_equal(at.values, end.values)
    assert at.shifts is not None
    assert end.shifts is not None
    assert np.array_equal(at.shifts, end.shifts)


def test_along_spreads_evenly_and_ends_at_the_end(run: la.Run) -> None:
    class Long:
        n_steps, checkpoints = 1000, {"best": 400, "/x/a.ckpt": 400}

    found = moments.find(Long(), "along")
    assert found.steps == tuple(range(20, 1001, 20))  # every twentieth
    assert found.name == moments.find(Long(), "along:50").name == "along"
    assert moments.find(Long(), "along:20").steps == tuple(range(50, 1001, 50))
    assert moments.find(Long(), "along:20").name == "along:20"
    Long.n_steps = 300
    assert moments.find(Long(), "along").steps == tuple(range(15, 301, 15))  # and 20 at least
    Long.n_steps = 1000
    assert moments.find(Long(), "along:999999999").steps == tuple(range(1, 1001))
    assert moments.find(Long(), "along:4").steps == (250, 500, 750, 1000)
    assert moments.find(Long(), [1000, 250, 750, 500, 250]).name == "along:4"
    assert moments.find(Long(), 1000) == moments.find(Long(), "end") == moments.find(Long(), "along:1")
    assert moments.find(Long(), "best") == moments.find(Long(), "/x/a.ckpt") == moments.find(Long(), np.int64(400))
    assert moments.find(run, "along").steps == tuple(range(1, run.n_steps + 1))  # 12 steps have no 20


@pytest.mark.parametrize(
    ("at", "why"),
    [
        (0, "steps from 1 to 12; before the first"),
        (13, "at=13 is no moment"),
        ([3, 13], "at=13 is no moment"),
        ([], r"at=\[\] reads nowhere"),
        ("along:0", "reads nowhere"),
        ("best", "this run has no checkpoints"),
        ("sometimes", "no moment of a run"),
        (2.5, "no moment"),
        (None, "no moment"),
        (True, "no moment"),
        ([2.5], "no moment"),
    ],
)
def test_what_is_no_moment_is_refused(run: la.Run, at: Any, why: str) -> None:
    with pytest.raises(la.RequestError, match=why):
        scored(run, at=at)


def test_tables_of_different_moments_stand_beside_each_other(tmp_path: Path) -> None:
    run = record(tmp_path / "run", make(optimizer=SGD))
    end, along = (scored(run, at=at, save=True) for at in ("end", "along"))
    three, several = (scored(run, at=at, save=True) for at in (3, [3, 4]))
    names = {path.stem for path in (tmp_path / "run" / "scores").iterdir()}
    assert names == {"sgd-ie", "sgd-ie.along", "sgd-ie.step-3", f"sgd-ie.steps-{store.digest(b'3,4')[:8]}"}
    for table, at in ((end, "end"), (along, "along"), (three, 3), (several, [4, 3])):
        again = scored(run, at=at, save=True)
        assert again.conditions["reused"] == N
        assert np.array_equal(again.values, table.values)
    assert scored(run, at=run.n_steps, save=True).conditions["reused"] == N


def test_pieces_and_workers_change_nothing_along_the_run(run: la.Run) -> None:
    whole = scored(run, "acc-sgd-ie", at="along")
    pieces = scored(run, "acc-sgd-ie", at="along", memory_gb=0.0005)
    np.testing.assert_allclose(whole.values, pieces.values, rtol=1e-9, atol=1e-14)
    farmed = scored(run, "acc-sgd-ie", at="along", memory_gb=0.0005, ray_address="local")
    assert np.array_equal(farmed.values, pieces.values)


def test_the_verdict_is_on_what_was_asked(tmp_path: Path) -> None:
    run = record(tmp_path / "run", make(hidden=4, optimizer=SGD))
    table = scored(run, "acc-sgd-ie", at=4, check=18, save=True)
    truth = scored(run, "loo", at=4, save=True).by_removal()
    assert table.verdict.n == 12
    assert table.truths
    assert all(value == pytest.approx(truth[removal], rel=1e-9) for removal, value in table.truths.items())
    stored = json.loads(scored(run, "acc-sgd-ie", at=4, save=True, check=18).conditions["verdict"])
    assert stored["n"] == 12


def test_a_record_that_is_not_reproduced_is_refused_wherever_it_is_read(tmp_path: Path) -> None:
    """Also where no parameters were written between the first step and the one that is asked about."""
    run = record(tmp_path / "run", make(optimizer=SGD))

    class Sparse(la.Run):
        snapshots = property(lambda self: [0, self.n_steps])  # type: ignore[assignment]

    class Other(Sparse):
        @property
        def steps(self) -> Any:
            steps = list(super().steps)
            steps[0].groups[0]["lr"] = 0.06
            return steps

    for method in ("sgd-ie", "loo", "acc-low-rank"):
        assert np.array_equal(scored(Sparse(tmp_path / "run"), method, at=2).values, scored(run, method, at=2).values)
        with pytest.raises(la.RunError, match="does not reproduce"):
            scored(Other(tmp_path / "run"), method, at=2)
