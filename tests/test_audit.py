"""The audit tells round-off from what is wrong, number by number and in all numbers together."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from problems import Net, make, record, trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_acc as la
from lightning_acc.core.audit import RoundOff, confirm
from lightning_acc.core.replay import Replay
from lightning_acc.record.record import Record
from lightning_acc.record.steps import Steps

WORDS, LENGTH = 60, 12


class Decoder(pl.LightningModule):
    """A small language model with tied embeddings; its training_step averages otherwise than per_sample_loss and mean do."""

    def __init__(self, weight_decay: float = 0.01, lr: float = 3e-3) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.words, self.places = nn.Embedding(WORDS, 32), nn.Embedding(LENGTH, 32)
        layer = nn.TransformerEncoderLayer(32, 2, 64, dropout=0.0, activation="gelu", batch_first=True, norm_first=True)
        self.body = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.last = nn.LayerNorm(32)

    def logits(self, words: Tensor) -> Tensor:
        n = words.shape[1]
        x = self.words(words) + self.places.weight[:n]
        mask = nn.Transformer.generate_square_subsequent_mask(n, dtype=x.dtype)
        return self.last(self.body(x, mask=mask, is_causal=True)) @ self.words.weight.T

    def per_sample_loss(self, batch: Any) -> Tensor:
        words = batch[0]
        losses = nn.functional.cross_entropy(self.logits(words[:, :-1]).transpose(1, 2), words[:, 1:], reduction="none")
        return losses.mean(1)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        words = batch[0]
        return nn.functional.cross_entropy(self.logits(words[:, :-1]).flatten(0, 1), words[:, 1:].flatten())

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val", self.per_sample_loss(batch).mean())

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=self.hparams.lr, weight_decay=self.hparams.weight_decay)


def decoder(path: Path, seed: int = 0, **options: Any) -> la.Run:
    pl.seed_everything(seed)
    # Most words are rare: the gradients of their embeddings are near 0 in most steps.
    words = (torch.rand(64, LENGTH).square() * WORDS).long().clamp_max(WORDS - 1)
    loader, val = DataLoader(TensorDataset(words), 8, shuffle=True), DataLoader(TensorDataset(words[:16]), 16)
    quiet = trainer(la.TrajectoryRecorder(path), precision="32-true", gradient_clip_val=1.0, max_epochs=4)
    quiet.fit(Decoder(**options), loader, val)
    return la.Run(path)


def told(monkeypatch: pytest.MonkeyPatch, **changes: float) -> None:
    """From here on every record says other hyper-parameters than were used: times so much."""
    honest = Steps.__getitem__

    def lie(self: Steps, index: Any) -> Any:
        step = honest(self, index)
        groups = [{**g, **{key: g[key] * by for key, by in changes.items()}} for g in step.groups]
        return dataclasses.replace(step, groups=groups)

    monkeypatch.setattr(Steps, "__getitem__", lie)


@pytest.mark.parametrize("seed", range(3))
def test_adam_on_gradients_near_zero_passes(tmp_path: Path, seed: int) -> None:
    report = decoder(tmp_path / "run", seed).audit()
    assert report.ok, report
    assert report.max_abs_error > 1e-6  # what a tolerance relative to the parameters would condemn


@pytest.mark.parametrize("what", ["weight_decay", "lr"])
@pytest.mark.parametrize("decay", [0.01, 0.1])
def test_a_thousandth_of_weight_decay_or_learning_rate_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str, decay: float
) -> None:
    run = decoder(tmp_path / "run", weight_decay=decay)
    assert run.audit().ok
    told(monkeypatch, **{what: 1.001})
    report = run.audit()
    assert not report.ok
    assert "all errors together" in str(report) or report.max_abs_error > report.tolerance


@pytest.mark.parametrize("optimizer", [{"lr": 0.1, "weight_decay": 0.1, "momentum": 0.9}, {"class": "AdamW", "lr": 0.01}])
@pytest.mark.parametrize("what", ["weight_decay", "lr"])
def test_it_is_found_in_small_runs_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, optimizer: dict[str, Any], what: str
) -> None:
    run = record(tmp_path / "run", make(hidden=8, optimizer=optimizer))
    assert run.audit().max_abs_error == 0
    told(monkeypatch, **{what: 1.001})
    assert not run.audit().ok


def test_a_run_that_rounds_on_the_way_is_audited_once_for_all_its_sweeps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = record(tmp_path / "run", make(hidden=4))
    replays = []
    monkeypatch.setattr("lightning_acc.core.audit.Replay", lambda *a, **k: replays.append(1) or Replay(*a, **k))
    replay = Replay(run)
    off = replay.placed(run.snapshot(len(replay))) * 1.01  # as where a GPU adds up in another order each time
    for _ in range(3):
        confirm(replay, off)
    assert len(replays) == 1
    told(monkeypatch, lr=1.1)
    with pytest.raises(la.RunError, match="audit FAILED"):
        confirm(Replay(la.Run(tmp_path / "run")), off)


def test_what_is_bit_for_bit_needs_no_round_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which takes several updates a step to tell; what is not is told from it, from the first step on."""
    run = record(tmp_path / "run", make(hidden=4, optimizer={"class": "AdamW", "lr": 0.01}))
    followed = []
    advance = RoundOff.advance
    monkeypatch.setattr(RoundOff, "advance", lambda *given: followed.append(given[0]) or advance(*given))
    report = run.audit()
    assert (report.ok, report.max_abs_error, report.tolerance, followed) == (True, 0.0, 0.0, [])
    snapshot = Record.snapshot
    last = run.snapshots[-1]
    monkeypatch.setattr(Record, "snapshot", lambda self, t: snapshot(self, t) * (1 + (t == last) * 1e-15))
    report = run.audit()
    assert report.ok
    assert 0 < report.max_abs_error < report.tolerance
    assert len(followed) == run.n_steps


class Narrower(Net):
    """Computes something else where its numbers are wider than the training's."""

    def per_sample_loss(self, batch: Any) -> Tensor:
        return super().per_sample_loss(batch) * (1.1 if batch[0].dtype == torch.float64 else 1.0)


@pytest.mark.parametrize("method", ["sgd-ie", "acc-sgd-ie", "loo"])
def test_a_sweep_that_goes_elsewhere_is_refused_where_the_audit_passes(tmp_path: Path, method: str) -> None:
    run = record(tmp_path / "run", Narrower(hidden=4), precision="32-true")
    assert run.audit().ok
    ask: dict[str, Any] = {"ray_address": None, "check": 0, "save": False}
    with pytest.raises(la.RunError, match=r"does not come by .* at step \d+ of \d+ in float64 on cpu"):
        la.score(run, method, [1], dtype="float64", **ask)
    assert la.score(run, method, [1], **ask).values.all()


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_training_that_amplifies_round_off_is_let_pass(tmp_path: Path, dtype: str) -> None:
    run = decoder(tmp_path / "run", lr=1e-2)
    replay = Replay(run, dtype)
    confirm(replay, replay.placed(run.snapshot(len(replay))) * 1.01)
    confirm(replay, replay.placed(run.snapshot(len(replay))) * 1.01, linear=False)
