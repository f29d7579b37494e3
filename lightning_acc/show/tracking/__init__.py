"""W&B: rankings, agreement, cleaning, influence over time and cost as one run. The only part that imports wandb."""

from lightning_acc.show.tracking.connection import finish, group_of, last_part, logger_options, mode, name_of
from lightning_acc.show.tracking.dashboard import track
from lightning_acc.show.tracking.driver import Live, live
from lightning_acc.show.tracking.layout import workspace
from lightning_acc.show.tracking.opening import dashboards
from lightning_acc.show.tracking.report import report

__all__ = [
    "Live",
    "dashboards",
    "finish",
    "group_of",
    "last_part",
    "live",
    "logger_options",
    "mode",
    "name_of",
    "report",
    "track",
    "workspace",
]
