"""What the studies' data modules share: drawing the splits, corrupting training samples, loaders, what is told of samples."""

from __future__ import annotations

import io
import os
from abc import abstractmethod
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader

from lightning_acc.errors import RequestError
from lightning_acc.extras import extra

DATA_VARIABLE = "LIGHTNING_ACC_DATA"
"""Environment variable: a folder with local copies, laid out as on the Hub (``<owner>/<name>/data/*.parquet``)."""


@dataclass
class Samples:
    """Some samples.

    Attributes:
        features: what the model sees, (n, ...), float32.
        labels: class numbers, (n,).
        described: for people: columns such as ``image`` (PNG bytes) or ``text``, a value for each sample.
    """

    features: np.ndarray
    labels: np.ndarray
    described: dict[str, list[Any]] = field(default_factory=dict)


class StudyDataModule(pl.LightningDataModule):
    """Draws training, validation and test samples, and corrupts a share of the training samples, all from one seed.

    Training and validation samples come from the data set's own training split, test samples from its test split. Only
    training samples are corrupted, and with ``val_label_noise`` validation labels; test samples never. Which training samples
    are is told to the recorder, so that a ranking can be checked against it.

    Args:
        n_train: training samples; None takes all that validation leaves.
        n_val: validation samples.
        n_test: test samples; None takes all.
        batch_size: samples in a training batch.
        label_noise: share of the training labels that are made wrong, from 0 to 1.
        class_dependent: flip labels of even classes only, c into c + 1, instead of uniformly into any other class. The share is
            still one of all labels, so that of the even classes a larger one is flipped; no more than there are.
        feature_noise: share of the training samples whose features are made noisy, from 0 to 1.
        seed: of the draw and of the corruption.
        val_label_noise: whether the validation labels are made wrong too, in the same way and by the same share. What is
            drawn otherwise stays the same.

    Raises:
        RequestError: a number is out of range, or the data set cannot be loaded.
    """

    class_names: list[str]
    val_from = "train"

    def __init__(
        self,
        n_train: int | None,
        n_val: int,
        n_test: int | None,
        batch_size: int,
        label_noise: float,
        class_dependent: bool,
        feature_noise: float,
        seed: int,
        val_label_noise: bool = False,
    ) -> None:
        super().__init__()
        for name, share in (("label_noise", label_noise), ("feature_noise", feature_noise)):
            if not 0 <= share <= 1:
                raise RequestError(f"{name}={share} is no share: choose from 0 to 1.")
        for name, count in (("n_train", n_train), ("n_val", n_val), ("n_test", n_test), ("batch_size", batch_size)):
            if count is not None and count < 1:
                raise RequestError(f"{name}={count} is too few: choose at least 1.")
        self.n_train, self.n_val, self.n_test, self.batch_size = n_train, n_val, n_test, batch_size
        self.label_noise, self.class_dependent, self.feature_noise = label_noise, class_dependent, feature_noise
        self.seed, self.val_label_noise = seed, val_label_noise

    @abstractmethod
    def candidates(self, split: str) -> np.ndarray:
        """Indices of the samples of ``train`` or ``test`` that may be drawn."""

    @abstractmethod
    def take(self, split: str, indices: np.ndarray, noisy: np.ndarray, random: np.random.Generator) -> Samples:
        """The samples at ``indices`` (n,), with noise in the features where ``noisy`` (n,) is True."""

    def setup(self, stage: str | None = None) -> None:
        """Load, draw and corrupt; always the same for the same ``seed``."""
        if hasattr(self, "splits"):
            return
        random = np.random.default_rng(self.seed)
        pool = random.permutation(self.candidates("train"))
        apart = 0 if self.val_from == "test" else self.n_val
        n_train = len(pool) - apart if self.n_train is None else self.n_train
        if n_train < 1 or n_train + apart > len(pool):
            raise RequestError(
                f"n_train={self.n_train} and n_val={self.n_val} ask for more than the {len(pool)} samples there are."
            )
        held_out = random.permutation(self.candidates("test"))
        if (self.n_test or 0) + self.n_val - apart > len(held_out):
            raise RequestError(
                f"n_test={self.n_test}{'' if apart else f' and n_val={self.n_val}'} asks for more than the {len(held_out)} "
                "test samples there are."
            )
        noisy = self._choose(n_train, self.feature_noise, random)
        none = np.zeros(len(pool) + len(held_out), dtype=bool)
        train = self.take("train", pool[:n_train], noisy, random)
        if apart:
            val = self.take("train", pool[n_train : n_train + self.n_val], none[: self.n_val], random)
        else:
            val = self.take("test", held_out[-self.n_val :], none[: self.n_val], random)
            held_out = held_out[: -self.n_val]
        test = held_out[: self.n_test]
        self.true_labels = train.labels.copy()
        self._flip(train.labels, random)
        self.corrupted = noisy | (train.labels != self.true_labels)
        self.true_val_labels = val.labels.copy()
        if self.val_label_noise:
            # From random numbers of its own: the test samples' are the same with and without it.
            self._flip(val.labels, np.random.default_rng([self.seed, 1]))
        self.splits = {"train": train, "val": val, "test": self.take("test", test, none[: len(test)], random)}

    @property
    def n_features(self) -> int:
        """Numbers a sample has."""
        self.setup()
        return int(np.prod(self.splits["train"].features.shape[1:]))

    @staticmethod
    def _choose(n: int, share: float, random: np.random.Generator, among: np.ndarray | None = None) -> np.ndarray:
        chosen = np.zeros(n, dtype=bool)
        pool = np.arange(n) if among is None else among
        chosen[random.choice(pool, min(round(share * n), len(pool)), replace=False)] = True
        return chosen

    def _flip(self, labels: np.ndarray, random: np.random.Generator) -> None:
        k = len(self.class_names)
        can_follow = np.flatnonzero((labels % 2 == 0) & (labels + 1 < k)) if self.class_dependent else None
        flipped = self._choose(len(labels), self.label_noise, random, can_follow)
        shift = 1 if self.class_dependent else random.integers(1, k, flipped.sum())
        labels[flipped] = (labels[flipped] + shift) % k

    def describe_samples(self) -> dict[str, Any]:
        """For the recorder: label, true label, whether corrupted, and what there is to see, a value for each sample."""
        train = self.splits["train"]
        return {
            **train.described,
            "label": [self.class_names[label] for label in train.labels],
            "true_label": [self.class_names[label] for label in self.true_labels],
            "corrupted": self.corrupted.tolist(),
        }

    def describe_examples(self, query: str) -> dict[str, Any] | None:
        """For the recorder: the same of the examples of ``val``, and of ``test``, of which none is corrupted."""
        if query not in ("val", "test"):
            return None
        examples = self.splits[query]
        true = self.true_val_labels if query == "val" else examples.labels
        return {
            **examples.described,
            "label": [self.class_names[label] for label in examples.labels],
            "true_label": [self.class_names[label] for label in true],
            "corrupted": (examples.labels != true).tolist(),
        }

    def train_dataloader(self) -> DataLoader[Any]:
        """Shuffled batches (features (B, ...), labels (B,))."""
        return self._loader("train", self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader[Any]:
        """The validation split in batches of up to 1000."""
        return self._loader("val", 1000)

    def test_dataloader(self) -> DataLoader[Any]:
        """The test split in batches of up to 1000."""
        return self._loader("test", 1000)

    def _loader(self, split: str, batch_size: int, shuffle: bool = False) -> DataLoader[Any]:
        samples = self.splits[split]
        data = torch.utils.data.TensorDataset(torch.from_numpy(samples.features), torch.from_numpy(samples.labels))
        return DataLoader(data, batch_size, shuffle=shuffle)


def load(name: str, path: str | None, split: str) -> Any:
    """A split of a Hugging Face data set.

    Args:
        name: its name on the Hub, ``owner/name``.
        path: another name or a local folder of the same layout; None takes the folder ``name`` in $LIGHTNING_ACC_DATA
            where that is set, else the Hub.
        split: ``train`` or ``test``.

    Raises:
        RequestError: it cannot be loaded.
    """
    with extra():
        import datasets
    if path is None:
        copies = os.environ.get(DATA_VARIABLE)
        path = os.path.join(copies, name) if copies and os.path.isdir(os.path.join(copies, name)) else name
    try:
        with _quiet(datasets):
            return datasets.load_dataset(path, split=split)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        first = str(error).strip().partition("\n")[0].rstrip(".")
        raise RequestError(
            f"The data set {path!r} cannot be loaded ({type(error).__name__}: {first}): reach the Hub, give path= a local copy "
            f"of the same layout, or set {DATA_VARIABLE} to the folder that holds {name}."
        ) from error


class _quiet:  # noqa: N801 (reads as a word)
    """In here ``datasets`` draws no progress bars."""

    def __init__(self, datasets: Any) -> None:
        self._datasets = datasets

    def __enter__(self) -> None:
        self._shown = self._datasets.are_progress_bars_disabled()
        self._datasets.disable_progress_bars()

    def __exit__(self, *_: Any) -> None:
        if not self._shown:
            self._datasets.enable_progress_bars()


def png(image: np.ndarray) -> bytes:
    """A grey image with values from 0 (black) to 1, as a PNG file."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray((255 * np.clip(image, 0, 1)).round().astype(np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()
