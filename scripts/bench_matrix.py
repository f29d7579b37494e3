"""What questions cost: along the run, and of each example. As ratios to the run itself, taken once more, on one thread.

    python scripts/bench_matrix.py            # two or three minutes

A network of 784-128-10 with GELU, momentum, 5 epochs over 2000 samples in batches of 64; a query of 1000 examples; each figure
is the median of three, taken in turn.
"""

from __future__ import annotations

import logging
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, TensorDataset

import lightning_acc as la
from lightning_acc.core.process import as_scored
from lightning_acc.core.queries import moments
from lightning_acc.core.replay import Replay
from lightning_acc.methods.method import Question
from lightning_acc.methods.rules import AdjointSgdIe
from lightning_acc.methods.sweeps import reverse
from lightning_acc.studies.models import Classifier

N, EXAMPLES, TURNS = 2000, 1000, 3


def data(n: int, seed: int) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(n, 1, 28, 28, generator=generator)
    return TensorDataset(x, (x.flatten(1) @ torch.randn(784, 10, generator=torch.Generator().manual_seed(0))).argmax(1))


def record(directory: str) -> la.Run:
    pl.seed_everything(0, verbose=False)
    quiet: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = pl.Trainer(
        max_epochs=5, accelerator="cpu", enable_model_summary=False, callbacks=[la.TrajectoryRecorder(directory)], **quiet
    )
    loaders = DataLoader(data(N, 1), 64, shuffle=True), DataLoader(data(EXAMPLES, 2), 1000)
    trainer.fit(Classifier(784, 10, (128,), "gelu", lr=0.02, momentum=0.9), *loaders)
    return la.Run(directory)


def main() -> None:
    warnings.filterwarnings("ignore")
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as directory, as_scored():
        run = record(str(Path(directory) / "run"))
        replay, val = Replay(run), run.query("val")

        def replayed() -> None:
            state = replay.initial
            for t in range(len(replay)):
                state = replay.step(t)(state)

        def sweep(at: str, examples: int | None = None) -> Callable[[], object]:
            query = val if examples is None else val.picked(range(examples))
            question = Question(query, moments.find(run, at), "linear", False, 4 * 2**30, each=examples is not None)
            return lambda: reverse(replay, AdjointSgdIe(), question)

        work = {"replay": replayed, "end": sweep("end"), "along": sweep("along")}
        for count in (1, 64):
            work |= {f"{count} examples, {at}": sweep(at, count) for at in ("end", "along")}
        seconds: dict[str, list[float]] = {name: [] for name in work}
        for _ in range(TURNS):
            for name, function in work.items():
                started = time.perf_counter()
                function()
                seconds[name].append(time.perf_counter() - started)
        median = {name: statistics.median(values) for name, values in seconds.items()}
        print(f"{N} samples, {run.n_steps} steps, p = {run.n_parameters}; the run once more: {median['replay']:.2f} s")
        for at in ("end", "along"):
            print(f"one sweep of the mean of {EXAMPLES} examples, {at}: {median[at] / median['replay']:.2f} replays")
        print(f"along costs {median['along'] / median['end']:.2f} times end")
        for count in (1, 64):
            for at in ("end", "along"):
                each = median[f"{count} examples, {at}"] / median["replay"] / count
                print(f"each of {count} examples in one sweep, {at}: {each:.2f} replays")


if __name__ == "__main__":
    main()
