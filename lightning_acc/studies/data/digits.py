"""scikit-learn's handwritten digits: small, and on every machine."""

from __future__ import annotations

from functools import cached_property

import numpy as np

from lightning_acc.extras import extra
from lightning_acc.studies.data.base import Samples, StudyDataModule, png

N_TEST = 500


class DigitsDataModule(StudyDataModule):
    """scikit-learn's bundled handwritten digits: 1797 grey images of 8 x 8, as 64 numbers from 0 to 1.

    Of a fixed shuffling the last 500 are for testing. Feature noise adds Gaussian noise of standard deviation 0.5 to every
    pixel, cut off at 0 and 1.

    Args:
        n_train, n_val, batch_size, label_noise, class_dependent, feature_noise, seed, val_label_noise: see ``StudyDataModule``.
    """

    def __init__(
        self,
        n_train: int | None = 600,
        n_val: int = 500,
        batch_size: int = 100,
        label_noise: float = 0.1,
        class_dependent: bool = False,
        feature_noise: float = 0.0,
        seed: int = 0,
        val_label_noise: bool = False,
    ) -> None:
        super().__init__(n_train, n_val, None, batch_size, label_noise, class_dependent, feature_noise, seed, val_label_noise)
        self.class_names = [str(digit) for digit in range(10)]
        self.save_hyperparameters()

    @cached_property
    def _data(self) -> tuple[np.ndarray, np.ndarray]:
        with extra():
            from sklearn.datasets import load_digits
        images, labels = load_digits(return_X_y=True)
        order = np.random.default_rng(0).permutation(len(labels))
        return (images[order] / 16).astype(np.float32), labels[order].astype(np.int64)

    def candidates(self, split: str) -> np.ndarray:
        """The first 1297 for training and validation, the others for testing."""
        indices = np.arange(len(self._data[1]))
        return indices[:-N_TEST] if split == "train" else indices[-N_TEST:]

    def take(self, split: str, indices: np.ndarray, noisy: np.ndarray, random: np.random.Generator) -> Samples:
        """The images at ``indices``."""
        images, labels = (part[indices] for part in self._data)
        noise = 0.5 * random.standard_normal((int(noisy.sum()), images.shape[1]))
        images[noisy] = np.clip(images[noisy] + noise, 0, 1)
        return Samples(images, labels, {"image": [png(image.reshape(8, 8)) for image in images]})
