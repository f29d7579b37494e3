"""SGD-IE's score of a sample is a sum over the steps that saw it: here the terms of chosen samples are kept apart."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lightning_acc.core.products import Point, Pulled
from lightning_acc.methods.rules import AdjointSgdIe


class AdjointVisits(AdjointSgdIe):
    """SGD-IE's reverse sweep, which also keeps ``sum_i -w_i <g_i, gamma_t>`` of each step for the samples i in ``samples``.

    Args:
        samples: ids (m,).
        n_samples: of the run.
        n_steps: of the run.
        watch: told each step's number and the parameters (p,) before it.

    Attributes:
        visits: one entry per step that saw any of the samples, the last step first: the step, the samples and their terms.
    """

    def __init__(self, samples: Tensor, n_samples: int, n_steps: int, watch: Callable[[int, Tensor], object]) -> None:
        self.samples, self.watch = samples, watch
        self.visits: list[tuple[int, Tensor, Tensor]] = []
        self._n_samples, self._step = n_samples, n_steps

    def see(self, point: Point, pulled: Pulled) -> None:
        """One step back."""
        self._step -= 1
        self.watch(self._step, point.state[0])
        ids = point.step.sample_ids
        seen = self.samples[torch.isin(self.samples, ids)]
        if len(seen):
            terms = -point.step.weights * pulled.slopes
            terms = terms.new_zeros(self._n_samples).index_add_(0, ids.to(terms.device), terms).cpu()
            self.visits.append((self._step, seen, terms[seen]))
