"""What can go wrong with a score, in four pictures of small recorded runs, and what to do about each.

    python scripts/what_can_go_wrong.py [FOLDER]

It trains, records, scores and retrains (two minutes on two cores), and writes what-can-go-wrong.md and its pictures, by
default into scripts/guide. All figures in the text are read off these runs.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pytorch_lightning as pl
import torch
from scipy.stats import spearmanr
from torch import nn
from torch.utils.data import DataLoader

import lightning_acc as la
from lightning_acc.studies.data import DigitsDataModule
from lightning_acc.studies.models import Classifier

plt.switch_backend("Agg")
mpl.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "lightning_acc", "font.size": 9, "axes.spines.top": False})
mpl.rcParams.update({"axes.spines.right": False, "figure.constrained_layout.use": True})
N, BATCH, EPOCHS, HIDDEN, LR = 200, 25, 20, 16, 0.3
SIZES = (1, 2, 4, 8, 16)
"""Of groups: how many samples of one class are removed as one."""
LEFT_OUT = 40
"""Samples that are really left out of their batches, of the network with batch normalisation."""
BLUE, ORANGE, GREY = "#0b6e99", "#d9730d", "#9b9a97"
HERE = Path(__file__).parent / "guide"


class Normalised(Classifier):
    """A classifier with batch normalisation before its activation."""

    def __init__(self, n_features: int, n_classes: int, hidden: tuple[int, ...], lr: float) -> None:
        super().__init__(n_features, n_classes, hidden, lr=lr)
        self.net.insert(1, nn.BatchNorm1d(hidden[0]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=HERE)
    write(parser.parse_args().folder)


def write(folder: Path) -> dict[str, float]:
    """Write the page and its pictures; returns the figures in its text."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)  # small products on several threads wait for each other
    with tempfile.TemporaryDirectory() as runs:
        smooth, kinked = (record(Path(runs, kind), activation=kind)[0] for kind in ("gelu", "relu"))
        figures = {
            **activations(folder, smooth, kinked),
            **groups(folder, smooth),
            **end_of_run(folder, kinked),
            **batch_norm(folder, Path(runs, "normalised")),
        }
    (folder / "what-can-go-wrong.md").write_text(TEXT.format(n=N, epochs=EPOCHS, **figures), encoding="utf-8")
    return figures


def data() -> DigitsDataModule:
    return DigitsDataModule(n_train=N, batch_size=BATCH, label_noise=0.1)


def record(path: Path, module: Any = None, activation: Any = "gelu", **options: Any) -> tuple[la.Run, Any, float]:
    """A small training of digits, recorded in double precision; the module as it was before, and the validation loss after."""
    pl.seed_everything(0)
    module = module or Classifier(64, 10, (HIDDEN,), activation, lr=LR)
    before = copy.deepcopy(module)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    callbacks: Any = [la.TrajectoryRecorder(path, **options)]
    trainer = pl.Trainer(max_epochs=EPOCHS, accelerator="cpu", precision="64-true", callbacks=callbacks, **quiet)
    trainer.fit(module, data())
    return la.Run(path, module=module), before, float(trainer.callback_metrics["val_loss"])


def scored(run: la.Run, method: str, removals: Any = None, at: Any = "end") -> np.ndarray:
    """What a method says, unchecked, so that no truth stands among the estimates."""
    return la.score(run, method, removals, at=at, ray_address=None, check=0, progress=False).estimates


def rank_correlation(a: np.ndarray, b: np.ndarray) -> float:
    return float(spearmanr(a, b).statistic)


def against_truth(axes: Any, truth: np.ndarray, estimate: np.ndarray, title: str, names: tuple[str, str]) -> float:
    """A scatter plot with the line on which both are equal; returns their rank correlation."""
    rho = rank_correlation(truth, estimate)
    ends = np.quantile(np.r_[truth, estimate], [0.002, 0.998])  # a few explode, and would hide the others
    axes.plot(ends, ends, color=GREY, linewidth=1, zorder=0)
    axes.scatter(truth, estimate, s=8, color=BLUE, linewidths=0, alpha=0.7)
    margin = 0.05 * (ends[1] - ends[0])
    axes.set(title=f"{title}: Spearman {rho:.2f}", xlabel=names[0], ylabel=names[1])
    axes.set(xlim=(ends[0] - margin, ends[1] + margin), ylim=(ends[0] - margin, ends[1] + margin))
    return rho


def save(figure: Any, folder: Path, name: str) -> None:
    figure.savefig(folder / f"{name}.svg", metadata={"Date": None})
    plt.close(figure)


def activations(folder: Path, smooth: la.Run, kinked: la.Run) -> dict[str, float]:
    figure, panels = plt.subplots(1, 2, figsize=(7.5, 3.6))
    names = ("retrained without (loo)", "acc-sgd-ie")
    rhos = [
        against_truth(axes, scored(run, "loo"), scored(run, "acc-sgd-ie"), title, names)
        for axes, run, title in zip(panels, (smooth, kinked), ("GELU", "ReLU"), strict=True)
    ]
    save(figure, folder, "relu")
    return {"gelu": rhos[0], "relu": rhos[1]}


def groups(folder: Path, run: la.Run) -> dict[str, float]:
    labels = np.array(run.sample_info()["label"].to_pylist())
    by_class = [np.flatnonzero(labels == one) for one in sorted(set(labels))]
    smallest = min(map(len, by_class))
    sizes = [*(size for size in SIZES if size < smallest), smallest]
    estimates: dict[str, list[float]] = {"sgd-ie": [], "acc-sgd-ie": []}
    for size in sizes:
        removals = [members[:size].tolist() for members in by_class]
        truth = scored(run, "loo", removals)
        for method, errors in estimates.items():
            errors.append(float(np.median(np.abs(scored(run, method, removals) - truth) / np.abs(truth))))
    figure, axes = plt.subplots(figsize=(5, 3.4))
    shares = [100 * size / run.n_samples for size in sizes]
    for (method, errors), colour in zip(estimates.items(), (ORANGE, BLUE), strict=True):
        axes.plot(shares, errors, marker="o", color=colour, label=method)
    axes.axvline(2, color=GREY, linestyle=":", linewidth=1)
    axes.set(xscale="log", yscale="log", xlabel="removed as one, % of the samples, all of one class")
    axes.set(ylabel="error, as a multiple of the truth (median)")
    axes.set_xticks(shares, [f"{share:g}" for share in shares])
    axes.yaxis.set_major_formatter("{x:g}")
    axes.minorticks_off()
    axes.legend(frameon=False)
    save(figure, folder, "groups")
    return {
        "single_error": estimates["acc-sgd-ie"][0],
        "group_error": estimates["acc-sgd-ie"][-1],
        "group_error_sgd": estimates["sgd-ie"][-1],
        "group_size": float(sizes[-1]),
    }


def end_of_run(folder: Path, run: la.Run) -> dict[str, float]:
    figure, panels = plt.subplots(1, 2, figsize=(7.5, 3.6))
    rhos = [
        against_truth(axes, scored(run, "loo", at=at), scored(run, "sgd-ie", at=at), f"at {at}", ("loo", "sgd-ie"))
        for axes, at in zip(panels, ("end", "along"), strict=True)
    ]
    panels[0].set_title(f"at the end: Spearman {rhos[0]:.2f}")
    panels[1].set_title(f"along the run: Spearman {rhos[1]:.2f}")
    save(figure, folder, "end-of-run")
    return {"end": rhos[0], "along": rhos[1]}


def batch_norm(folder: Path, path: Path) -> dict[str, float]:
    pl.seed_everything(0)
    run, before, recorded = record(path, Normalised(64, 10, (HIDDEN,), LR), batch_norm="keep-batch-statistics")
    samples = list(range(0, N, max(1, N // LEFT_OUT)))[:LEFT_OUT]
    kept = scored(run, "loo", samples)
    trainings = trained_without(run, before, [None, *samples])
    assert abs(trainings[0] - recorded) < 1e-6 * recorded  # with all samples it is the training that was recorded
    truth = np.array(trainings[1:]) - trainings[0]
    figure, axes = plt.subplots(figsize=(3.9, 3.6))
    rho = against_truth(axes, truth, kept, "BatchNorm", ("really left out of its batches", "loo, statistics kept"))
    save(figure, folder, "batch-norm")
    return {"batch_norm": rho}


def trained_without(run: la.Run, before: Any, samples: list[int | None]) -> list[float]:
    """Validation losses of the same training, without one sample each: not in its batches, nor in their statistics."""
    source = data()
    source.setup("fit")
    images, labels = next(iter(DataLoader(source.train_dataloader().dataset, batch_size=N)))
    batches = [step.sample_ids.tolist() for step in run.steps]
    losses = []
    for sample in samples:
        module = copy.deepcopy(before).double().train()
        optimizer = module.configure_optimizers()
        for batch in batches:
            ids = torch.tensor([i for i in batch if i != sample])
            optimizer.zero_grad()
            (module.per_sample_loss((images[ids].double(), labels[ids])).sum() / len(batch)).backward()
            optimizer.step()
        module.eval()
        with torch.no_grad():
            values = [module.per_sample_loss((x.double(), y)) for x, y in source.val_dataloader()]
        losses.append(float(torch.cat(values).mean()))
    return losses


TEXT = """# What can go wrong

A score says what *this run* would have ended with without a sample. `loo` finds out by training again, and is right by
definition. The estimates follow straight lines instead ([how they work](../../lightning_acc/methods/__init__.py)), and there
are places that no line reaches. Here are four, each seen in small runs of handwritten digits ({n} images, {epochs} epochs) by
`python scripts/what_can_go_wrong.py`, which also wrote the figures into this text.

You do not have to know beforehand: every table of estimates is held against retraining when it is made, and its
`verdict` says *faithful*, *rough* or *unreliable*, and what would help.

## Kinks: ReLU

![ACC-SGD-IE against retraining, for GELU and for ReLU](relu.svg)

The same training, once with GELU (Spearman {gelu:.2f} with retraining), once with ReLU ({relu:.2f}). Without a sample a few
units cross their kink at other steps, from there on the gradient is another one, and a line drawn at the recorded parameters
does not know. **What to do:** use a smooth activation where you can choose; read the scores along the run (below); retrain
without the samples that you act on: `--confirm top:50`.

## Groups

![Error of the estimates against the size of the group](groups.svg)

The more is removed, the farther the run goes from the recorded one, and all of a class is the worst choice: nothing holds the
parameters back. Removing single samples `acc-sgd-ie` is off by {single_error:.2g} times the truth (in the median), removing
{group_size:.0f} of one class by {group_error:.2g} times, `sgd-ie` by {group_error_sgd:.2g} times.
**What to do:** nothing. Groups of 2 % of the samples (the dotted line) or more are retrained without, or refused with the
price; only `check=0` gives what is drawn here.

## The end of a run

![SGD-IE against retraining, at the end and along the run](end-of-run.svg)

Nothing has trained over what the last steps saw, so the end is a noisy place to ask at. The same ReLU run, `sgd-ie` against
retraining: Spearman {end:.2f} at the end, {along:.2f} as the mean over steps along the run. **What to do:** `at="along"`, which
costs nothing more, where the question is what a sample is worth, and not what these very parameters would have been.

## Batch normalisation

![Retraining with kept statistics against really leaving the sample out](batch-norm.svg)

With batch normalisation in training mode every sample moves the statistics that the others of its batch are normalised with:
the loss is no sum over samples, and such a run is refused. `batch_norm="keep-batch-statistics"` records it for another
question: a removed sample leaves the loss, but stays in the batches, and the query is read with the running statistics of the
recorded run. What that says, and what would have happened had the sample really not been there, have Spearman {batch_norm:.2f}
here. **What to do:** normalise by layer or by group; or freeze the statistics
(`eval()` on these layers) for the training you want to ask about.
"""


if __name__ == "__main__":
    main()
