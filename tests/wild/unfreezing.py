"""Trainings in which not every step moves every parameter: frozen at first, in turn, or left out by chance."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
import torch
from losses import Network, classes, setup
from pytorch_lightning.callbacks import BackboneFinetuning, BaseFinetuning
from torch import Tensor, nn
from torch.nn import functional as F
from wild import LeavesOut, Setup


class Transfer(Network):
    """A backbone that comes from elsewhere, and a new head."""

    def prepare(self) -> None:
        self.backbone = nn.Sequential(nn.Linear(6, 12), nn.LayerNorm(12), nn.GELU(), nn.Linear(12, 8), nn.GELU())
        self.net = nn.Sequential(nn.Dropout(0.2), nn.Linear(8, 3))

    def losses(self, batch: Any) -> Tensor:
        return F.cross_entropy(self.net(self.backbone(batch[0])), batch[1], reduction="none")

    def loss(self, batch: Any) -> Tensor:
        return F.cross_entropy(self.net(self.backbone(batch[0])), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)


class TransferByHand(LeavesOut, Transfer):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.mean(self.losses(batch))


class Momentum(Transfer):
    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(filter(lambda p: p.requires_grad, self.parameters()), lr=0.1, momentum=0.9, nesterov=True)


class MomentumByHand(TransferByHand, Momentum):
    pass


class InStages(BaseFinetuning):
    """The last layers of the backbone from epoch 1 on, all of them from epoch 2 on."""

    def freeze_before_training(self, pl_module: Any) -> None:
        self.freeze(pl_module.backbone)

    def finetune_function(self, pl_module: Any, epoch: int, optimizer: Any) -> None:
        stages = {1: pl_module.backbone[3:], 2: pl_module.backbone[:3]}
        if epoch in stages:
            self.unfreeze_and_add_param_group(stages[epoch], optimizer, lr=0.03 / epoch)


class ByHand(Transfer):
    """All parameters are the optimizer's from the start; the module unfreezes the backbone itself."""

    def prepare(self) -> None:
        super().prepare()
        self.backbone.requires_grad_(False)

    def on_train_epoch_start(self) -> None:
        if self.current_epoch == 1:
            self.backbone.requires_grad_(True)

    def configure_optimizers(self) -> Any:
        groups = [{"params": self.net.parameters()}, {"params": self.backbone.parameters(), "lr": 3e-3}]
        optimizer = torch.optim.AdamW(groups, lr=1e-2, weight_decay=0.1)
        return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 3)]


class ByHandByHand(TransferByHand, ByHand):
    pass


class InTurn(Transfer):
    """The backbone learns in one epoch, the head in the next."""

    def on_train_epoch_start(self) -> None:
        self.net.requires_grad_(self.current_epoch % 2 == 1)
        self.backbone.requires_grad_(self.current_epoch % 2 == 0)

    def on_train_epoch_end(self) -> None:
        self.requires_grad_(True)

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=1e-2, weight_decay=0.01)


class InTurnByHand(TransferByHand, InTurn):
    pass


class Switched(Transfer):
    """Each step goes through one of two branches, by chance; the other has no gradient then."""

    def prepare(self) -> None:
        super().prepare()
        self.other = nn.Linear(6, 8)

    def losses(self, batch: Any) -> Tensor:
        branch = self.other if self.training and torch.rand(()) < 0.4 else self.backbone
        return F.cross_entropy(self.net(branch(batch[0])), batch[1], reduction="none")

    def loss(self, batch: Any) -> Tensor:
        return self.losses(batch).mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-2, weight_decay=0.1)


class SwitchedByHand(TransferByHand, Switched):
    pass


class Alone(Transfer):
    def configure_optimizers(self) -> Any:
        return torch.optim.NAdam(self.net.parameters(), lr=1e-2)


class AloneByHand(TransferByHand, Alone):
    pass


class Later(pl.Callback):
    """Gives the optimizer the backbone, which was not frozen, in epoch 1."""

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        if trainer.current_epoch == 1:
            trainer.optimizers[0].add_param_group({"params": list(pl_module.backbone.parameters()), "lr": 3e-3})


THREE = {"max_epochs": 3}
SETUPS: dict[str, Setup] = {
    "backbone frozen at first": setup(
        "Lightning's `BackboneFinetuning`, AdamW with weight decay, clipping, dropout",
        Transfer,
        classes,
        TransferByHand,
        callbacks=lambda: [BackboneFinetuning(unfreeze_backbone_at_epoch=1, backbone_initial_ratio_lr=0.3)],
        trainer={**THREE, "gradient_clip_val": 0.5},
    ),
    "backbone in stages": setup(
        "a `BaseFinetuning` of one's own with two stages, SGD with Nesterov momentum",
        Momentum,
        classes,
        MomentumByHand,
        callbacks=lambda: [InStages()],
        trainer=THREE,
    ),
    "unfrozen by the module": setup(
        '`requires_grad_(True)` in `on_train_epoch_start`, two parameter groups, `frozen="trained-later"`',
        ByHand,
        classes,
        ByHandByHand,
        recorder={"frozen": "trained-later"},
        trainer=THREE,
    ),
    "in turn": setup(
        "backbone and head are trained in turn, `requires_grad_` by epoch, Adam with weight decay",
        InTurn,
        classes,
        InTurnByHand,
        recorder={"frozen": "trained-later"},
        trainer={"max_epochs": 4},
    ),
    "one of two branches": setup(
        "a step uses one branch or the other, by a random number; AdamW with weight decay", Switched, classes, SwitchedByHand
    ),
    "parameters that join later": setup(
        '`add_param_group` in a callback, NAdam, accumulation, `frozen="trained-later"`',
        Alone,
        classes,
        AloneByHand,
        callbacks=lambda: [Later()],
        recorder={"frozen": "trained-later"},
        trainer={**THREE, "accumulate_grad_batches": 2},
    ),
}
