"""Rows of a batch are taken by themselves under the random numbers that they had in it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from problems import FEATURES, Net, SharedNoise, make, record
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

import lightning_acc as la
from lightning_acc.core import replay as replays
from lightning_acc.core.losses import batch as parts
from lightning_acc.core.losses.drawing import AsInTheBatch, NotByRow
from lightning_acc.core.replay import Replay

B, T, D = 6, 4, 8
torch.manual_seed(0)
LAYER = nn.TransformerEncoderLayer(D, 2, 16, dropout=0.3, batch_first=True).double()
SEQUENCE_FIRST = nn.MultiheadAttention(D, 2, dropout=0.3).double()
DRAWS: dict[str, Callable[[Tensor], Tensor]] = {
    "dropout": lambda x: functional.dropout(x, 0.3),
    "dropout in place": lambda x: functional.dropout(x.clone(), 0.3, inplace=True),
    "of tokens": lambda x: functional.dropout(x.reshape(-1, D), 0.3).reshape(x.shape),
    "of channels": lambda x: functional.dropout1d(x, 0.3),
    "alpha": lambda x: functional.alpha_dropout(x, 0.3, training=True),
    "of whole rows": lambda x: x * x.new_empty(len(x), 1, 1).bernoulli_(0.5),
    "a normal": lambda x: x + torch.randn_like(x),
    "a normal of a size": lambda x: x + torch.randn(x.shape, dtype=x.dtype),
    "a uniform": lambda x: x + torch.rand(len(x), 1, D, dtype=x.dtype),
    "several": lambda x: functional.dropout(functional.dropout(x, 0.1) + 0.1 * torch.rand_like(x), 0.5),
    "rrelu": lambda x: x * torch.empty_like(x).uniform_(0.1, 0.3),
    "transposed": lambda x: functional.dropout(x.transpose(0, 1).contiguous().transpose(0, 1), 0.3),
    "attention": lambda x: LAYER(x),
    "noise of none": lambda x: x + torch.randn(5, dtype=x.dtype).sum(),
}


@pytest.mark.parametrize("rows", [[0, 1], [5, 2], [1, 3, 4], list(range(B))])
@pytest.mark.parametrize("draw", DRAWS)
def test_rows_have_the_numbers_they_have_in_the_batch(draw: str, rows: list[int]) -> None:
    x = torch.randn(B, T, D, dtype=torch.float64)

    def drawn(some: list[int] | None) -> Tensor:
        torch.manual_seed(3)
        with sdpa_kernel(SDPBackend.MATH):
            if some is None:
                return DRAWS[draw](x)
            with AsInTheBatch(torch.tensor(some), B):
                return DRAWS[draw](x[some])

    whole = drawn(None)
    assert torch.allclose(drawn(rows), whole[rows], rtol=1e-12, atol=1e-12)


def test_what_tells_no_rows_is_refused() -> None:
    with pytest.raises(NotByRow, match="multinomial"), AsInTheBatch(torch.tensor([0, 1]), B):
        torch.multinomial(torch.ones(2, 3), 1)


class Tokens(Net):
    """Attention over tokens, with dropout."""

    def __init__(self) -> None:
        super().__init__(optimizer={"class": "AdamW", "lr": 0.01})
        self.net = nn.Sequential(nn.Unflatten(1, (FEATURES, 1)), nn.Linear(1, D))
        self.attention = nn.TransformerEncoderLayer(D, 2, 16, dropout=0.3, activation="gelu", batch_first=True)
        self.last = nn.Linear(D, 3)

    def per_sample_loss(self, batch: Any) -> Tensor:
        hidden = self.attention(self.net(batch[0])).mean(1)
        return functional.cross_entropy(self.last(hidden), batch[1], reduction="none")


@pytest.mark.parametrize("module", [Tokens, lambda: make(hidden=4, dropout=0.4, optimizer={"momentum": 0.9})])
@pytest.mark.parametrize("options", [{}, {"accumulate_grad_batches": 2}, {"batch_size": 2, "accumulate_grad_batches": 3}])
@pytest.mark.parametrize("method", ["acc-sgd-ie", "sgd-ie", "acc-low-rank"])
def test_a_removed_sample_is_taken_by_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, options: dict[str, Any], module: Any
) -> None:
    """Of large models; the scores are those of the whole batch, and its losses are not computed again."""
    monkeypatch.setitem(replays.STATES_BYTES, "cpu", 0)
    run = record(tmp_path / "run", module(), **options)
    ask: dict[str, Any] = {"ray_address": None, "check": 0, "save": False, "keep_shifts": method != "acc-low-rank"}
    ask |= {"followed": 4} if method == "acc-low-rank" else {"removals": [0, 3, 8]}
    assert Replay(run).draws.by_row
    apart = la.score(run, method, **ask)
    monkeypatch.setattr(parts.Draws, "by_row", False)
    whole = la.score(run, method, **ask)
    assert np.abs(apart.values - whole.values).max() <= 1e-9 * np.abs(whole.values).max()
    if apart.shifts is not None and whole.shifts is not None:
        assert float((apart.shifts - whole.shifts).abs().max()) <= 1e-9 * float(whole.shifts.abs().max())


def test_the_whole_batch_is_not_taken_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(replays.STATES_BYTES, "cpu", 0)
    run = record(tmp_path / "run", Tokens())
    replay = Replay(run)
    taken: list[int] = []
    picked = parts.Batch.picked

    def counted(batch: parts.Batch, rows: Tensor) -> parts.Batch:
        taken.append(len(rows))
        return picked(batch, rows)

    assert replay.draws.by_row
    monkeypatch.setattr(parts.Batch, "picked", counted)
    monkeypatch.setattr("lightning_acc.core.step.Step.losses_each", lambda *_: pytest.fail("the whole batch"))
    la.score(run, "acc-sgd-ie", [3, 4], ray_address=None, check=0, save=False)
    assert set(taken) == {2}


def test_groups_are_taken_by_twos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As was seen: of other numbers noise that all rows share may have as many numbers."""
    monkeypatch.setitem(replays.STATES_BYTES, "cpu", 0)
    run = record(tmp_path / "run", Three(hidden=4, dropout=0.3), batch_size=8)
    assert Replay(run).draws.by_row
    groups = [[0, 1, 2], [3, 4, 5, 6, 7], list(range(20))]
    ask: dict[str, Any] = {"removals": groups, "ray_address": None, "check": 0, "save": False}
    apart = la.score(run, "acc-sgd-ie", **ask)
    monkeypatch.setattr(parts.Draws, "by_row", False)
    whole = la.score(run, "acc-sgd-ie", **ask)
    assert np.abs(apart.values - whole.values).max() <= 1e-9 * np.abs(whole.values).max()


class Three(Net):
    """Noise of three numbers that all rows share."""

    def per_sample_loss(self, batch: Any) -> Tensor:
        losses = super().per_sample_loss(batch)
        return losses * (1 + 0.1 * self.training * torch.rand(3, dtype=losses.dtype).sum())


def test_noise_that_rows_share_is_seen(tmp_path: Path) -> None:
    assert not Replay(record(tmp_path / "run", SharedNoise(hidden=4))).draws.by_row


class Sampled(Net):
    """Draws in a way that tells no rows."""

    def per_sample_loss(self, batch: Any) -> Tensor:
        losses = super().per_sample_loss(batch)
        chosen = torch.multinomial(torch.ones(len(losses), 3), 1)[:, 0] if self.training else torch.ones(len(losses))
        return losses * (1 + 0.1 * chosen)


def test_draws_that_tell_no_rows_are_seen(tmp_path: Path) -> None:
    assert not Replay(record(tmp_path / "run", Sampled(hidden=4))).draws.by_row


class Fused(Net):
    """Draws other numbers where attention is computed by operations that can be differentiated twice, as on a GPU."""

    def per_sample_loss(self, batch: Any) -> Tensor:
        if self.training and torch.backends.cuda.flash_sdp_enabled():
            torch.rand(1)
        return super().per_sample_loss(batch)


def test_other_random_numbers_than_the_trainings_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And loo goes one by one, as the training did."""
    run = record(tmp_path / "run", Fused(hidden=4, dropout=0.4))
    ask: dict[str, Any] = {"ray_address": None, "check": 0, "save": False}
    for method in ("sgd-ie", "acc-sgd-ie", "acc-low-rank", "tracin"):
        with pytest.raises(
            la.RequestError, match=rf"{method} takes operations .* draw other random numbers \(dropout\) on cpu"
        ):
            la.score(run, method, **ask)
    assert Replay(run).states_at_once == 1
    found = la.score(run, "loo", **ask).values
    assert Replay(record(tmp_path / "other", make(hidden=4, dropout=0.4))).states_at_once > 1
    monkeypatch.setitem(replays.STATES_BYTES, "cpu", 0)
    assert np.array_equal(la.score(run, "loo", **ask).values, found)


class Otherwise(Net):
    """Computes other losses where attention is computed by operations that can be differentiated twice."""

    def per_sample_loss(self, batch: Any) -> Tensor:
        return super().per_sample_loss(batch) * (1.0 if torch.backends.cuda.flash_sdp_enabled() else 1.1)


def test_other_losses_than_the_trainings_are_refused(tmp_path: Path) -> None:
    """Without any random numbers, too."""
    run = record(tmp_path / "run", Otherwise(hidden=4))
    ask: dict[str, Any] = {"ray_address": None, "check": 0, "save": False}
    for method in ("sgd-ie", "acc-sgd-ie", "acc-low-rank", "tracin"):
        with pytest.raises(la.RequestError, match=rf"{method} takes operations .* give other losses on cpu"):
            la.score(run, method, **ask)
    assert la.score(run, "loo", [1], **ask).values.all()
