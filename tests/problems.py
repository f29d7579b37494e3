"""Shared small problems: modules, data sets, and a recorded Lightning training of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import lightly  # noqa: F401
import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

import lightning_acc as la
from lightning_acc.core.queries import moments
from lightning_acc.core.replay import Replay
from lightning_acc.methods.method import Question

N, FEATURES, CLASSES = 24, 5, 3


class Net(pl.LightningModule):
    """A small network; ``loss`` is ``squared`` or ``cross-entropy``."""

    def __init__(
        self,
        hidden: int = 0,
        loss: str = "cross-entropy",
        activation: str = "tanh",
        dropout: float = 0.0,
        optimizer: dict[str, Any] | None = None,
        decay_lr: float = 1.0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        outputs = CLASSES if loss == "cross-entropy" else 1
        functions = {"tanh": nn.Tanh, "gelu": nn.GELU, "relu": nn.ReLU}
        layers = [nn.Linear(FEATURES, hidden), functions[activation](), nn.Dropout(dropout)] if hidden else []
        self.net = nn.Sequential(*layers, nn.Linear(hidden or FEATURES, outputs))
        self.loss = loss
        options = {"lr": 0.2, **(optimizer or {})}
        self.optimizer_class = getattr(torch.optim, options.pop("class", "SGD"))
        self.options = options
        self.decay_lr = decay_lr

    def per_sample_loss(self, batch: Any) -> Tensor:
        x, y = batch["x"] if isinstance(batch, dict) else batch[0], batch["y"] if isinstance(batch, dict) else batch[1]
        out = self.net(x)
        if self.loss == "squared":
            return (out[:, 0] - y) ** 2
        return nn.functional.cross_entropy(out, y, reduction="none")

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.per_sample_loss(batch).mean()
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val", self.per_sample_loss(batch).mean())

    def configure_optimizers(self) -> Any:
        optimizer = self.optimizer_class(self.parameters(), **self.options)
        return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, self.decay_lr)]


class Noting(Net):
    """Notes on how many threads its losses are computed."""

    seen: ClassVar[list[int]] = []

    def per_sample_loss(self, batch: Any) -> torch.Tensor:
        self.seen.append(torch.get_num_threads())
        return super().per_sample_loss(batch)


class Weighted(Net):
    """Multiplies each sample's loss with the weight a training batch carries, so that retraining can leave samples out."""

    def per_sample_loss(self, batch: Any) -> Tensor:
        losses = super().per_sample_loss(batch)
        return losses * batch[2] if len(batch) > 2 else losses


class SharedNoise(Net):
    """Noise that all rows of a batch share."""

    def per_sample_loss(self, batch: Any) -> Tensor:
        losses = super().per_sample_loss(batch)
        return losses * (1 + 0.1 * torch.rand(6, dtype=losses.dtype)[self.training * 5])


class Normalised(Net):
    def __init__(self) -> None:
        super().__init__()
        self.net.insert(0, nn.BatchNorm1d(FEATURES))


class StepOnly(pl.LightningModule):
    """Only a ``training_step``, with no arguments beyond the batch, returning a dict."""

    def __init__(self, reduction: str = "mean", penalty: float = 0.0, contrast: bool = False) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.layer = nn.Linear(FEATURES, CLASSES)
        self.options = {"reduction": reduction, "penalty": penalty, "contrast": contrast}

    def training_step(self, batch: Any) -> dict[str, Tensor]:
        x, y = batch
        logits = self.layer(x)
        if self.options["contrast"]:
            logits = logits - logits.mean(0)
        loss = nn.functional.cross_entropy(logits, y, reduction=self.options["reduction"])
        loss = loss + self.options["penalty"] * self.layer.weight.square().sum()
        self.log("train", loss)
        return {"loss": loss}

    def validation_step(self, batch: Any) -> None:
        self.log("val", nn.functional.cross_entropy(self.layer(batch[0]), batch[1]))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.01)


def data(loss: str = "cross-entropy", n: int = N, seed: int = 0, dtype: torch.dtype = torch.float64) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, FEATURES, generator=generator, dtype=dtype)
    if loss == "squared":
        y = x @ torch.randn(FEATURES, generator=generator, dtype=dtype) + 0.5 * torch.randn(n, generator=generator, dtype=dtype)
    else:
        y = torch.randint(0, CLASSES, (n,), generator=generator)
    return TensorDataset(x, y)


class Data(pl.LightningDataModule):
    """The shared data as a data module, for what is known of samples."""

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(data(), 7, shuffle=True)

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(data(n=16, seed=9), 16)


def trainer(*callbacks: Any, precision: str = "64-true", **options: Any) -> pl.Trainer:
    defaults = {
        "max_epochs": 3,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "accelerator": "cpu",
        "devices": 1,
        "precision": precision,
        "num_sanity_val_steps": 0,
    }
    return pl.Trainer(callbacks=list(callbacks), **{**defaults, **options})


def record(
    path: Path,
    module: pl.LightningModule,
    train: Dataset[Any] | DataLoader[Any] | None = None,
    *,
    batch_size: int = 7,
    seed: int = 1,
    callbacks: tuple[Any, ...] = (),
    validation: bool = True,
    recorder: dict[str, Any] | None = None,
    **options: Any,
) -> la.Run:
    """Train ``module`` with the recorder and open the run; the module keeps its final weights."""
    fit(
        module,
        train,
        la.TrajectoryRecorder(path, **(recorder or {})),
        *callbacks,
        batch_size=batch_size,
        seed=seed,
        validation=validation,
        **options,
    )
    return la.Run(path)


def fit(
    module: pl.LightningModule,
    train: Any,
    *callbacks: Any,
    batch_size: int = 7,
    seed: int = 1,
    validation: bool = True,
    ckpt_path: Path | None = None,
    **options: Any,
) -> Tensor:
    """Train as ``record`` does, and return the final flat parameters."""
    loss = getattr(module, "loss", "cross-entropy")
    dtype = torch.float32 if options.get("precision") == "32-true" else torch.float64
    train = data(loss, dtype=dtype) if train is None else train
    loader = train if isinstance(train, DataLoader) else DataLoader(train, batch_size, shuffle=True)
    held_out = DataLoader(data(loss, n=16, seed=9, dtype=dtype), 16) if validation else None
    pl.seed_everything(seed)
    trainer(*callbacks, **options).fit(module, loader, held_out, ckpt_path=ckpt_path)
    return flat(module)


def flat(module: nn.Module) -> Tensor:
    return torch.cat([p.detach().reshape(-1) for p in module.parameters() if p.requires_grad])


def make(seed: int = 0, **arguments: Any) -> Net:
    torch.manual_seed(seed)
    return Net(**arguments).double()


def replay_by_hand(run: la.Run, module: Net, weight_of: dict[int, float]) -> Tensor:
    """The recorded training again, in plain torch: torch.optim and a loop, with the weights of some samples scaled.

    Shares nothing with the package but the record. Returns the final flat parameters (p,).
    """
    with torch.no_grad():
        start, position = run.parameters(0).double(), 0
        for p in module.parameters():
            p.copy_(start[position : position + p.numel()].view_as(p))
            position += p.numel()
    optimizer = torch.optim.SGD(module.parameters(), **module.options)
    for t, step in enumerate(run.steps):
        (leaves,) = run.batches(t)
        scale = torch.tensor([weight_of.get(i, 1.0) for i in step.sample_ids.tolist()], dtype=torch.float64)
        for group, recorded in zip(optimizer.param_groups, step.groups, strict=True):
            group["lr"] = recorded["lr"]
        optimizer.zero_grad()
        losses = module.per_sample_loss(
            (leaves["0"].double(), leaves["1"].double() if module.loss == "squared" else leaves["1"])
        )
        (step.weights * scale * losses).sum().backward()
        optimizer.step()
    return flat(module)


def weighing(replay: Replay, sample: int, weight: float) -> Tensor:
    """The final parameters (p,) of the recorded run with the loss of one sample times ``weight``."""
    state = replay.initial
    for t in range(len(replay)):
        step = replay.step(t)
        step.weights = torch.where(step.sample_ids == sample, weight * step.weights, step.weights)
        state = step(state)
    return state[0]


def asked(run: la.Run, query: str = "val", at: Any = "end", memory: int = 2**30, **options: Any) -> Question:
    """A question with the linear readout, as sweeps are asked it."""
    return Question(
        run.query(query), moments.find(run, at), **{"readout": "linear", "keep_shifts": False, **options}, memory=memory
    )
