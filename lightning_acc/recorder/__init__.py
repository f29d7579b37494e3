"""The recorder: knows Lightning and how to see each step; knows no method, no Ray, no W&B."""

from lightning_acc.recorder.recorder import TrajectoryRecorder
from lightning_acc.recorder.refusals import RecordingRefused

__all__ = ["RecordingRefused", "TrajectoryRecorder"]
