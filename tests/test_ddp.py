"""Two processes: the record is that of the global steps, and what follows from it is what really happens."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from problems import Weighted, data, make, record, trainer
from pytorch_lightning.callbacks import ModelCheckpoint
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

import lightning_acc as la

N = 23  # odd: the sampler pads with a repetition
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*sync_dist",
    "ignore:.*validation_step",
    "ignore:Training has no validation data",
    "ignore:.*fork",
    "ignore:.*is gone without an end",
)
DDP = {"strategy": "ddp_fork", "devices": 2}


class Annealed(Weighted):
    """Weighs its loss by a number that a hook sets, and raises its dropout."""

    weight = 1.0

    def on_train_epoch_start(self) -> None:
        self.weight, self.net[2].p = 1 / (1 + self.current_epoch), 0.1 * self.current_epoch

    def per_sample_loss(self, batch: Any) -> Tensor:
        return self.weight * super().per_sample_loss(batch)


def train(kept: Tensor, *callbacks: Any, dropout: float = 0.0, ckpt_path: Path | None = None, **options: Any) -> Tensor:
    torch.manual_seed(0)
    kind = options.pop("kind", Weighted)
    module = kind(hidden=5, activation="gelu", dropout=dropout, optimizer=options.pop("optimizer", None)).double()
    loader = DataLoader(TensorDataset(*data(n=N).tensors, kept), 5, shuffle=True)
    pl.seed_everything(1)
    trainer(*callbacks, **DDP, **options).fit(module, loader, ckpt_path=ckpt_path)
    return torch.cat([p.detach().reshape(-1) for p in module.parameters()])


SETUPS: dict[str, dict[str, Any]] = {
    "sgd": {},
    "adamw-clipped-dropout": {
        "optimizer": {"class": "AdamW", "lr": 0.02, "weight_decay": 0.1},
        "gradient_clip_val": 0.3,
        "dropout": 0.3,
    },
    "accumulated": {"optimizer": {"momentum": 0.9, "lr": 0.05}, "accumulate_grad_batches": 2},
    "annealed": {"kind": Annealed},
}


@pytest.mark.parametrize("setup", SETUPS)
def test_two_ranks_are_recorded_as_one_run(tmp_path: Path, setup: str) -> None:
    options = SETUPS[setup]
    everything = torch.ones(N, dtype=torch.float64)
    without_callback = train(everything, **options)
    base = train(everything, la.TrajectoryRecorder(tmp_path / "run"), **options)
    assert torch.equal(base, without_callback)
    run = la.Run(tmp_path / "run")
    assert run.manifest["world_size"] == 2
    assert torch.equal(run.parameters(run.n_steps), base)
    accumulate = options.get("accumulate_grad_batches", 1)
    assert run.n_steps == 3 * -(-3 // accumulate)
    first_epoch = [i for step in run.steps[: run.n_steps // 3] for i in step.sample_ids.tolist()]
    assert len(first_epoch) == N + 1
    assert set(first_epoch) == set(range(N))
    assert run.steps[0].sizes == [5] * 2 * accumulate
    last = run.steps[run.n_steps - 1]
    assert last.sizes == [2, 2]
    assert last.weights.tolist() == pytest.approx([1 / (2 * 2 * accumulate)] * 4)
    report = run.audit()
    assert report.ok, report
    assert not (tmp_path / "run/ranks").exists()

    held_out = la.Query("held-out", [(*data(n=8, seed=5).tensors, torch.ones(8, dtype=torch.float64))])
    twice = next(i for i in range(N) if first_epoch.count(i) == 2)
    samples = [twice, (twice + 5) % N, (twice + 9) % N]
    found = la.score(run, "loo", samples, held_out, keep_shifts=True, ray_address=None, check=0).shifts
    assert found is not None
    for sample, shift in zip(samples, found, strict=True):
        kept = everything.clone()
        kept[sample] = 0
        change = train(kept, **options) - base
        assert float((shift - change).norm() / change.norm()) < 1e-6


def test_two_ranks_and_one_process_give_the_same_scores(tmp_path: Path) -> None:
    module = make(hidden=5, activation="gelu", optimizer={"momentum": 0.8, "lr": 0.05})
    two = record(tmp_path / "two", module, data(n=24), batch_size=4, **DDP)
    assert two.query("val").n_examples == 16  # all of it, not one rank's half
    batches = [step.sample_ids.tolist() for step in two.steps]
    assert len(batches[0]) == 8

    class InTurn:
        def __init__(self) -> None:
            self.epoch = -1

        def __iter__(self) -> Any:
            self.epoch += 1
            yield from batches[3 * self.epoch : 3 * self.epoch + 3]

        def __len__(self) -> int:
            return 3

    module = make(hidden=5, activation="gelu", optimizer={"momentum": 0.8, "lr": 0.05})
    one = record(tmp_path / "one", module, DataLoader(data(n=24), batch_sampler=InTurn()))
    assert [step.sample_ids.tolist() for step in one.steps] == batches
    for method in ("loo", "acc-sgd-ie", "sgd-ie", "tracin"):
        ours, theirs = (la.score(run, method, ray_address=None, save=False, check=0).values for run in (two, one))
        np.testing.assert_allclose(ours, theirs, rtol=1e-8, atol=1e-14)
        assert np.abs(ours).min() > 0


class Stop(pl.Callback):
    """Ends the training in every process."""

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == 5:
            raise RuntimeError("stopped")


@pytest.mark.filterwarnings("ignore:.*resuming from a checkpoint that ended", "ignore:.*Checkpoint directory .* exists")
def test_two_ranks_resume_their_record(tmp_path: Path) -> None:
    everything = torch.ones(N, dtype=torch.float64)
    options = {**SETUPS["adamw-clipped-dropout"], "enable_checkpointing": True}

    def keep() -> ModelCheckpoint:
        return ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=4, save_top_k=-1)

    with pytest.raises(torch.multiprocessing.ProcessRaisedException, match="stopped"):
        train(everything, la.TrajectoryRecorder(tmp_path / "run"), keep(), Stop(), **options)
    path = tmp_path / "step=4.ckpt"
    alone = train(everything, keep(), ckpt_path=path, **options)
    final = train(everything, la.TrajectoryRecorder(tmp_path / "run"), keep(), ckpt_path=path, **options)
    assert torch.equal(final, alone)
    run = la.Run(tmp_path / "run")
    assert run.manifest["resumed_at"] == [4]
    assert run.steps[5].sizes == [5, 5]
    assert run.audit().ok
    assert torch.equal(run.parameters(run.n_steps), final)
    assert not (tmp_path / "run/ranks").exists()


SCRIPT = """
import sys
sys.path.insert(0, {tests!r})
import torch
from test_ddp import example

torch.set_num_threads(1)
example({path!r}, "ddp")
"""


def example(path: Path, strategy: str) -> la.Run:
    module = make(hidden=5, optimizer={"momentum": 0.8, "lr": 0.05})
    return record(path, module, data(n=N), strategy=strategy, devices=2)


@pytest.mark.parametrize("strategy", ["ddp", "ddp_spawn"])
def test_processes_that_are_started_anew(tmp_path: Path, strategy: str) -> None:
    """The same run as with ``ddp_fork``, to the last bit."""
    if strategy == "ddp":  # it starts the program itself anew
        script = tmp_path / "train.py"
        script.write_text(SCRIPT.format(tests=str(Path(__file__).parent), path=str(tmp_path / "run")))
        done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stderr
    else:
        example(tmp_path / "run", strategy)
    run, forked = la.Run(tmp_path / "run"), example(tmp_path / "forked", "ddp_fork")
    assert run.manifest["world_size"] == 2
    assert [step.sample_ids.tolist() for step in run.steps] == [step.sample_ids.tolist() for step in forked.steps]
    assert torch.equal(run.parameters(run.n_steps), forked.parameters(forked.n_steps))
    assert run.audit().max_abs_error == 0


def test_another_strategy_is_refused_by_name_unless_allowed(tmp_path: Path) -> None:
    from pytorch_lightning.strategies import SingleDeviceStrategy

    from lightning_acc.recorder import RecordingRefused

    class ShardedStrategy(SingleDeviceStrategy):
        pass

    with pytest.raises(RecordingRefused, match=r"ShardedStrategy is untested.*allow_untested=True"):
        record(tmp_path / "run", make(), strategy=ShardedStrategy(device="cpu"))
    loader = DataLoader(data(), 6)
    recorder = la.TrajectoryRecorder(tmp_path / "allowed", allow_untested=True)
    trainer(recorder, strategy=ShardedStrategy(device="cpu")).fit(make(), loader, loader)
    assert la.Run(tmp_path / "allowed").audit().ok


class Spare(pl.LightningModule):
    """With a layer that no step uses."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.spare = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return torch.nn.functional.cross_entropy(self.used(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_a_parameter_that_no_step_uses(tmp_path: Path) -> None:
    """DistributedDataParallel averages nothing then, unless it looks for such parameters."""
    loader = DataLoader(TensorDataset(torch.randn(12, 3), torch.arange(12) % 2), 3, shuffle=True)
    words = "'spare.weight' gets no gradient in step 0, and without all of them .* strategy='ddp_find_unused_parameters_true'"
    with pytest.raises(Exception, match=words):
        trainer(la.TrajectoryRecorder(tmp_path / "refused"), **DDP).fit(Spare(), loader)
    found = trainer(la.TrajectoryRecorder(tmp_path / "run"), devices=2, strategy="ddp_fork_find_unused_parameters_true")
    found.fit(Spare(), loader)
    assert la.Run(tmp_path / "run", module=Spare()).audit().ok
