"""A row of a batch is one sample: rows made of several are refused, or counted as they are; what only looks so passes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from problems import CLASSES, N, Net, data, fit, record
from test_penalties import WIDTH, WORDS, Tokens
from test_wrong_recordings import Noisy
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

import lightning_acc as la
from lightning_acc.recorder import RecordingRefused

pytestmark = pytest.mark.filterwarnings("ignore:Training has no validation data", "ignore:.*Skipping val loop")


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
    found = la.score(run, "loo", [3, 17], query, keep_shifts=True, ray_address=None, save=False, check=0).shifts
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


def counting_words(samples: list[Any]) -> Any:
    """Tells each row how many words its batch has."""
    lengths = torch.tensor([len(sample["ids"]) for sample in samples])
    return [*Padding()(samples), lengths.sum().expand(len(lengths))]


def one_hot(x: Tensor, y: Tensor) -> Any:
    return [x, nn.functional.one_hot(y, CLASSES).to(x.dtype), torch.arange(len(x))][:2]


def numbered(x: Tensor, y: Tensor) -> Any:
    """Each row knows its place."""
    return [x, y, torch.ones(len(x), dtype=x.dtype)]


class Counting(Tokens):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss(*batch[:2])


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
    "words counted in pairs": (Counting, lambda: DataLoader(Sentences(), 2, shuffle=True, collate_fn=counting_words)),
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
