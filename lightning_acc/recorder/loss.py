"""What the samples of a batch weigh in its loss, seen in the training's own forward pass."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_acc.core.losses.per_sample import weights_of
from lightning_acc.core.losses.reductions import Reductions


class LossTap:
    """Observes ``training_step`` where it is asked to; what it computes stays the same, bit for bit.

    Args:
        trainer: the Lightning trainer.
    """

    def __init__(self, trainer: Any) -> None:
        self._strategy = trainer.strategy
        self._size: int | None = None
        self._weights: Tensor | None = None
        step = self._strategy.training_step

        def observed(*args: Any, **kwargs: Any) -> Any:
            if self._size is None:
                return step(*args, **kwargs)
            with Reductions(self._size, weights_only=True) as reductions:
                output = step(*args, **kwargs)
            reduced = reductions.seen.of(output.get("loss") if isinstance(output, Mapping) else output)
            if reduced is not None:
                self._weights = weights_of(reduced, self._size, "weighted", torch.float64).detach().cpu().clone()
            return output

        self._strategy.training_step = observed

    def observe(self, size: int | None) -> None:
        """Observe the next step, on a batch of ``size`` samples; None: do not."""
        self._size, self._weights = size, None

    def take(self) -> Tensor | None:
        """What the samples of the batch weigh, (B,), float64; None where it was not observed or not seen."""
        weights, self._weights = self._weights, None
        return weights

    def remove(self) -> None:
        """Give the trainer its own method back."""
        vars(self._strategy).pop("training_step", None)
