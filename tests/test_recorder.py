"""The recorder sees what the training sees, changes nothing, and refuses what it cannot describe."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from problems import CLASSES, FEATURES, N, Net, StepOnly, data, fit, flat, make, record, trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, WeightedRandomSampler

import lightning_acc as la
from lightning_acc.recorder import RecordingRefused


class Indexed(Dataset[Any]):
    """Samples that carry their own index, as a tuple or as a nested dict."""

    def __init__(self, nested: bool = False) -> None:
        self.x, self.y = data(dtype=torch.float32).tensors
        self.nested = nested

    def __len__(self) -> int:
        return N

    def __getitem__(self, i: int) -> Any:
        if self.nested:
            return {"x": self.x[i], "y": self.y[i], "extra": {"index": torch.tensor(i)}}
        return self.x[i], self.y[i], torch.tensor(i)


class Watching(Net):
    """Notes the indices of every batch it trains on."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        index = batch["extra"]["index"] if isinstance(batch, dict) else batch[2]
        self.__dict__.setdefault("seen", []).append(index.tolist())
        return super().training_step(batch, batch_idx)


class OddBatches:
    """A batch sampler of uneven batches, in another order every epoch."""

    def __iter__(self) -> Any:
        order = torch.randperm(N).tolist()
        yield from (order[:3], order[3:11], order[11:12], order[12:20])

    def __len__(self) -> int:
        return 4


class OddLoader(DataLoader[Any]):
    """A DataLoader subclass with an iterator of its own."""

    def __iter__(self) -> Any:
        yield from super().__iter__()


LOADERS: dict[str, Any] = {
    "plain": lambda: DataLoader(Indexed(), 7, shuffle=True),
    "dict": lambda: DataLoader(Indexed(nested=True), 7, shuffle=True),
    "ragged": lambda: DataLoader(Indexed(), 10, shuffle=True),
    "drop-last": lambda: DataLoader(Indexed(), 10, shuffle=True, drop_last=True),
    "workers": lambda: DataLoader(Indexed(), 5, shuffle=True, num_workers=2, prefetch_factor=3),
    "persistent-workers": lambda: DataLoader(Indexed(), 5, shuffle=True, num_workers=2, persistent_workers=True),
    "weighted": lambda: DataLoader(Indexed(), 7, sampler=WeightedRandomSampler(torch.arange(1.0, N + 1), 20)),
    "own-generator": lambda: DataLoader(Indexed(), 7, shuffle=True, generator=torch.Generator().manual_seed(3)),
    "batch-sampler": lambda: DataLoader(Indexed(), batch_sampler=OddBatches()),
    "batch-as-sampler": lambda: DataLoader(_Whole(), batch_size=None, sampler=_lists()),
    "subclass": lambda: OddLoader(Indexed(), 7, shuffle=True),
}


class _Whole(Indexed):
    """A dataset that is asked for whole batches."""

    def __getitem__(self, indices: Any) -> Any:
        return self.x[indices], self.y[indices], torch.tensor(indices)


def _lists() -> Any:
    return torch.utils.data.BatchSampler(torch.utils.data.RandomSampler(range(N)), 5, drop_last=False)


SETUPS = [(name, {}) for name in LOADERS] + [
    ("plain", {"limit_train_batches": 2}),
    ("workers", {"limit_train_batches": 3}),
    ("persistent-workers", {"limit_train_batches": 3}),
    ("ragged", {"val_check_interval": 2}),
    ("ragged", {"reload_dataloaders_every_n_epochs": 1}),
    ("plain", {"num_sanity_val_steps": 2, "max_steps": 7, "max_epochs": -1}),
    ("plain", {"limit_val_batches": 0}),
]


@pytest.mark.parametrize(("loader", "options"), SETUPS, ids=str)
def test_ids_are_those_of_the_batches_and_training_is_not_changed(tmp_path: Path, loader: str, options: Any) -> None:
    def module() -> Watching:
        torch.manual_seed(0)
        return Watching(hidden=4, optimizer={"momentum": 0.9}, decay_lr=0.9)

    plain, recorded = module(), module()
    without = fit(plain, LOADERS[loader](), precision="32-true", **options)
    run = record(tmp_path / "run", recorded, LOADERS[loader](), precision="32-true", **options)
    assert torch.equal(flat(recorded), without)
    assert torch.equal(run.parameters(run.n_steps), without)
    assert [step.sample_ids.tolist() for step in run.steps] == recorded.seen == plain.seen
    assert run.n_samples == N
    x, _ = data(dtype=torch.float32).tensors
    for t in (0, run.n_steps - 1):
        (leaves,) = run.batches(t)
        assert torch.equal(leaves["x" if loader == "dict" else "0"], x[run.steps[t].sample_ids])
        assert run.steps[t].weights.tolist() == [1 / len(leaves["x" if loader == "dict" else "0"])] * len(recorded.seen[t])
    assert run.audit().max_abs_error == 0
    assert run.query_names() == ["val"]


def test_the_learning_rate_is_the_one_that_was_used(tmp_path: Path) -> None:
    run = record(tmp_path / "run", make(decay_lr=0.5), batch_size=12)
    assert [step.hyperparameters["lr"] for step in run.steps] == [0.2, 0.2, 0.1, 0.1, 0.05, 0.05]


class TwoRates(Net):
    def configure_optimizers(self) -> Any:
        weight, bias = self.net[0].weight, self.net[0].bias
        return torch.optim.SGD([{"params": [bias], "lr": 0.5}, {"params": [weight], "weight_decay": 0.1}], lr=0.1)


def test_parameter_groups_keep_their_own_hyperparameters(tmp_path: Path) -> None:
    run = record(tmp_path / "run", TwoRates().double())
    assert run.steps[0].hyperparameters["lr"] == (0.5, 0.1)
    assert run.steps[0].hyperparameters["weight_decay"] == (0.0, 0.1)
    assert run.audit().max_abs_error == 0


class Frozen(Net):
    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.save_hyperparameters()
        self.net[0].requires_grad_(False)


def test_frozen_parameters_count_as_given(tmp_path: Path) -> None:
    module = Frozen(hidden=4).double()
    run = record(tmp_path / "run", module)
    assert run.n_parameters == 4 * CLASSES + CLASSES
    assert run.audit().max_abs_error == 0
    assert la.score(run, "loo", [1], ray_address=None, check=0).values[0] != 0


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_module_without_per_sample_loss_gives_the_same_scores(tmp_path: Path, reduction: str) -> None:
    torch.manual_seed(0)
    run = record(tmp_path / "run", StepOnly(reduction).double())
    assert run.manifest["loss"]["source"] == "reductions"
    assert run.manifest["loss"]["reduction"] == reduction
    assert run.audit().ok
    torch.manual_seed(0)
    twin = Net(optimizer={"lr": 0.01}).double()
    twin.load_state_dict({"net.0.weight": run.parameters(0)[:15].view(3, 5), "net.0.bias": run.parameters(0)[15:]})
    if reduction == "mean":
        same = record(tmp_path / "twin", twin)
        for method in ("loo", "acc-sgd-ie", "sgd-ie"):
            ours, theirs = (la.score(r, method, ray_address=None, save=False, check=0).values for r in (run, same))
            torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), rtol=1e-8, atol=1e-14)
    else:
        assert run.steps[0].weights.tolist() == [1.0] * 7


class Metric(StepOnly):
    """Keeps a torchmetrics metric in its step, as many modules do."""

    def __init__(self) -> None:
        super().__init__()
        from torchmetrics.classification import MulticlassAccuracy

        self.accuracy = MulticlassAccuracy(CLASSES)

    def training_step(self, batch: Any, i: int) -> dict[str, Tensor]:
        self.accuracy(self.layer(batch[0]), batch[1])
        return super().training_step(batch)


def test_metrics_in_the_step_do_no_harm(tmp_path: Path) -> None:
    run = record(tmp_path / "run", Metric().double())
    assert run.audit().ok
    assert la.score(run, "acc-sgd-ie", [0, 1], ray_address=None, check=0).values.all()


class TokenMean(Net):
    """A mean over the "tokens" of the batch: longer samples weigh more."""

    def per_sample_loss(self, batch: Any) -> Tensor:
        lengths = 1.0 + batch[1]
        return super().per_sample_loss(batch) * lengths * len(lengths) / lengths.sum()


def test_a_loss_averaged_over_tokens_is_fine(tmp_path: Path) -> None:
    torch.manual_seed(0)
    run = record(tmp_path / "run", TokenMean().double())
    assert not run.manifest["loss"]["independent_rows"]
    assert run.audit().max_abs_error == 0
    truth, estimate = (la.score(run, method, ray_address=None, check=0).values for method in ("loo", "acc-sgd-ie"))
    assert la.evaluate(run).to_pylist()[1]["kendall"] > 0.9
    assert abs(truth - estimate).max() < 0.3 * abs(truth).max()


def test_a_run_that_is_there_is_not_overwritten(tmp_path: Path) -> None:
    run = record(tmp_path / "run", make())
    with pytest.raises(RecordingRefused, match=r"already holds a run.*overwrite=True"):
        record(tmp_path / "run", make(seed=5))
    assert la.Run(tmp_path / "run").hash == run.hash
    fit(make(seed=5), None, la.TrajectoryRecorder(tmp_path / "run", overwrite=True))
    assert la.Run(tmp_path / "run").hash != run.hash


def test_fitting_twice_with_one_recorder_is_refused(tmp_path: Path) -> None:
    recorder = la.TrajectoryRecorder(tmp_path / "run")
    fit(make(), None, recorder)
    with pytest.raises(RecordingRefused, match="already holds a run"):
        fit(make(), None, recorder)


@pytest.mark.filterwarnings("ignore:.*Skipping val loop")
def test_without_validation_data_recording_goes_on_with_a_warning(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"no validation data.*add_query"):
        run = record(tmp_path / "run", make(), validation=False)
    with pytest.raises(la.RequestError, match=r"no query 'val'.*add_query"):
        la.score(run, "sgd-ie", ray_address=None, check=0)
    run.add_query("val", DataLoader(data(n=16, seed=9), 5))
    assert len(la.score(run, "sgd-ie", ray_address=None, check=0)) == N


class Unsaved(Net):
    def __init__(self, width: Any) -> None:
        super().__init__(hidden=width.size)
        self.hparams.clear()


class Width:
    size = 4


def test_a_module_that_cannot_be_rebuilt_is_said_at_the_start_and_can_be_given(tmp_path: Path) -> None:
    module = Unsaved(Width()).double()
    with pytest.warns(UserWarning, match=r"Unsaved cannot be rebuilt.*save_hyperparameters.*module="):
        run = record(tmp_path / "run", module)
    assert la.Run(tmp_path / "run").audit().ok  # as long as this process still has the module
    del module
    gc.collect()
    with pytest.raises(la.RunError, match="save_hyperparameters"):
        la.score(run, "sgd-ie", ray_address=None, check=0)
    given = la.Run(tmp_path / "run", module=Unsaved(Width()))
    assert given.audit().max_abs_error == 0


def test_a_loss_that_is_not_finite_from_the_first_is_refused_in_one_sentence(tmp_path: Path) -> None:
    bad = data()
    bad.tensors[0][:] = float("nan")
    with pytest.raises(la.RunError, match="not finite") as error:
        record(tmp_path / "run", make(), bad)
    assert "\n" not in str(error.value)
    with pytest.raises(la.RunError):
        la.Run(tmp_path / "run")


class Interrupting(pl.Callback):
    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == 5:
            raise KeyboardInterrupt


def test_ctrl_c_while_training_keeps_the_whole_steps(tmp_path: Path) -> None:
    module = make(hidden=4)
    with pytest.raises(SystemExit):
        fit(module, None, la.TrajectoryRecorder(tmp_path / "run"), Interrupting())
    run = la.Run(tmp_path / "run")
    assert run.manifest["stopped"] == "interrupted"
    assert run.n_steps == 5
    assert run.audit().max_abs_error == 0
    assert torch.equal(run.parameters(5), flat(module))


def test_ctrl_c_within_a_step_does_not_take_the_parameters_after_it_for_those_before(tmp_path: Path) -> None:
    class InterruptingAtStep6(pl.Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            if trainer.global_step == 6:  # the optimizer has stepped; the recorder, called later, has not been told
                raise KeyboardInterrupt

    whole = record(tmp_path / "whole", make(hidden=4))
    recorder = la.TrajectoryRecorder(tmp_path / "run", parameters="every-k", budget_gb=1e-9)
    with pytest.raises(SystemExit):
        fit(make(hidden=4), None, InterruptingAtStep6(), recorder)
    run = la.Run(tmp_path / "run")
    assert run.n_steps == 5
    assert run.audit().ok
    assert torch.equal(run.parameters(5), whole.parameters(5))


class Image(Net):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 3, padding=1)
        self.head = nn.Linear(2 * 36, CLASSES)
        self.net = nn.Sequential(self.conv, nn.GELU(), nn.Flatten(), self.head)
        self.options = {"lr": 0.05}


def test_a_convolutional_network_on_images(tmp_path: Path) -> None:
    torch.manual_seed(0)
    images, labels = torch.rand(N, 1, 6, 6), data().tensors[1]
    loader = DataLoader(torch.utils.data.TensorDataset(images, labels), 6, shuffle=True)
    with pytest.warns(UserWarning, match="no validation data"):
        run = record(tmp_path / "run", Image(), loader, validation=False, precision="32-true")
    run.add_query("val", [(images[:8], labels[:8])])
    assert run.audit().ok
    truth = la.score(run, "loo", ray_address=None, dtype="float64", save=False, check=0).values
    estimate = la.score(run, "acc-sgd-ie", ray_address=None, dtype="float64", save=False, check=0).values
    assert abs(truth - estimate).max() < 0.1 * abs(truth).max()


def test_every_kth_snapshot_fits_the_budget_and_the_others_are_computed_again(tmp_path: Path) -> None:
    everything = record(tmp_path / "all", make(hidden=8, optimizer={"momentum": 0.9, "lr": 0.05}), max_epochs=10)
    size = 8 * everything.n_parameters
    recorder = la.TrajectoryRecorder(tmp_path / "some", parameters="every-k", budget_gb=12 * size / 2**30)
    fit(make(hidden=8, optimizer={"momentum": 0.9, "lr": 0.05}), None, recorder, max_epochs=10)
    sparse = la.Run(tmp_path / "some")
    assert everything.snapshots == list(range(41))
    assert sparse.snapshots == [0, 1, 2, 3, 4, 8, 12, 16, 20, 24, 28, 40]
    for t in range(41):
        assert torch.equal(sparse.parameters(t), everything.parameters(t))
    assert sparse.audit().max_abs_error == 0
    scores = [
        la.score(run, "acc-sgd-ie", ray_address=None, save=False, check=0).values.tolist() for run in (everything, sparse)
    ]
    assert scores[0] == scores[1]


def test_auto_keeps_what_two_percent_of_the_time_pays_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning_acc.recorder import snapshots

    monkeypatch.setattr(snapshots, "SMALL", 0)
    run = record(tmp_path / "run", make(hidden=8), max_epochs=20)
    assert run.snapshots[:4] == [0, 1, 2, 3]
    assert run.snapshots[-1] == run.n_steps == 80
    assert len(run.snapshots) < 80
    assert run.audit().max_abs_error == 0
    with pytest.raises(la.RequestError, match="parameters='sometimes' is none of its choices: give one of 'auto'"):
        fit(make(), None, la.TrajectoryRecorder(tmp_path / "no", parameters="sometimes"))  # type: ignore[arg-type]


class Augmented(Dataset[Any]):
    """Another content at every visit."""

    def __init__(self) -> None:
        self.x, self.y = data().tensors

    def __len__(self) -> int:
        return N

    def __getitem__(self, i: int) -> Any:
        return self.x[i] + 0.1 * torch.randn(FEATURES, dtype=torch.float64), self.y[i]


@pytest.mark.parametrize("workers", [0, 2])
def test_augmentation_keeps_the_content_of_each_visit_and_equal_contents_once(tmp_path: Path, workers: int) -> None:
    module = make(hidden=4)
    run = record(tmp_path / "run", module, DataLoader(Augmented(), 6, shuffle=True, num_workers=workers))
    assert run.audit().max_abs_error == 0
    assert torch.equal(run.parameters(run.n_steps), flat(module))
    assert max(int(step.contents.max()) for step in run.steps) == 3 * N - 1
    plain = record(tmp_path / "plain", make(hidden=4), DataLoader(data(), 6, shuffle=True))
    assert max(int(step.contents.max()) for step in plain.steps) == N - 1
    assert la.score(run, "loo", [3], ray_address=None, check=0).values[0] != 0


@pytest.mark.parametrize("format", ["torch", "numpy", None])
def test_hugging_face_datasets_of_any_format(tmp_path: Path, format: str | None) -> None:
    from datasets import Dataset as HubDataset

    x, y = data(dtype=torch.float32).tensors
    rows = HubDataset.from_dict({"x": x.tolist(), "y": y.tolist(), "name": [f"row {i}" for i in range(N)]})
    rows = rows.select_columns(["x", "y"]).with_format(format)

    def collate(batch: list[dict[str, Any]]) -> dict[str, Tensor]:
        return {
            "x": torch.stack([torch.as_tensor(row["x"], dtype=torch.float32) for row in batch]),
            "y": torch.stack([torch.as_tensor(row["y"], dtype=torch.int64) for row in batch]),
        }

    module = make(hidden=4).float()
    run = record(tmp_path / "run", module, DataLoader(rows, 7, shuffle=True, collate_fn=collate), precision="32-true")
    assert run.audit().max_abs_error == 0
    sample = run.content_of(5)
    assert sample is not None
    assert torch.equal(sample["x"], x[5])


class Adapted(Net):
    """A frozen backbone with a low-rank addition that is trained."""

    def __init__(self) -> None:
        super().__init__(hidden=6)
        self.net.requires_grad_(False)
        self.down, self.up = nn.Linear(FEATURES, 2, bias=False), nn.Linear(2, 6, bias=False)

    def per_sample_loss(self, batch: Any) -> Tensor:
        x, y = batch
        hidden = self.net[1](self.net[0](x) + self.up(self.down(x)))
        return nn.functional.cross_entropy(self.net[3](hidden), y, reduction="none")


def test_only_trained_parameters_count(tmp_path: Path) -> None:
    torch.manual_seed(0)
    run = record(tmp_path / "run", Adapted().double())
    assert run.n_parameters == 2 * FEATURES + 2 * 6
    assert run.audit().max_abs_error == 0
    truth, estimate = (la.score(run, method, ray_address=None, check=0).values for method in ("loo", "acc-sgd-ie"))
    assert abs(truth - estimate).max() < 0.2 * abs(truth).max()


class Recurrent(Net):
    """Per-sample losses of a GRU, which single samples and many parameter vectors are evaluated on alike."""

    def __init__(self, bag: bool = False) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.words = nn.EmbeddingBag(20, 4) if bag else nn.Embedding(20, 4)
        self.gru, self.out = nn.GRU(4, 5, batch_first=True), nn.Linear(5 if not bag else 4, CLASSES)

    def per_sample_loss(self, batch: Any) -> Tensor:
        found = self.words(batch[0])
        hidden = found if found.ndim == 2 else self.gru(found)[0][:, -1]
        return nn.functional.cross_entropy(self.out(hidden), batch[1], reduction="none")


def words() -> torch.utils.data.TensorDataset:
    generator = torch.Generator().manual_seed(2)
    return torch.utils.data.TensorDataset(torch.randint(0, 20, (N, 6), generator=generator), data().tensors[1])


def test_recurrent_networks_and_bags_of_words(tmp_path: Path) -> None:
    query = la.Query("held-out", [words()[:10]])
    for bag in (False, True):
        torch.manual_seed(0)
        path = tmp_path / str(bag)
        pl.seed_everything(0)
        module = Recurrent(bag).double()
        if bag:
            module.gru.requires_grad_(False)
        loader = DataLoader(words(), 6, shuffle=True)
        trainer(la.TrajectoryRecorder(path), limit_val_batches=0).fit(module, loader, loader)
        assert la.Run(path).audit().ok
        truth = la.score(path, "loo", None, query, ray_address=None, check=0).values
        estimate = la.score(path, "acc-sgd-ie", None, query, ray_address=None, check=0).values
        assert abs(truth - estimate).max() < 0.1 * abs(truth).max()
