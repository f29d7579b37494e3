"""Terms of a loss that no sample is in: recorded beside the losses of the samples, and kept where these are left out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from problems import CLASSES, N, record
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_acc as la
from lightning_acc.recorder import RecordingRefused

pytestmark = pytest.mark.filterwarnings("ignore:Training has no validation data", "ignore:.*Skipping val loop")
WORDS, LENGTH, WIDTH = 12, 4, 6


def words(n: int = N, seed: int = 2) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, CLASSES, (n,), generator=generator)
    return TensorDataset(torch.randint(0, WORDS, (n, LENGTH), generator=generator), labels)


class Tokens(pl.LightningModule):
    """Token ids, embedded; only a ``training_step``."""

    smoothing = 0.0
    step = 0
    kept: Tensor | None = None
    """Which of the samples of the next batch its loss holds, (B,), where they are left out by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, WIDTH)
        self.out = nn.Linear(WIDTH, CLASSES)
        self.scale = nn.Parameter(torch.tensor(0.3))

    def forward(self, ids: Tensor) -> Tensor:
        return self.out(self.words(ids).mean(1))

    def loss(self, ids: Tensor, labels: Tensor) -> Tensor:
        if self.kept is None:
            return nn.functional.cross_entropy(self(ids), labels, label_smoothing=self.smoothing)
        return (nn.functional.cross_entropy(self(ids), labels, reduction="none") * self.kept).sum() / len(ids)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss(*batch)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val", nn.functional.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class L2(Tokens):
    def loss(self, ids: Tensor, labels: Tensor) -> Tensor:
        return super().loss(ids, labels) + 0.01 * sum(p.square().sum() for p in self.parameters())


class Orthogonal(Tokens):
    """A penalty added in place, as low-rank adapters do that choose their rank."""

    def loss(self, ids: Tensor, labels: Tensor) -> Tensor:
        loss = super().loss(ids, labels)
        weight = self.out.weight
        loss += 0.1 * torch.linalg.norm(weight @ weight.T - torch.eye(CLASSES, dtype=weight.dtype))
        return loss


class PenaltyFirst(Tokens):
    def loss(self, ids: Tensor, labels: Tensor) -> Tensor:
        loss = torch.zeros((), dtype=self.scale.dtype)
        loss += 0.01 * self.words.weight.abs().sum()
        loss += super().loss(ids, labels)
        return loss


class Nested(Tokens):
    def loss(self, ids: Tensor, labels: Tensor) -> Tensor:
        whole = (super().loss(ids, labels) + 0.02 * self.words.weight.square().mean() * 3) * 2
        return -(self.scale * whole / -0.3)


class Stacked(Tokens):
    def loss(self, ids: Tensor, labels: Tensor) -> Tensor:
        return torch.stack([super().loss(ids, labels), 0.1 * self.words.weight.square().mean()]).sum()


class OnlyALittle(Tokens):
    def loss(self, ids: Tensor, labels: Tensor) -> Tensor:
        return super().loss(ids, labels) + 1e-4 * self.out.bias.square().sum() + 1e-4 * self.words.weight.square().sum()


class Uncertain(Tokens):
    """Two losses whose weights are learned."""

    def loss(self, ids: Tensor, labels: Tensor) -> Tensor:
        losses = torch.stack([super().loss(ids, labels), 2 * super().loss(ids.flip(1), labels)])
        return (torch.exp(-self.scale) * losses + self.scale).sum()


class FromTheStart(Tokens):
    """Drawn to the parameters it began with, by one of torch's losses."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("start", self.out.weight.detach().clone())

    def loss(self, ids: Tensor, labels: Tensor) -> Tensor:
        return super().loss(ids, labels) + nn.functional.mse_loss(self.out.weight, self.start)


class WarmedUp(Tokens):
    """Nothing is added in the first step."""

    def loss(self, ids: Tensor, labels: Tensor) -> Tensor:
        share = min(1.0, (self.global_step if self.kept is None else self.step) / 5)
        return super().loss(ids, labels) + share * self.words.weight.square().sum()


class Summed(Tokens):
    def loss(self, ids: Tensor, labels: Tensor) -> Tensor:
        return 0.3 * len(ids) * super().loss(ids, labels) + 0.05 * self.words.weight.square().sum()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if self.kept is not None:
            return self.loss(*batch)
        losses = nn.functional.cross_entropy(self(batch[0]), batch[1], reduction="sum")
        return 0.3 * losses + 0.05 * self.words.weight.square().sum() + 0 * self.scale  # all of them are used, as ddp asks for


PENALISED = [L2, Orthogonal, PenaltyFirst, Nested, Stacked, OnlyALittle, Uncertain, FromTheStart, WarmedUp, Summed]


def recorded(path: Path, kind: type[Tokens], **options: Any) -> la.Run:
    torch.manual_seed(0)
    loader = DataLoader(words(), 6, shuffle=True)
    return record(path, kind().double(), loader, validation=False, **options)


def retrained(kind: type[Tokens], run: la.Run, left_out: int = -1, part: float = 0.0) -> Tensor:
    """Final parameters of a plain loop over the recorded batches, in which ``part`` of one sample's loss is left."""
    torch.manual_seed(0)
    module = kind().double()
    optimizer = module.configure_optimizers()
    ids, labels = words().tensors
    for t, step in enumerate(run.steps):
        optimizer.zero_grad()
        module.step = t
        for samples in step.sample_ids.split(step.sizes):
            module.kept = torch.ones(len(samples), dtype=torch.float64)
            module.kept[samples == left_out] = part
            (module.training_step((ids[samples], labels[samples]), 0) / len(step.sizes)).backward()
        optimizer.step()
    return torch.cat([p.detach().reshape(-1) for p in module.parameters()])


def read() -> la.Query:
    def loss(module: Any, batch: Any) -> Tensor:
        return nn.functional.cross_entropy(module(batch[0]), batch[1], reduction="none")

    return la.Query("held-out", DataLoader(words(8, seed=5), 8), loss)


def read_at(kind: type[Tokens], theta: Tensor) -> float:
    module = kind().double()
    torch.nn.utils.vector_to_parameters(theta, module.parameters())
    ids, labels = words(8, seed=5).tensors
    return float(nn.functional.cross_entropy(module(ids), labels).detach())


def as_retrained(kind: type[Tokens], run: la.Run, *left_out: int) -> None:
    """The record passes its audit, and loo is a plain training without each of the samples."""
    assert run.audit().ok
    whole = retrained(kind, run)
    torch.testing.assert_close(run.parameters(run.n_steps), whole, rtol=1e-9, atol=1e-12)
    scores = la.score(run, "loo", left_out, query=read(), keep_shifts=True, ray_address=None)
    truth = torch.stack([retrained(kind, run, sample) - whole for sample in left_out])
    assert float((scores.shifts - truth).norm() / truth.norm()) < 1e-9


@pytest.mark.parametrize("kind", PENALISED)
def test_a_penalty_stays_where_a_sample_is_left_out(tmp_path: Path, kind: type[Tokens]) -> None:
    run = recorded(tmp_path / "run", kind)
    assert run.manifest["loss"]["penalised"]
    assert run.manifest["loss"]["source"] == "reductions"
    as_retrained(kind, run, 4, 17)


@pytest.mark.parametrize("kind", [L2, Uncertain])
def test_accumulated_batches_share_their_penalty(tmp_path: Path, kind: type[Tokens]) -> None:
    run = recorded(tmp_path / "run", kind, accumulate_grad_batches=2)
    as_retrained(kind, run, 4)


@pytest.mark.filterwarnings("ignore:.*fork", "ignore:.*sync_dist", "ignore:'set_vital' is deprecated")
@pytest.mark.parametrize("kind", [L2, Uncertain, Summed])
def test_two_processes_share_their_penalty(tmp_path: Path, kind: type[Tokens]) -> None:
    run = recorded(tmp_path / "run", kind, strategy="ddp_fork", devices=2)
    assert run.manifest["loss"]["penalised"]
    assert [len(step.sizes) for step in run.steps] == [2] * run.n_steps
    as_retrained(kind, run, 4)


@pytest.mark.parametrize("kind", [L2, Orthogonal, Uncertain])
def test_curvature_of_a_penalty_is_that_of_the_step(tmp_path: Path, kind: type[Tokens]) -> None:
    """SGD-IE is the derivative of the parameters in a sample's weight; by central differences of a plain loop."""
    run = recorded(tmp_path / "run", kind)
    shift = la.score(run, "sgd-ie", [4], query=read(), readout="linear", ray_address=None, check=0).values[0]
    small = 1e-4
    more, less = (read_at(kind, retrained(kind, run, 4, 1 + change)) for change in (small, -small))
    assert shift == pytest.approx((less - more) / (2 * small), rel=1e-6)


class TimesItsLabels(Tokens):
    """How much the penalty counts for is read off the batch."""

    def loss(self, ids: Tensor, labels: Tensor) -> Tensor:
        return super().loss(ids, labels) + 0.1 * float(labels.double().mean()) * self.words.weight.square().sum()


class Spread(Tokens):
    def loss(self, ids: Tensor, labels: Tensor) -> Tensor:
        return super().loss(ids, labels) + 0.1 * self(ids).square().mean(0).norm()


@pytest.mark.parametrize("kind", [TimesItsLabels, Spread])
def test_a_term_that_changes_with_the_samples_is_no_penalty(tmp_path: Path, kind: type[Tokens]) -> None:
    with pytest.raises(RecordingRefused, match=r"samples of a batch are coupled|changes with them.*mean over samples") as error:
        recorded(tmp_path / "run", kind)
    assert "\n" not in str(error.value)


class Smoothed(Tokens):
    smoothing = 0.1


class Tied(Tokens):
    """The embedding is the last layer too."""

    def forward(self, ids: Tensor) -> Tensor:
        return (self.words(ids).mean(1) @ self.words.weight.T)[:, :CLASSES]


class Auxiliary(Tokens):
    def loss(self, ids: Tensor, labels: Tensor) -> Tensor:
        loss = torch.zeros((), dtype=self.scale.dtype)
        loss += super().loss(ids, labels)
        return loss + 0.1 * self.words(ids).square().mean() + 0 * self.scale


class Padded(Tokens):
    """Ids are written into a tensor that knew nothing of them."""

    def forward(self, ids: Tensor) -> Tensor:
        longer = torch.zeros(len(ids), LENGTH + 1, dtype=ids.dtype)
        longer[:, :LENGTH] = ids
        return super().forward(longer)

    def loss(self, ids: Tensor, labels: Tensor) -> Tensor:
        return super().loss(ids, labels) + 0.1 * self.words(ids).square().mean()


class Handwritten(Tokens):
    """Cross-entropy in two terms, and a scale that is trained."""

    def loss(self, ids: Tensor, labels: Tensor) -> Tensor:
        logits = self(ids) * self.scale.exp()
        return logits.logsumexp(1).mean() - logits.gather(1, labels[:, None]).mean()


class Transformer(Tokens):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(WIDTH, 2, 8, dropout=0.0, batch_first=True)

    def forward(self, ids: Tensor) -> Tensor:
        return self.out(self.layer(self.words(ids)).mean(1))


class TwoWords(Tokens):
    """Sums that the loss is made of nowhere near its end."""

    def forward(self, ids: Tensor) -> Tensor:
        return self.out(self.words(ids[:, 0]) + self.words.weight[0] * self.scale) + self.out.bias


@pytest.mark.parametrize("kind", [Tokens, Smoothed, Tied, Auxiliary, Padded, Handwritten, Transformer, TwoWords])
def test_a_loss_without_a_penalty_is_recorded(tmp_path: Path, kind: Any) -> None:
    torch.manual_seed(0)
    run = record(tmp_path / "run", kind().double(), DataLoader(words(), 6), validation=False)
    assert run.audit().ok
    assert run.manifest["loss"]["source"] == "reductions"
    assert ("penalised" in run.manifest["loss"]) == (kind is Auxiliary)  # which adds a parameter times 0
