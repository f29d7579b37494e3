"""lightning_acc: which training samples made a PyTorch Lightning model better or worse?

``TrajectoryRecorder`` records a training run; ``Run`` opens the record; ``score`` answers, for every sample or group, what
this very run would have ended with without it; ``evaluate`` compares the estimates with true leave-one-out retraining.

The house, room by room; each may import those above it in this list, and none below (a test reads the imports):

* ``errors``, ``arguments``, ``credentials``, ``extras``, ``progress``, ``contract``: the ground floor. ``arguments`` checks
  what users pass, ``credentials`` hides what is secret; ``contract`` is all that a user's module may define, on one page.
* ``record``: the run directory as plain data. *Another file, another storage, another schema: here.*
* ``core``: F, the training step as a pure function, written once. *Another optimizer: a rule in* ``core.optimizers``.
  *Another kind of question: ``core.queries``. Another device or number format:* ``core.replay``, *which alone moves data.*
* ``recorder``: how Lightning's steps are seen (imports ``core`` and ``record`` alone). *Another kind of training: here.*
* ``methods``: a small class a method, and the sweeps. *Another method: its rule in* ``methods.rules``, *its entry in*
  ``methods.registry``.
* ``planning``: what each method will cost.
* ``scoring``: from a question to a table, or to a matrix of single predictions (``scoring.matrices``), and how far it can be
  trusted (``scoring.trust``). *Another backend beside this process and Ray:* ``scoring.cluster``.
* ``judge``: agreement with the truth, cleaning, what leaves the package.
* ``run``: ``la.Run``, a record with its verbs.
* ``show``: the page and W&B.
* ``studies``: our own experiments, and ``fit``.
* ``cli``: words to functions.
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
    from lightning_acc.planning.plan import plan
    from lightning_acc.recorder import TrajectoryRecorder
    from lightning_acc.recorder.ending import repair
    from lightning_acc.run import Run
    from lightning_acc.scoring.matrices import ScoreMatrix, score_matrix
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
    "ScoreMatrix",
    "Scores",
    "TrajectoryRecorder",
    "clean",
    "evaluate",
    "plan",
    "register_optimizer",
    "repair",
    "score",
    "score_matrix",
    "write_report",
]

# Imported when first used: Lightning takes seconds to import, and the mathematics runs where it is not installed.
_HOMES = {
    "AuditReport": "core.audit",
    "InfluenceError": "errors",
    "OptimizerRule": "core.optimizers",
    "Query": "core.queries",
    "RequestError": "errors",
    "Run": "run",
    "RunError": "errors",
    "ScoreMatrix": "scoring.matrices",
    "Scores": "scoring.scores",
    "TrajectoryRecorder": "recorder",
    "clean": "judge.cleaning",
    "evaluate": "judge.agreement",
    "plan": "planning.plan",
    "register_optimizer": "core.optimizers",
    "repair": "recorder.ending",
    "write_report": "show.report",
    "score": "scoring.score",
    "score_matrix": "scoring.matrices",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
