"""The samples of a batch by the ids it holds, as ``TrajectoryRecorder(..., sample_id=...)`` says where to find them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from torch import Tensor

from lightning_acc.arguments import index, shown
from lightning_acc.errors import RequestError
from lightning_acc.record.samples.names import Name
from lightning_acc.recorder.checks.refusals import RecordingRefused

SampleId = str | int | Callable[[Any], Any]
"""A key of a batch that is a dict, or an attribute; a place in a tuple or list; or a function of the batch."""


class BatchNames:
    """Reads the ids of samples from batches.

    Args:
        where: the recorder's argument ``sample_id``.

    Attributes:
        words: the argument, as the manifest has it.

    Raises:
        RequestError: it is nothing of the kind.
    """

    def __init__(self, where: SampleId) -> None:
        place = index(where)
        if not (isinstance(where, str) or callable(where) or place is not None):
            raise RequestError(
                f"sample_id={shown(where)} does not say where the ids are: give a key of the batch, a place in it, or a "
                "function of it."
            )
        self._where = where if place is None else place
        self.words = where if isinstance(where, str) and where.isprintable() else shown(where)
        if callable(where):
            self.words = "a function of the batch"

    def names(self, batch: Any, size: int) -> list[Name]:
        """The ids of the samples of a batch of ``size`` rows, in order.

        Raises:
            RecordingRefused: it has none, or they are no integers or texts, one for each row.
        """
        found = self._found(batch)
        if isinstance(found, (Tensor, np.ndarray)):
            if found.ndim != 1:
                raise self._refusal(f"are of shape {tuple(found.shape)} and not one for each row")
            found = found.tolist()
        if not isinstance(found, (list, tuple)):
            raise self._refusal(f"are {shown(found)} and not one for each row")
        if len(found) != size:
            raise self._refusal(f"are {len(found)}, but its batch has {size} rows")
        return [self._name(one) for one in found]

    def _found(self, batch: Any) -> Any:
        where = self._where
        if callable(where):
            try:
                return where(batch)
            except Exception as error:
                raise RecordingRefused(
                    f"The function sample_id fails on a training batch ({type(error).__name__}: "
                    f"{' '.join(str(error).split())[:200]}): let it give the ids of the batch's rows."
                ) from error
        try:
            if isinstance(where, int) or isinstance(batch, Mapping):
                return batch[where]
            return getattr(batch, where)
        except (LookupError, AttributeError, TypeError) as error:
            keys = f" with the keys {', '.join(map(repr, batch))}" if isinstance(batch, Mapping) else ""
            raise RecordingRefused(
                f"A training batch has no sample_id={where!r}, for it is a {type(batch).__name__}{keys}: name a key of a dict, "
                "a place in a tuple or an attribute, or give a function of the batch."
            ) from error

    def _name(self, one: Any) -> Name:
        if isinstance(one, str):
            try:
                one.encode()
            except UnicodeEncodeError:
                raise self._refusal(f"hold {shown(one)}, which is no text in UTF-8") from None
            return str(one)
        number = index(one)
        if number is None:
            raise self._refusal(f"hold {shown(one)}, which is neither an integer nor a text")
        return number

    def _refusal(self, words: str) -> RecordingRefused:
        return RecordingRefused(
            f"The ids of samples in a training batch (sample_id={self.words}) {words}: let the data set give every sample an "
            "integer or a text that is its own."
        )
