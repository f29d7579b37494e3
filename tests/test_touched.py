"""Removals that follow the update: only what they touch is kept of them, and only while they are in a window."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from problems import CLASSES, N, Net, asked, record
from test_defect import ADAMW, ROUND_OFF, SOME
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import lightning_acc as la
from lightning_acc.core.removals import Removals
from lightning_acc.core.replay import Replay
from lightning_acc.methods.low_rank import budget, prices
from lightning_acc.methods.low_rank.defect import scores as defects
from lightning_acc.methods.low_rank.defect import touched, windows
from lightning_acc.methods.low_rank.defect.windows import Windows

WORDS, OF_A_TEXT, WIDTH = 30, 6, 16


class Words(nn.Module):
    """Texts of words by number, as counts or as the mean of their embeddings."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.first = nn.Embedding(WORDS, WIDTH) if kind == "embedding" else nn.Linear(WORDS, WIDTH)
        self.second = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        if x.is_floating_point():  # what validates
            x = (10 * x.abs()).long() % WORDS
        if self.kind == "embedding":
            return self.second(self.first(x).mean(1))
        counts = torch.zeros(len(x), WORDS, dtype=self.second.weight.dtype).scatter(1, x, 1.0)
        hidden = self.first(counts)
        return self.second(hidden.relu() if self.kind == "relu" else nn.functional.gelu(hidden))


class Texts(Net):
    def __init__(self, kind: str, optimizer: dict[str, Any]) -> None:
        super().__init__(optimizer=optimizer)
        self.net = nn.Sequential(Words(kind), nn.GELU(), nn.Linear(WIDTH, CLASSES))


def texts(n: int = N) -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    words = torch.stack([torch.randperm(WORDS, generator=generator)[:OF_A_TEXT] for _ in range(n)])
    return TensorDataset(words, words.sum(1) % CLASSES)


def trained(path: Path, kind: str, optimizer: dict[str, Any] = ADAMW, **options: Any) -> la.Run:
    torch.manual_seed(0)
    return record(path, Texts(kind, optimizer).double(), texts(), **options)


def followed(run: la.Run, chosen: Windows, at_once: int = 99) -> Tensor:
    question = asked(run, at=[4, run.n_steps])
    return defects.defect(Replay(run), SOME, question, len(SOME), at_once, chosen).scores


CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "counts": ("counts", ADAMW, {}),
    "by value": ("counts", {**ADAMW, "amsgrad": True}, {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"}),
    "embeddings": ("embedding", ADAMW, {"accumulate_grad_batches": 2}),
    "embeddings, Adagrad": ("embedding", {"class": "Adagrad", "lr": 0.05, "weight_decay": 0.01}, {}),
    "dead units wake up": ("relu", {**ADAMW, "lr": 0.1}, {}),
}


@pytest.mark.parametrize("name", CASES)
def test_what_a_sample_does_not_touch_stays_as_the_run_has_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    kind, optimizer, options = CASES[name]
    run = trained(tmp_path / "run", kind, optimizer, **options)
    (apart,) = [part for part in touched.units(Replay(run)) if part.count > 1]
    assert (apart.count, apart.size, apart.turned) == (WORDS, WORDS * WIDTH, kind != "embedding")
    assert apart.share == pytest.approx(OF_A_TEXT / WORDS) or kind == "relu"
    ways = [(Windows(0), 99), (Windows(2), 99), (Windows(3, 2), 4), (windows.usual(Replay(run)), 99), (Windows(2, 2), 1)]
    found = [followed(run, *way) for way in ways]
    in_little = prices.bytes_by_the_update(Replay(run))[0]
    monkeypatch.setattr(touched, "NARROWEST", math.inf)
    assert all(part.count == 1 for part in touched.units(Replay(run)))
    assert in_little < 0.8 * prices.bytes_by_the_update(Replay(run))[0]
    for scores, way in zip(found, ways, strict=True):
        torch.testing.assert_close(scores, followed(run, *way), rtol=0, atol=ROUND_OFF)
    assert not torch.allclose(found[0], found[-2], rtol=1e-3)


def test_where_all_is_touched_all_is_kept(tmp_path: Path) -> None:
    """Clipped by its norm, a gradient without a sample is another everywhere; and a matrix is updated as a whole."""
    clipped = trained(tmp_path / "clipped", "counts", gradient_clip_val=0.1)
    by_matrix = trained(tmp_path / "matrix", "counts", {"class": "Adafactor", "lr": 0.05})
    for run in (clipped, by_matrix):
        replay = Replay(run)
        assert all(part.count == 1 for part in touched.units(replay))
        vector, parts = replay.initial[0].nbytes, len(replay.initial)
        assert prices.bytes_by_the_update(replay)[0] == (parts + 1) * vector
    assert len(touched.units(Replay(by_matrix))) == 6


def test_a_range_is_taken_in_units(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = trained(tmp_path / "run", "counts")
    monkeypatch.setitem(touched.CACHED, "cpu", 100)
    parts = touched.units(replay := Replay(run))
    ends = [part.columns.stop for part in parts]
    assert [part.columns.start for part in parts] == [0, *ends[:-1]]
    assert ends[-1] == run.n_parameters
    assert max(part.size for part in parts if part.count == 1) <= 100
    weight = replay.initial[0][: WORDS * WIDTH].view(WIDTH, WORDS)
    assert torch.equal(parts[0].of(replay.initial[0]), weight.T)


@pytest.mark.parametrize("chosen", [Windows(0), Windows(2), Windows(3, 2), Windows(5, 4), Windows(99)], ids=str)
def test_passes_have_no_more_in_a_window_than_asked(tmp_path: Path, chosen: Windows) -> None:
    run = trained(tmp_path / "run", "counts", max_epochs=5)
    replay = Replay(run)
    inside = np.zeros((len(SOME), run.n_steps), dtype=bool)
    for t, step in enumerate(run.steps):
        for i, removal in enumerate(SOME):
            if set(removal) & set(step.sample_ids.tolist()):
                inside[i, t : -(-(t + chosen.length + 1) // chosen.stride) * chosen.stride] = True
    assert chosen.most_inside(replay, Removals(SOME)) == inside.sum(0).max()
    assert chosen.share(replay) == pytest.approx(inside[:N].mean(), abs=0.2)
    changes = [t for i in inside for t in range(1, run.n_steps) if i[t - 1] and not i[t]]
    assert chosen.ends(replay, SOME) == sorted(set(changes))
    for at_once in (1, 3, 8, 99):
        passes = chosen.passes(replay, SOME, at_once)
        assert [i for part in passes for i in part] == list(range(len(SOME)))
        assert all(inside[part].sum(0).max() <= at_once for part in map(list, passes))
    assert len(chosen.passes(replay, SOME, 99)) == 1
    assert chosen.passes(replay, [], 1) == []


def test_windows_are_as_long_as_is_affordable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = trained(tmp_path / "run", "counts", batch_size=1, max_epochs=2)
    replay, everyone = Replay(run), run.n_samples
    usual = windows.usual(replay)
    assert usual == Windows(2 * N)
    assert usual.share(replay) == 1
    assert budget.windows(replay, 10**6) == usual
    price = {chosen: prices.Prices(replay).by_the_update(chosen) for chosen in (usual, Windows(24, 12), Windows(12, 6))}
    assert sorted(price.values(), reverse=True) == list(price.values())
    monkeypatch.setattr(prices.Prices, "by_the_update", lambda self, chosen: chosen.length / everyone)
    for length, trainings in ((48, 53), (24, 52), (24, 29), (12, 28), (8, 13), (8, 5)):
        chosen = budget.windows(replay, trainings)
        assert chosen == (Windows(length, length // 2) if length < 48 else usual)
    assert budget.windows(replay, 5, followed=3) == usual
    assert budget.most_by_the_update(replay, 5, Windows(8, 4)) == 1
    # What all can be followed for in shorter windows is not what retraining all is worth.
    monkeypatch.setattr(prices.Prices, "retrained", lambda self, n: 20.0)
    assert la.score(run, "acc-low-rank", trainings=25, ray_address=None, save=False, check=0).conditions.get("window") is None
    monkeypatch.setattr(prices.Prices, "retrained", lambda self, n: 26.0)
    told = la.score(run, "acc-low-rank", trainings=25, ray_address=None, save=False, check=0).conditions
    assert (told["window"], told["followed_by_the_update"]) == (12, everyone)


@pytest.mark.parametrize(("trainings", "expected"), [(None, 10), (1000, 10), (25, 334), (19.5, 500), (15, 1000), (5, 1000)])
def test_pieces_have_a_sweep_back_each_that_is_paid_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trainings: float | None, expected: int
) -> None:
    run = trained(tmp_path / "run", "counts", max_epochs=1)
    monkeypatch.setattr(prices.Prices, "by_the_update", lambda self, chosen: 0.01)
    monkeypatch.setattr(budget, "bytes_by_the_update", lambda replay: (1, 0))
    monkeypatch.setattr(budget, "SWEEPS", 0)
    assert budget.piece_by_the_update(Replay(run), 1000, 10, Windows(8, 4), trainings) == expected
    monkeypatch.setattr(budget, "SWEEPS", 2)
    assert budget.piece_by_the_update(Replay(run), 1000, 10, Windows(8, 4), trainings) == max(900, expected)
