"""What a GPU is worth: seconds of each method there, in plain trainings on the same card and in seconds of one CPU core.

    LIGHTNING_ACC_DATA=... python scripts/bench_gpu.py [mnist resnet9 minilm] [--smoke]

Full MNIST on a GELU network; 12 800 images of it on ResNet-9 (with GroupNorm); MiniLM fine-tuned on two newsgroups, with
dropout. Trained and scored on the GPU, or on the CPU with --smoke, which is small and shows that all of it runs. The seconds of
a CPU core are planned from a few steps (la.plan); a training that drew random numbers on the GPU is replayed nowhere else, and
has none. On one H200, with torch 2.11: full MNIST, recorded, takes 1.06 trainings, SGD-IE of all samples 0.52, acc-low-rank of
all 0.94; of 16 samples loo takes 0.23 and ACC-SGD-IE 0.36. Of MiniLM (64 posts, trained anew in 0.17 s) SGD-IE takes 1.2 s, loo
0.27 s a removal, ACC-SGD-IE 1.0 s. Steps so small leave a GPU idle.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset, TensorDataset

import lightning_acc as la
from lightning_acc.studies.data import MNISTDataModule
from lightning_acc.studies.models import Classifier

SOME = 16
"""Removals of the methods whose cost grows with them."""
METHODS = {"sgd-ie": None, "acc-sgd-ie": SOME, "loo": SOME, "acc-low-rank": None}
LEFT_OUT = {("resnet9", "acc-low-rank")}
"""torch has no batched second derivatives of GroupNorm: its directions are taken one after another."""


class ResNet9(pl.LightningModule):
    """Eight convolutions with two shortcuts, and a linear layer; GroupNorm keeps the samples of a batch apart."""

    def __init__(self, width: int = 64, lr: float = 0.02) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.first = nn.Sequential(_block(1, width), _block(width, 2 * width), nn.AvgPool2d(2))
        self.second = nn.Sequential(_block(2 * width, 2 * width), _block(2 * width, 2 * width))
        self.third = nn.Sequential(_block(2 * width, 4 * width), nn.AvgPool2d(2), _block(4 * width, 4 * width))
        self.fourth = nn.Sequential(_block(4 * width, 4 * width), _block(4 * width, 4 * width))
        self.last = nn.Linear(4 * width, 10)

    def per_sample_loss(self, batch: Any) -> Tensor:
        x = self.first(batch[0].reshape(-1, 1, 28, 28))
        x = self.third(x + self.second(x))
        x = (x + self.fourth(x)).mean((2, 3))
        return nn.functional.cross_entropy(self.last(x), batch[1], reduction="none")

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.per_sample_loss(batch).mean()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val", self.per_sample_loss(batch).mean())

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=self.hparams.lr, momentum=0.9)


def _block(n_in: int, n_out: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(n_in, n_out, 3, padding=1, bias=False), nn.GroupNorm(4, n_out), nn.GELU())


def mnist(smoke: bool, n_train: int = 60000) -> tuple[DataLoader[Any], DataLoader[Any]]:
    """Loaders of MNIST and of 1000 of its test images, or of noise."""
    size = 16 if smoke else 128
    if smoke:
        draw = torch.Generator().manual_seed(0)
        noise = TensorDataset(torch.rand(96, 784, generator=draw), torch.randint(0, 10, (96,), generator=draw))
        train, held_out = Subset(noise, range(64)), Subset(noise, range(64, 96))
        return DataLoader(train, size, shuffle=True), DataLoader(held_out, size)
    data = MNISTDataModule(n_train=n_train, n_val=1000, n_test=1, batch_size=size, val_from="test")
    data.setup()
    return data.train_dataloader(), data.val_dataloader()


def newsgroups(smoke: bool) -> tuple[DataLoader[Any], DataLoader[Any]]:
    """Loaders of posts as token ids."""
    import bench_minilm
    from transformers import AutoTokenizer, DataCollatorWithPadding

    collate = DataCollatorWithPadding(AutoTokenizer.from_pretrained(bench_minilm.minilm()))
    train, held_out = (bench_minilm.posts(split, 8 if smoke else 512, 8 if smoke else 64) for split in ("train", "test"))
    size = 4 if smoke else 16
    return DataLoader(train, size, shuffle=True, collate_fn=collate), DataLoader(held_out, size, collate_fn=collate)


def network(smoke: bool) -> pl.LightningModule:
    """784-128-10."""
    return Classifier(784, 10, (8 if smoke else 128,), activation="gelu", lr=0.05, momentum=0.9)


def resnet9(smoke: bool) -> pl.LightningModule:
    """Of 64 to 256 channels."""
    return ResNet9(width=4 if smoke else 64)


def minilm(smoke: bool) -> pl.LightningModule:
    """All of its 22.7M parameters."""
    import bench_minilm

    return bench_minilm.FineTuned(steps=4 if smoke else 64)


PROBLEMS: dict[str, tuple[Callable[[bool], pl.LightningModule], Callable[[bool], tuple[DataLoader[Any], DataLoader[Any]]]]] = {
    "mnist": (network, mnist),
    "resnet9": (resnet9, partial(mnist, n_train=12800)),
    "minilm": (minilm, newsgroups),
}


def train(name: str, smoke: bool, path: Path | None = None) -> pl.LightningModule:
    """Train once, recorded at ``path`` or as it is; the module."""
    pl.seed_everything(0)
    module, loaders = PROBLEMS[name][0](smoke), PROBLEMS[name][1](smoke)
    options: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = pl.Trainer(
        max_epochs=2,
        accelerator="cpu" if smoke else "gpu",
        devices=1,
        enable_model_summary=False,
        callbacks=[] if path is None else [la.TrajectoryRecorder(path)],
        **options,
    )
    trainer.fit(module, *loaders)
    return module


def seconds(do: Callable[[], Any]) -> float:
    """Of the clock, until the GPU is done too."""
    started = time.perf_counter()
    do()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started


def measure(name: str, smoke: bool, core: bool, folder: Path) -> None:
    """Print the rows of a problem."""
    train(name, True)  # imports and starts what there is to start
    plain = seconds(lambda: train(name, smoke))
    recorded = seconds(lambda: train(name, smoke, folder / name))
    run = la.Run(folder / name, module=PROBLEMS[name][0](smoke))
    print(f"{name}: {run.n_samples:,} samples, {run.n_steps:,} steps, {run.n_parameters:,} parameters", flush=True)
    print(f"  {'plain training':24s}{plain:9.1f} s\n  {'recorded':24s}{recorded:9.1f} s{recorded / plain:9.2f} trainings")
    print(f"  {run.audit()}", flush=True)
    options = {"device": "cpu" if smoke else "cuda", "ray_address": None, "check": 0, "save": False, "progress": False}
    some = range(2 if smoke else SOME)
    of_all, of_some = (on_a_core(run, removals) if core else {} for removals in (None, some))
    for method, most in METHODS.items():
        if (name, method) in LEFT_OUT:
            continue
        removals, on_core = (None, of_all) if most is None else (some, of_some)
        took = seconds(partial(la.score, run, method, removals, **options))
        ratio = f"{on_core[method] / took:9.2f} times a CPU core" if method in on_core else ""
        what = method if most is None else f"{method} of {len(some)}"
        print(f"  {what:24s}{took:9.1f} s{took / plain:9.2f} trainings{ratio}", flush=True)


def on_a_core(run: la.Run, removals: Any) -> dict[str, float]:
    """Seconds that each method takes one CPU core, from a few steps; empty where the run cannot be replayed there."""
    try:
        rows = la.plan(run, removals, device="cpu", ray_address=None, progress=False).table.to_pylist()
    except la.RequestError:
        return {}
    return {row["method"]: row["work_seconds"] for row in rows}


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("problems", nargs="*", metavar="problem", help=", ".join(PROBLEMS), default=[*PROBLEMS])
    parser.add_argument("--smoke", action="store_true", help="small, on the CPU")
    parser.add_argument("--gpu-alone", action="store_true", help="plan no seconds of a CPU core")
    given = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    if not given.smoke and not torch.cuda.is_available():
        parser.error("torch finds no GPU here: --smoke runs it small on the CPU")
    print("on one CPU core" if given.smoke else f"on one {torch.cuda.get_device_name()}")
    with tempfile.TemporaryDirectory() as folder:
        for name in given.problems:
            measure(name, given.smoke, not given.gpu_alone, Path(folder))


if __name__ == "__main__":
    main()
