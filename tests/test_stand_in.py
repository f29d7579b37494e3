"""Steps that use their trainer, keep things, or measure: replayed as they are written, or refused by the name of the cause."""

from __future__ import annotations

import io
import threading
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
import torchmetrics
from problems import CLASSES, FEATURES, N, data, flat, trainer
from pytorch_lightning.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_acc as la
from lightning_acc.core.stand_in import Watched, set_to, silent_copy
from lightning_acc.recorder import RecordingRefused

pytestmark = pytest.mark.filterwarnings("ignore:The run's module .* cannot be imported here")
SAMPLES = (1, 8, 23)


class Plain(pl.LightningModule):
    """A step that does ``act`` beside its loss, of a module with whatever ``prepare`` gives it."""

    act: Callable[[Any, Any, Tensor], Any] = staticmethod(lambda module, batch, loss: loss)
    prepare: Callable[[Any], Any] = staticmethod(lambda module: None)
    kept = torch.ones(N, dtype=torch.float64)

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(FEATURES, 4), nn.Tanh(), nn.Linear(4, CLASSES)).double()
        self.outputs: list[Any] = []
        self.prepare(self)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y, number = batch
        loss = (nn.functional.cross_entropy(self.net(x), y, reduction="none") * self.kept[number]).mean()
        return self.act(self, batch, loss)

    def on_train_epoch_end(self) -> None:
        self.outputs.clear()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val", nn.functional.cross_entropy(self.net(batch[0]), batch[1]))

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.2)
        return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.8)]


def kind(act: Any, prepare: Any = None) -> type[Plain]:
    body = {"act": staticmethod(act), **({"prepare": staticmethod(prepare)} if prepare else {})}
    return type("Using", (Plain,), body)


def train(module: Plain, kept: Tensor | None, *callbacks: Any, **options: Any) -> Tensor:
    module.kept = torch.ones(N, dtype=torch.float64) if kept is None else kept
    x, y = data().tensors
    loaded = DataLoader(TensorDataset(x, y, torch.arange(N)), 7, shuffle=True)
    held_out = DataLoader(TensorDataset(*data(n=16, seed=9).tensors, torch.arange(16)), 16)
    pl.seed_everything(1)
    trainer(*callbacks, **options).fit(module, loaded, held_out)
    return flat(module)


def logging_lr(module: Any, batch: Any, loss: Tensor) -> Tensor:
    module.log("lr", module.optimizers().param_groups[0]["lr"])
    module.log("lr again", module.optimizers(use_pl_optimizer=False).param_groups[-1].get("lr"))
    module.log("next", module.lr_schedulers().get_last_lr()[0])
    module.log("trainer's", module.trainer.optimizers[0].param_groups[0]["lr"])
    return loss


def looking_around(module: Any, batch: Any, loss: Tensor) -> Tensor:
    seen = (module.global_step, module.current_epoch, module.global_rank, module.local_rank, module.trainer.is_global_zero)
    if module.trainer.is_global_zero and module.trainer.global_step % 2 == 0 and module.trainer.state.fn == "fit":
        module.print(seen, module.trainer.callback_metrics.get("val"))
    assert module.trainer.training == module.training  # which a query is not
    assert not module.trainer.sanity_checking
    return loss


def of_constants(module: Any, batch: Any, loss: Tensor) -> Tensor:
    """As a Bayesian network weighs its prior: by what never changes in a training."""
    of = module.trainer
    return loss * (1 + 1 / of.num_training_batches + 1 / of.estimated_stepping_batches + 1 / of.max_epochs + of.world_size)


def scalars(module: Any, batch: Any, loss: Tensor) -> Tensor:
    for logger in module.loggers:
        logger.log_metrics({"loss": float(loss.detach())} if not torch._C._functorch.is_batchedtensor(loss) else {})
    if module.logger is not None:
        module.logger.experiment.log_metrics({"twice": 2.0}, module.global_step)
    return loss


def collecting(module: Any, batch: Any, loss: Tensor) -> dict[str, Tensor]:
    module.outputs.append(loss)
    module.named["losses"].append({"loss": loss, "x": batch[0]})
    module.last = loss
    return {"loss": loss, "more": loss.detach()}


def collections(module: Any) -> None:
    module.named = {"losses": deque(maxlen=3), "never": []}


def metrics(module: Any) -> None:
    module.error, module.mean = torchmetrics.MeanSquaredError(), torchmetrics.MeanMetric()
    module.several = torchmetrics.MetricCollection({"error": torchmetrics.MeanSquaredError()})


def measuring(module: Any, batch: Any, loss: Tensor) -> Tensor:
    out, y = module.net(batch[0])[:, 0], batch[1].double()
    module.log("error", module.error(out, y))
    module.mean.update(loss)
    module.log("mean", module.mean, on_epoch=True)
    module.log_dict({name: 2 * value for name, value in module.several(out, y).items()})
    return loss


def holding(module: Any) -> None:
    module.lock, module.held = threading.Lock(), {"locks": [threading.Lock()], "file": io.TextIOWrapper(io.BytesIO())}


def locked(module: Any, batch: Any, loss: Tensor) -> Tensor:
    with module.lock, module.held["locks"][0]:
        module.held["file"].write("a step\n")
    return loss


def averaging(module: Any, batch: Any, loss: Tensor) -> Tensor:
    """A moving average that is only looked at."""
    before = getattr(module, "average", None)
    module.average = loss.detach() if before is None else 0.9 * before + 0.1 * loss.detach()
    module.log("average", module.average)
    return loss


USING: dict[str, tuple[type[Plain], dict[str, Any]]] = {
    "the learning rate, logged": (kind(logging_lr), {}),
    "what the trainer says": (kind(looking_around), {}),
    "what never changes": (kind(of_constants), {}),
    "the logger": (kind(scalars), {"logger": True}),
    "no logger": (kind(scalars), {}),
    "lists": (kind(collecting, collections), {}),
    "metrics": (kind(measuring, metrics), {}),
    "locks and files": (kind(locked, holding), {}),
    "a moving average": (kind(averaging), {}),
    "the epoch": (kind(lambda m, b, loss: loss * (1 + m.current_epoch)), {}),
    "the step": (kind(lambda m, b, loss: loss * (1 + m.global_step)), {}),
    "a warm-up": (kind(lambda m, b, loss: loss * min(1.0, m.trainer.global_step / 5)), {}),
    "another loss from a step on": (
        kind(lambda m, b, loss: loss + (m.kept[b[2]] * m.net(b[0])[:, 0]).mean() if m.global_step > 3 else loss),
        {"accumulate_grad_batches": 2},
    ),
}


@pytest.mark.filterwarnings("ignore:.*MetricCollection")
@pytest.mark.parametrize("case", USING)
def test_a_step_that_uses_more_than_its_batch_is_replayed(tmp_path: Path, case: str) -> None:
    make, options = USING[case]
    if "logger" in options:
        options = {"logger": CSVLogger(tmp_path / "logs")}
    base = train(make(), None, **options)
    module = make()
    assert torch.equal(train(module, None, la.TrajectoryRecorder(tmp_path / "run"), **options), base)
    run = la.Run(tmp_path / "run", module=make())  # which has never had a trainer
    assert run.audit().ok
    found = la.score(run, "loo", SAMPLES, keep_shifts=True, ray_address=None, check=0, save=False)
    assert found.shifts is not None
    for sample, shift in zip(SAMPLES, found.shifts, strict=True):
        kept = torch.ones(N, dtype=torch.float64)
        kept[sample] = 0
        change = train(make(), kept, **options) - base
        assert float((shift - change).norm() / change.norm()) < 1e-9
    estimates = la.score(run, "sgd-ie", SAMPLES, ray_address=None, check=0, save=False).values
    assert np.isfinite(estimates).all()


def hidden(module: Any) -> None:
    module.hidden = None


def recurrent(module: Any, batch: Any, loss: Tensor) -> Tensor:
    out = module.net(batch[0]).mean(0)
    loss = loss if module.hidden is None else loss + (out * module.hidden).sum()
    module.hidden = out.detach()
    return loss


def normalised(module: Any, batch: Any, loss: Tensor) -> Tensor:
    module.hidden = loss.detach() if module.hidden is None else 0.99 * module.hidden + 0.01 * loss.detach()
    return loss / module.hidden


def queued(module: Any, batch: Any, loss: Tensor) -> Tensor:
    out = module.net(batch[0])
    if module.outputs:
        loss = loss + (out.mean(0) * torch.stack(list(module.outputs)).mean(0)).sum()
    module.outputs.append(out.mean(0).detach())
    return loss


def encoder(module: Any) -> None:
    module.key = nn.Linear(FEATURES, CLASSES).double().requires_grad_(False)


def momentum(module: Any, batch: Any, loss: Tensor) -> Tensor:
    module.key.weight.data.mul_(0.9)
    return loss + nn.functional.mse_loss(module.net(batch[0]), module.key(batch[0]))


def queue(module: Any) -> None:
    module.register_buffer("queue", torch.zeros(2, CLASSES, dtype=torch.float64))


def queued_in_a_buffer(module: Any, batch: Any, loss: Tensor) -> Tensor:
    out = module.net(batch[0])
    loss = loss + (out.mean(0) * module.queue.clone()).sum()
    module.queue[0] = out.mean(0).detach()
    return loss


def with_metric(module: Any, batch: Any, loss: Tensor) -> Tensor:
    return loss + module.error(module.net(batch[0])[:, 0], batch[1].double())


REFUSED: dict[str, tuple[type[Plain], str]] = {
    "the learning rate": (
        kind(lambda m, b, loss: loss * m.optimizers().param_groups[0]["lr"]),
        r"^The loss is made of the optimizer's lr, which no replay knows.*log it only",
    ),
    "a metric": (kind(with_metric, metrics), r"^The loss is made of the metric self.error"),
    "a metric alone": (
        kind(lambda m, b, loss: m.error(m.net(b[0])[:, 0], b[1].double()), metrics),
        r"^The loss is made of the metric self.error.*function of the same name",
    ),
    "the data module": (
        kind(lambda m, b, loss: loss * (1 if m.trainer.datamodule is None else 2)),
        r"^training_step reads self.trainer.datamodule, which no replay has: read it in",
    ),
    "other processes": (kind(lambda m, b, loss: m.all_gather(loss).mean()), r"^training_step reads self.trainer.strategy"),
    "a hidden state": (
        kind(recurrent, hidden),
        r"^training_step carries self.hidden from one step to the next.*Begin each",
    ),
    "a normalising average": (kind(normalised, hidden), r"^training_step carries self.hidden from one step"),
    "a queue": (kind(queued), r"^training_step carries self.outputs from one step"),
    "a momentum encoder": (kind(momentum, encoder), r"^The parameter 'key.weight' changes while training"),
    "a queue in a buffer": (kind(queued_in_a_buffer, queue), r"^The buffer 'queue' changes while training"),
}


@pytest.mark.filterwarnings("ignore:.*MetricCollection")
@pytest.mark.parametrize("case", REFUSED)
def test_a_loss_made_of_more_than_its_batch_is_refused_by_the_name_of_that(tmp_path: Path, case: str) -> None:
    make, message = REFUSED[case]
    with pytest.raises(RecordingRefused, match=message) as error:
        train(make(), None, la.TrajectoryRecorder(tmp_path / "run"))
    assert "\n" not in str(error.value)
    with pytest.raises(la.RunError):
        la.Run(tmp_path / "run")


def test_replays_keep_no_graph_and_leave_the_module_alone(tmp_path: Path) -> None:
    from lightning_acc.core.replay import Replay

    make = kind(collecting, collections)
    module = make()
    train(module, None, la.TrajectoryRecorder(tmp_path / "run"))
    assert len(module.named["losses"]) == 3  # those of the training, and not the recorder's
    assert all(entry["loss"].shape == () for entry in module.named["losses"])
    replay = Replay(la.Run(tmp_path / "run", module=make()))
    step = replay.step(0)
    theta = replay.initial[0].requires_grad_()
    assert step.losses(theta).requires_grad
    step.gradients(replay.initial[0].expand(3, -1), step.weights.expand(3, -1))
    twin: Any = replay.objective.submodule("")
    assert twin.outputs == []
    assert list(twin.named["losses"]) == twin.named["never"] == []
    assert not hasattr(twin, "last")


def test_a_copy_in_the_middle_of_a_step_has_no_trainer_and_no_graph() -> None:
    class Inner(pl.LightningModule):
        pass

    module = kind(collecting, collections)()
    module.inner = Inner()
    module._trainer = module.inner._trainer = module.mine = real = threading.Lock()  # as little to be copied as a trainer
    loss = module.net(torch.ones(2, FEATURES, dtype=torch.float64)).sum()
    module.outputs.append(loss)
    module.named["never"].append((loss, {"again": loss}))
    twin: Any = silent_copy(module, {"max_epochs": 7})
    assert module._trainer is module.inner._trainer is module.mine is real
    assert module.outputs[0] is loss
    assert twin.trainer is twin.inner.trainer is twin.mine
    assert twin.trainer.max_epochs == 7
    assert twin.outputs[0].grad_fn is None
    assert twin.named["never"][0][1]["again"] is twin.outputs[0]
    assert getattr(twin.trainer, "datamodule", None) is None


def annealing(hook: str) -> type[Plain]:
    """A loss whose weight, and a layer whose number, a hook changes; the loss's temperature comes down in every step."""

    def change(module: Any, *_: Any) -> None:
        module.weight = np.float64(0.5) * (1 + module.current_epoch)
        module.net[1].negative_slope = 0.1 * module.current_epoch

    def cool(module: Any, *_: Any) -> None:
        module.temperature *= 0.9

    def prepare(module: Any) -> None:
        module.weight, module.temperature, module.unused = 1.0, 2.0, None
        module.net[1] = nn.LeakyReLU(0.3)

    made = kind(lambda module, batch, loss: loss * module.weight / module.temperature, prepare)
    setattr(made, hook, change)
    made.on_train_batch_end = cool
    return made


@pytest.mark.parametrize("hook", ["on_train_epoch_start", "on_train_batch_start", "on_train_epoch_end"])
def test_what_hooks_set_is_what_it_was_in_each_step(tmp_path: Path, hook: str) -> None:
    make = annealing(hook)
    train(make(), None, la.TrajectoryRecorder(tmp_path / "run"))
    run = la.Run(tmp_path / "run", module=make())  # set as it was when the training began
    assert run.audit().ok
    names = {"weight", "temperature", "net.1.negative_slope"}
    assert run.manifest["settings"].keys() == run.manifest["final_settings"].keys() == names
    scores = la.score(run, "loo", SAMPLES, keep_shifts=True, ray_address=None, check=0)
    trained, held_out = [], (*data(n=16, seed=9).tensors, torch.arange(16))
    for removed in ([], *([sample] for sample in SAMPLES)):
        module, kept = make(), torch.ones(N, dtype=torch.float64)
        kept[removed] = 0
        theta = train(module, kept)
        module.kept = torch.ones(N, dtype=torch.float64)
        with torch.no_grad():
            trained.append((theta, float(module.training_step(held_out, 0))))
    (base, loss), *others = trained
    assert scores.shifts is not None
    for shift, value, (theta, other) in zip(scores.shifts, scores.values, others, strict=True):
        assert float((shift - (theta - base)).norm() / (theta - base).norm()) < 1e-9
        assert value == pytest.approx(other - loss, rel=1e-8), "the query reads what the last hook left"


def test_settings_that_stay_the_same_are_not_recorded(tmp_path: Path) -> None:
    train(Plain(), None, la.TrajectoryRecorder(tmp_path / "run"))
    assert "settings" not in la.Run(tmp_path / "run", module=Plain()).manifest


def test_settings_that_are_no_numbers_and_texts_are_not_seen() -> None:
    module = nn.Sequential(nn.Dropout(0.1))
    module.best, module.values, module.kind, module.far = 1.0, [1], "a", 2.0
    watched = Watched(module, {})
    assert watched.now() == {}
    module.best, module.values, module.kind, module.far = torch.ones(2), [2], "b", float("inf")
    module[0].p, module.later = True, 3
    assert watched.now() == {"kind": "b", "0.p": True}
    assert watched.first == {"kind": "a", "0.p": 0.1}
    module.kind, module[0].p = "a", np.float32(0.5)
    assert watched.now() == {"kind": "a", "0.p": 0.5}
    module.eval()
    assert watched.now() == {"kind": "a", "0.p": 0.5}


def test_a_module_without_a_layer_whose_settings_change_is_refused(tmp_path: Path) -> None:
    make = annealing("on_train_epoch_start")
    train(make(), None, la.TrajectoryRecorder(tmp_path / "run"))
    module = make()
    module.net = nn.ModuleDict({"0": module.net[0], "2": module.net[2]})
    with pytest.raises(
        la.RunError, match=r"no layer 'net.1', whose 'negative_slope' changes .*: give the one that was trained"
    ):
        la.Run(tmp_path / "run", module=module).audit()


@pytest.mark.parametrize("name", ["0._modules", "_forward_hooks", "training"])
def test_a_record_sets_nothing_that_is_torchs_own(name: str) -> None:
    with pytest.raises(la.RunError, match=rf"sets '{name}', in which torch keeps what is its own: restore the run"):
        set_to(nn.Sequential(nn.Linear(2, 2)), {name: {}})
