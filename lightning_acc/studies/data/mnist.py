"""MNIST: handwritten digits, all ten or a pair of them."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np

from lightning_acc.errors import RequestError
from lightning_acc.studies.data.base import Samples, StudyDataModule, load, png

NAME = "ylecun/mnist"


class MNISTDataModule(StudyDataModule):
    """Images (1, 28, 28) with pixels from 0 to 1; pixels that are the same in all images stay as they are, at 0.

    Feature noise adds Gaussian noise of ``noise_scale`` to every pixel, cut off at 0 and 1.

    Args:
        path: a name on the Hub or a local folder of its layout; None: ``ylecun/mnist``, from $LIGHTNING_ACC_DATA where that
            is set.
        digits: the classes, such as ``[1, 7]``; None takes all ten.
        n_train, n_val, n_test, batch_size, label_noise, class_dependent, feature_noise, seed, val_label_noise: see
            ``StudyDataModule``.
        noise_scale: standard deviation of the feature noise.
        val_from: where the validation images are taken from: ``train``, or ``test``, which leaves all 60 000 for training.
    """

    def __init__(
        self,
        path: str | None = None,
        digits: list[int] | None = None,
        n_train: int | None = 200,
        n_val: int = 200,
        n_test: int | None = 2000,
        batch_size: int = 100,
        label_noise: float = 0.0,
        class_dependent: bool = False,
        feature_noise: float = 0.0,
        noise_scale: float = 0.5,
        seed: int = 0,
        val_from: Literal["train", "test"] = "train",
        val_label_noise: bool = False,
    ) -> None:
        super().__init__(n_train, n_val, n_test, batch_size, label_noise, class_dependent, feature_noise, seed, val_label_noise)
        self.path, self.noise_scale, self.val_from = path, noise_scale, val_from
        self.digits = list(range(10)) if digits is None else list(digits)
        if len(set(self.digits)) < 2 or not set(self.digits) <= set(range(10)):
            raise RequestError(f"digits={digits} is no choice of classes: name at least two digits from 0 to 9.")
        self.class_names = [str(digit) for digit in self.digits]
        self.save_hyperparameters()
        self._data: dict[str, Any] = {}

    def _load(self, split: str) -> tuple[Any, np.ndarray]:
        if split not in self._data:
            data = load(NAME, self.path, split)
            self._data[split] = data, np.array(data["label"])
        found: tuple[Any, np.ndarray] = self._data[split]
        return found

    def candidates(self, split: str) -> np.ndarray:
        """The images of the chosen digits."""
        return np.flatnonzero(np.isin(self._load(split)[1], self.digits))

    def take(self, split: str, indices: np.ndarray, noisy: np.ndarray, random: np.random.Generator) -> Samples:
        """The images at ``indices``."""
        data, labels = self._load(split)
        pictures = [np.asarray(image, dtype=np.float32) / 255 for image in data.select(indices)["image"]]
        images = np.stack(pictures) if pictures else np.zeros((0, 28, 28), np.float32)
        noise = self.noise_scale * random.standard_normal((int(noisy.sum()), 28, 28))
        images[noisy] = np.clip(images[noisy] + noise, 0, 1)
        numbers = np.array([self.digits.index(label) for label in labels[indices]], dtype=np.int64)
        described = {"image": [png(image) for image in images]} if split == "train" else {}
        return Samples(images[:, None], numbers, described)
