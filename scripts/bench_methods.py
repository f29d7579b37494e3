"""What each method costs: seconds as ratios within one run, and peak memory against the budget given.

    python scripts/bench_methods.py

One thread. A ReLU 8-8 network on 68 features (the size of Adult), n = 400, 38 epochs of batch 100. "loop" is the published
way to compute ACC-SGD-IE: one autograd Hessian-vector product for each sample and step, measured on a few steps.
"""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch

N, FEATURES, EPOCHS, BATCH = 400, 68, 38, 100
LOOP_STEPS = 3


def record(directory: Path, hidden: tuple[int, ...], features: int, epochs: int) -> float:
    """Train with the recorder; returns the seconds the same training takes without it."""
    import pytorch_lightning as pl
    from torch.utils.data import DataLoader, TensorDataset

    from lightning_acc import TrajectoryRecorder
    from lightning_acc.studies.models import Classifier

    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    torch.manual_seed(0)
    x = torch.randn(N, features)
    y = (x @ torch.randn(features) + torch.randn(N) > 0).long()

    def fit(*callbacks: pl.Callback) -> float:
        trainer = pl.Trainer(
            max_epochs=epochs,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=list(callbacks),
        )
        model = Classifier(features, 2, hidden, "relu", lr=0.1)
        started = time.perf_counter()
        trainer.fit(model, DataLoader(TensorDataset(x, y), BATCH, shuffle=True), DataLoader(TensorDataset(x, y), N))
        return time.perf_counter() - started

    fit()
    seconds = fit()
    fit(TrajectoryRecorder(directory))
    return seconds


def loop_seconds(replay: object) -> float:
    """Seconds of the sequential baseline for the whole run: one Hessian-vector product per sample and step."""
    from lightning_acc.core.replay import Replay

    assert isinstance(replay, Replay)
    state, shifts = replay.initial, [torch.zeros_like(replay.initial[0]) for _ in range(N)]
    started = time.perf_counter()
    for t in range(LOOP_STEPS):
        step = replay.step(t)
        theta = state[0].detach().requires_grad_()
        position = {sample: i for i, sample in enumerate(step.sample_ids.tolist())}
        for j in range(N):
            weights = step.weights.clone()
            source = torch.zeros_like(theta)
            losses = step.losses(theta)
            if j in position:
                weights[position[j]] = 0
                (source,) = torch.autograd.grad(step.weights[position[j]] * losses[position[j]], theta, retain_graph=True)
            (gradient,) = torch.autograd.grad((weights * losses).sum(), theta, create_graph=True)
            (product,) = torch.autograd.grad(gradient, theta, shifts[j])
            lr = step.groups[0]["lr"]
            shifts[j] = shifts[j] - lr * product + lr * source.detach()
        state = step(state)
    return (time.perf_counter() - started) / LOOP_STEPS * len(replay)


def speed() -> None:
    """Print the table of seconds and ratios."""
    from lightning_acc import Run
    from lightning_acc.core.queries import moments
    from lightning_acc.core.replay import Replay
    from lightning_acc.methods import sweeps
    from lightning_acc.methods.method import Question
    from lightning_acc.methods.rules import AccSgdIe, AdjointSgdIe, LeaveOneOut

    with tempfile.TemporaryDirectory() as directory:
        training = record(Path(directory) / "run", (8, 8), FEATURES, EPOCHS)
        run = Run(Path(directory) / "run")
        replay = Replay(run)
        removals = [(i,) for i in range(N)]
        question = Question(run.query("val"), moments.find(run, "end"), "linear", False, 2**30)
        print(f"n = {N}, p = {run.n_parameters}, {run.n_steps} steps of batch {BATCH}, torch {torch.__version__}, one thread")

        def replayed() -> None:
            state = replay.initial
            for t in range(len(replay)):
                state = replay.step(t)(state)

        work = {
            "replay": replayed,
            "loo": lambda: sweeps.forward(replay, LeaveOneOut(), removals),
            "acc-sgd-ie": lambda: sweeps.forward(replay, AccSgdIe(), removals),
            "sgd-ie": lambda: sweeps.reverse(replay, AdjointSgdIe(), question),
        }
        times: dict[str, list[float]] = {name: [] for name in work}
        for turn in range(6):
            for name, function in work.items():
                started = time.perf_counter()
                function()
                if turn:  # the first turn warms up
                    times[name].append(time.perf_counter() - started)
        seconds = {"training": training, **{name: statistics.median(values) for name, values in times.items()}}
        seconds["loop"] = loop_seconds(replay)
    for name, value in seconds.items():
        print(f"{name:12s} {value:9.3f} s")

    def ratio(a: str, b: str) -> float:
        pairs = zip(times[a], times[b], strict=True)
        return statistics.median(first / second for first, second in pairs)

    print(f"acc-sgd-ie / loo       {ratio('acc-sgd-ie', 'loo'):7.2f}   (to reach: at most 1.5)")
    print(f"sgd-ie / replay        {ratio('sgd-ie', 'replay'):7.2f}   (to reach: at most 6)")
    print(f"loop / acc-sgd-ie      {seconds['loop'] / seconds['acc-sgd-ie']:7.1f}   (to reach: at least 25)")
    print(f"loo / training         {seconds['loo'] / training:7.2f}   for {N} retrainings")


def memory() -> None:
    """Print the peak memory of each method under several budgets, each in a process of its own."""
    with tempfile.TemporaryDirectory() as directory:
        record(Path(directory) / "run", (256, 64), 784, 1)
        print("\npeak memory beyond what was there before, 784-256-64-2 network, n = 400, GB")
        print(f"{'budget':>12s}" + "".join(f"{budget:9.2f}" for budget in BUDGETS))
        words = [sys.executable, __file__, "--measure", directory + "/run", *map(str, BUDGETS)]
        print(subprocess.run(words, check=True, capture_output=True, text=True).stdout, end="")


BUDGETS = (0.25, 0.5, 1.0, 2.0)


def measure(path: str, budgets: list[float]) -> None:
    """In a fresh process: print by how many GB scoring with each budget raises the peak."""
    from lightning_acc import Run, score

    run = Run(path)
    # What any method brings along is there before: the module, Lightning, the machinery of autograd.
    score(run, "sgd-ie", [0], ray_address=None, save=False, check=0)
    score(run, "acc-sgd-ie", [0], readout="exact", ray_address=None, save=False, check=0)
    for method in ("loo", "acc-sgd-ie", "sgd-ie", "tracin"):
        print(f"{method:>12s}" + "".join(f"{_peak(run, method, budget):9.2f}" for budget in budgets), flush=True)


def _peak(run: Any, method: str, budget: float) -> float:
    """In a fork, which has the peak of what it begins with."""
    context = multiprocessing.get_context("fork")
    answer = context.SimpleQueue()

    def work() -> None:
        from lightning_acc import score

        with open("/proc/self/statm", encoding="ascii") as file:
            before = int(file.read().split()[1]) * resource.getpagesize()
        score(run, method, readout="exact", ray_address=None, save=False, check=0, memory_gb=budget)
        answer.put((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before) / 2**30)

    process = context.Process(target=work)
    process.start()
    process.join()
    if process.exitcode:
        raise SystemExit(f"measuring {method} ended with {process.exitcode}")
    return float(answer.get())


if __name__ == "__main__":
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--measure", nargs="+", metavar=("RUN", "GB"), help=argparse.SUPPRESS)
    parser.add_argument("--only", choices=("speed", "memory"), help="one of the two parts")
    options = parser.parse_args()
    if options.measure:
        measure(options.measure[0], [float(budget) for budget in options.measure[1:]])
    else:
        if options.only != "memory":
            speed()
        if options.only != "speed":
            memory()
