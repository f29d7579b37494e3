"""Losses of the kinds that people write, over small networks: weighted, masked, summed, and those that couple samples."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytorch_lightning as pl
import torch
import torchmetrics
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from wild import LeavesOut, Setup


def rows(*columns: Tensor, batch_size: int = 5, shuffle: bool = True) -> DataLoader[Any]:
    return DataLoader(TensorDataset(*columns), batch_size, shuffle=shuffle)


def made(n: int = 14, seed: int = 0) -> tuple[Tensor, torch.Generator]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 6, generator=generator), generator


def classes(n: int = 14, seed: int = 0, **options: Any) -> DataLoader[Any]:
    x, generator = made(n, seed)
    return rows(x, torch.randint(0, 3, (n,), generator=generator), **options)


def numbers(n: int = 14, seed: int = 0, **options: Any) -> DataLoader[Any]:
    x, generator = made(n, seed)
    return rows(x, x[:, :1] + torch.randn(n, 1, generator=generator), **options)


def held_out(make: Callable[..., DataLoader[Any]]) -> Callable[[], DataLoader[Any]]:
    return lambda: make(8, 1, batch_size=8, shuffle=False)


class Network(pl.LightningModule):
    outputs = 3

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 12), nn.GELU(), nn.Dropout(0.2), nn.Linear(12, self.outputs))
        self.prepare()

    def prepare(self) -> None:
        """Criteria with buffers of their own."""

    def loss(self, batch: Any) -> Tensor:
        raise NotImplementedError

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch))

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=1e-2)


class ClassWeights(Network):
    """Divides by the sum of the weights of the batch's classes."""

    def prepare(self) -> None:
        self.criterion = nn.CrossEntropyLoss(weight=torch.tensor([0.5, 1.0, 3.0]))

    def loss(self, batch: Any) -> Tensor:
        return self.criterion(self.net(batch[0]), batch[1])


class ClassWeightsByHand(LeavesOut, ClassWeights):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        losses = F.cross_entropy(self.net(batch[0]), batch[1], reduction="none")
        return self.mean(losses, self.criterion.weight[batch[1]])


class Focal(Network):
    def losses(self, batch: Any) -> Tensor:
        ce = F.cross_entropy(self.net(batch[0]), batch[1], reduction="none")
        return 0.25 * (1 - torch.exp(-ce)) ** 2 * ce

    def loss(self, batch: Any) -> Tensor:
        return self.losses(batch).mean()


class FocalByHand(LeavesOut, Focal):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.mean(self.losses(batch))


def weighted_samples(n: int = 14, seed: int = 0, **options: Any) -> DataLoader[Any]:
    x, generator = made(n, seed)
    y, w = torch.randint(0, 3, (n,), generator=generator), torch.rand(n, generator=generator) + 0.1
    return rows(x, y, w, **options)


class SampleWeights(Network):
    """Weights that come with the samples; the mean is over their sum in the batch."""

    def loss(self, batch: Any) -> Tensor:
        x, y, w = batch
        return (w * F.cross_entropy(self.net(x), y, reduction="none")).sum() / w.sum()


class SampleWeightsByHand(LeavesOut, SampleWeights):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.mean(F.cross_entropy(self.net(batch[0]), batch[1], reduction="none"), batch[2])


def several(n: int = 14, seed: int = 0, **options: Any) -> DataLoader[Any]:
    x, generator = made(n, seed)
    return rows(x, (torch.rand(n, 3, generator=generator) < 0.3).float(), **options)


class PosWeight(Network):
    def prepare(self) -> None:
        self.criterion = nn.BCEWithLogitsLoss(pos_weight=torch.tensor([2.0, 3.0, 5.0]))

    def loss(self, batch: Any) -> Tensor:
        return self.criterion(self.net(batch[0]), batch[1])


class PosWeightByHand(LeavesOut, PosWeight):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        z, y = self.net(batch[0]), batch[1]
        return self.mean(-(self.criterion.pos_weight * y * F.logsigmoid(z) + (1 - y) * F.logsigmoid(-z)))


class Quantiles(Network):
    def losses(self, batch: Any) -> Tensor:
        error = batch[1] - self.net(batch[0])
        q = torch.tensor([0.1, 0.5, 0.9], dtype=error.dtype)
        return torch.maximum(q * error, (q - 1) * error)

    def loss(self, batch: Any) -> Tensor:
        return self.losses(batch).sum(dim=1).mean()


class QuantilesByHand(LeavesOut, Quantiles):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.mean(self.losses(batch).sum(dim=1))


class Gaussian(Network):
    outputs = 2

    def loss(self, batch: Any) -> Tensor:
        mean, scale = self.net(batch[0]).chunk(2, dim=1)
        return F.gaussian_nll_loss(mean, batch[1], F.softplus(scale))


class GaussianByHand(LeavesOut, Gaussian):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        mean, scale = self.net(batch[0]).chunk(2, dim=1)
        variance = F.softplus(scale)
        return self.mean(0.5 * (variance.log() + (mean - batch[1]) ** 2 / variance))


class Tasks(Network):
    """Two tasks whose weights are learned (Kendall and others, 2018): log sigma is in no sample."""

    outputs = 4

    def prepare(self) -> None:
        self.log_variance = nn.Parameter(torch.zeros(2))

    def parts(self, batch: Any) -> tuple[Tensor, Tensor]:
        out = self.net(batch[0])
        return F.cross_entropy(out[:, :3], batch[1], reduction="none"), (out[:, 3] - batch[0][:, 0]) ** 2

    def loss(self, batch: Any) -> Tensor:
        parts = torch.stack([part.mean() for part in self.parts(batch)])
        return (torch.exp(-self.log_variance) * parts + self.log_variance).sum()


class TasksByHand(LeavesOut, Tasks):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        parts = torch.stack([self.mean(part) for part in self.parts(batch)])
        return (torch.exp(-self.log_variance) * parts + self.factor * self.log_variance).sum()


class ElasticNet(Network):
    """Its parameters are penalised in the step, by size and by square."""

    def penalty(self) -> Tensor:
        return sum(1e-3 * p.abs().sum() + 1e-2 * p.square().sum() for p in self.parameters())

    def loss(self, batch: Any) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss(batch) + self.penalty()


class ElasticNetByHand(LeavesOut, ElasticNet):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.mean(F.cross_entropy(self.net(batch[0]), batch[1], reduction="none")) + self.factor * self.penalty()


class TwoLosses(Tasks):
    """Named losses in a dict, weighted and summed, as detection models return them."""

    def prepare(self) -> None:
        self.share = {"class": 1.0, "box": 0.3}

    def loss(self, batch: Any) -> Tensor:
        parts = {name: part.mean() for name, part in zip(("class", "box"), self.parts(batch), strict=True)}
        self.log_dict(parts)
        return sum(self.share[name] * part for name, part in parts.items())


class TwoLossesByHand(LeavesOut, TwoLosses):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        first, second = self.parts(batch)
        return self.mean(first + 0.3 * second)


class Metrics(Network):
    """Metrics kept by torchmetrics, and logged as objects."""

    def prepare(self) -> None:
        self.accuracy = torchmetrics.classification.MulticlassAccuracy(3)
        self.all = torchmetrics.MetricCollection({"f1": torchmetrics.classification.MulticlassF1Score(3)}, prefix="train_")

    def loss(self, batch: Any) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        logits = self.net(batch[0])
        self.accuracy(logits, batch[1])
        self.log("accuracy", self.accuracy, on_step=True, on_epoch=True)
        self.log_dict(self.all(logits, batch[1]))
        return F.cross_entropy(logits, batch[1])


class MetricsByHand(LeavesOut, Metrics):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.mean(F.cross_entropy(self.net(batch[0]), batch[1], reduction="none"))


class MetricAsLoss(Network):
    """A metric of torchmetrics is what is minimised."""

    outputs = 1

    def prepare(self) -> None:
        self.criterion = torchmetrics.MeanSquaredError()

    def loss(self, batch: Any) -> Tensor:
        return self.criterion(self.net(batch[0]), batch[1])


def setup(has: str, module: Any, train: Any, by_hand: Any = None, **options: Any) -> Setup:
    """A set-up that validates on held-out data of the kind it trains on."""
    return Setup(has, module, train, by_hand, held_out(train), **options)


SETUPS: dict[str, Setup] = {
    "class weights": setup("`CrossEntropyLoss(weight=...)`, dropout", ClassWeights, classes, ClassWeightsByHand),
    "focal loss": setup("written by hand, dropout", Focal, classes, FocalByHand),
    "sample weights": setup(
        "`(w * losses).sum() / w.sum()`, `w` in the batch", SampleWeights, weighted_samples, SampleWeightsByHand
    ),
    "positive weights": setup("`BCEWithLogitsLoss(pos_weight=...)` over three labels", PosWeight, several, PosWeightByHand),
    "quantile regression": setup("pinball losses, summed over quantiles", Quantiles, numbers, QuantilesByHand),
    "Gaussian likelihood": setup("`gaussian_nll_loss`, mean and variance predicted", Gaussian, numbers, GaussianByHand),
    "uncertainty weighting": setup(
        "two tasks, weights learned; the query reads the losses without what no sample is in",
        Tasks,
        classes,
        TasksByHand,
        scores=False,
    ),
    "elastic net": setup("the sizes and squares of all weights are added to the loss", ElasticNet, classes, ElasticNetByHand),
    "losses in a dict": setup("two losses by name, weighted and summed, `log_dict`", TwoLosses, classes, TwoLossesByHand),
    "torchmetrics": setup("metrics in the step, logged as objects; a collection of them", Metrics, classes, MetricsByHand),
    "torchmetrics as the loss": setup(
        "`MeanSquaredError()` is minimised",
        MetricAsLoss,
        numbers,
        refused="The loss is made of the metric self.criterion.*log it only",
    ),
}
