"""scikit-learn's handwritten digits: small, and on every machine."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader

from lightning_acc.data.base import png
from lightning_acc.errors import RequestError


class DigitsDataModule(pl.LightningDataModule):
    """scikit-learn's bundled handwritten digits (1797 grey images of 8 x 8), a share of the training labels flipped.

    The flips are drawn uniformly from the other labels and told to the recorder, so that a ranking can be checked against
    them. Validation and test labels are never touched.

    Args:
        n_train: training samples; the rest is split evenly into validation and test.
        flipped: share of the training labels that are flipped, from 0 to 1.
        batch_size: samples in a training batch.
        seed: of the split and of the flips.
    """

    def __init__(self, n_train: int = 600, flipped: float = 0.1, batch_size: int = 100, seed: int = 0) -> None:
        super().__init__()
        if not 0 < n_train <= 1700:
            raise RequestError(f"n_train={n_train} is out of range: digits has 1797 samples, choose 1 to 1700.")
        if not 0 <= flipped <= 1:
            raise RequestError(f"flipped={flipped} is no share: choose from 0 to 1.")
        self.save_hyperparameters()
        self.n_train, self.flipped, self.batch_size, self.seed = n_train, flipped, batch_size, seed

    def setup(self, stage: str) -> None:
        """Load, split and flip; the same for the same ``seed``."""
        from datasets import Dataset
        from sklearn.datasets import load_digits

        images, labels = load_digits(return_X_y=True)
        random = np.random.default_rng(self.seed)
        order = random.permutation(len(labels))
        images, labels = (images[order] / 16).astype(np.float32), labels[order]
        middle = self.n_train + (len(labels) - self.n_train) // 2
        self.true_labels = labels[: self.n_train].copy()
        touched = random.choice(self.n_train, round(self.flipped * self.n_train), replace=False)
        labels[touched] = (labels[touched] + random.integers(1, 10, len(touched))) % 10
        parts = {"train": slice(0, self.n_train), "val": slice(self.n_train, middle), "test": slice(middle, None)}
        self.splits = {
            name: Dataset.from_dict({"image": images[part], "label": labels[part]}).with_format("torch")
            for name, part in parts.items()
        }

    def describe_samples(self) -> dict[str, Any]:
        """For the recorder: picture, label, true label and whether the label was flipped, a value for each sample."""
        train = self.splits["train"].with_format("numpy")
        labels = train["label"][:].tolist()
        return {
            "image": [png(image.reshape(8, 8)) for image in train["image"][:]],
            "label": [str(label) for label in labels],
            "true_label": [str(label) for label in self.true_labels],
            "corrupted": [bool(a != b) for a, b in zip(labels, self.true_labels, strict=True)],
        }

    def train_dataloader(self) -> DataLoader[Any]:
        """Shuffled batches (image (B, 64), label (B,))."""
        return self._loader("train", shuffle=True, batch_size=self.batch_size)

    def val_dataloader(self) -> DataLoader[Any]:
        """The validation split in one batch."""
        return self._loader("val")

    def test_dataloader(self) -> DataLoader[Any]:
        """The test split in one batch."""
        return self._loader("test")

    def _loader(self, split: str, shuffle: bool = False, batch_size: int | None = None) -> DataLoader[Any]:
        data = self.splits[split]
        return DataLoader(data, batch_size or len(data), shuffle=shuffle, collate_fn=_pairs)


def _pairs(rows: list[dict[str, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.stack([row["image"] for row in rows]), torch.stack([row["label"] for row in rows])
