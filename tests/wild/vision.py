"""Image classifiers: timm's networks as they are fine-tuned, and a ViT of Hugging Face."""

from __future__ import annotations

import contextlib
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
import types
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset, default_collate
from wild import LeavesOut, Setup


class _Named(type):
    """Classes that have every attribute; each is a class like them."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Named(name, (), {})


class _Empty(types.ModuleType):
    """A module in which every name is an empty class."""

    __path__: ClassVar[list[str]] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Named(name, (), {"__init__": lambda self, *_, **__: None, "__call__": lambda self, value: value})


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name: str, path: Sequence[str] | None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        is_torchvision = name.partition(".")[0] == "torchvision"
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if is_torchvision else None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return _Empty(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        return None


@contextlib.contextmanager
def _empty_torchvision() -> Iterator[None]:
    """In here ``torchvision`` can be imported and holds nothing; afterwards it is not there any more."""
    finder = _Finder()
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]


def installed_timm() -> Any:
    """The package timm, without its image transforms; skips where it is not installed."""
    if importlib.util.find_spec("timm") is None:
        pytest.skip("timm is not installed", allow_module_level=True)
    there = importlib.util.find_spec("torchvision") is not None
    with contextlib.nullcontext() if there else _empty_torchvision():
        for part in ("timm.data", "timm.loss", "timm.optim"):
            importlib.import_module(part)
    return sys.modules["timm"]


timm = installed_timm()
KEEP = {"batch_norm": "keep-batch-statistics"}
SMALL_VIT: dict[str, Any] = {"img_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2}


def images(n: int = 15, seed: int = 0, batch_size: int = 5, shuffle: bool = True, collate: Any = None) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(seed)
    data = TensorDataset(torch.randn(n, 3, 16, 16, generator=generator), torch.randint(0, 3, (n,), generator=generator))
    return DataLoader(data, batch_size, shuffle=shuffle, collate_fn=collate)


def held_out() -> DataLoader[Any]:
    return images(8, 1, 8, shuffle=False)


class Timm(pl.LightningModule):
    """A network by its name, label smoothing, timm's AdamW with layer decay or Lion."""

    network = "vit_tiny_patch16_224"
    options: ClassVar[dict[str, Any]] = {**SMALL_VIT, "drop_path_rate": 0.3, "proj_drop_rate": 0.1}
    smoothing = 0.1

    def __init__(self) -> None:
        super().__init__()
        self.model = timm.create_model(self.network, num_classes=3, **self.options)
        self.criterion = torch.nn.CrossEntropyLoss(label_smoothing=self.smoothing)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        loss = self.criterion(self.model(x), y)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        self.log("val_loss", self.criterion(self.model(x), y))

    def configure_optimizers(self) -> Any:
        optimizer = timm.optim.create_optimizer_v2(self, opt="adamw", lr=2e-3, weight_decay=0.05)
        return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 2)]


class TimmByHand(LeavesOut, Timm):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        logs = F.log_softmax(self.model(x), dim=1)
        right = -logs.gather(1, y[:, None])[:, 0]
        return self.mean((1 - self.smoothing) * right - self.smoothing * logs.mean(1))


class ResNet(Timm):
    """Residual blocks with batch normalisation and stochastic depth."""

    network = "resnet10t"
    options: ClassVar[dict[str, Any]] = {"channels": (8, 8, 16, 16), "stem_width": 8, "drop_path_rate": 0.2}

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4, nesterov=True)


class ResNetByHand(TimmByHand, ResNet):
    pass


class ConvNext(Timm):
    network = "convnext_atto"
    options: ClassVar[dict[str, Any]] = {"depths": (1, 1, 1, 1), "dims": (8, 8, 16, 16), "patch_size": 1, "drop_path_rate": 0.2}


class ConvNextByHand(TimmByHand, ConvNext):
    pass


class WithLion(Timm):
    """timm's Lion, whose update is the sign of an average; no biases of keys, whose gradient is 0 but for round-off."""

    options: ClassVar[dict[str, Any]] = {**SMALL_VIT, "drop_path_rate": 0.3, "qkv_bias": False}

    def configure_optimizers(self) -> Any:
        return timm.optim.Lion(self.parameters(), lr=1e-3, weight_decay=0.05)


class WithLionByHand(TimmByHand, WithLion):
    pass


def mixed(samples: list[Any]) -> Any:
    """Mixup, as in many collate functions: each image is blended with another one of the batch."""
    x, y = default_collate(samples)
    share, order = float(torch.distributions.Beta(0.8, 0.8).sample()), torch.randperm(len(x))
    one_hot = F.one_hot(y, 3).float()
    return share * x + (1 - share) * x[order], share * one_hot + (1 - share) * one_hot[order]


class Mixed(Timm):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        return None


class MixedByHand(LeavesOut, Mixed):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        target = (1 - self.smoothing) * y + self.smoothing / 3
        return self.mean(-(target * F.log_softmax(self.model(x), dim=1)).sum(1))


class MixedInStep(Timm):
    """timm's ``Mixup`` called in ``training_step``, as its training script does."""

    def __init__(self) -> None:
        super().__init__()
        from timm.data.mixup import Mixup

        self.mixup = Mixup(mixup_alpha=0.8, num_classes=3)
        self.soft = timm.loss.SoftTargetCrossEntropy()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = self.mixup(*batch)
        return self.soft(self.model(x), y)


class HuggingFaceViT(Timm):
    """transformers' ViT, with ``labels`` and ``outputs.loss``."""

    def __init__(self) -> None:
        pl.LightningModule.__init__(self)
        transformers = pytest.importorskip("transformers")
        config = transformers.ViTConfig(
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=24,
            image_size=16,
            patch_size=4,
            num_labels=3,
            hidden_dropout_prob=0.1,
            attention_probs_dropout_prob=0.1,
        )
        self.model = transformers.ViTForImageClassification(config).train()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.model(pixel_values=batch[0], labels=batch[1]).loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.model(pixel_values=batch[0], labels=batch[1]).loss)

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=2e-3)


class HuggingFaceViTByHand(LeavesOut, HuggingFaceViT):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        logits = self.model(pixel_values=batch[0]).logits
        return self.mean(F.cross_entropy(logits, batch[1], reduction="none"))


SETUPS: dict[str, Setup] = {
    "timm: ViT": Setup(
        "drop-path, dropout, label smoothing, AdamW with timm's groups, cosine schedule", Timm, images, TimmByHand, held_out
    ),
    "timm: ViT with Lion": Setup("timm's own optimizer Lion; drop-path", WithLion, images, WithLionByHand, held_out),
    "timm: ResNet": Setup(
        "batch normalisation (`keep-batch-statistics`), stochastic depth, SGD with Nesterov momentum",
        ResNet,
        images,
        ResNetByHand,
        held_out,
        recorder=KEEP,
        scores=False,
    ),
    "timm: ResNet without a word": Setup(
        "batch normalisation in training mode, nothing said about it",
        ResNet,
        images,
        refused="is a .*BatchNorm.* in training mode",
    ),
    "timm: ConvNeXt with EMA": Setup(
        "drop-path, layer scale, `EMAWeightAveraging` beside the trained weights",
        ConvNext,
        images,
        ConvNextByHand,
        held_out,
        callbacks=lambda: [pl.callbacks.EMAWeightAveraging(decay=0.9)],
        at="ema",
        double=False,  # Lightning keeps the average in float32 and passes the weights through it when it validates
    ),
    "timm: mixup in the collator": Setup(
        "rows made of two samples each",
        Mixed,
        lambda: images(collate=mixed),
        refused="A row of a batch is made of several samples",
    ),
    'timm: mixup, `mixed_rows="as-they-are"`': Setup(
        "a row counts as the sample whose index led to it",
        Mixed,
        lambda: images(collate=mixed),
        MixedByHand,
        recorder={"mixed_rows": "as-they-are"},
    ),
    "timm: mixup in the step": Setup(
        "`timm.data.Mixup` blends the samples of a batch, by NumPy's random numbers",
        MixedInStep,
        lambda: images(n=16, batch_size=4),
        refused="draws random numbers from Python or NumPy",
    ),
    "transformers: ViT": Setup("`outputs.loss`, dropout, patches", HuggingFaceViT, images, HuggingFaceViTByHand, held_out),
}
