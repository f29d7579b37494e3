"""Recording changes nothing: weights and random numbers are bitwise those of a training without, also where it is refused."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from problems import CLASSES, FEATURES, N, Net, Normalised, StepOnly, data, fit, flat
from pytorch_lightning.callbacks import ModelCheckpoint
from test_refusals import LATE, REFUSED
from test_rows import MIXED
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

import lightning_acc as la
from lightning_acc.recorder import RecordingRefused

pytestmark = pytest.mark.filterwarnings(
    *("ignore:.*Skipping val loop", "ignore:Training has no validation data", "ignore:.*fork", "ignore:.*sync_dist"),
    *("ignore:.*validation_step", "ignore:.*Checkpoint directory", "ignore:.*torch.jit.script_method. is deprecated"),
)


def random_state() -> tuple[Any, ...]:
    """State of all generators, in a form that can be compared."""
    numpy_state: dict[str, Any] = np.random.get_state(legacy=False)
    words = numpy_state["state"]["key"].tobytes(), numpy_state["state"]["pos"]
    return torch.get_rng_state().numpy().tobytes(), random.getstate(), words


class Watched(la.TrajectoryRecorder):
    """A recorder each of whose hooks must leave the random numbers as they are, also when it refuses."""

    def __getattribute__(self, name: str) -> Any:
        found = super().__getattribute__(name)
        if name not in HOOKS:
            return found

        def watched(*args: Any, **options: Any) -> Any:
            before = random_state()
            try:
                return found(*args, **options)
            finally:
                assert random_state() == before, f"{name} draws random numbers"

        return watched


HOOKS = {name for name in vars(la.TrajectoryRecorder) if name.startswith("on_") or name in ("setup", "teardown")}


class DropoutStep(StepOnly):
    """Dropout in a module without per_sample_loss."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Sequential(nn.Linear(FEATURES, 8), nn.Dropout(0.4), nn.GELU(), nn.Linear(8, CLASSES))  # type: ignore[assignment]

    def training_step(self, batch: Any) -> dict[str, Tensor]:
        return {"loss": nn.functional.cross_entropy(self.layer(batch[0]), batch[1])}


class DropoutPenalty(DropoutStep):
    def training_step(self, batch: Any) -> dict[str, Tensor]:
        loss = nn.functional.cross_entropy(self.layer(batch[0]), batch[1])
        return {"loss": loss + 0.01 * self.share(batch) * self.layer[0].weight.square().sum()}

    def share(self, batch: Any) -> float:
        return 1.0


class DropoutLabels(DropoutPenalty):
    """How much the penalty counts for is read off the labels."""

    def share(self, batch: Any) -> float:
        return float(batch[1].double().mean())


class DropoutContrast(DropoutStep):
    def training_step(self, batch: Any) -> dict[str, Tensor]:
        logits = self.layer(batch[0])
        return {"loss": nn.functional.cross_entropy(logits - logits.mean(0), batch[1])}


class DropoutTokens(DropoutStep):
    """Token ids, embedded, with dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Sequential(nn.Embedding(9, 4), nn.Flatten(), nn.Dropout(0.4), nn.Linear(12, CLASSES))  # type: ignore[assignment]

    def validation_step(self, batch: Any) -> None:
        return None


class Drawing(Net):
    """Draws in its __init__, from all generators."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.save_hyperparameters()
        self.drawn = random.random() + np.random.rand() + float(torch.rand(()))


class Jittered(Net):
    """Random augmentation on the device."""

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return [batch[0] + 0.1 * torch.randn_like(batch[0]), *batch[1:]] if self.trainer.training else batch


class Augmented(Dataset[Any]):
    """Random augmentation with all generators, and one of its own."""

    def __init__(self) -> None:
        self.x, self.y = data().tensors
        self.own = np.random.default_rng(3)

    def __len__(self) -> int:
        return N

    def __getitem__(self, i: int) -> Any:
        return self.x[i] * random.uniform(0.9, 1.1) + 0.1 * np.random.rand() + 0.1 * self.own.random() + 0.1 * torch.rand(
            ()
        ), self.y[i]


class NoisyCollate:
    """A collate function that draws random numbers, with a generator of its own too."""

    def __init__(self) -> None:
        self.own = torch.Generator().manual_seed(4)
        self.calls = 0

    def __call__(self, samples: list[Any]) -> Any:
        self.calls += 1
        x, y = torch.utils.data.default_collate(samples)
        noise = torch.rand(x.shape, generator=self.own, dtype=x.dtype) + torch.rand_like(x) + np.random.rand()
        return [x + 0.1 * noise + 0.001 * self.calls, y]


class AsDict(Dataset[Any]):
    def __len__(self) -> int:
        return N

    def __getitem__(self, i: int) -> Any:
        x, y = data()[i]
        return {"x": x, "y": y}


def tokens() -> TensorDataset:
    return TensorDataset(torch.randint(0, 9, (N, 3), generator=torch.Generator().manual_seed(1)), data().tensors[1])


ADAMW = {"class": "AdamW", "lr": 0.02, "weight_decay": 0.1}
SETUPS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "sgd": (lambda: Net(optimizer={"momentum": 0.9}), None, {}),
    "adamw, clipped, dropout": (lambda: Net(6, dropout=0.3, optimizer=ADAMW), None, {"gradient_clip_val": 0.3}),
    "accumulated": (lambda: Net(6, dropout=0.3), None, {"accumulate_grad_batches": 3}),
    "dropout without per_sample_loss": (DropoutStep, None, {}),
    "dropout and a penalty": (DropoutPenalty, None, {}),
    "dropout on tokens without per_sample_loss": (
        DropoutTokens,
        lambda: DataLoader(tokens(), 7, shuffle=True),
        {"validation": False},
    ),
    "batch norm": (Normalised, None, {"recorder": {"batch_norm": "keep-batch-statistics"}}),
    "dict batches": (lambda: Net(6, dropout=0.3), lambda: DataLoader(AsDict(), 7, shuffle=True), {}),
    "validation mid-epoch": (lambda: Net(6, dropout=0.3), None, {"val_check_interval": 2, "num_sanity_val_steps": 1}),
    "schedule": (lambda: Net(decay_lr=0.5, optimizer=ADAMW), None, {}),
    "workers": (Net, lambda: DataLoader(Augmented(), 7, shuffle=True, num_workers=2), {}),
    "augmentation": (Net, lambda: DataLoader(Augmented(), 7, shuffle=True), {}),
    "noisy collate": (Net, lambda: DataLoader(data(), 7, shuffle=True, collate_fn=NoisyCollate()), {}),
    "noisy collate in workers": (Net, lambda: DataLoader(data(), 7, num_workers=2, collate_fn=NoisyCollate()), {}),
    "augmentation on the device": (Jittered, None, {}),
    "loaders built anew": (lambda: Net(6, dropout=0.3), None, {"reload_dataloaders_every_n_epochs": 1}),
    "drawing when it is made": (lambda: Drawing(hidden=6, dropout=0.3), None, {}),
    "bf16-mixed": (
        lambda: Net(6, dropout=0.3, optimizer=ADAMW).float(),
        lambda: DataLoader(data(dtype=torch.float32), 7, shuffle=True),
        {"precision": "bf16-mixed", "validation": False},
    ),
    "two processes": (lambda: Net(6, dropout=0.3, optimizer=ADAMW), None, {"strategy": "ddp_fork", "devices": 2}),
}


def train(setup: tuple[Any, Any, dict[str, Any]], *callbacks: Any) -> tuple[Tensor, Any]:
    """Final weights and random state of one training."""
    make_module, make_loader, options = setup
    options = {key: value for key, value in options.items() if key != "recorder"}
    random.seed(0), np.random.seed(0), torch.manual_seed(0)
    module = make_module()
    if options.get("precision") != "bf16-mixed":
        module = module.double()
    train_on = make_loader() if make_loader else DataLoader(data(), 7, shuffle=True)
    weights = fit(module, train_on, *callbacks, **options)
    return weights, random_state()


@pytest.mark.parametrize("name", SETUPS)
def test_weights_and_random_numbers_are_bitwise_those_without(tmp_path: Path, name: str) -> None:
    setup = SETUPS[name]
    weights, state = train(setup)
    recorded, state_after = train(setup, Watched(tmp_path / "run", **setup[2].get("recorder", {})))
    assert torch.equal(weights, recorded)
    assert state == state_after
    assert la.Run(tmp_path / "run").audit().ok


REFUSALS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "penalty by the labels, dropout": (DropoutLabels, None, {}),
    "coupled step, dropout": (DropoutContrast, None, {}),
    "batch norm": (Normalised, None, {}),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_after_a_refusal_training_without_is_what_it_would_have_been(tmp_path: Path, name: str) -> None:
    setup = REFUSALS[name]
    weights, state = train(setup)
    with pytest.raises(RecordingRefused):
        train(setup, Watched(tmp_path / "run"))
    again, state_after = train(setup)
    assert torch.equal(weights, again)
    assert state == state_after


@pytest.mark.parametrize("case", [*REFUSED, *LATE, *MIXED])
def test_a_refusal_draws_no_random_numbers(tmp_path: Path, case: str) -> None:
    if case in MIXED:
        make_module, make_loader, _ = MIXED[case]
        options, callbacks = {"train": make_loader() if make_loader else None}, ()
    elif case in REFUSED:
        make_module, options, _ = REFUSED[case]
        callbacks = options.get("callbacks", ())
    else:
        make_module, callbacks, _ = LATE[case]
        options = {}
    recorder = Watched(tmp_path / "run", **options.get("recorder", {}))
    settings = {key: value for key, value in options.items() if key not in ("callbacks", "recorder", "train")}
    with pytest.raises(RecordingRefused):
        fit(make_module().double(), options.get("train"), recorder, *callbacks, **settings)


def test_a_resumed_training_goes_on_as_without(tmp_path: Path) -> None:
    found = []
    for name, recorder in (("without", ()), ("with", (Watched(tmp_path / "run"),))):
        for epochs, start in ((2, None), (4, tmp_path / name / "epoch=1-step=8.ckpt")):
            torch.manual_seed(0)
            module = Net(6, dropout=0.3, optimizer=ADAMW).double()
            keep = ModelCheckpoint(tmp_path / name, save_top_k=-1)
            options = {"max_epochs": epochs, "enable_checkpointing": True, "ckpt_path": start}
            found.append((fit(module, data(), *recorder, keep, **options), random_state()))
    for (weights, state), (recorded, state_after) in zip(found[:2], found[2:], strict=True):
        assert torch.equal(weights, recorded)
        assert state == state_after


def test_a_trainer_gets_its_own_methods_back_after_a_refusal(tmp_path: Path) -> None:
    from problems import trainer

    refusing = trainer(Watched(tmp_path / "run"))
    with pytest.raises(RecordingRefused):
        refusing.fit(Normalised().double(), DataLoader(data(), 7))
    assert "process_dataloader" not in vars(refusing.strategy)
    assert flat(Normalised()).numel()
    assert isinstance(refusing, pl.Trainer)
