"""What recording costs: training steps with and without the callback, in pairs, and the checks of the first steps apart.

    python scripts/bench_recorder.py

Networks whose steps take about 2 ms and 20 ms on one quiet core, with batches of 64 samples of 64 features and of 128 of 784
(``wide``, and 20 ms); SGD with momentum and AdamW, with ``per_sample_loss`` and without. To reach: at most 15 % added where a
step takes 2 ms, 3 % where it takes 20 ms, and first steps of at most 3.

``copies`` is what no record can do without: a callback that copies the batch and the parameters of every step adds so much of
the training thread's time. ``wall`` is time that passes with the recorder, and ``thread`` processor time of the thread that
trains; of both, steps are told by their lower quartiles. ``writing`` is processor time of the thread beside it, on average
over all steps. ``first`` is what the first steps take beyond those of the plain training, in steps of it.

On a core of a virtual machine whose other guests make a step longer by half from one minute to the next: ``copies`` add -4 to
20 % to steps of 2.2 to 3.3 ms, and ``thread`` is 17 to 49 % (in its quiet minutes 0.3 ms of 1.3); of steps of 28 to 34 ms it
is 3 to 12 %; first steps are 12 to 31. Of 0.32 ms the hooks take 0.21; the rest is what the training's own code takes to come
back into the caches that they share.
"""

from __future__ import annotations

import logging
import statistics
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from lightning_acc import TrajectoryRecorder


class Case(NamedTuple):
    """A training: how many samples of how many features make a batch, the widths of the network, the steps."""

    batch: int
    features: int
    hidden: tuple[int, ...]
    steps: int


CASES = {
    "2 ms": Case(64, 64, (32,) * 6, 1500),
    "2 ms, wide": Case(128, 784, (12,), 1500),
    "20 ms": Case(128, 784, (1600, 800), 240),
}
BATCHES, PAIRS = 40, 3
FIRST = 6
"""Steps in which the recorder compares itself with the training, and those around them."""


class Network(pl.LightningModule):
    """A ReLU network whose ``training_step`` is the mean cross-entropy."""

    def __init__(self, features: int, hidden: tuple[int, ...], optimizer: str) -> None:
        super().__init__()
        self.save_hyperparameters()
        widths = [features, *hidden, 10]
        layers = [part for i in range(len(widths) - 1) for part in (nn.Linear(widths[i], widths[i + 1]), nn.ReLU())]
        self.net = nn.Sequential(*layers[:-1])
        self.optimizer = optimizer

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """The loss of a batch."""
        return functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """The one that was asked for."""
        if self.optimizer == "AdamW":
            return torch.optim.AdamW(self.parameters(), lr=1e-3)
        return torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9)


class WithLosses(Network):
    """The same, which says what the loss of a sample is."""

    def per_sample_loss(self, batch: Any) -> Tensor:
        """(B,)."""
        return functional.cross_entropy(self.net(batch[0]), batch[1], reduction="none")


class Copies(pl.Callback):
    """What no record can do without, and nothing else: a copy of the batch and of the parameters of every step."""

    def __init__(self) -> None:
        self.batches: list[list[Tensor]] = []
        self.parameters: list[Tensor] = []

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        """Copy the batch; those before it are let go after a while, as what has been written is."""
        self.batches = [*self.batches[-15:], [part.clone() for part in batch]]

    def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
        """Copy the parameters."""
        self.parameters = [*self.parameters[-15:], torch.cat([p.detach().reshape(-1) for p in module.parameters()])]


class Seconds:
    """What trainings took: of the first steps, their sums; of the later ones, each; and of all threads, means."""

    def __init__(self) -> None:
        self.first: list[float] = []
        self.wall: list[float] = []
        self.thread: list[float] = []
        self.writing: list[float] = []


class Clock(pl.Callback):
    """Takes the times at the ends of batches."""

    def __init__(self) -> None:
        self.times = [self.now()]

    @staticmethod
    def now() -> tuple[float, float, float]:
        """Wall, thread, process."""
        return time.perf_counter(), time.thread_time(), time.process_time()

    def on_train_start(self, *_: Any) -> None:
        """The first step begins."""
        self.times = [self.now()]

    def on_train_batch_end(self, *_: Any) -> None:
        """Note the time."""
        self.times.append(self.now())

    def add_to(self, seconds: Seconds) -> None:
        """Add what this training took."""
        wall, thread, process = (list(times) for times in zip(*self.times, strict=True))
        seconds.first.append(thread[FIRST] - thread[0])
        for found, times in ((seconds.wall, wall), (seconds.thread, thread)):
            found += [after - before for before, after in zip(times[FIRST:], times[FIRST + 1 :], strict=False)]
        other = (process[-1] - process[0]) - (thread[-1] - thread[0])
        seconds.writing.append(other / (len(self.times) - 1))


def train(kind: type[Network], optimizer: str, case: Case, seconds: Seconds, *callbacks: pl.Callback) -> None:
    """Train once, and add what it took to ``seconds``."""
    network = kind(case.features, case.hidden, optimizer)
    torch.manual_seed(0)
    n = BATCHES * case.batch
    data = TensorDataset(torch.randn(n, case.features), torch.randint(0, 10, (n,)))
    clock = Clock()
    trainer = pl.Trainer(
        max_steps=case.steps,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[*callbacks, clock],
    )
    trainer.fit(network, DataLoader(data, case.batch, shuffle=True))
    clock.add_to(seconds)


def usual(times: list[float]) -> float:
    """The lower quartile: on a machine that is shared, half of the steps are longer by what others do on it."""
    return statistics.quantiles(times, n=4)[0]


def row(name: str, case: Case, optimizer: str, network: type[Network]) -> str:
    """A line of the table."""
    plain, copied, recorded, size = Seconds(), Seconds(), Seconds(), 0
    for _ in range(PAIRS):
        train(network, optimizer, case, plain)
        train(network, optimizer, case, copied, Copies())
        with tempfile.TemporaryDirectory() as directory:
            run = Path(directory) / "run"
            train(network, optimizer, case, recorded, TrajectoryRecorder(run))
            size = sum(path.stat().st_size for path in run.rglob("*.safetensors"))
    step = usual(plain.thread)
    copies, wall, thread = usual(copied.thread) / step, usual(recorded.wall) / usual(plain.wall), usual(recorded.thread) / step
    writing = (statistics.mean(recorded.writing) - statistics.mean(plain.writing)) / step
    first = (statistics.median(recorded.first) - statistics.median(plain.first)) / step
    losses = "per_sample_loss" if network is WithLosses else "training_step"
    added = " ".join(f"{100 * share:7.1f} %" for share in (copies - 1, wall - 1, thread - 1, writing))
    return f"{name:>10s} {optimizer:>6s} {losses:>16s} {1e3 * step:7.2f} ms {added} {first:8.1f} {size / case.steps:12,.0f}"


def main() -> None:
    """Print the table."""
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {PAIRS} of each: a step, and added")
    print(
        f"{'':>10s} {'':>6s} {'losses by':>16s} {'a step':>10s} {'copies':>9s} {'wall':>9s} {'thread':>9s} {'writing':>9s} "
        f"{'first':>8s} {'bytes/step':>12s}"
    )
    for name, case in CASES.items():
        for optimizer in ("SGD", "AdamW"):
            for network in (WithLosses, Network):
                print(row(name, case, optimizer, network), flush=True)


if __name__ == "__main__":
    main()
