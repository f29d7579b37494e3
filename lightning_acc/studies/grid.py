"""The study's grid: which trainings it consists of."""

from __future__ import annotations

import importlib.metadata
import itertools
import json
from dataclasses import asdict, dataclass, field
from typing import Any

from lightning_acc import arguments
from lightning_acc.errors import RequestError
from lightning_acc.record.store import digest

DATA: dict[str, tuple[str, dict[str, Any]]] = {
    "adult": ("AdultDataModule", {}),
    "newsgroups": ("NewsgroupsDataModule", {}),
    "mnist": ("MNISTDataModule", {"digits": [1, 7]}),
    "digits": ("DigitsDataModule", {"label_noise": 0.0}),
}
MODELS: dict[str, dict[str, Any]] = {
    "logistic": {"hidden": ()},
    "relu": {"hidden": (8, 8), "activation": "relu"},
    "tanh": {"hidden": (8, 8), "activation": "tanh"},
    "gelu": {"hidden": (8, 8), "activation": "gelu"},
}
CORRUPTIONS: dict[str, str | None] = {"clean": None, "labels": "label_noise", "features": "feature_noise"}


@dataclass(frozen=True)
class Cell:
    """One training of the grid."""

    data: str
    model: str
    corruption: str
    epochs: int
    batch_size: int
    seed: int

    @property
    def name(self) -> str:
        """What its file is called."""
        return f"{self.data}-{self.model}-{self.corruption}-{self.epochs}x{self.batch_size}-{self.seed}"


@dataclass(frozen=True)
class Study:
    """The grid of cells and what they share.

    Args:
        directory: where the results are written, a local path or a URL that all workers can reach.
        data: adult, newsgroups (the two hardware groups), mnist (1 against 7), digits.
        models: logistic, or networks of 8 and 8 hidden units: relu, tanh, gelu.
        corruptions: clean, labels (a share of the labels flipped), features (a share of the samples made noisy).
        lengths: pairs of epochs and batch size.
        seeds: of the split, the corruption, the initial parameters and the order.
        n_train: training samples of a cell; all are removed in turn.
        lr: learning rate of plain SGD.
        share: of the training samples that are corrupted.
        dtype: precision of the replays.
        memory_gb: budget of each worker; auto as for the verb score.
    """

    directory: str
    data: list[str] = field(default_factory=lambda: ["adult", "newsgroups", "mnist"])
    models: list[str] = field(default_factory=lambda: ["logistic", "relu", "gelu"])
    corruptions: list[str] = field(default_factory=lambda: ["clean", "labels", "features"])
    lengths: list[tuple[int, int]] = field(default_factory=lambda: [(2, 100), (10, 100), (38, 100), (10, 20)])
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    n_train: int = 200
    lr: float = 0.1
    share: float = 0.2
    dtype: str = "float64"
    memory_gb: arguments.Budget = "auto"

    def cells(self) -> list[Cell]:
        """All cells, those of the first seed first, so that a study that is stopped early covers the grid.

        Raises:
            RequestError: a name is not known.
        """
        for what, names, known in (
            ("data", self.data, DATA),
            ("models", self.models, MODELS),
            ("corruptions", self.corruptions, CORRUPTIONS),
        ):
            for name in names:
                if name not in known:
                    raise RequestError(f"{what} has {name!r}, which the study does not know: choose from {', '.join(known)}.")
        lengths = [(int(epochs), int(batch)) for epochs, batch in self.lengths]
        grid = itertools.product(self.seeds, lengths, self.data, self.models, self.corruptions)
        return [Cell(data, model, corruption, *length, seed) for seed, length, data, model, corruption in grid]

    @property
    def key(self) -> str:
        """Hash of what the cells share; results under another one are computed again."""
        from lightning_acc.methods.registry import METHODS  # not before: it imports torch

        shared = {key: value for key, value in asdict(self).items() if key in ("n_train", "lr", "share", "dtype")}
        return digest(
            json.dumps({**shared, "methods": list(METHODS), "version": importlib.metadata.version("lightning-acc")}).encode()
        )[:12]
