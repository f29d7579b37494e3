"""What was recorded without a word and meant something else: refused with its cause, while what only looks like it passes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from problems import CLASSES, FEATURES, N, Net, data, fit, make, record, trainer
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
    assert run.manifest["loss"]["source"] == "training_step"


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


# ---- rows that are no samples


class Mixable(Net):
    """Cross-entropy with labels or with rows of probabilities."""

    def per_sample_loss(self, batch: Any) -> Tensor:
        losses = nn.functional.cross_entropy(self.net(batch[0]), batch[1], reduction="none")
        return losses * batch[2] if len(batch) > 2 else losses


def mixup(x: Tensor, y: Tensor, *rest: Tensor, order: str = "random") -> list[Tensor]:
    y = nn.functional.one_hot(y, CLASSES).to(x.dtype)
    share = torch.distributions.Beta(0.4, 0.4).sample().to(x.dtype)
    other = torch.randperm(len(x)) if order == "random" else torch.arange(len(x)).flip(0)
    return [share * x + (1 - share) * x[other], share * y + (1 - share) * y[other], *rest]


def cutmix(x: Tensor, y: Tensor, *rest: Tensor) -> list[Tensor]:
    """Every other time, the last two features come from another sample."""
    if torch.rand(()) < 0.5:
        x = torch.cat([x[:, :-2], x[torch.randperm(len(x))][:, -2:]], 1)
    return [x, y, *rest]


class Collate:
    def __init__(self, change: Any) -> None:
        self.change = change

    def __call__(self, samples: list[Any]) -> Any:
        return self.change(*torch.utils.data.default_collate(samples))


def flipped(x: Tensor, y: Tensor) -> Any:
    return mixup(x, y, order="flipped")


def longest_first(samples: list[Any]) -> Any:
    """Sorted, as packed sequences were once asked for."""
    return torch.utils.data.default_collate(sorted(samples, key=lambda sample: -float(sample[0][0])))


class MixingModule(Mixable):
    mix = staticmethod(mixup)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return self.mix(*batch) if self.trainer.training else batch


class MixingBefore(MixingModule):
    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return cutmix(*batch)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return batch


class WholeBatches(Dataset[Any]):
    def __len__(self) -> int:
        return N

    def __getitem__(self, index: Any) -> Any:
        return list(data()[index])


def whole(change: Any) -> Any:
    sampler = torch.utils.data.BatchSampler(torch.utils.data.RandomSampler(range(N)), 6, drop_last=False)
    return DataLoader(WholeBatches(), batch_size=None, sampler=sampler, collate_fn=lambda batch: change(*batch))


MIXED: dict[str, tuple[Any, Any, str]] = {
    "mixup": (Mixable, lambda: DataLoader(data(), 6, collate_fn=Collate(mixup)), "the collate_fn Collate changes a row"),
    "mixup, flipped": (Mixable, lambda: DataLoader(data(), 6, collate_fn=Collate(flipped)), "the collate_fn Collate"),
    "mixup in pairs": (Mixable, lambda: DataLoader(data(), 2, collate_fn=Collate(mixup)), "the collate_fn Collate"),
    "cutmix": (Mixable, lambda: DataLoader(data(), 6, collate_fn=Collate(cutmix)), "the collate_fn Collate"),
    "mixup in workers": (Mixable, lambda: DataLoader(data(), 6, num_workers=2, collate_fn=Collate(mixup)), "the collate_fn Co"),
    "mixup of whole batches": (Mixable, lambda: whole(mixup), "the collate_fn whole"),
    "mixup on the device": (MixingModule, None, "MixingModule.on_after_batch_transfer changes a row"),
    "cutmix before": (MixingBefore, None, "MixingBefore.on_before_batch_transfer|MixingBefore.on_after_batch_transfer"),
    "sorted": (Mixable, lambda: DataLoader(data(), 6, collate_fn=longest_first), "not in the order .* longest_first sorts"),
}


@pytest.mark.parametrize("case", MIXED)
def test_rows_that_are_no_samples_are_refused(tmp_path: Path, case: str) -> None:
    kind, loader, message = MIXED[case]
    with pytest.raises(RecordingRefused, match=rf"{message}.*mixed_rows='as-they-are'") as error:
        record(tmp_path / "run", kind().double(), loader() if loader else None, validation=False)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("case", ["mixup", "mixup on the device"])
def test_mixed_rows_can_be_taken_as_they_are(tmp_path: Path, case: str) -> None:
    """A removed sample takes the rows out of the loss that its index led to: really retrained, with weight 0."""

    def train(kept: Tensor, *callbacks: Any) -> Tensor:
        torch.manual_seed(0)
        collate = Collate(mixup) if case == "mixup" else None
        loader = DataLoader(TensorDataset(*data().tensors, kept), 6, shuffle=True, collate_fn=collate)
        return fit(MIXED[case][0]().double(), loader, *callbacks, validation=False)

    everything = torch.ones(N, dtype=torch.float64)
    base = train(everything, la.TrajectoryRecorder(tmp_path / "run", mixed_rows="as-they-are"))
    assert torch.equal(base, train(everything))
    run = la.Run(tmp_path / "run")
    assert run.audit().max_abs_error == 0
    assert run.manifest["loss"]["mixed_rows"] == "as-they-are"
    query = la.Query("held-out", [data(n=8, seed=5)[:]])
    found = la.score(run, "loo", [3, 17], query, keep_shifts=True, ray_address=None, save=False).shifts
    assert found is not None
    for sample, shift in zip((3, 17), found, strict=True):
        kept = everything.clone()
        kept[sample] = 0
        change = train(kept) - base
        assert float((shift - change).norm() / change.norm()) < 1e-9


class Sentences(Dataset[Any]):
    """Token ids of different lengths."""

    def __len__(self) -> int:
        return N

    def __getitem__(self, i: int) -> Any:
        generator = torch.Generator().manual_seed(i)
        return {"ids": torch.randint(1, WORDS, (1 + i % 7,), generator=generator), "label": i % CLASSES}


class Padding:
    """Pads to the longest sentence of a batch (or to ``length``); may take features out of the samples, and mask some words."""

    def __init__(self, mask: float = 0.0, length: int = 7) -> None:
        self.mask, self.length = mask, length

    def __call__(self, samples: list[Any]) -> Any:
        ids = [sample.pop("ids") for sample in samples]
        longest = max(self.length, *map(len, ids))
        together = torch.stack([nn.functional.pad(each, (0, longest - len(each))) for each in ids])
        masked = torch.bernoulli(torch.full(together.shape, self.mask)).bool() & (together > 0)
        replaced = torch.where(torch.rand(together.shape) < 0.8, 0, torch.randint(1, WORDS, together.shape))
        return [torch.where(masked, replaced, together), torch.tensor([sample["label"] for sample in samples])]


class Normalising(Mixable):
    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return [(batch[0] - 0.5) / 2, *batch[1:]]


class Jittering(Mixable):
    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return [batch[0] + 0.1 * torch.randn_like(batch[0]), *batch[1:]]


def scaled(x: Tensor, y: Tensor) -> Any:
    return [x * torch.empty(len(x), 1, dtype=x.dtype).uniform_(0.5, 1.5), y]


def one_hot(x: Tensor, y: Tensor) -> Any:
    return [x, nn.functional.one_hot(y, CLASSES).to(x.dtype), torch.arange(len(x))][:2]


def numbered(x: Tensor, y: Tensor) -> Any:
    """Each row knows its place."""
    return [x, y, torch.ones(len(x), dtype=x.dtype)]


class Counted:
    """Counts its calls, and gives the count away."""

    calls = 0

    def __call__(self, samples: list[Any]) -> Any:
        self.calls += 1
        x, y = torch.utils.data.default_collate(samples)
        return [x + 0.01 * self.calls, y]


PASSING: dict[str, tuple[Any, Any]] = {
    "padding": (Tokens, lambda: DataLoader(Sentences(), 6, collate_fn=Padding())),
    "masked words": (Tokens, lambda: DataLoader(Sentences(), 6, shuffle=True, collate_fn=Padding(mask=0.3))),
    "masked words in workers": (Tokens, lambda: DataLoader(Sentences(), 6, num_workers=2, collate_fn=Padding(mask=0.3))),
    "pairs of sentences": (Tokens, lambda: DataLoader(Sentences(), 2, collate_fn=Padding(mask=0.3))),
    "augmentation": (Net, lambda: DataLoader(Noisy(), 6, shuffle=True)),
    "augmentation in the collate function": (Net, lambda: DataLoader(data(), 6, collate_fn=Collate(scaled))),
    "one-hot labels": (Mixable, lambda: DataLoader(data(), 6, collate_fn=Collate(one_hot))),
    "numbered rows": (Mixable, lambda: DataLoader(data(), 6, collate_fn=Collate(numbered))),
    "a collate function that counts": (Net, lambda: DataLoader(data(), 6, collate_fn=Counted())),
    "whole batches": (Net, lambda: whole(lambda x, y: [2 * x, y])),
    "normalising on the device": (Normalising, None),
    "augmentation on the device": (Jittering, None),
    "one sample a batch": (Net, lambda: DataLoader(data(n=5), 1, collate_fn=Collate(mixup))),
}


@pytest.mark.parametrize("case", PASSING)
def test_rows_that_are_samples_are_recorded(tmp_path: Path, case: str) -> None:
    kind, loader = PASSING[case]
    if case == "one sample a batch":  # mixed with itself
        kind = Mixable
    run = record(tmp_path / "run", kind().double(), loader() if loader else None, validation=False)
    assert run.audit().ok


class Ragged(Tokens):
    """Sentences of a batch are only as long as its longest."""

    def forward(self, ids: Tensor) -> Tensor:
        return self.out(self.words(ids).sum(1) / (ids > 0).sum(1, keepdim=True))

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, WIDTH, padding_idx=0)


def test_padding_to_the_longest_of_each_batch_is_recorded(tmp_path: Path) -> None:
    loader = DataLoader(Sentences(), 6, shuffle=True, collate_fn=Padding(length=0))
    assert record(tmp_path / "run", Ragged().double(), loader, validation=False).audit().ok


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

    (leaves, _), *_ = queries.read(run.store, "val").batches
    assert torch.equal(leaves["0"], data(n=16, seed=9).tensors[0])
    assert ("validate", False) in module.states
    assert ("validate", True) not in module.states
    (trained,) = run.batches(0)
    assert torch.equal(trained["0"], data().tensors[0][run.steps[0].sample_ids] + 1 + 1)
