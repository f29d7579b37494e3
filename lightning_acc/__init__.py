"""lightning_acc: which training samples made a PyTorch Lightning model better or worse?

``TrajectoryRecorder`` records a training run; ``Run`` opens the record; ``score`` answers, for every sample or group, what
this very run would have ended with without it; ``evaluate`` compares the estimates with true leave-one-out retraining.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_acc.agreement import evaluate
    from lightning_acc.audit import AuditReport
    from lightning_acc.cleaning import clean
    from lightning_acc.errors import InfluenceError, RequestError, RunError
    from lightning_acc.forecast import plan
    from lightning_acc.optimizers import OptimizerRule, register_optimizer
    from lightning_acc.queries import Query
    from lightning_acc.recorder import TrajectoryRecorder
    from lightning_acc.report import write_report
    from lightning_acc.scores import Scores
    from lightning_acc.scoring import score
    from lightning_acc.trajectory.run import Run

__all__ = [
    "AuditReport",
    "InfluenceError",
    "OptimizerRule",
    "Query",
    "RequestError",
    "Run",
    "RunError",
    "Scores",
    "TrajectoryRecorder",
    "clean",
    "evaluate",
    "plan",
    "register_optimizer",
    "score",
    "write_report",
]

# Imported when first used: Lightning takes seconds to import, and the mathematics runs where it is not installed.
_HOMES = {
    "AuditReport": "audit",
    "InfluenceError": "errors",
    "OptimizerRule": "optimizers",
    "Query": "queries",
    "RequestError": "errors",
    "Run": "trajectory.run",
    "RunError": "errors",
    "Scores": "scores",
    "TrajectoryRecorder": "recorder",
    "clean": "cleaning",
    "evaluate": "agreement",
    "plan": "forecast",
    "register_optimizer": "optimizers",
    "write_report": "report",
    "score": "scoring",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
