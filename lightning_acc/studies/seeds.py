"""``fit --runs N``: the same training from several seeds, each in a run directory of its own, on the same data.

Only ``seed_everything`` differs, so that the initial parameters and the order of the samples do. What the data module draws by
a seed of its own stays: scores of the runs can be averaged sample by sample.
"""

from __future__ import annotations

import os
import shlex
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from pytorch_lightning import Callback

from lightning_acc import arguments
from lightning_acc.credentials import without_credentials
from lightning_acc.errors import RequestError, RunError
from lightning_acc.progress import Progress
from lightning_acc.record import manifest
from lightning_acc.record.store import Store
from lightning_acc.scoring import cluster
from lightning_acc.show import tracking
from lightning_acc.studies import fit


@dataclass(frozen=True)
class Trainings:
    """What the trainings share.

    Attributes:
        config: the whole configuration, as YAML.
        seed: of the first one; the others count on from it.
        directory: holds the run directories.
        files: holds what Lightning itself writes, in a folder for each.
        folder: where the command was given, which relative paths start from.
        group: the W&B group of all of them.
    """

    config: str
    seed: int
    directory: str
    files: str
    folder: str
    group: str

    def directory_of(self, i: int) -> str:
        """The run directory of the training number ``i``."""
        return f"{self.directory}/seed-{i}"

    def arguments_of(self, i: int) -> list[str]:
        """The arguments of ``fit`` for it."""
        own = {
            "seed_everything": self.seed + i,
            "recorder.directory": self.directory_of(i),
            "trainer.default_root_dir": f"{self.files}/seed-{i}",
            "runs": 1,
        }
        return [f"--config={self.config}", *(f"--{name}={value}" for name, value in own.items())]


class _Tells(Callback):
    """Says how far a training is, after every batch; a worker that says nothing for long counts as hung."""

    def __init__(self, progress: Callable[[float], None]) -> None:
        self._progress = progress
        self._steps = 0.0

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Now Lightning can count the batches; before, that would make the loaders too early."""
        self._steps = trainer.estimated_stepping_batches

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        """One more batch."""
        self._progress(min(1.0, trainer.global_step / self._steps) if self._steps else 0.0)

    def on_validation_batch_end(self, trainer: Any, *_: Any) -> None:
        """One more batch, of no step."""
        self.on_train_batch_end(trainer)


def fit_several(cli: fit.RecordingCLI, runs: int) -> None:
    """Train ``runs`` times as the configuration says, over Ray where there are cores for it.

    Raises:
        RequestError: a training would take several processes, or that many trainings are none.
        RunError: there are runs already, or some of the trainings failed; the others are kept.
    """
    arguments.whole("runs", runs, "is no training", least=1)
    if cli.trainer.world_size > 1:
        raise RequestError(
            f"--runs trains each time in one process, but the trainer takes {cli.trainer.world_size}: start fit once for each "
            "seed, with --seed_everything and --recorder.directory."
        )
    job = _trainings(cli)
    _refuse_what_is_there(job, runs, cli.config.recorder.overwrite)
    address = cli.config.influence.ray_address
    if address == "local" and len(os.sched_getaffinity(0)) < 2:
        address = None
    work = train if address is None else partial(train, threads=1)
    failed: dict[int, str] = {}
    with Progress(f"fit · {runs} trainings", runs, False if address is None else None, unit="trainings") as bar:
        for i, result in cluster.each(work, job, range(runs), address, bar):
            reason = result.reason if isinstance(result, cluster.Failure) else result
            if reason is not None:
                failed[i] = reason
    names = [str(Store(job.directory_of(i))) for i in range(runs) if i not in failed]
    for name in names:
        print(f"recorded in {name}")
    if len(names) > 1:
        print(f"score them together: {shlex.join(['lightning-acc', 'score', *names])}")
    if failed:
        what = "; ".join(f"{Store(job.directory_of(i))}: {reason.rstrip('.')}" for i, reason in sorted(failed.items()))
        raise RunError(f"{len(failed)} of {runs} trainings failed. {what}. The others are kept.")


def _refuse_what_is_there(job: Trainings, runs: int, overwrite: bool) -> None:
    """Before any training begins, as the last one may begin much later."""
    if Store(job.directory).exists(manifest.NAME):
        raise RunError(f"{Store(job.directory)} is a run itself: give several runs another --recorder.directory.")
    there = [Store(job.directory_of(i)) for i in range(runs) if Store(job.directory_of(i)).exists(manifest.NAME)]
    if there and not overwrite:
        raise RunError(
            f"There are runs already: {', '.join(map(str, there))}. Choose another directory, delete them, or pass "
            "--recorder.overwrite=true. (For one seed alone: fit without --runs, with --seed_everything and "
            "--recorder.directory.)"
        )


def train(job: Trainings, i: int, progress: Callable[[float], None], threads: int | None = None) -> str | None:
    """The training number ``i``; returns why it failed, or None.

    Args:
        job: what the trainings share.
        i: which one.
        progress: told the fraction done.
        threads: of torch; None leaves them as they are.
    """
    with _standing_in(job.folder), _threads(threads):
        try:
            cli = fit.build("fit", job.arguments_of(i))
            trainer: Any = cli.trainer
            trainer.callbacks.insert(0, _Tells(progress))
            fit.train(cli, job.group)
        except Exception as error:  # the others are trained all the same
            text = str(error).strip().partition("\n")[0]
            return str(without_credentials(text if isinstance(error, RunError) else f"{type(error).__name__}: {text}"))
    return None


def _trainings(cli: fit.RecordingCLI) -> Trainings:
    config = cli.config.clone()
    config.pop("config", None)
    seed = config.get("seed_everything")
    directory = Store(config.recorder.directory).url
    name = tracking.last_part(directory)
    return Trainings(
        config=cli.parser.dump(config, skip_none=False),
        seed=seed if type(seed) is int else 0,
        directory=directory,
        files=f"{config.trainer.default_root_dir or 'lightning_logs'}/{name}",
        folder=os.getcwd(),
        group=f"{name}-{time.strftime('%Y%m%d-%H%M%S')}",
    )


@contextmanager
def _standing_in(folder: str) -> Iterator[None]:
    """In here relative paths start from ``folder``, where this machine has it: workers stand elsewhere."""
    before = os.getcwd()
    if os.path.isdir(folder):
        os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


@contextmanager
def _threads(number: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
