"""What the recorder cannot describe exactly is refused before the first step, with the reason and the remedy."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from problems import N, Net, Normalised, StepOnly, data, flat, make, record, trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

import lightning_acc as la
from lightning_acc.recorder import RecordingRefused


class Contrastive(Net):
    """Per-sample losses that add up to the training loss, but see the other samples."""

    def per_sample_loss(self, batch: Any) -> Tensor:
        out = self.net(batch[0])
        return nn.functional.cross_entropy(out @ out.T, torch.arange(len(out)), reduction="none")


class WrongSum(Net):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step(batch, batch_idx) * 1.01


class Penalised(Net):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step(batch, batch_idx) + 1e-3 * sum(p.square().sum() for p in self.parameters())


class Peeking(StepOnly):
    """A step that needs more than a batch."""

    def training_step(self, batch: Any) -> dict[str, Tensor]:
        return {"loss": super().training_step(batch)["loss"] * (1 + 0 * len(self.trainer.train_dataloader))}


class Manual(Net):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False


class Foreign(torch.optim.SGD):
    """An optimizer from elsewhere."""


class Unknown(Net):
    def configure_optimizers(self) -> Any:
        return Foreign(self.parameters(), lr=0.1)


class Clipping(Net):
    def on_after_backward(self) -> None:
        for p in self.parameters():
            p.grad.clamp_(-0.01, 0.01)


class Moving(pl.Callback):
    """Moves a weight behind everybody's back, from the first step on."""

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        with torch.no_grad():
            next(pl_module.parameters()).mul_(0.999)


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Any:
        yield from zip(*data().tensors, strict=True)


class Drawing(Net):
    """Draws random numbers in its training step."""

    source: Any = staticmethod(np.random.rand)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step(batch, batch_idx) * (1 + 1e-12 * self.source())


class DrawingInPython(Drawing):
    source = staticmethod(random.random)


REFUSED: dict[str, tuple[Any, dict[str, Any], str]] = {
    "coupled step": (lambda: StepOnly(contrast=True), {}, r"samples of a batch are coupled.*cosine.*mean over samples"),
    "coupled losses": (Contrastive, {}, r"samples of a batch are coupled.*cosine"),
    "batch norm": (Normalised, {}, r"'net.0' is a BatchNorm1d in training mode.*GroupNorm"),
    "NumPy's random numbers": (Drawing, {}, r"random numbers from Python or NumPy"),
    "Python's random numbers": (DrawingInPython, {}, r"random numbers from Python or NumPy"),
    "penalty beside per_sample_loss": (Penalised, {}, r"gradients differ by .* %.*weight_decay"),
    "wrong sum": (WrongSum, {}, r"differ by 0?\.?\d.* %"),
    "neither": (Peeking, {}, r"^training_step reads self.trainer.train_dataloader, which no replay has: read it in"),
    "manual": (Manual, {}, r"automatic_optimization=False"),
    "optimizer": (Unknown, {}, r"Foreign is not known: use one of torch.optim \(.*Adam, AdamW.*register_optimizer"),
    "hook": (Clipping, {}, r"gradients differ by .* overrides on_after_backward, where this may come from"),
    "callback": (Net, {"callbacks": (Moving(),)}, r"Step 0 moved the parameters otherwise"),
    "iterable": (Net, {"train": DataLoader(Stream(), 5)}, r"iterable dataset .*map-style"),
    "out of order": (Net, {"train": DataLoader(data(), 5, num_workers=2, in_order=False)}, r"in_order=False"),
}


class ByEpoch(Net):
    """Weighs the loss by the epoch, as an annealed term does."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step(batch, batch_idx) * (1 + self.current_epoch)


class Shrinking(pl.Callback):
    """Shrinks the parameters at the end of an epoch."""

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        with torch.no_grad():
            next(pl_module.parameters()).mul_(0.9)


LATE: dict[str, tuple[Any, tuple[Any, ...], str]] = {
    "loss by the epoch": (
        ByEpoch,
        (),
        r"has become another .* step 4 their gradients differ by 50 %.*let per_sample_loss.*change",
    ),
    "callback at the end of an epoch": (Net, (Shrinking(),), r"Step 3 moved the parameters otherwise"),
}


@pytest.mark.parametrize("case", LATE)
def test_what_begins_later_is_refused_when_it_is_met(tmp_path: Path, case: str) -> None:
    make_module, callbacks, message = LATE[case]
    with pytest.raises(RecordingRefused, match=message):
        record(tmp_path / "run", make_module().double(), callbacks=callbacks)
    with pytest.raises(la.RunError):
        la.Run(tmp_path / "run")


class Posts(Dataset[Any]):
    """Samples as dicts, with something beside the tensors of each batch."""

    def __init__(self, beside: Any) -> None:
        self.beside = beside

    def __len__(self) -> int:
        return N

    def __getitem__(self, i: int) -> Any:
        x, y = data()[i]
        return {"x": x, "y": y}

    def together(self, samples: list[Any]) -> Any:
        return {**torch.utils.data.default_collate(samples), **self.beside(len(samples))}


@pytest.mark.parametrize(
    ("beside", "message"),
    [
        (lambda n: {"part": None if n == 7 else torch.ones(n)}, "The batch of step 3 is built otherwise.*: 'part' is a tensor"),
        (lambda n: {"part": torch.ones(2) if n == 7 else 2 * torch.ones(2)}, "The tensor 'part' has no row a sample.* step 3"),
        (lambda n: {"part": {str(n): n}}, "The batch of step 3 is built otherwise.*: 'part' holds 3 and not 7"),
    ],
)
def test_what_differs_from_batch_to_batch_and_belongs_to_no_sample(tmp_path: Path, beside: Any, message: str) -> None:
    posts = Posts(beside)
    with pytest.raises(la.RunError, match=message):
        record(tmp_path / "run", make(), DataLoader(posts, 7, collate_fn=posts.together))


@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method. is deprecated")
@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_exact_is_refused_before_the_first_step(tmp_path: Path, case: str) -> None:
    make_module, options, message = REFUSED[case]
    module = make_module().double()
    start = flat(module)
    with pytest.raises(RecordingRefused, match=f"(?s){message}") as refusal:
        record(tmp_path / "run", module, **options)
    assert "\n" not in str(refusal.value)
    if case != "callback":
        assert torch.equal(flat(module), start)
    with pytest.raises(la.RunError):
        la.Run(tmp_path / "run")


def test_several_loaders_are_refused(tmp_path: Path) -> None:
    loaders = [DataLoader(data(), 6), DataLoader(data(), 6)]
    with pytest.raises(RecordingRefused, match="2 training loaders"):
        trainer(la.TrajectoryRecorder(tmp_path / "run")).fit(make(), loaders)
