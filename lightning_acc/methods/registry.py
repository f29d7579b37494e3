"""The registry: every method, once. To add one, write its rule and add its entry here; all else asks this list."""

from __future__ import annotations

from lightning_acc import arguments
from lightning_acc.core.replay import Replay
from lightning_acc.methods.low_rank.entry import LowRank
from lightning_acc.methods.memory import Copies
from lightning_acc.methods.method import Method
from lightning_acc.methods.rules import AccSgdIe, AdjointSgdIe, AdjointTracIn, SgdIe, TracIn
from lightning_acc.methods.swept import RETRAINING, Swept

METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        RETRAINING,
        Swept("acc-sgd-ie", AccSgdIe, Copies(9, 6)),
        LowRank(),
        Swept("sgd-ie", SgdIe, Copies(0, 6, tangents=9), AdjointSgdIe, differentiates=True),
        Swept("tracin", TracIn, Copies(0, 1, tangents=9), AdjointTracIn, is_baseline=True, differentiates=True),
    )
}
"""By name: the truth, then the estimates, the most faithful first."""

TRUTH = next(method.name for method in METHODS.values() if method.is_truth)


def find(name: str) -> Method:
    """The method ``name``.

    Raises:
        RequestError: there is none.
    """
    return METHODS[arguments.choice("method", name, METHODS)]


def least_bytes(method: Method, replay: Replay, each: bool = False) -> int:
    """Bytes without which not one removal can be scored and retrained without; ``each``: of one example of the query."""
    return max(method.least_bytes(replay, each), METHODS[TRUTH].least_bytes(replay))


def is_truth(name: str) -> bool:
    """Whether the method ``name`` is what the others estimate."""
    return name == TRUTH


def is_ranking(name: str) -> bool:
    """Whether the method ``name`` estimates, and is no mere baseline."""
    return not (METHODS[name].is_truth or METHODS[name].is_baseline)


def place(name: str) -> int:
    """Where a method stands in the registry: the smaller, the more faithful. Behind all, where it is none of these."""
    return list(METHODS).index(name) if name in METHODS else len(METHODS)
