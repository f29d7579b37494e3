"""What was recorded without a word and meant something else: refused with its cause, while what only looks like it passes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from problems import CLASSES, FEATURES, N, Net, data, make, record, trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset

import lightning_acc as la
from lightning_acc.recorder import RecordingRefused

pytestmark = pytest.mark.filterwarnings("ignore:Training has no validation data", "ignore:.*Skipping val loop")
WORDS, LENGTH, WIDTH = 12, 4, 6


def words(n: int = N) -> TensorDataset:
    generator = torch.Generator().manual_seed(2)
    labels = torch.randint(0, CLASSES, (n,), generator=generator)
    return TensorDataset(torch.randint(0, WORDS, (n, LENGTH), generator=generator), labels)


# ---- a term that no sample is in


class Tokens(pl.LightningModule):
    """Token ids, embedded; only a ``training_step``."""

    smoothing = 0.0

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, WIDTH)
        self.out = nn.Linear(WIDTH, CLASSES)
        self.scale = nn.Parameter(torch.tensor(0.3))

    def forward(self, ids: Tensor) -> Tensor:
        return self.out(self.words(ids).mean(1))

    def loss(self, ids: Tensor, labels: Tensor) -> Tensor:
        return nn.functional.cross_entropy(self(ids), labels, label_smoothing=self.smoothing)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss(*batch)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class L2(Tokens):
    def loss(self, ids: Tensor, labels: Tensor) -> Tensor:
        return super().loss(ids, labels) + 0.01 * sum(p.square().sum() for p in self.parameters())


class Orthogonal(Tokens):
    """A penalty added in place, as low-rank adapters do that choose their rank."""

    def loss(self, ids: Tensor, labels: Tensor) -> Tensor:
        loss = super().loss(ids, labels)
        weight = self.out.weight
        loss += 0.1 * torch.linalg.norm(weight @ weight.T - torch.eye(CLASSES, dtype=weight.dtype))
        return loss


class PenaltyFirst(Tokens):
    def loss(self, ids: Tensor, labels: Tensor) -> Tensor:
        loss = torch.zeros((), dtype=self.scale.dtype)
        loss += 0.01 * self.words.weight.abs().sum()
        loss += super().loss(ids, labels)
        return loss


class Nested(Tokens):
    def loss(self, ids: Tensor, labels: Tensor) -> Tensor:
        whole = (super().loss(ids, labels) + 0.02 * self.words.weight.square().mean() * 3) * 2
        return -(self.scale * whole / -0.3)


class Stacked(Tokens):
    def loss(self, ids: Tensor, labels: Tensor) -> Tensor:
        return torch.stack([super().loss(ids, labels), 0.1 * self.words.weight.square().mean()]).sum()


class OnlyALittle(Tokens):
    def loss(self, ids: Tensor, labels: Tensor) -> Tensor:
        return super().loss(ids, labels) + 1e-4 * self.out.bias.square().sum() + 1e-4 * self.words.weight.square().sum()


@pytest.mark.parametrize("kind", [L2, Orthogonal, PenaltyFirst, Nested, Stacked, OnlyALittle])
def test_a_penalty_beside_token_ids_is_refused(tmp_path: Path, kind: Any) -> None:
    torch.manual_seed(0)
    with pytest.raises(RecordingRefused, match=r"term to the loss that no sample is in; it makes .* % .*weight_decay") as error:
        record(tmp_path / "run", kind().double(), DataLoader(words(), 6), validation=False)
    assert "\n" not in str(error.value)


class Smoothed(Tokens):
    smoothing = 0.1


class Tied(Tokens):
    """The embedding is the last layer too."""

    def forward(self, ids: Tensor) -> Tensor:
        return (self.words(ids).mean(1) @ self.words.weight.T)[:, :CLASSES]


class Auxiliary(Tokens):
    def loss(self, ids: Tensor, labels: Tensor) -> Tensor:
        loss = torch.zeros((), dtype=self.scale.dtype)
        loss += super().loss(ids, labels)
        return loss + 0.1 * self.words(ids).square().mean() + 0 * self.scale


class Padded(Tokens):
    """Ids are written into a tensor that knew nothing of them."""

    def forward(self, ids: Tensor) -> Tensor:
        longer = torch.zeros(len(ids), LENGTH + 1, dtype=ids.dtype)
        longer[:, :LENGTH] = ids
        return super().forward(longer)

    def loss(self, ids: Tensor, labels: Tensor) -> Tensor:
        return super().loss(ids, labels) + 0.1 * self.words(ids).square().mean()


class Handwritten(Tokens):
    """Cross-entropy in two terms, and a scale that is trained."""

    def loss(self, ids: Tensor, labels: Tensor) -> Tensor:
        logits = self(ids) * self.scale.exp()
        return logits.logsumexp(1).mean() - logits.gather(1, labels[:, None]).mean()


class Transformer(Tokens):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(WIDTH, 2, 8, dropout=0.0, batch_first=True)

    def forward(self, ids: Tensor) -> Tensor:
        return self.out(self.layer(self.words(ids)).mean(1))


class TwoWords(Tokens):
    """Sums that the loss is made of nowhere near its end."""

    def forward(self, ids: Tensor) -> Tensor:
        return self.out(self.words(ids[:, 0]) + self.words.weight[0] * self.scale) + self.out.bias


@pytest.mark.parametrize("kind", [Tokens, Smoothed, Tied, Auxiliary, Padded, Handwritten, Transformer, TwoWords])
def test_a_loss_without_a_penalty_is_recorded(tmp_path: Path, kind: Any) -> None:
    torch.manual_seed(0)
    run = record(tmp_path / "run", kind().double(), DataLoader(words(), 6), validation=False)
    assert run.audit().ok
    assert run.manifest["loss"]["source"] == "reductions"


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
