"""What used to end in a bare error, or in a number that is none: attention with a mask, gradients inside a step, a NaN."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from problems import CLASSES, FEATURES, N, Net, data, make, record
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

import lightning_acc as la
from lightning_acc.core.audit import confirm
from lightning_acc.core.replay import Replay

LENGTH, WIDTH, HEADS = 6, 8, 2


class Masked(Net):
    """One layer of attention with a mask; ``.item()`` keeps it from being vectorised."""

    def __init__(self) -> None:
        super().__init__(optimizer={"lr": 0.1})
        self.words = nn.Embedding(20, WIDTH)
        self.mix, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, CLASSES)

    def logits(self, ids: Tensor) -> Tensor:
        assert ids.max().item() < 20
        mask = torch.arange(LENGTH) < 4 + ids[:, :1] % 3
        parts = self.mix(self.words(ids)).view(len(ids), LENGTH, 3, HEADS, -1).transpose(1, 3).unbind(2)
        mixed = nn.functional.scaled_dot_product_attention(*parts, attn_mask=mask[:, None, None, :])
        return self.out(mixed.transpose(1, 2).reshape(len(ids), LENGTH, WIDTH).mean(1))

    def per_sample_loss(self, batch: Any) -> Tensor:
        return nn.functional.cross_entropy(self.logits(batch[0]), batch[1], reduction="none")


class MaskedStep(Masked):
    """The same, seen one sample at a time."""

    per_sample_loss = None  # type: ignore[assignment]  # says that it has none after all

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.logits(batch[0]), batch[1])


def words(n: int = N, seed: int = 2) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 20, (n, LENGTH), generator=generator)
    return TensorDataset(ids, torch.randint(0, CLASSES, (n,), generator=generator))


@pytest.mark.filterwarnings("ignore:Training has no validation data")
@pytest.mark.parametrize("kind", [Masked, MaskedStep])
def test_attention_with_a_mask_is_differentiated_twice_also_one_by_one(tmp_path: Path, kind: Any) -> None:
    torch.manual_seed(0)
    run = record(tmp_path / "run", kind().double(), DataLoader(words(), 6, shuffle=True), validation=False, max_epochs=2)
    query = la.Query("held-out", [words(8, 5)[:]])
    values = {
        method: torch.tensor(la.score(run, method, [0, 5, [1, 7]], query, ray_address=None, save=False, check=0).values)
        for method in ("loo", "acc-sgd-ie", "sgd-ie")
    }
    for method in ("acc-sgd-ie", "sgd-ie"):
        assert float((values[method] - values["loo"]).abs().max()) < 0.1 * float(values["loo"].abs().max())


class Checkpointed(Net):
    """Computes its first layers again on the way back."""

    reentrant = False

    def per_sample_loss(self, batch: Any) -> Tensor:
        x = batch[0].detach().requires_grad_()
        hidden = checkpoint(self.net[:3], x, use_reentrant=self.reentrant)
        return nn.functional.cross_entropy(self.net[3](hidden), batch[1], reduction="none")


class CheckpointedReentrant(Checkpointed):
    reentrant = True


class InputPenalised(Net):
    """Adds to each loss how steep it is in its own input."""

    def per_sample_loss(self, batch: Any) -> Tensor:
        with torch.enable_grad():
            x = batch[0].detach().requires_grad_()
            losses = super().per_sample_loss((x, batch[1]))
            (slope,) = torch.autograd.grad(losses.sum(), x, create_graph=True)
        return losses + 0.1 * slope.square().sum(1)


@pytest.mark.parametrize("kind", [Checkpointed, CheckpointedReentrant, InputPenalised])
def test_gradients_taken_inside_a_step_do_not_reach_the_scores(tmp_path: Path, kind: Any) -> None:
    runs = []
    for each in (kind, Net):
        torch.manual_seed(0)
        runs.append(record(tmp_path / each.__name__, each(hidden=4, dropout=0.2).double(), max_epochs=2))
    assert runs[0].audit().max_abs_error == 0
    for method in ("loo", "acc-sgd-ie", "sgd-ie"):
        values, plain = (la.score(run, method, [0, 5], ray_address=None, save=False, check=0).values for run in runs)
        assert values.all()
        if kind is not InputPenalised:  # the same training, computed in another way
            torch.testing.assert_close(torch.tensor(values), torch.tensor(plain), rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_replay_that_ends_in_no_number_is_refused(tmp_path: Path, value: float) -> None:
    replay = Replay(record(tmp_path / "run", make(), max_epochs=1))
    confirm(replay, replay.run.parameters(len(replay)))
    broken = replay.run.parameters(len(replay)).clone()
    broken[0] = value
    with pytest.raises(la.RunError, match=rf"ends in parameters that are not finite \(1 of {FEATURES * CLASSES + CLASSES}\)"):
        confirm(replay, broken)


class Turning(Net):
    """Gives no number any more once it is told so."""

    broken = False

    def per_sample_loss(self, batch: Any) -> Tensor:
        return super().per_sample_loss(batch) * (float("nan") if Turning.broken else 1.0)


def test_a_record_that_replays_to_no_number_gives_no_scores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = record(tmp_path / "run", Turning().double(), max_epochs=1)
    query = la.Query("logits", [data(n=4)[:]], lambda module, batch: module.net(batch[0])[:, 0])
    monkeypatch.setattr(Turning, "broken", True)
    for method in ("loo", "acc-sgd-ie", "sgd-ie"):
        with pytest.raises(la.RunError, match="audit FAILED: step 0"):
            la.score(run, method, [0], query, ray_address=None, save=False, check=0)
