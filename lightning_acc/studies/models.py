"""The studies' LightningModules."""

from __future__ import annotations

import itertools
from typing import Any, Literal

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.nn import functional

ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "tanh": nn.Tanh, "gelu": nn.GELU}


class Classifier(pl.LightningModule):
    """A multilayer perceptron, or softmax regression without hidden layers, trained by SGD on the mean cross-entropy.

    Of two classes the second alone has a logit, against 0 for the first: without hidden layers that is logistic regression.

    Args:
        n_features: numbers a sample has.
        n_classes: number of classes.
        hidden: width of each hidden layer.
        activation: ``relu``, ``tanh`` or ``gelu``. Estimators follow smooth activations more truly than ReLU.
        lr: learning rate.
        momentum: of SGD.
        weight_decay: of SGD.
    """

    def __init__(
        self,
        n_features: int,
        n_classes: int,
        hidden: tuple[int, ...] = (),
        activation: Literal["relu", "tanh", "gelu"] = "gelu",
        lr: float = 0.1,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        widths = [n_features, *hidden]
        layers: list[nn.Module] = []
        for inputs, outputs in itertools.pairwise(widths):
            layers += [nn.Linear(inputs, outputs), ACTIVATIONS[activation]()]
        self.net = nn.Sequential(*layers, nn.Linear(widths[-1], n_classes if n_classes > 2 else 1))
        self.sgd: dict[str, Any] = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, n_classes) of inputs (B, ...)."""
        return _against_zero(self.net(x.flatten(1)))

    def per_sample_loss(self, batch: Any) -> Tensor:
        """Cross-entropy of each sample, (B,)."""
        x, y = batch
        return functional.cross_entropy(self(x), y, reduction="none")

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Mean cross-entropy of the batch."""
        loss = self.per_sample_loss(batch).mean()
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Log mean cross-entropy and accuracy."""
        x, y = batch
        logits = self(x)
        self.log("val_loss", functional.cross_entropy(logits, y), prog_bar=True)
        self.log("val_accuracy", (logits.argmax(1) == y).float().mean(), prog_bar=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Plain SGD with the options given."""
        return torch.optim.SGD(self.parameters(), **self.sgd)


class ConvNet(Classifier):
    """A small convolutional network for grey images (1, 28, 28): two strided convolutions, one linear layer.

    Args:
        n_classes: number of classes.
        channels: of the two convolutions.
        activation: ``relu``, ``tanh`` or ``gelu``.
        lr: learning rate.
        momentum: of SGD.
        weight_decay: of SGD.
    """

    def __init__(
        self,
        n_classes: int = 10,
        channels: tuple[int, int] = (8, 16),
        activation: Literal["relu", "tanh", "gelu"] = "gelu",
        lr: float = 0.1,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(1, n_classes, lr=lr, momentum=momentum, weight_decay=weight_decay)
        self.save_hyperparameters()
        first, second = channels
        # Strided convolutions in place of max pooling, whose choice of a pixel no linearisation follows.
        self.net = nn.Sequential(
            nn.Conv2d(1, first, 5, stride=2, padding=2),
            ACTIVATIONS[activation](),
            nn.Conv2d(first, second, 5, stride=2, padding=2),
            ACTIVATIONS[activation](),
            nn.Flatten(),
            nn.Linear(second * 7 * 7, n_classes if n_classes > 2 else 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, n_classes) of images (B, 1, 28, 28)."""
        return _against_zero(self.net(x))


def _against_zero(logits: Tensor) -> Tensor:
    """A single logit (B, 1) as that of the second of two classes, (B, 2); more logits as they are."""
    return torch.cat([torch.zeros_like(logits), logits], -1) if logits.shape[-1] == 1 else logits
