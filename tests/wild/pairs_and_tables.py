"""Losses over pairs, triplets and whole batches; tables of categories and numbers; matrix factorisation."""

from __future__ import annotations

from typing import Any

import torch
from losses import Network, classes, made, numbers, rows, setup
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from wild import LeavesOut, Setup


class Triplets(Network):
    def loss(self, batch: Any) -> Tensor:
        return F.triplet_margin_loss(*(self.net(part) for part in batch))


class TripletsByHand(LeavesOut, Triplets):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.mean(F.triplet_margin_loss(*(self.net(part) for part in batch), reduction="none"))


def triplets(n: int = 14, seed: int = 0, **options: Any) -> DataLoader[Any]:
    return rows(*(made(n, seed + 10 * i)[0] for i in range(3)), **options)


class SimClr(Network):
    """Two noisy views of each image, told from all others of the batch."""

    outputs = 8

    def loss(self, batch: Any) -> Tensor:
        a, b = (F.normalize(self.net(batch[0] + 0.1 * torch.randn_like(batch[0])), dim=1) for _ in range(2))
        return F.cross_entropy(a @ b.T / 0.5, torch.arange(len(a)))


class Clip(Network):
    """Images and texts, paired within the batch, in both directions."""

    outputs = 8

    def prepare(self) -> None:
        self.text, self.scale = nn.Linear(6, 8), nn.Parameter(torch.tensor(1.0))

    def loss(self, batch: Any) -> Tensor:
        image, text = F.normalize(self.net(batch[0]), dim=1), F.normalize(self.text(batch[1]), dim=1)
        logits, target = self.scale.exp() * image @ text.T, torch.arange(len(image))
        return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


class Cox(Network):
    """Cox's partial likelihood: every event is compared with all who were still at risk."""

    outputs = 1

    def loss(self, batch: Any) -> Tensor:
        x, time = batch
        order = time[:, 0].argsort(descending=True)
        risk = self.net(x)[order, 0]
        return -(risk - torch.logcumsumexp(risk, 0)).mean()


class Ratings(Network):
    """Matrix factorisation with sparse gradients."""

    sparse = True

    def prepare(self) -> None:
        self.net = nn.ModuleList([nn.Embedding(14, 4, sparse=self.sparse), nn.Embedding(5, 4, sparse=self.sparse)])

    def predicted(self, batch: Any) -> Tensor:
        return (self.net[0](batch[0]) * self.net[1](batch[1])).sum(1)

    def loss(self, batch: Any) -> Tensor:
        return F.mse_loss(self.predicted(batch), batch[2].to(self.dtype))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class RatingsByHand(LeavesOut, Ratings):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.mean((self.predicted(batch) - batch[2]) ** 2)


class SparseAdam(Ratings):
    def configure_optimizers(self) -> Any:
        return torch.optim.SparseAdam(self.parameters(), lr=0.1)


def ratings(n: int = 14, seed: int = 0, **options: Any) -> DataLoader[Any]:
    _, generator = made(n, seed)
    items = torch.randint(0, 5, (n,), generator=generator)
    return rows(torch.arange(n), items, torch.randn(n, generator=generator), **options)


class Tabular(Network):
    """Categories in embeddings beside normalised numbers."""

    def prepare(self) -> None:
        self.category, self.norm = nn.Embedding(3, 4), nn.BatchNorm1d(6)
        self.net = nn.Sequential(nn.Linear(10, 12, bias=False), nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, 1))

    def forward(self, batch: Any) -> Tensor:
        return self.net(torch.cat([self.category(batch[1]), self.norm(batch[0])], 1))

    def loss(self, batch: Any) -> Tensor:
        return F.l1_loss(self(batch)[:, 0], batch[0].sum(1))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


class TabularByHand(LeavesOut, Tabular):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.mean((self(batch)[:, 0] - batch[0].sum(1)).abs())


SETUPS: dict[str, Setup] = {
    "triplet loss": setup("anchor, positive and negative in each sample, dropout", Triplets, triplets, TripletsByHand),
    "SimCLR": setup(
        "every sample is told from the others of its batch",
        SimClr,
        classes,
        refused="The samples of a batch are coupled.*cannot be attributed to single samples",
    ),
    "CLIP": setup(
        "images and texts are paired within the batch",
        Clip,
        triplets,
        refused="The samples of a batch are coupled.*cannot be attributed to single samples",
    ),
    "Cox survival": setup(
        "partial likelihood over those at risk in the batch",
        Cox,
        numbers,
        refused="The samples of a batch are coupled.*cannot be attributed to single samples",
    ),
    "matrix factorisation": setup("`Embedding(sparse=True)`, SGD", Ratings, ratings, RatingsByHand),
    "matrix factorisation, SparseAdam": setup(
        "an optimizer that moves only the rows seen",
        SparseAdam,
        ratings,
        refused="SparseAdam moves the rows that a sparse gradient stores",
    ),
    "tabular": setup(
        "embeddings beside numbers, `BatchNorm1d` (`keep-batch-statistics`), `l1_loss`",
        Tabular,
        classes,
        TabularByHand,
        recorder={"batch_norm": "keep-batch-statistics"},
        scores=False,
    ),
}
