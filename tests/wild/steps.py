"""Training steps that use more than a batch, batches that hold more than tensors, streams, and further ways to train."""

from __future__ import annotations

from collections import namedtuple
from dataclasses import dataclass
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from losses import Network, classes, made, rows, setup
from pytorch_lightning.loggers import CSVLogger
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset
from wild import LeavesOut, Setup


class Logs(Network):
    """Reads the trainer, its optimizers and schedulers, writes to the logger's own object, keeps outputs in a list."""

    def prepare(self) -> None:
        self.training_step_outputs: list[Tensor] = []

    def loss(self, batch: Any) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def note(self, loss: Tensor) -> Tensor:
        self.log("lr", self.optimizers().param_groups[0]["lr"], on_step=True)
        self.log("progress", self.trainer.global_step / self.trainer.estimated_stepping_batches)
        self.log("rate", self.lr_schedulers().get_last_lr()[0])
        if self.trainer.is_global_zero and self.trainer.current_epoch >= 0:
            self.logger.experiment.log_metrics({"seen": float(loss)}, step=self.global_step)
        self.training_step_outputs.append(loss)
        return loss

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.note(self.loss(batch))

    def on_train_epoch_end(self) -> None:
        self.log("epoch_loss", torch.stack(self.training_step_outputs).mean())
        self.training_step_outputs.clear()

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.parameters(), lr=1e-2)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)]


class LogsByHand(LeavesOut, Logs):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.note(self.mean(F.cross_entropy(self.net(batch[0]), batch[1], reduction="none")))


class Sequences(Network):
    """A packed LSTM over sequences of different lengths."""

    def prepare(self) -> None:
        self.rnn, self.net = nn.LSTM(4, 8, num_layers=2, dropout=0.2, batch_first=True), nn.Linear(8, 3)

    def forward(self, batch: Any) -> Tensor:
        x, lengths, _ = batch
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths.cpu(), batch_first=True, enforce_sorted=False)
        return self.net(self.rnn(packed)[1][0][-1])

    def loss(self, batch: Any) -> Tensor:
        return F.cross_entropy(self(batch), batch[2])


class SequencesByHand(LeavesOut, Sequences):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.mean(F.cross_entropy(self(batch), batch[2], reduction="none"))


def sequences(n: int = 14, seed: int = 0, **options: Any) -> DataLoader[Any]:
    _, generator = made(n, seed)
    x, lengths = torch.randn(n, 7, 4, generator=generator), torch.randint(2, 8, (n,), generator=generator)
    return rows(x * (torch.arange(7)[:, None] < lengths[:, None, None]), lengths, lengths % 3, **options)


class Speech(Network):
    """Connectionist temporal classification: the mean of each sample's loss over its target's length."""

    def prepare(self) -> None:
        self.rnn, self.net = nn.GRU(4, 8, batch_first=True), nn.Linear(8, 5)
        self.criterion = nn.CTCLoss(zero_infinity=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(self.rnn(x)[0]).log_softmax(2).transpose(0, 1)

    def loss(self, batch: Any) -> Tensor:
        x, lengths, target, target_lengths = batch
        return self.criterion(self(x), target, lengths, target_lengths)


class SpeechByHand(LeavesOut, Speech):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, lengths, target, target_lengths = batch
        losses = F.ctc_loss(self(x), target, lengths, target_lengths, reduction="none", zero_infinity=True)
        return self.mean(losses / target_lengths)


def speech(n: int = 14, seed: int = 0, **options: Any) -> DataLoader[Any]:
    _, generator = made(n, seed)
    draw = {"generator": generator}
    lengths, targets = torch.randint(7, 10, (n,), **draw), torch.randint(1, 4, (n,), **draw)
    return rows(torch.randn(n, 9, 4, **draw), lengths, torch.randint(1, 5, (n, 3), **draw), targets, **options)


Pair = namedtuple("Pair", ["x", "y"])


@dataclass
class Fields:
    x: Tensor
    y: Tensor
    texts: list[str]


class ByAttribute(Network):
    """Batches whose parts are asked for by attribute: a namedtuple, a dataclass."""

    def loss(self, batch: Any) -> Tensor:
        return F.cross_entropy(self.net(batch.x.to(self.dtype)), batch.y)


class ByAttributeByHand(LeavesOut, ByAttribute):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.mean(F.cross_entropy(self.net(batch.x.to(self.dtype)), batch.y, reduction="none"))


def pairs(n: int = 14, seed: int = 0, **options: Any) -> DataLoader[Any]:
    loader = classes(n, seed, **options)
    loader.collate_fn = lambda samples: Pair(*torch.utils.data.default_collate(samples))
    return loader


def fields(n: int = 14, seed: int = 0, **options: Any) -> DataLoader[Any]:
    loader = classes(n, seed, **options)

    def collate(samples: list[Any]) -> Fields:
        return Fields(*torch.utils.data.default_collate(samples), texts=[f"text {float(x[0]):.3f}" for x, _ in samples])

    loader.collate_fn = collate
    return loader


class Boxes(Network):
    """Detection: a list of targets of different sizes, a loss for each image, their mean."""

    def losses(self, batch: Any) -> Tensor:
        images, targets = batch
        out = self.net(torch.stack(images))
        return torch.stack([((o - target["boxes"]) ** 2).mean() for o, target in zip(out, targets, strict=True)])

    def loss(self, batch: Any) -> Tensor:
        return self.losses(batch).mean()


class FilledBoxes(Boxes):
    """The same, filled up to one number of boxes, with a mask."""

    def losses(self, batch: Any) -> Tensor:
        images, targets = batch
        errors = ((self.net(images)[:, None] - targets["boxes"]) ** 2).mean(2)
        return (errors * targets["mask"]).sum(1) / targets["mask"].sum(1)


class FilledBoxesByHand(LeavesOut, FilledBoxes):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.mean(self.losses(batch))


def filled(n: int = 14, seed: int = 0, **options: Any) -> DataLoader[Any]:
    loader = classes(n, seed, **options)

    def collate(samples: list[Any]) -> Any:
        x, y = torch.utils.data.default_collate(samples)
        return x, {"boxes": x[:, None, :3].repeat(1, 3, 1), "mask": (torch.arange(3) <= y[:, None]).to(x)}

    loader.collate_fn = collate
    return loader


def boxes(n: int = 14, seed: int = 0, **options: Any) -> DataLoader[Any]:
    loader = classes(n, seed, **options)

    def collate(samples: list[Any]) -> Any:
        images = [x for x, _ in samples]
        return images, [{"boxes": x[:3].repeat(int(y) + 1, 1), "labels": y.repeat(int(y) + 1)} for x, y in samples]

    loader.collate_fn = collate
    return loader


class Posts(Network):
    """Rows of a Hugging Face data set: tensors beside their raw text."""

    def loss(self, batch: Any) -> Tensor:
        return F.cross_entropy(self.net(batch["x"].to(self.dtype)), batch["label"])


class PostsByHand(LeavesOut, Posts):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.mean(F.cross_entropy(self.net(batch["x"].to(self.dtype)), batch["label"], reduction="none"))


def hub(n: int = 14, seed: int = 0) -> Any:
    datasets = pytest.importorskip("datasets")
    x, generator = made(n, seed)
    labels = torch.randint(0, 3, (n,), generator=generator).tolist()
    texts = [f"post {i} of {seed}" for i in range(n)]
    return datasets.Dataset.from_dict({"x": x.tolist(), "label": labels, "text": texts, "id": [f"p{i}" for i in range(n)]})


def posts(n: int = 14, seed: int = 0, batch_size: int = 5, shuffle: bool = True) -> DataLoader[Any]:
    return DataLoader(hub(n, seed).with_format("torch"), batch_size, shuffle=shuffle)


def streamed(n: int = 14, seed: int = 0, batch_size: int = 5, shuffle: bool = True) -> DataLoader[Any]:
    stream = hub(n, seed).to_iterable_dataset(num_shards=1).with_format("torch")
    return DataLoader(stream.shuffle(seed=0, buffer_size=8) if shuffle else stream, batch_size)


class StreamedByHand(PostsByHand):
    def ids(self, batch: Any) -> list[int]:
        """The samples of a batch: numbered as they came first."""
        self.order: dict[str, int] = getattr(self, "order", {})
        return [self.order.setdefault(name, len(self.order)) for name in batch["id"]]


class Endless(IterableDataset[Any]):
    def __iter__(self) -> Any:
        yield from zip(*classes().dataset.tensors, strict=True)


def stateful(n: int = 14, seed: int = 0, **options: Any) -> Any:
    loaders = pytest.importorskip("torchdata.stateful_dataloader")
    return loaders.StatefulDataLoader(classes(n, seed).dataset, 5, shuffle=True)


class Plain(Network):
    lr = 1e-2

    def loss(self, batch: Any) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=self.lr)


class PlainByHand(LeavesOut, Plain):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.mean(F.cross_entropy(self.net(batch[0]), batch[1], reduction="none"))


class Compiled(Plain):
    def prepare(self) -> None:
        self.net = torch.compile(self.net, backend="aot_eager")


class CompiledByHand(PlainByHand, Compiled):
    pass


class WithMuon(Plain):
    """Muon, which takes matrices alone, on a network without biases."""

    def prepare(self) -> None:
        self.net = nn.Sequential(nn.Linear(6, 12, bias=False), nn.GELU(), nn.Linear(12, 3, bias=False))

    def configure_optimizers(self) -> Any:
        return torch.optim.Muon(self.parameters(), lr=0.02)


class WithMuonByHand(PlainByHand, WithMuon):
    pass


class WithAdafactor(Plain):
    def configure_optimizers(self) -> Any:
        return torch.optim.Adafactor(self.parameters(), lr=0.05)


class WithAdafactorByHand(PlainByHand, WithAdafactor):
    pass


class SecondOrder(Plain):
    def configure_optimizers(self) -> Any:
        return torch.optim.LBFGS(self.parameters(), lr=0.1)


def everyday() -> list[Any]:
    """Callbacks that look on, or stop."""
    return [
        pl.callbacks.LearningRateMonitor(),
        pl.callbacks.EarlyStopping("val_loss", patience=5),
        pl.callbacks.ModelCheckpoint(monitor="val_loss", save_last=True),
        pl.callbacks.GradientAccumulationScheduler({0: 1, 1: 2}),
        pl.callbacks.Timer(),
        pl.callbacks.LambdaCallback(on_train_epoch_end=lambda trainer, module: None),
    ]


SWA = {"swa_lrs": 1e-2, "swa_epoch_start": 0.5}

SETUPS: dict[str, Setup] = {
    "a step that uses its trainer": setup(
        "`self.trainer`, `self.optimizers()`, `self.lr_schedulers()`, `self.logger.experiment`, a list of outputs",
        Logs,
        classes,
        LogsByHand,
        logger=CSVLogger,
    ),
    "packed LSTM": setup("`pack_padded_sequence`, two layers, dropout between them", Sequences, sequences, SequencesByHand),
    "CTC": setup("`CTCLoss`: each sample over its target's length; a GRU", Speech, speech, SpeechByHand),
    "namedtuple": setup("`batch.x`, `batch.y`", ByAttribute, pairs, ByAttributeByHand),
    "dataclass": setup("`batch.x`, and texts beside it", ByAttribute, fields, ByAttributeByHand),
    "detection": setup(
        "lists of images and of targets, boxes of different numbers",
        Boxes,
        boxes,
        refused="a list of 5 tensors, one a sample.*stack them in the collate_fn",
    ),
    "detection, filled up": setup("boxes of different numbers under a mask", FilledBoxes, filled, FilledBoxesByHand),
    "Hugging Face data set": setup('`with_format("torch")`, raw text kept in the batch', Posts, posts, PostsByHand),
    "Hugging Face stream": setup(
        "shuffled by a buffer, ids from the batch", Posts, streamed, StreamedByHand, recorder={"sample_id": "id"}
    ),
    "a stream without ids": Setup(
        "an `IterableDataset` of tensors", Plain, lambda: DataLoader(Endless(), 5), refused="iterable dataset .*sample_id"
    ),
    "StatefulDataLoader": Setup("torchdata's loader, which can go on within an epoch", Plain, stateful, PlainByHand),
    "torch.compile": Setup(
        '`torch.compile(net, backend="aot_eager")`', Compiled, lambda: classes(n=15), CompiledByHand, trainer={"max_epochs": 1}
    ),
    "Muon": setup("a matrix update by Newton and Schulz", WithMuon, classes, WithMuonByHand),
    "Adafactor": setup("factored second moments", WithAdafactor, classes, WithAdafactorByHand),
    "L-BFGS": setup(
        "evaluates the loss several times in a step",
        SecondOrder,
        classes,
        refused="LBFGS takes the gradient at several parameters within a step",
    ),
    "everyday callbacks": setup(
        "`LearningRateMonitor`, `EarlyStopping`, `ModelCheckpoint`, `Timer`, `LambdaCallback`, accumulation that changes",
        Plain,
        classes,
        PlainByHand,
        callbacks=everyday,
        logger=CSVLogger,
        trainer={"enable_checkpointing": True, "max_epochs": 3},
    ),
    "learning-rate finder": setup(
        "`LearningRateFinder` trains a few steps first, and undoes them",
        Plain,
        classes,
        PlainByHand,
        callbacks=lambda: [pl.callbacks.LearningRateFinder(num_training_steps=6, attr_name="lr")],
    ),
    "SWA": setup(
        "`StochasticWeightAveraging`: another learning rate from its start, the average at the end",
        Plain,
        classes,
        PlainByHand,
        callbacks=lambda: [pl.callbacks.StochasticWeightAveraging(**SWA)],
        trainer={"max_epochs": 4},
        scores=False,
    ),
}
