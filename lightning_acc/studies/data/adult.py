"""Adult (Census Income): who earned more than 50 000 dollars a year in 1994?"""

from __future__ import annotations

from typing import Any

import numpy as np

from lightning_acc.studies.data.base import Samples, StudyDataModule, load

NAME = "scikit-learn/adult-census-income"
NUMERIC = ("age", "education.num", "capital.gain", "capital.loss", "hours.per.week")
CATEGORIES = ("workclass", "marital.status", "occupation", "relationship", "race", "sex", "native.country")


class AdultDataModule(StudyDataModule):
    """Census answers as 91 numbers: standardised quantities and one-hot categories.

    Capital gain and loss enter as log(1 + x). A missing answer (``?``) is a category of its own. Left out are ``fnlwgt``,
    a survey weight, and ``education``, which ``education.num`` repeats. Means, spreads and categories are those of the whole
    training split. Feature noise adds Gaussian noise of ``noise_scale`` to every number.

    Args:
        path: a name on the Hub or a local folder of its layout; None: ``scikit-learn/adult-census-income``, from
            $LIGHTNING_ACC_DATA where that is set.
        n_train, n_val, n_test, batch_size, label_noise, class_dependent, feature_noise, seed, val_label_noise: see
            ``StudyDataModule``.
        noise_scale: standard deviation of the feature noise.
    """

    def __init__(
        self,
        path: str | None = None,
        n_train: int | None = 200,
        n_val: int = 200,
        n_test: int | None = 2000,
        batch_size: int = 100,
        label_noise: float = 0.0,
        class_dependent: bool = False,
        feature_noise: float = 0.0,
        noise_scale: float = 1.0,
        seed: int = 0,
        val_label_noise: bool = False,
    ) -> None:
        super().__init__(n_train, n_val, n_test, batch_size, label_noise, class_dependent, feature_noise, seed, val_label_noise)
        self.class_names = ["<=50K", ">50K"]
        self.path, self.noise_scale = path, noise_scale
        self.save_hyperparameters()
        self._tables: dict[str, Any] = {}

    def _table(self, split: str) -> Any:
        if split not in self._tables:
            self._tables[split] = load(NAME, self.path, split).to_pandas()
        return self._tables[split]

    def candidates(self, split: str) -> np.ndarray:
        """All of them."""
        return np.arange(len(self._table(split)))

    def take(self, split: str, indices: np.ndarray, noisy: np.ndarray, random: np.random.Generator) -> Samples:
        """The rows at ``indices`` as numbers; described in words, and answer by answer."""
        train, rows = self._table("train"), self._table(split).iloc[indices]
        columns = []
        for name in NUMERIC:
            scale = np.log1p if name.startswith("capital") else np.asarray
            known = scale(train[name].to_numpy(np.float64))
            columns.append((scale(rows[name].to_numpy(np.float64)) - known.mean()) / known.std())
        for name in CATEGORIES:
            columns += [(rows[name] == value).to_numpy(np.float64) for value in sorted(train[name].unique())]
        features = np.stack(columns, 1)
        features[noisy] += self.noise_scale * random.standard_normal((int(noisy.sum()), features.shape[1]))
        words = [
            f"{row['age']} years, {row['sex']}, {row['race']}, {row['marital.status']}, {row['education']}, "
            f"{row['workclass']}, {row['occupation']}, {row['hours.per.week']} hours a week, from {row['native.country']}"
            for _, row in rows.iterrows()
        ]
        labels = (rows["income"] == ">50K").to_numpy(np.int64)
        asked = {name: rows[name].tolist() for name in (*NUMERIC, "education", *CATEGORIES)}
        return Samples(features.astype(np.float32), labels, {"text": words, **asked})
