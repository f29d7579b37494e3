"""An id means the same sample as long as the training lasts, also where its loader is built anew on the way."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from lightning_acc.recorder.checks.randomness import seeded
from lightning_acc.recorder.checks.refusals import RecordingRefused

ASKED = 64
"""Samples that the first data set and a later one are both asked for, at most."""


class Identity:
    """Follows the contents of samples where ``reload_dataloaders_every_n_epochs`` may bring another data set.

    Within one data set contents may differ from visit to visit (augmentation). Under another object the content of an id must
    be the one it had at first; where it is not, or the id is new, both data sets are asked for it under the same random
    numbers. The first data set is kept for that.
    """

    def __init__(self) -> None:
        self._first: Any = None
        self._contents: dict[int, int] = {}
        self._asked = 0

    def check(self, dataset: Any, ids: list[int], contents: list[int]) -> None:
        """See that samples ``ids``, with the numbers of their contents, are those they were.

        Raises:
            RecordingRefused: one is another sample.
        """
        if self._first is None:
            self._first = dataset
        if len(dataset) != len(self._first):
            raise RecordingRefused(
                f"The training loader was built anew over {len(dataset)} samples, but had {len(self._first)} at first, so an "
                f"id is not the same sample any more. {REMEDY}"
            )
        for sample, content in zip(ids, contents, strict=True):
            seen = sample in self._contents and self._contents[sample] == content
            if dataset is not self._first and not seen and self._differs(sample, dataset):
                raise RecordingRefused(
                    f"Sample {sample} is not the sample {sample} that was seen before: the training loader was built anew over "
                    f"a data set with another content there. {REMEDY}"
                )
            self._contents.setdefault(sample, content)

    def _differs(self, sample: int, dataset: Any) -> bool:
        if self._asked >= ASKED:
            return False
        self._asked += 1
        answers = []
        for asked in (self._first, dataset):
            with seeded(asked):
                try:
                    answers.append(asked[sample])
                except Exception:  # a file that has been closed, for one: then nothing is known
                    return False
        return not same(*answers)


REMEDY = (
    "Keep one data set with all samples for the whole training and choose each epoch's with a sampler, or leave "
    "reload_dataloaders_every_n_epochs out and record one run for each data set."
)


def same(a: Any, b: Any) -> bool:
    """Whether two samples are equal, whatever they are made of."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return same(a.detach().cpu().numpy(), b.detach().cpu().numpy()) if a.dtype == b.dtype else False
    if isinstance(a, np.ndarray) and isinstance(b, np.ndarray):
        return a.shape == b.shape and a.dtype == b.dtype and a.tobytes() == b.tobytes()
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    try:
        return bool(a == b) or (a != a and b != b)
    except Exception:
        return True  # it does not say
