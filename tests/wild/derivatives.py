"""Losses that are made of gradients, and layers whose weights are made of others."""

from __future__ import annotations

from typing import Any

import torch
from losses import classes, numbers, setup
from schedules import CrossEntropy
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm
from wild import LeavesOut, Setup


class Equation(CrossEntropy):
    """How far a network is from solving a differential equation; Lightning validates without gradients, and so not this."""

    outputs = 1

    def prepare(self) -> None:
        self.net = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 1))

    def losses(self, batch: Any) -> Tensor:
        x = batch[0].detach().clone().requires_grad_()
        u = self.net(x)
        (slopes,) = torch.autograd.grad(u, x, torch.ones_like(u), create_graph=True)
        (curvature,) = torch.autograd.grad(slopes[:, 0].sum(), x, create_graph=True)
        return (curvature[:, 0] + u[:, 0] - batch[1][:, 0]).square()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """None."""


class EquationByHand(LeavesOut, Equation):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.mean(self.losses(batch))


class Adversarial(CrossEntropy):
    """Trains on samples moved up the slope of their own loss."""

    def prepare(self) -> None:
        self.net = nn.Sequential(nn.Linear(6, 12), nn.GELU(), nn.Linear(12, 3))

    def losses(self, batch: Any) -> Tensor:
        x, y = batch
        if self.training:
            x = x.clone().requires_grad_()
            (slope,) = torch.autograd.grad(F.cross_entropy(self.net(x), y), x)
            x = (x + 0.1 * slope.sign()).detach()
        return F.cross_entropy(self.net(x), y, reduction="none")


class AdversarialByHand(LeavesOut, Adversarial):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.mean(self.losses(batch))


class Normalised(CrossEntropy):
    """Convolutions under weight normalisation, as in a temporal convolutional network."""

    def prepare(self) -> None:
        first, second = weight_norm(nn.Conv1d(1, 4, 3, padding=2)), weight_norm(nn.Conv1d(4, 4, 3))
        self.net = nn.Sequential(
            nn.Unflatten(1, (1, 6)), first, nn.GELU(), nn.Dropout(0.1), second, nn.Flatten(), nn.Linear(24, 3)
        )


class NormalisedByHand(LeavesOut, Normalised):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.mean(self.losses(batch))


SETUPS: dict[str, Setup] = {
    "differential equation": setup(
        "the loss is made of derivatives in the features, by `torch.autograd.grad` (PINN)",
        Equation,
        numbers,
        EquationByHand,
        scores=False,
    ),
    "adversarial training": setup(
        "samples are moved by the sign of their own gradient first", Adversarial, classes, AdversarialByHand
    ),
    "weight normalisation": setup(
        "`parametrizations.weight_norm` of convolutions, dropout", Normalised, classes, NormalisedByHand
    ),
}
