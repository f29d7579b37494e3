"""Do verdicts hold? Six runs whose every sample is retrained without; then the check of 32 and 16 removals is drawn 20 times.

    python scripts/study_verdicts.py

The interval a verdict gives is held against the Spearman correlation over all samples, and its word too: ``faithful`` where
that is below 0.75 is wrong, and so is ``unreliable`` where it is above 0.9. Needs MNIST and Adult, from the Hub or by
LIGHTNING_ACC_DATA. Writes its table into scripts/study/README.md; some ten minutes on one core.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from sklearn.datasets import load_breast_cancer
from study_figures import into_readme
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_acc as la
from lightning_acc.scoring.trust.check import SIZES, draw
from lightning_acc.scoring.trust.figures import spearman
from lightning_acc.scoring.trust.verdict import FAITHFUL, UNRELIABLE, judge
from lightning_acc.studies.data import AdultDataModule, MNISTDataModule

N, DRAWS = 240, 20
METHODS = ("acc-sgd-ie", "sgd-ie", "tracin")
BELOW, ABOVE = 0.75, 0.9


class Module(pl.LightningModule):
    """A network made by ``make``, on the mean cross-entropy, by an optimizer of torch."""

    def __init__(self, make: Callable[[], nn.Module], optimizer: str, **options: float) -> None:
        super().__init__()
        self.net, self.optimizer, self.options = make(), optimizer, options

    def per_sample_loss(self, batch: Any) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1], reduction="none")

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.per_sample_loss(batch).mean()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val", self.per_sample_loss(batch).mean())

    def configure_optimizers(self) -> Any:
        return getattr(torch.optim, self.optimizer)(self.parameters(), **self.options)


class Pooled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1)


def mlp(inputs: int, classes: int, activation: type[nn.Module], norm: bool = False) -> nn.Module:
    between: list[nn.Module] = [nn.BatchNorm1d(24)] if norm else []
    return nn.Sequential(nn.Flatten(), nn.Linear(inputs, 24), *between, activation(), nn.Linear(24, classes))


def transformer() -> nn.Module:
    """Reads the 28 rows of an image as words."""
    layer = nn.TransformerEncoderLayer(24, 2, 48, dropout=0.1, activation="gelu", batch_first=True)
    encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
    return nn.Sequential(nn.Flatten(), nn.Unflatten(1, (28, 28)), nn.Linear(28, 24), encoder, Pooled(), nn.Linear(24, 10))


def mnist() -> tuple[TensorDataset, TensorDataset]:
    return _of(MNISTDataModule(n_train=N, n_val=500, label_noise=0.1))


def adult() -> tuple[TensorDataset, TensorDataset]:
    return _of(AdultDataModule(n_train=N, n_val=500, label_noise=0.1))


def _of(data: Any) -> tuple[TensorDataset, TensorDataset]:
    data.setup("fit")
    return tuple(  # type: ignore[return-value]
        TensorDataset(torch.from_numpy(s.features), torch.from_numpy(s.labels))
        for s in (data.splits["train"], data.splits["val"])
    )


def cancer() -> tuple[TensorDataset, TensorDataset]:
    x, y = (torch.from_numpy(part) for part in load_breast_cancer(return_X_y=True))
    x = ((x - x.mean(0)) / x.std(0)).float()
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    return TensorDataset(x[order[:N]], y[order[:N]]), TensorDataset(x[order[N:]], y[order[N:]])


RUNS: dict[str, tuple[Callable[[], Any], Callable[[], nn.Module], dict[str, Any], int]] = {
    "MNIST, ReLU, SGD": (mnist, lambda: mlp(784, 10, nn.ReLU), {"optimizer": "SGD", "lr": 0.1, "momentum": 0.9}, 8),
    "MNIST, GELU, AdamW": (mnist, lambda: mlp(784, 10, nn.GELU), {"optimizer": "AdamW", "lr": 3e-3}, 8),
    "Adult, ReLU, AdamW": (adult, lambda: mlp(108, 2, nn.ReLU), {"optimizer": "AdamW", "lr": 1e-2}, 10),
    "breast cancer, GELU, SGD": (cancer, lambda: mlp(30, 2, nn.GELU), {"optimizer": "SGD", "lr": 0.1, "momentum": 0.9}, 8),
    "MNIST, transformer, AdamW": (mnist, transformer, {"optimizer": "AdamW", "lr": 3e-3}, 6),
    "MNIST, BatchNorm, SGD": (mnist, lambda: mlp(784, 10, nn.ReLU, norm=True), {"optimizer": "SGD", "lr": 0.05}, 6),
}
"""Data, network, optimizer and epochs of each run."""


def record(name: str, directory: str) -> la.Run:
    data, make, options, epochs = RUNS[name]
    train, val = data()
    pl.seed_everything(0, verbose=False)
    if name.startswith("Adult"):
        inputs = train.tensors[0].flatten(1).shape[1]
        make = lambda: mlp(inputs, 2, nn.ReLU)  # noqa: E731
    module = Module(make, **options)
    trainer = pl.Trainer(
        max_epochs=epochs,
        callbacks=[la.TrajectoryRecorder(directory, batch_norm="keep-batch-statistics")],
        **dict.fromkeys(["logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"], False),
        accelerator="cpu",
        num_sanity_val_steps=0,
    )
    trainer.fit(module, DataLoader(train, 20, shuffle=True), DataLoader(val, 500))
    return la.Run(directory, module=module)


def main() -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    lines = [
        "| run | estimate | Spearman over all | interval covers it, of 20 draws | words given | wrong words |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    covered = wrong = total = 0
    for name in RUNS:
        with tempfile.TemporaryDirectory() as directory:
            run = record(name, directory)
            truth = la.score(run, "loo", ray_address=None, save=False, check=0).by_removal()
            for method in METHODS:
                scores = la.score(run, method, ray_address=None, save=False, check=0)
                estimates = scores.by_removal("estimate")
                over_all = spearman(scores.estimates, torch.tensor([truth[r] for r in scores.removals]).numpy())
                verdicts = [judge(estimates, truth, *draw(scores, SIZES[0], seed), seed=seed) for seed in range(DRAWS)]
                covers = sum(v.spearman_low <= over_all <= v.spearman_high for v in verdicts)  # type: ignore[operator]
                bad = sum(
                    (v.word == FAITHFUL and over_all < BELOW) or (v.word == UNRELIABLE and over_all > ABOVE) for v in verdicts
                )
                words = [v.word for v in verdicts]
                counts = ", ".join(f"{word} {words.count(word)}" for word in dict.fromkeys(words))
                lines.append(f"| {name} | `{method}` | {over_all:.2f} | {covers} | {counts} | {bad} |")
                print(lines[-1], flush=True)
                covered, wrong, total = covered + covers, wrong + bad, total + DRAWS
    lines += [
        "",
        f"Of {total} verdicts {covered} ({covered / total:.0%}) hold the correlation in their interval, {wrong} are wrong.",
    ]
    print(lines[-1])
    place = Path(__file__).parent / "study" / "README.md"
    if "<!-- verdicts:" in place.read_text():
        into_readme("verdicts", lines)


if __name__ == "__main__":
    main()
