"""What was recorded without a word and meant something else: refused with its cause, while what only looks like it passes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from problems import FEATURES, N, Net, data, make, record, trainer
from torch.utils.data import DataLoader, Dataset, Subset

import lightning_acc as la
from lightning_acc.recorder import RecordingRefused

pytestmark = pytest.mark.filterwarnings("ignore:Training has no validation data", "ignore:.*Skipping val loop")

# ---- another data set on the way


class Reloading(pl.LightningDataModule):
    """A new loader every epoch, over what ``make`` gives for the epoch."""

    def __init__(self, make: Any) -> None:
        super().__init__()
        self.make = make

    def train_dataloader(self) -> Any:
        return DataLoader(self.make(self.trainer.current_epoch), 6, shuffle=True)


class Noisy(Dataset[Any]):
    """Augmented at random; the ``origin`` tells what is underneath."""

    def __init__(self, origin: int = 0) -> None:
        self.inner = data(seed=origin)
        self.own = torch.Generator().manual_seed(origin)

    def __len__(self) -> int:
        return N

    def __getitem__(self, i: int) -> Any:
        x, y = self.inner[i]
        return x + 0.1 * torch.randn(FEATURES, dtype=torch.float64) + 0.1 * torch.rand((), generator=self.own), y


def swapped(epoch: int) -> Any:
    """Two samples change places in epoch 2."""
    return Subset(data(), [1, 0, *range(2, N)] if epoch == 2 else list(range(N)))


COLLIDING: dict[str, tuple[Any, str]] = {
    "another seed": (lambda epoch: data(seed=epoch), r"Sample \d+ is not the sample \d+ .*another content.*sampler"),
    "another part": (lambda epoch: Subset(data(n=2 * N), range(epoch * N, N + epoch * N)) if epoch < 2 else None, "Sample"),
    "two changed places": (swapped, r"Sample [01] is not the sample"),
    "more samples": (lambda epoch: data(n=N + epoch), r"over 25 samples, but had 24 at first.*sampler"),
    "augmented, others": (Noisy, r"Sample \d+ is not the sample"),
}


@pytest.mark.parametrize("case", COLLIDING)
def test_another_data_set_under_the_same_ids_is_refused(tmp_path: Path, case: str) -> None:
    make_data, message = COLLIDING[case]
    training = trainer(la.TrajectoryRecorder(tmp_path / "run"), reload_dataloaders_every_n_epochs=1)
    with pytest.raises(RecordingRefused, match=message):
        training.fit(make(), datamodule=Reloading(make_data))


@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize("kind", [data, Noisy])
def test_the_same_data_in_a_loader_built_anew_is_recorded(tmp_path: Path, kind: Any, kept: bool) -> None:
    once = kind()
    weights = []
    for callbacks in ([la.TrajectoryRecorder(tmp_path / "run")], []):
        pl.seed_everything(0)
        module = make()
        give = Reloading(lambda epoch: once if kept else kind())
        if kept and kind is Noisy:
            once.own.manual_seed(0)
        trainer(*callbacks, reload_dataloaders_every_n_epochs=1).fit(module, datamodule=give)
        weights.append(torch.cat([p.detach().reshape(-1) for p in module.parameters()]))
    assert torch.equal(*weights)
    assert la.Run(tmp_path / "run").audit().ok


# ---- the validation data


class TrainingOnly(Net):
    """Augments training batches alone, and notes the state it is in."""

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return [batch[0] + 1, *batch[1:]] if self.trainer.training or self.training else batch

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        self.__dict__.setdefault("states", []).append((str(self.trainer.state.stage.value), self.training))
        return [batch[0] + 1, *batch[1:]] if self.trainer.training or self.training else batch


class ModeWatcher(pl.Callback):
    """What follows the first batch must find everything as it was."""

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        assert trainer.training
        assert pl_module.training
        assert not pl_module.net[2].training
        assert torch.is_grad_enabled()


class PartlyEvaluating(TrainingOnly):
    def on_train_epoch_start(self) -> None:
        self.net[2].eval()


def test_the_query_is_what_validation_sees(tmp_path: Path) -> None:
    module = PartlyEvaluating(hidden=4, dropout=0.5).double()
    run = record(tmp_path / "run", module, callbacks=(ModeWatcher(),))
    from lightning_acc.core import queries

    (leaves, _), *_ = queries.find(run, "val").batches
    assert torch.equal(leaves["0"], data(n=16, seed=9).tensors[0])
    assert ("validate", False) in module.states
    assert ("validate", True) not in module.states
    (trained,) = run.batches(0)
    assert torch.equal(trained["0"], data().tensors[0][run.steps[0].sample_ids] + 1 + 1)


@pytest.mark.parametrize("lr", [1e5, 1e9])
def test_a_training_that_diverges_is_told_so_and_no_callback_is_blamed(tmp_path: Path, lr: float) -> None:
    with pytest.raises(la.RunError, match=r"The training diverges: step \d moved .*: lower the learning rate") as caught:
        record(tmp_path / "run", make(loss="squared", optimizer={"lr": lr}).float(), precision="32-true", max_epochs=4)
    assert "callback" not in str(caught.value)
