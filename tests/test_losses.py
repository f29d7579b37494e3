"""How a loss is made of the losses of samples: weighted means, and batches whose dropout, noise and statistics are their own.

Each module is written as its users write it, beside the same loss by hand with a factor for each sample, by which a real
training leaves a sample out.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from problems import Net, flat, record, trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_acc as la
from lightning_acc.core.replay import Replay
from lightning_acc.recorder.checks.refusals import RecordingRefused

N, WORDS, LENGTH, CLASSES = 17, 11, 6, 3


def tokens() -> TensorDataset:
    """Words, the next words of which some are ignored, a class, a number, a weight, and which sample it is."""
    generator = torch.Generator().manual_seed(3)
    words = torch.randint(0, WORDS, (N, LENGTH), generator=generator)
    targets = torch.randint(0, WORDS, (N, LENGTH), generator=generator)
    targets[torch.arange(LENGTH) >= torch.randint(1, LENGTH + 1, (N, 1), generator=generator)] = -100
    targets[4] = -100  # nothing of this sample counts
    classes = torch.randint(0, CLASSES, (N,), generator=generator)
    numbers = torch.randn(N, 2, generator=generator, dtype=torch.float64)
    weights = torch.rand(N, generator=generator, dtype=torch.float64) + 0.1
    return TensorDataset(words, targets, classes, numbers, weights, torch.arange(N))


class Case(pl.LightningModule):
    """``left_out`` is the sample that a training by hand is without; -1: none."""

    source, reduction = "reductions", "mean"

    def __init__(self) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.left_out: int | None = None
        self.words = nn.Embedding(WORDS, 8)
        self.body = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Dropout(0.3))
        self.next, self.kind, self.number = nn.Linear(8, WORDS), nn.Linear(8, CLASSES), nn.Linear(8, 2)
        self.register_buffer("class_weights", torch.tensor([0.2, 1.0, 3.0]))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if self.left_out is None:
            return self.loss(batch)
        return self.by_hand(batch, (batch[-1] != self.left_out).double())

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        loss = self.loss(batch)
        self.log("val", loss["loss"] if isinstance(loss, dict) else loss, batch_size=len(batch[0]))

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=0.01)

    def loss(self, batch: Any) -> Any:
        raise NotImplementedError

    def by_hand(self, batch: Any, kept: Tensor) -> Tensor:
        raise NotImplementedError

    def hidden(self, batch: Any) -> Tensor:
        return self.body(self.words(batch[0]))


class Tokens(Case):
    reduction = "weighted"

    def loss(self, batch: Any) -> Any:
        logits = self.next(self.hidden(batch))
        return {"loss": F.cross_entropy(logits.view(-1, WORDS), batch[1].view(-1)), "logits": logits.detach()}

    def by_hand(self, batch: Any, kept: Tensor) -> Tensor:
        losses = F.cross_entropy(self.next(self.hidden(batch)).transpose(1, 2), batch[1], reduction="none")
        return (losses * kept[:, None]).sum() / (batch[1] != -100).sum()

    @staticmethod
    def shares(batch: Any) -> Tensor:
        return (batch[1] != -100).sum(1).double()


class Masked(Tokens):
    """The same mean, written out."""

    def loss(self, batch: Any) -> Any:
        mask = (batch[1] != -100).float()
        losses = F.cross_entropy(self.next(self.hidden(batch)).transpose(1, 2), batch[1].clamp(min=0), reduction="none")
        return (losses * mask).sum() / mask.sum().clamp(min=1.0)


class ClassWeights(Case):
    reduction = "weighted"

    def loss(self, batch: Any) -> Any:
        return nn.CrossEntropyLoss(weight=self.class_weights)(self.kind(self.hidden(batch).mean(1)), batch[2])

    def by_hand(self, batch: Any, kept: Tensor) -> Tensor:
        losses = F.cross_entropy(self.kind(self.hidden(batch).mean(1)), batch[2], reduction="none")
        weights = self.class_weights[batch[2]]
        return (losses * weights * kept).sum() / weights.sum()

    @staticmethod
    def shares(batch: Any) -> Tensor:
        return torch.tensor([0.2, 1.0, 3.0]).double()[batch[2]]


class SampleWeights(Case):
    reduction = "weighted"

    def loss(self, batch: Any) -> Any:
        losses = (self.number(self.hidden(batch).mean(1)) - batch[3]).square().sum(-1)
        return (losses * batch[4]).sum() / batch[4].sum()

    def by_hand(self, batch: Any, kept: Tensor) -> Tensor:
        losses = (self.number(self.hidden(batch).mean(1)) - batch[3]).square().sum(-1)
        return losses @ (kept * batch[4] / batch[4].sum())

    @staticmethod
    def shares(batch: Any) -> Tensor:
        return batch[4]


class Pair(SampleWeights):
    """Gives the weights itself; those of its training step are not seen from outside."""

    source = "per_sample_loss"

    def per_sample_loss(self, batch: Any) -> tuple[Tensor, Tensor]:
        return (self.number(self.hidden(batch).mean(1)) - batch[3]).square().sum(-1), batch[4]

    def loss(self, batch: Any) -> Any:
        losses, weights = self.per_sample_loss(batch)
        return losses @ weights / weights.sum()


class SeenPair(Pair):
    """Gives the weights itself; those of its training step are seen."""

    def loss(self, batch: Any) -> Any:
        losses, weights = self.per_sample_loss(batch)
        return (losses * weights).sum() / weights.sum()


class Squared(Case):
    """Three means of squares and a factor."""

    def loss(self, batch: Any) -> Any:
        out = self.number(self.hidden(batch).mean(1))
        parts = {"a": nn.MSELoss()(out, batch[3]), "b": 0.5 * F.l1_loss(out, batch[3]), "c": (out**2).mean(1).mean()}
        return sum(parts.values())

    def by_hand(self, batch: Any, kept: Tensor) -> Tensor:
        out = self.number(self.hidden(batch).mean(1))
        losses = (out - batch[3]).square().mean(1) + 0.5 * (out - batch[3]).abs().mean(1) + (out**2).mean(1)
        return (losses * kept).mean()


class Stacked(Squared):
    def loss(self, batch: Any) -> Any:
        out = self.number(self.hidden(batch).mean(1))
        parts = [F.mse_loss(out, batch[3]), F.l1_loss(out, batch[3]), (out**2).mean()]
        return (torch.stack(parts) * torch.tensor([1.0, 0.5, 1.0])).sum()


class Noisy(Case):
    """A variational autoencoder, with noise in evaluation mode too; its sum is divided by the size of the batch."""

    def parts(self, batch: Any) -> Tensor:
        mean, spread = self.hidden(batch).mean(1).chunk(2, -1)
        code = mean + torch.randn_like(mean) * (0.5 * spread).exp()
        reconstructed = self.number(torch.cat([code, code], -1))
        kl = -0.5 * (1 + spread - mean.square() - spread.exp()).sum(1)
        return F.mse_loss(reconstructed, batch[3], reduction="none").sum(1) + 0.1 * kl

    def loss(self, batch: Any) -> Any:
        mean, spread = self.hidden(batch).mean(1).chunk(2, -1)
        code = mean + torch.randn_like(mean) * (0.5 * spread).exp()
        reconstructed = self.number(torch.cat([code, code], -1))
        kl = -0.5 * torch.sum(1 + spread - mean.square() - spread.exp())
        loss = F.mse_loss(reconstructed, batch[3], reduction="sum")
        loss += 0.1 * kl
        return loss / batch[0].size(0)

    def by_hand(self, batch: Any, kept: Tensor) -> Tensor:
        return (self.parts(batch) * kept).mean()


class MeanAndSum(Noisy):
    """Alone, a sample would weigh the two terms otherwise than within its batch."""

    def loss(self, batch: Any) -> Any:
        out = self.number(self.hidden(batch).mean(1))
        return F.mse_loss(out, batch[3]) + 0.05 * out.square().sum()

    def by_hand(self, batch: Any, kept: Tensor) -> Tensor:
        out = self.number(self.hidden(batch).mean(1))
        return ((out - batch[3]).square().mean(1) * kept).mean() + 0.05 * (out.square().sum(1) * kept).sum()


class OneByOne(Case):
    """A loop over the samples, which no reduction shows."""

    source = "training_step"

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(8, 8), nn.GELU())

    def loss(self, batch: Any) -> Any:
        out = self.number(self.hidden(batch).mean(1))
        return sum((a - b).norm() ** 2 for a, b in zip(out, batch[3], strict=True)) / len(out)

    def by_hand(self, batch: Any, kept: Tensor) -> Tensor:
        out = self.number(self.hidden(batch).mean(1))
        return ((out - batch[3]).square().sum(1) * kept).mean()


class Statistics(Case):
    """Batch normalisation, without per_sample_loss: one argument of the recorder allows it."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Dropout(0.2))
        self.norm = nn.BatchNorm1d(8)

    def loss(self, batch: Any) -> Any:
        return F.cross_entropy(self.kind(self.norm(self.hidden(batch).mean(1))), batch[2])

    def by_hand(self, batch: Any, kept: Tensor) -> Tensor:
        losses = F.cross_entropy(self.kind(self.norm(self.hidden(batch).mean(1))), batch[2], reduction="none")
        return (losses * kept).mean()


CASES = [
    *(Tokens, Masked, ClassWeights, SampleWeights, Pair, SeenPair, Squared, Stacked, Noisy, MeanAndSum, OneByOne, Statistics),
]


def made(kind: type[Case]) -> Case:
    torch.manual_seed(0)
    return kind().double()


def train(module: Case, *callbacks: Any) -> Tensor:
    """Two epochs of steps that accumulate two batches, the last of them ragged; returns the final parameters (p,)."""
    pl.seed_everything(1)
    fitted = trainer(*callbacks, max_epochs=2, accumulate_grad_batches=2)
    fitted.fit(module, DataLoader(tokens(), 5, shuffle=True), DataLoader(tokens(), 7))
    return flat(module)


def trained(kind: type[Case], left_out: int) -> Tensor:
    module = made(kind)
    module.left_out = left_out
    return train(module)


@pytest.mark.parametrize("kind", CASES, ids=lambda kind: kind.__name__)
def test_retraining_by_the_record_is_retraining(tmp_path: Path, kind: type[Case]) -> None:
    options = {"batch_norm": "keep-batch-statistics"} if kind is Statistics else {}
    train(made(kind), la.TrajectoryRecorder(tmp_path / "run", **options))
    run = la.Run(tmp_path / "run")
    loss = run.manifest["loss"]
    assert (loss["source"], loss["reduction"]) == (kind.source, kind.reduction)
    assert run.audit().ok
    untouched = trained(kind, -1)
    torch.testing.assert_close(run.parameters(run.n_steps), untouched, rtol=0, atol=1e-10)  # the two ways to write the loss
    removals = [0, 4, 9]
    found = la.score(run, "loo", removals, ray_address=None, check=0, keep_shifts=True).shifts
    for sample, shift in zip(removals, found, strict=True):
        truth = trained(kind, sample) - untouched
        assert truth.norm() > 0 or sample == 4
        assert float((torch.as_tensor(shift) - truth).norm()) <= 1e-9 * max(1.0, float(truth.norm()))
    if kind.reduction == "weighted":
        for t, step in enumerate(run.steps):
            parts = []
            for leaves in run.batches(t):
                shares = kind.shares([leaves[str(i)] for i in range(6)])  # type: ignore[attr-defined]
                parts.append(shares / shares.sum() / 2)
            torch.testing.assert_close(step.weights, torch.cat(parts), rtol=1e-12, atol=0)
    backwards = la.score(run, "sgd-ie", ray_address=None, check=0, save=False).estimates
    forwards = la.score(run, "sgd-ie", removals, readout="linear", keep_shifts=True, ray_address=None, check=0, save=False)
    torch.testing.assert_close(torch.tensor(forwards.estimates), torch.tensor(backwards[removals]), rtol=1e-7, atol=1e-13)


def test_the_query_is_the_loss_that_the_module_reports(tmp_path: Path) -> None:
    """The weighted mean of each batch, and over batches by their sizes."""
    module = made(Tokens)
    train(module, la.TrajectoryRecorder(tmp_path / "run"))
    reported = trainer().validate(module, DataLoader(tokens(), 7), verbose=False)[0]["val"]
    run = la.Run(tmp_path / "run")
    value = run.query("val").value(Replay(run).objective, run.parameters(run.n_steps))
    assert float(value) == pytest.approx(reported, rel=1e-6)


def test_mixed_precision_rounds_as_the_batch_does(tmp_path: Path) -> None:
    """bf16-mixed without per_sample_loss: the losses of single samples would be rounded otherwise."""
    torch.manual_seed(0)
    pl.seed_everything(1)
    recorder = la.TrajectoryRecorder(tmp_path / "run")
    trainer(recorder, precision="bf16-mixed").fit(Squared(), DataLoader(single(), 5, shuffle=True), DataLoader(single(), 7))
    run = la.Run(tmp_path / "run")
    assert run.manifest["loss"]["source"] == "reductions"
    report = run.audit()
    assert report.ok
    assert report.max_abs_error <= 1e-5


def single() -> TensorDataset:
    return TensorDataset(*(t.float() if t.is_floating_point() else t for t in tokens().tensors))


class DroppedLoop(Case):
    """A loop over the samples, whose masks are drawn for the words of all in turn."""

    def loss(self, batch: Any) -> Any:
        out = self.number(self.body(self.words(batch[0].T)).mean(0))
        return sum((a - b).norm() ** 2 for a, b in zip(out, batch[3], strict=True)) / len(out)


class TwicePair(Pair):
    """Its per_sample_loss says nothing of the weights."""

    def per_sample_loss(self, batch: Any) -> Any:
        return super().per_sample_loss(batch)[0]

    def loss(self, batch: Any) -> Any:
        return self.per_sample_loss(batch) @ (batch[4] / batch[4].sum())


class Decayed(Squared):
    def per_sample_loss(self, batch: Any) -> Tensor:
        out = self.number(self.hidden(batch).mean(1))
        return (out - batch[3]).square().mean(1)

    def loss(self, batch: Any) -> Any:
        return self.per_sample_loss(batch).mean() + 0.01 * sum(p.square().sum() for p in self.parameters())


class TwiceDropped(Decayed):
    """Draws its masks anew for per_sample_loss, after others."""

    def loss(self, batch: Any) -> Any:
        self.hidden(batch)
        return self.per_sample_loss(batch).mean()


class Contrasted(Squared):
    def loss(self, batch: Any) -> Any:
        out = F.normalize(self.number(self.hidden(batch).mean(1)), dim=1)
        return F.cross_entropy(out @ out.T, torch.arange(len(out)))


class ByItsOwnSize(Squared):
    """Each sample leaves the divisor with its loss, which no fixed weight says."""

    def loss(self, batch: Any) -> Any:
        loss = super().loss(batch)
        return loss / loss.detach()


class ByAnother(Squared):
    def loss(self, batch: Any) -> Any:
        out = self.number(self.hidden(batch).mean(1))
        return F.mse_loss(out, batch[3]) * torch.exp(-F.l1_loss(out, batch[3]).detach())


class WrongShape(Squared):
    def per_sample_loss(self, batch: Any) -> Any:
        return self.number(self.hidden(batch).mean(1)).square(), batch[4]


REFUSED = {
    DroppedLoop: r"draws random numbers \(dropout, noise\) for a whole batch.*is not seen.*return losses, weights",
    TwicePair: (
        r"weighs the samples of a batch by 0\.\d+.*: .*from those of the mean of their losses.*"
        r"Return \(losses, weights\) from per_sample_loss"
    ),
    Decayed: r"adds a squared penalty on the weights.*Use the optimizer's weight_decay",
    TwiceDropped: r"draw different random numbers.*the same layers in the same order",
    Contrasted: r"samples of a batch are coupled: .*mean over samples",
    ByItsOwnSize: r"coupled by their loss: it is divided by what is made of means or sums over the samples",
    ByAnother: r"coupled by their loss: it is multiplied by what is made of means or sums over the samples",
    WrongShape: r"returned a tuple of 2 \(a tensor of shape \(5, 2\), a tensor of shape \(5,\)\) for a batch of 5 samples",
}


@pytest.mark.parametrize("kind", REFUSED, ids=lambda kind: kind.__name__)
def test_the_cause_of_a_refusal_is_told(tmp_path: Path, kind: type[Case]) -> None:
    with pytest.raises(RecordingRefused, match=REFUSED[kind]) as refused:
        train(made(kind), la.TrajectoryRecorder(tmp_path / "run"))
    assert hasattr(kind, "per_sample_loss") is False or "Define" not in str(refused.value)


def test_observing_changes_no_bit(tmp_path: Path) -> None:
    plain, recorded = made(Tokens), made(Tokens)
    train(plain)
    train(recorded, la.TrajectoryRecorder(tmp_path / "run"))
    assert torch.equal(flat(plain), flat(recorded))


class Looking(Tokens):
    """Does with its losses what no rule of the observer foresees."""

    def loss(self, batch: Any) -> Any:
        found = super().loss(batch)
        loss = found["loss"]
        pair = torch.stack([loss, 2 * loss])
        assert torch.max(pair, dim=0).values == torch.max(pair)
        assert pair[..., 0] == pair[0] == loss
        assert pair.reshape(1, 2).mean(dim=-1, keepdim=True).shape == (1, 1)
        assert torch.isfinite(loss.sum(dim=(), keepdim=False))
        return found


def test_observing_costs_no_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a step does with its losses, and whatever goes wrong in the observer."""
    from lightning_acc.core.losses import reductions

    plain, recorded, broken = made(Looking), made(Looking), made(Looking)
    train(plain)
    train(recorded, la.TrajectoryRecorder(tmp_path / "run"))
    assert torch.equal(flat(plain), flat(recorded))
    own = reductions.shares

    def fails(counts: Tensor) -> Tensor:
        if torch.is_grad_enabled() and not torch.overrides._get_current_function_mode_stack() and fails.armed:
            raise ArithmeticError("not foreseen")
        return own(counts)

    fails.armed = False  # type: ignore[attr-defined]
    monkeypatch.setattr(reductions, "shares", fails)

    class Arming(pl.Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            fails.armed = trainer.global_step > 0  # type: ignore[attr-defined]

        def on_before_backward(self, trainer: Any, pl_module: Any, loss: Tensor) -> None:
            fails.armed = False  # type: ignore[attr-defined]

    train(broken, Arming(), la.TrajectoryRecorder(tmp_path / "broken"))
    assert torch.equal(flat(plain), flat(broken))
    assert la.Run(tmp_path / "broken").audit().ok


class Compiled(Tokens):
    def __init__(self) -> None:
        super().__init__()
        self.body = torch.compile(self.body, backend="aot_eager")  # type: ignore[assignment]


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf", "ignore:.*torch.jit.script")
def test_a_compiled_module_is_not_observed(tmp_path: Path) -> None:
    """It would be compiled anew at every step."""

    plain, recorded = made(Compiled), made(Compiled)
    train(plain)
    train(recorded, la.TrajectoryRecorder(tmp_path / "run"))
    assert torch.equal(flat(plain), flat(recorded))
    run = la.Run(tmp_path / "run")
    assert run.manifest["loss"]["reduction"] == "weighted"
    assert run.audit().ok


class Centred(Net):
    """What is added to the samples' losses adds up to nothing: neither the loss nor its gradient shows it."""

    def per_sample_loss(self, batch: Any) -> Tensor:
        outputs = self.net(batch[0])[:, 0]
        return super().per_sample_loss(batch) + outputs - outputs.mean()


def test_a_coupling_that_cancels_over_the_batch_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecordingRefused, match="The samples of a batch are coupled: alone, sample 0"):
        record(tmp_path / "run", Centred(4), batch_size=4)
