"""Trainings that hooks and callbacks set otherwise from step to step, and layers that ask something of whoever replays them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from losses import Network, classes, setup
from torch import Tensor, nn
from torch.nn import functional as F
from wild import LeavesOut, Setup


class Annealed(Network):
    """The weight of a second term grows with the epochs, the temperature falls with the steps."""

    def prepare(self) -> None:
        self.weight, self.temperature, self.phase = 0.0, 2.0, "warm-up"

    def on_train_epoch_start(self) -> None:
        self.weight = np.interp(self.current_epoch, [0, 2], [0.0, 0.5])
        self.phase = "warm-up" if self.current_epoch < 1 else "main"

    def on_train_batch_end(self, *_: Any) -> None:
        self.temperature *= 0.8

    def losses(self, batch: Any) -> Tensor:
        logits = self.net(batch[0])
        cross_entropy = F.cross_entropy(logits / self.temperature, batch[1], reduction="none")
        smooth = logits.square().mean(1) if self.phase == "main" else logits.abs().mean(1)
        return cross_entropy + self.weight * smooth

    def loss(self, batch: Any) -> Tensor:
        return self.losses(batch).mean()


class AnnealedByHand(LeavesOut, Annealed):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.mean(self.losses(batch))


class Counting(Annealed):
    """A step that counts itself, for a warm-up of its loss, and keeps its losses."""

    def prepare(self) -> None:
        super().prepare()
        self.steps, self.seen = 0, []

    def losses(self, batch: Any) -> Tensor:
        warm_up = min(1.0, (self.steps + 1) / 4)
        losses = warm_up * super().losses(batch)
        if self.training:
            self.steps += 1
            self.seen.append(losses.detach().mean())
        return losses


class CountingByHand(LeavesOut, Counting):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.mean(self.losses(batch))


class Balancing(Annealed):
    """Divides its loss by a running mean of it."""

    running = 1.0

    def losses(self, batch: Any) -> Tensor:
        losses = super().losses(batch) / self.running
        self.running = 0.9 * self.running + 0.1 * float(losses.detach().mean())
        return losses


class CrossEntropy(Network):
    def losses(self, batch: Any) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1], reduction="none")

    def loss(self, batch: Any) -> Tensor:
        return self.losses(batch).mean()


class CrossEntropyByHand(LeavesOut, CrossEntropy):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.mean(self.losses(batch))


class MoreDropout(pl.Callback):
    """Raises the rate of dropout from epoch to epoch."""

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        pl_module.net[2].p = 0.3 * trainer.current_epoch


class Fourier(CrossEntropy):
    """Filters its features by frequency: complex weights as pairs of real ones, as in GFNet, behind a vector of odd length."""

    def prepare(self) -> None:
        self.scale = nn.Parameter(torch.ones(5))
        self.filters = nn.Parameter(torch.randn(4, 2, generator=torch.Generator().manual_seed(0)))
        self.net = nn.Linear(6, 3)

    def losses(self, batch: Any) -> Tensor:
        spectrum = torch.fft.rfft(batch[0]) * torch.view_as_complex(self.filters)
        filtered = torch.fft.irfft(spectrum, n=6)
        return F.cross_entropy(self.net(filtered * self.scale.mean()), batch[1], reduction="none")


class FourierByHand(LeavesOut, Fourier):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.mean(self.losses(batch))


class WritesToItsBatch(CrossEntropy):
    def losses(self, batch: Any) -> Tensor:
        batch[0].sub_(0.1).div_(2.0)
        return super().losses(batch)


class Scripted(CrossEntropy):
    def prepare(self) -> None:
        self.net[0] = torch.jit.script(self.net[0])


SETUPS: dict[str, Setup] = {
    "annealing": setup(
        "a hook of the epoch sets a loss's weight and a phase, one of the batch lowers a temperature: plain attributes",
        Annealed,
        classes,
        AnnealedByHand,
    ),
    "a step that counts": setup(
        "`self.steps += 1` in `training_step`, for a warm-up of the loss; beside it what hooks anneal",
        Counting,
        classes,
        CountingByHand,
    ),
    "annealing, accumulated": setup(
        "the same where two batches make a step, each under another temperature and count",
        Counting,
        classes,
        CountingByHand,
        trainer={"accumulate_grad_batches": 2, "max_epochs": 3},
    ),
    "a running mean of the loss": setup(
        "the loss is divided by a mean of itself over the steps so far",
        Balancing,
        classes,
        refused=r"training_step carries self\.running from one step to the next",
    ),
    "more and more dropout": setup(
        "a callback raises a dropout layer's `p` from epoch to epoch",
        CrossEntropy,
        classes,
        CrossEntropyByHand,
        callbacks=lambda: [MoreDropout()],
        trainer={"max_epochs": 3},
    ),
    "Fourier filters": setup("`view_as_complex` of a parameter, `torch.fft`", Fourier, classes, FourierByHand),
    "a step that writes to its batch": setup(
        "`batch[0].sub_(mean).div_(std)`, in place",
        WritesToItsBatch,
        classes,
        refused="training_step writes to its batch, to the tensor '0'.*out of place",
    ),
    "TorchScript": setup(
        "a layer made by `torch.jit.script`",
        Scripted,
        classes,
        refused="the layer 'net.0' is TorchScript.*leave torch.jit out",
    ),
}
