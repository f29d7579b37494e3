"""Which checkpoints a training has written and kept, and how many steps the parameters in each have taken.

Lightning tells callbacks of a checkpoint before there is a file, and without its path; so the strategy, which writes and
deletes the files, is asked on the way. What goes wrong here leaves a checkpoint out of the list, and nothing else.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Mapping
from typing import Any

import torch

from lightning_acc.record.manifest import NAMED_CHECKPOINTS
from lightning_acc.record.schema.kinds import TEXT


class Checkpoints:
    """The checkpoints of one training, in the process that writes them.

    Args:
        taken: how many recorded steps the parameters have taken by now; None where they are not of the record.
        changed: is called when the list has changed.
    """

    def __init__(self, taken: Callable[[], int | None], changed: Callable[[], None]) -> None:
        self._taken, self._changed = taken, changed
        self._steps: dict[str, int] = {}
        """By path, in the order they were written."""
        self._trainer: Any = None
        self._strategy: Any = None

    def install(self, trainer: Any) -> None:
        """See every checkpoint ``trainer`` writes or deletes from now on."""
        strategy = self._strategy = trainer.strategy
        self._trainer = trainer
        save, remove = strategy.save_checkpoint, strategy.remove_checkpoint

        def save_and_note(checkpoint: dict[str, Any], filepath: Any, *args: Any, **options: Any) -> None:
            step = None
            with contextlib.suppress(Exception):
                step = self._taken() if self._is_of_the_training(checkpoint) else None
            save(checkpoint, filepath, *args, **options)
            with contextlib.suppress(Exception):
                self._note(os.fspath(filepath), step)

        def remove_and_note(filepath: Any, *args: Any, **options: Any) -> None:
            remove(filepath, *args, **options)
            with contextlib.suppress(Exception):
                self._note(os.fspath(filepath), None)

        strategy.save_checkpoint, strategy.remove_checkpoint = save_and_note, remove_and_note

    def remove(self) -> None:
        """Undo ``install``."""
        if self._strategy is not None:
            for name in ("save_checkpoint", "remove_checkpoint"):
                vars(self._strategy).pop(name, None)
            self._strategy = None

    def resume(self, before: Mapping[str, int], path: Any, n_steps: int) -> None:
        """Go on with what was listed ``before``, from the checkpoint at ``path``, written after ``n_steps``.

        What was written later is of a training that is continued otherwise now.
        """
        listed = {name: step for name, step in before.items() if name not in NAMED_CHECKPOINTS and step <= n_steps}
        self._steps = {name: step for name, step in listed.items() if _may_exist(name)}
        if path is not None:
            self._note(os.fspath(path), n_steps)

    def listed(self, check: bool = False) -> dict[str, int]:
        """Steps by path, and of the ``best``, as the manifest has them.

        Args:
            check: leave out local files that are not there any more.
        """
        callbacks = self._trainer.checkpoint_callbacks if self._trainer is not None else []
        held = {path for callback in callbacks for path in _held(callback)}
        steps = {path: step for path, step in self._steps.items() if not check or path in held or _may_exist(path)}
        targets = {os.path.realpath(path): step for path, step in steps.items()}
        for path in sorted(held - set(steps)):  # a link to another, which Lightning makes by itself
            if os.path.islink(path) and os.path.realpath(path) in targets:
                steps[path] = targets[os.path.realpath(path)]
        bests = [str(c.best_model_path) for c in callbacks if getattr(c, "monitor", None) and getattr(c, "best_model_path", "")]
        return {"best": steps[bests[0]], **steps} if bests and bests[0] in steps else steps

    def _note(self, path: str, step: int | None) -> None:
        """The file at ``path`` holds what the parameters were after ``step``; None: something else, or it is gone."""
        before = self._steps.pop(path, None)
        if step is not None and TEXT.holds(path) and path not in NAMED_CHECKPOINTS:
            self._steps[path] = step
        if step is not None or before is not None:
            self._changed()

    def _is_of_the_training(self, checkpoint: Mapping[str, Any]) -> bool:
        """Whether the checkpoint has the module's own parameters, and not an average, say, in their place."""
        stored = checkpoint.get("state_dict", {})
        own = self._trainer.lightning_module.named_parameters()
        return all(torch.equal(stored[name].to(value.device), value) for name, value in own if name in stored)


def _held(callback: Any) -> list[str]:
    """What a ModelCheckpoint says it keeps; nothing of other callbacks that write checkpoints."""
    paths = [getattr(callback, name, "") for name in ("best_model_path", "last_model_path")]
    return [str(path) for path in [*paths, *getattr(callback, "best_k_models", {})] if path]


def _may_exist(path: str) -> bool:
    return "://" in path or os.path.exists(path)
