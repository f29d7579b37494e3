"""The bank: what was retrained once answers other questions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from problems import N, data, make, record

import lightning_acc as la
from lightning_acc.scoring import score as scoring
from lightning_acc.scoring.matrices import compute

SGD = {"momentum": 0.9, "lr": 0.05}
GROUPS = [[i, i + 1, i + 2] for i in range(0, N, 3)]


def retrained(run: la.Run, removals: Any = GROUPS, **options: Any) -> la.Scores:
    return la.score(run, "loo", removals, **{"ray_address": None, **options})


@pytest.fixture
def run(tmp_path: Path) -> la.Run:
    return record(tmp_path / "run", make(hidden=4, optimizer=SGD))


@pytest.fixture
def no_training(monkeypatch: pytest.MonkeyPatch) -> Any:
    def forbid() -> None:
        def trained(*_: Any) -> None:
            raise AssertionError("something is trained")

        monkeypatch.setattr(scoring, "compute", trained)
        monkeypatch.setattr(compute, "compute", trained)

    return forbid


def other() -> la.Query:
    return la.Query("other", [data(n=11, seed=4).tensors])


def test_another_query_needs_no_training(run: la.Run, no_training: Any) -> None:
    expected = retrained(run, save=False, query=other()).values
    retrained(run)
    no_training()
    found = retrained(run, query=other())
    np.testing.assert_allclose(found.values, expected, rtol=1e-9, atol=1e-14)
    assert found.conditions["seconds"] == 0
    assert (found.conditions["reused"], found.conditions["banked"]) == (0, len(GROUPS))
    assert retrained(run, query=other()).conditions["reused"] == len(GROUPS)  # the scores themselves, by now
    linear = retrained(run, query=other(), readout="linear")
    assert not np.array_equal(linear.values, found.values)
    # Of a function, whose scores are not kept, the bank knows as much as of data.
    margin = la.Query("margin", [data(n=6, seed=5).tensors], lambda module, batch: module.net(batch[0])[:, 0])
    assert retrained(run, query=margin).values.any()


def test_each_example_needs_no_training(run: la.Run, no_training: Any) -> None:
    expected = la.score_matrix(run, "loo", removals=GROUPS, ray_address=None, save=False).values
    retrained(run)
    no_training()
    found = la.score_matrix(run, "loo", removals=GROUPS, ray_address=None)
    np.testing.assert_allclose(found.values, expected, rtol=1e-6, atol=1e-10)


def test_a_matrix_of_truths_fills_the_bank(run: la.Run, no_training: Any) -> None:
    expected = retrained(run, save=False).values
    la.score_matrix(run, "loo", removals=GROUPS, ray_address=None)
    no_training()
    np.testing.assert_allclose(retrained(run).values, expected, rtol=1e-9, atol=1e-14)


def test_other_moments_where_their_steps_were_kept(run: la.Run, no_training: Any) -> None:
    expected = {str(at): retrained(run, save=False, at=at).values for at in (3, [3, 7], "end")}
    retrained(run, at=[3, 7, 12])
    no_training()
    for at in (3, [3, 7], "end"):
        np.testing.assert_allclose(retrained(run, at=at).values, expected[str(at)], rtol=1e-9, atol=1e-14)
    with pytest.raises(AssertionError, match="something is trained"):
        retrained(run, at=4)


def test_only_what_is_missing_is_retrained(run: la.Run, monkeypatch: pytest.MonkeyPatch) -> None:
    retrained(run, GROUPS[:5])
    worked: list[Any] = []
    real = scoring.compute
    monkeypatch.setattr(scoring, "compute", lambda job, piece, *rest: worked.extend(piece) or real(job, piece, *rest))
    found = retrained(run, query=other())
    assert sorted(worked) == [tuple(group) for group in GROUPS[5:]]
    np.testing.assert_allclose(found.values, retrained(run, save=False, query=other()).values, rtol=1e-9, atol=1e-14)


def test_the_budget_is_kept(run: la.Run, tmp_path: Path) -> None:
    bank = tmp_path / "run" / "bank"
    retrained(run, bank_gb=0)
    assert not bank.exists()
    retrained(run, GROUPS[:4], bank_gb=1e-9, query=other())
    assert not bank.exists()
    each = 9 * 8 * run.n_parameters
    retrained(run, bank_gb=1.5 * each / 2**30, at=4)
    size = sum(path.stat().st_size for path in bank.iterdir())
    assert 0 < size < 1.5 * each + 5000
    before = sorted(path.name for path in bank.iterdir())
    retrained(run, bank_gb=1.5 * each / 2**30, at=5)
    assert sorted(path.name for path in bank.iterdir()) == before


def test_what_is_damaged_or_of_another_precision_is_retrained(run: la.Run, tmp_path: Path) -> None:
    retrained(run)
    expected = retrained(run, save=False, query=other()).values
    (file,) = (tmp_path / "run" / "bank").glob("*.safetensors")
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(bytes(content))
    with pytest.warns(UserWarning, match="left out and deleted"):
        found = retrained(run, query=other())
    assert found.conditions["seconds"] > 0
    np.testing.assert_allclose(found.values, expected, rtol=1e-9, atol=1e-14)


def test_the_check_of_a_table_pays_into_the_bank(run: la.Run, no_training: Any) -> None:
    table = la.score(run, "acc-sgd-ie", ray_address=None, check=18)
    no_training()
    truths = la.score_matrix(run, "loo", removals=list(table.truths), ray_address=None)
    means = dict(zip(truths.removals, truths.values.mean(1, dtype=np.float64), strict=True))
    assert len(means) >= 12
    assert all(means[removal] == pytest.approx(value, rel=1e-4, abs=1e-8) for removal, value in table.truths.items())
