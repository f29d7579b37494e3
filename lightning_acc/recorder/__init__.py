"""The recorder: knows Lightning and how to see each step; knows no method, no Ray, no W&B."""

from lightning_acc.recorder.checks.refusals import RecordingRefused
from lightning_acc.recorder.recorder import TrajectoryRecorder

__all__ = ["RecordingRefused", "TrajectoryRecorder"]
