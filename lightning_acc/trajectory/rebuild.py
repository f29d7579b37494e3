"""From a module to the words that name it in the manifest, and back."""

from __future__ import annotations

import importlib
import inspect
import json
import sys
import weakref
from typing import Any

import torch

from lightning_acc.errors import RunError

REMEDY = (
    "call self.save_hyperparameters() in its __init__, with arguments JSON can hold, or open the run as Run(path, module=...)"
)


LIVE: weakref.WeakValueDictionary[str, torch.nn.Module] = weakref.WeakValueDictionary()
"""Modules recorded in this process that are still in use, by the id of their run: a notebook need not rebuild them."""


def describe(module: torch.nn.Module) -> dict[str, Any]:
    """Class and hyper-parameters of a LightningModule, as the manifest keeps them; values JSON cannot hold are left out."""
    kind = type(module)
    saved = {}
    # A subclass with an __init__ of its own inherits hyper-parameters it does not take.
    taken = inspect.signature(kind.__init__).parameters.values()
    anything = any(parameter.kind is parameter.VAR_KEYWORD for parameter in taken)
    for key, value in dict(getattr(module, "hparams", {})).items():
        try:
            saved[key] = json.loads(json.dumps(value))
        except (TypeError, ValueError):
            continue
    names = {parameter.name for parameter in taken}
    # LightningCLI saves where the module came from beside its arguments, under names with an underscore.
    saved = {key: value for key, value in saved.items() if not key.startswith("_") and (anything or key in names)}
    return {"class": f"{kind.__module__}:{kind.__qualname__}", "hyper_parameters": saved}


def build(description: dict[str, Any]) -> torch.nn.Module:
    """Make the module a manifest describes.

    Raises:
        RunError: its class cannot be imported here or refuses the saved hyper-parameters.
    """
    place, _, name = description["class"].partition(":")
    try:
        found: Any = sys.modules.get(place) or importlib.import_module(place)
        for part in name.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        raise RunError(
            f"The run's module {description['class']} cannot be imported here ({error}): put it where Python finds it, "
            "or open the run as Run(path, module=...)."
        ) from error
    try:
        return found(**description["hyper_parameters"])  # type: ignore[no-any-return]
    except Exception as error:
        raise RunError(
            f"The run's module {description['class']} cannot be rebuilt from its saved hyper-parameters "
            f"{sorted(description['hyper_parameters'])} ({error}): {REMEDY}."
        ) from error


def why_not_rebuildable(module: torch.nn.Module) -> str | None:
    """Why ``build(describe(module))`` would not give a module like this one; None where it does."""
    with torch.random.fork_rng(devices=[]):
        try:
            twin = build(describe(module))
        except RunError as error:
            return str(error)
    shapes = {name: tuple(value.shape) for name, value in module.state_dict().items()}
    if {name: tuple(value.shape) for name, value in twin.state_dict().items()} != shapes:
        return f"The module {describe(module)['class']} rebuilt from its hyper-parameters has other tensors: {REMEDY}."
    return None
