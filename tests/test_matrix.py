"""``score_matrix``: scores of removals for single examples."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from problems import N, Net, data, make, record
from torch import Tensor

import lightning_acc as la
from lightning_acc.methods.registry import METHODS
from lightning_acc.scoring.matrices import compute, matrix

SGD = {"momentum": 0.9, "lr": 0.05, "weight_decay": 0.01}
EXAMPLES = 16
SOME: list[Any] = [[3], [0, 7], [], [23, 1, 2]]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> la.Run:
    return record(tmp_path_factory.mktemp("matrix") / "run", make(hidden=4, activation="gelu", optimizer=SGD))


def asked(run: la.Run, method: str = "sgd-ie", **options: Any) -> la.ScoreMatrix:
    return la.score_matrix(run, method, **{"ray_address": None, "save": False, "check": 0, **options})


def one_example(run: la.Run, example: int) -> la.Query:
    x, y = data(n=EXAMPLES, seed=9).tensors
    return la.Query(f"example-{example}", [(x[example : example + 1], y[example : example + 1])])


@pytest.mark.filterwarnings("ignore:In . directions")
@pytest.mark.parametrize("at", ["end", [2, 5, 9]], ids=["end", "steps"])
@pytest.mark.parametrize("readout", ["exact", "linear"])
@pytest.mark.parametrize("method", METHODS)
def test_a_column_is_the_score_of_a_query_of_one_example(run: la.Run, method: str, readout: str, at: Any) -> None:
    options = {"method": method, "readout": readout, "at": at, "dtype": "float64"}
    examples = [11, 0, 5]
    found = asked(run, examples=examples, removals=SOME, **options)
    assert found.values.dtype == np.float32
    assert found.values.shape == (len(SOME), len(examples))
    assert found.examples == examples
    for column, example in zip(found.values.T, examples, strict=True):
        alone = la.score(run, query=one_example(run, example), removals=SOME, ray_address=None, check=0, save=False, **options)
        np.testing.assert_allclose(column, alone.values, rtol=2e-7, atol=1e-12)
        assert np.abs(column).max() > 1e-5


@pytest.mark.parametrize("method", ["sgd-ie", "acc-sgd-ie", "loo"])
def test_the_mean_over_the_examples_is_the_score(run: la.Run, method: str) -> None:
    mean = la.score(run, method, ray_address=None, check=0, save=False).values
    np.testing.assert_allclose(asked(run, method).values.mean(1, dtype=np.float64), mean, rtol=1e-5, atol=1e-9)


def test_many_adjoints_go_back_as_each_would_alone(run: la.Run) -> None:
    """In float64, before the matrix is rounded to float32."""
    from problems import asked as question

    from lightning_acc.core.replay import Replay
    from lightning_acc.methods.rules import AdjointSgdIe
    from lightning_acc.methods.sweeps import reverse

    replay = Replay(run, "float64")
    together = question(run, at="along", each=True)
    found = reverse(replay, AdjointSgdIe(), together)
    for example in (0, 7, 15):
        alone = question(run, at="along", query="val")
        object.__setattr__(alone, "query", alone.query.picked([example]))
        np.testing.assert_allclose(found[example], reverse(replay, AdjointSgdIe(), alone), rtol=1e-10, atol=1e-15)


def test_blocks_and_workers_change_nothing(run: la.Run, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = asked(run).values
    sizes: list[int] = []
    real = compute.compute_block

    def sized(job: Any, block: Any, *rest: Any) -> Any:
        sizes.append(len(block.examples))
        return real(job, block, *rest)

    monkeypatch.setattr(compute, "compute_block", sized)
    small = asked(run, memory_gb=5e-5).values
    assert max(sizes) < EXAMPLES / 2
    np.testing.assert_allclose(small, whole, rtol=1e-6, atol=1e-12)
    monkeypatch.undo()
    assert np.array_equal(asked(run, memory_gb=5e-5, ray_address="local").values, small)


def test_it_goes_on_where_it_was_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = record(tmp_path / "run", make(hidden=4, optimizer=SGD))
    real, worked = compute.compute_block, []

    def failing(job: Any, block: Any, *rest: Any) -> Any:
        if len(worked) == 2:
            raise KeyboardInterrupt
        worked.append(block.examples)
        return real(job, block, *rest)

    def counting(job: Any, block: Any, *rest: Any) -> Any:
        worked.append(block.examples)
        return real(job, block, *rest)

    monkeypatch.setattr(compute, "compute_block", failing)
    with pytest.raises(KeyboardInterrupt):
        asked(run, save=True, memory_gb=5e-5)
    assert len(list((tmp_path / "run" / "matrices").iterdir())) == 2
    monkeypatch.setattr(compute, "compute_block", counting)
    found = asked(run, save=True, memory_gb=5e-5)
    assert sorted(example for examples in worked for example in examples) == list(range(EXAMPLES))  # each once
    assert [path.name for path in (tmp_path / "run" / "matrices").iterdir()] == ["sgd-ie.safetensors"]
    again = asked(run, save=True, examples=[3, 1], removals=SOME[:1])
    assert len(worked) == len(set(map(tuple, worked)))
    assert np.array_equal(again.values, found.values[3:4, [3, 1]])
    assert again.conditions["reused"] == 2


def test_a_stored_matrix_is_read_back_and_a_damaged_one_computed_again(tmp_path: Path) -> None:
    run = record(tmp_path / "run", make(hidden=4, optimizer=SGD))
    first = asked(run, save=True, check=12)
    stored = matrix.read(run.store, "sgd-ie", run.n_samples)
    assert np.array_equal(stored.values, first.values)
    assert (stored.removals, stored.examples) == (first.removals, first.examples)
    assert stored.verdict == first.verdict
    assert stored.conditions["method"] == "sgd-ie"
    file = tmp_path / "run" / "matrices" / "sgd-ie.safetensors"
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(bytes(content))
    with pytest.raises(la.RunError, match="is damaged"):
        matrix.read(run.store, "sgd-ie")
    with pytest.warns(UserWarning, match="left out and deleted"):
        again = asked(run, save=True)
    assert np.array_equal(again.values, first.values)


def test_the_strongest_helpful_and_harmful(run: la.Run) -> None:
    found = asked(run)
    column = found.values[:, 4]
    for removals, scores, order in (
        (*found.top(4, 5), np.argsort(-np.abs(column))),
        (*found.helpful(4, 5), np.argsort(-column)),
        (*found.harmful(4, 5), np.argsort(column)),
    ):
        assert removals == [(i,) for i in order[:5]]
        assert np.array_equal(scores, column[order[:5]])
    assert len(found.top(4, 100)[0]) == N
    with pytest.raises(la.RequestError, match="no example 16 in this matrix"):
        found.top(16, 5)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"examples": [16]}, "no example 16: the query 'val' has the examples 0 to 15"),
        ({"examples": [1.5]}, "no example 1.5"),
        ({"examples": "all"}, "examples"),
        ({"method": "acc"}, "method"),
        ({"at": "never"}, "no moment"),
        ({"memory_gb": 1e-7}, "needs about"),
    ],
)
def test_what_cannot_be_asked_is_refused(run: la.Run, options: dict[str, Any], why: str) -> None:
    with pytest.raises(la.RequestError, match=why):
        asked(run, **options)


def test_a_query_of_one_value_a_batch_has_no_examples(run: la.Run) -> None:
    query = la.Query("whole", [data(n=5, seed=3).tensors], lambda module, batch: module.net(batch[0]).mean())
    with pytest.raises(la.RequestError, match="one value for a batch of 5 examples"):
        asked(run, "acc-sgd-ie", query=query)


class Resisting(Net):
    """Cannot be vectorised: it looks at a number."""

    def per_sample_loss(self, batch: Any) -> Tensor:
        losses = super().per_sample_loss(batch)
        return losses if float(losses.detach().sum()) > -1 else -losses


def test_a_module_that_cannot_be_vectorised(tmp_path: Path) -> None:
    torch.manual_seed(0)
    runs = []
    for kind in (Resisting, Net):
        torch.manual_seed(0)
        runs.append(record(tmp_path / kind.__name__, kind(hidden=4, optimizer=SGD).double()))
    slow, fast = (asked(one, at="along").values for one in runs)
    np.testing.assert_allclose(slow, fast, rtol=1e-6, atol=1e-12)


def test_the_verdict_is_over_single_examples(tmp_path: Path) -> None:
    run = record(tmp_path / "run", make(hidden=4, optimizer=SGD))
    found = asked(run, "acc-sgd-ie", check=14, save=True)
    rows = [found.removals.index(removal) for removal in found.verdict.random]
    assert len(rows) == 14
    truth = asked(run, "loo").values[rows]
    from scipy import stats

    each = [stats.spearmanr(a, b).statistic for a, b in zip(found.values[rows].T, truth.T, strict=True)]
    assert found.verdict.spearman == pytest.approx(np.mean(each), abs=1e-6)
    assert found.verdict.spearman_low <= found.verdict.spearman <= found.verdict.spearman_high
    assert asked(run).verdict.word == "unchecked"
    assert asked(run, "acc-sgd-ie", save=True).verdict == found.verdict  # asked again, unchecked, it is the same matrix
    assert matrix.read(run.store, "acc-sgd-ie").verdict == found.verdict
    noise = np.random.default_rng(0).normal(size=(14, EXAMPLES))
    from lightning_acc.scoring.trust.verdict import judge_each

    assert judge_each(noise, truth, found.verdict.random).word == "unreliable"
    assert judge_each(truth, truth, found.verdict.random).word == "faithful"


def test_samples_no_step_saw_and_features(tmp_path: Path) -> None:
    run = record(tmp_path / "run", make(optimizer=SGD), limit_train_batches=2, max_epochs=1)
    seen = set(torch.cat([step.sample_ids for step in run.steps]).tolist())
    values = asked(run).values
    assert not values[[i for i in range(N) if i not in seen]].any()
    assert values[sorted(seen)].any(1).all()
