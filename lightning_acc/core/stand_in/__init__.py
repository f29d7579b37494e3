"""A copy of a LightningModule for replays, with stand-ins for what it had in training: trainer, logger, optimizers, metrics.

What a step reads of these to log, to print or to decide whether to, does no harm. What never changes in a training (how many
epochs, how many batches) is recorded and given. What a replay does not know is *no number*: where it finds its way into the
loss, the loss is none either, and the comparison with the training's own gradient refuses it. The step, the epoch and what
hooks have set the module to are those of the step that is taken again. And nothing that a step leaves behind on the copy is
there for the next.
"""

from lightning_acc.core.stand_in.attributes import Attributes
from lightning_acc.core.stand_in.copying import silent_copy, trainer_of
from lightning_acc.core.stand_in.settings import Settings, Watched, is_setting, put_into, set_to
from lightning_acc.core.stand_in.trainer import OF_BATCHES, SETTINGS, NotInReplays, Place, facts, place_at_end, place_in

__all__ = [
    "OF_BATCHES",
    "SETTINGS",
    "Attributes",
    "NotInReplays",
    "Place",
    "Settings",
    "Watched",
    "facts",
    "is_setting",
    "place_at_end",
    "place_in",
    "put_into",
    "set_to",
    "silent_copy",
    "trainer_of",
]
