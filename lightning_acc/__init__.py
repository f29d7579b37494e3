"""lightning_acc: which training samples made a PyTorch Lightning model better or worse?

``TrajectoryRecorder`` records a training run; ``Run`` opens the record; ``score`` answers, for every sample or group, what
this very run would have ended with without it; ``evaluate`` compares the estimates with true leave-one-out retraining.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_acc.core.audit import AuditReport
    from lightning_acc.core.optimizers import OptimizerRule, register_optimizer
    from lightning_acc.core.queries import Query
    from lightning_acc.errors import InfluenceError, RequestError, RunError
    from lightning_acc.judge.agreement import evaluate
    from lightning_acc.judge.cleaning import clean
    from lightning_acc.plan.forecast import plan
    from lightning_acc.record.record import Run
    from lightning_acc.recorder import TrajectoryRecorder
    from lightning_acc.scoring.score import score
    from lightning_acc.scoring.scores import Scores
    from lightning_acc.show.report import write_report

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
    "AuditReport": "core.audit",
    "InfluenceError": "errors",
    "OptimizerRule": "core.optimizers",
    "Query": "core.queries",
    "RequestError": "errors",
    "Run": "record.record",
    "RunError": "errors",
    "Scores": "scoring.scores",
    "TrajectoryRecorder": "recorder",
    "clean": "judge.cleaning",
    "evaluate": "judge.agreement",
    "plan": "plan.forecast",
    "register_optimizer": "core.optimizers",
    "write_report": "show.report",
    "score": "scoring.score",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
