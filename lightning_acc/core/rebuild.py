"""From a module to the words that name it in the manifest, and back."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import json
import os
import sys
import weakref
from collections.abc import Iterable
from typing import Any

import torch

from lightning_acc.errors import RunError
from lightning_acc.record.credentials import without_credentials
from lightning_acc.record.record import Record, Trust, names

REMEDY = (
    "call self.save_hyperparameters() in its __init__, with arguments JSON can hold, or open the run as Run(path, module=...)"
)


TRUST_VARIABLE = "LIGHTNING_ACC_TRUST"
"""Environment variable with further ones, separated by commas."""
_trusted: set[str] = set()

LIVE: weakref.WeakValueDictionary[str, torch.nn.Module] = weakref.WeakValueDictionary()
"""Modules recorded in this process that are still in use, by the id of their run: a notebook need not rebuild them."""


def allow(packages: Iterable[str]) -> None:
    """Trust these packages (or modules) in this process from now on, as ``la.Run(path, trust=packages)`` does for one run."""
    _trusted.update([packages] if isinstance(packages, str) else packages)


def place_of(description: dict[str, Any]) -> str:
    """The Python module that the class of a manifest is in."""
    return str(description["class"]).partition(":")[0]


def is_allowed(place: str, trust: Trust = False) -> bool:
    """Whether the Python module ``place`` may be imported: importing one executes it."""
    top = place.partition(".")[0]
    if trust is True or top == "lightning_acc" or top in sys.modules:
        return True
    variable = [entry.strip() for entry in os.environ.get(TRUST_VARIABLE, "").split(",")]
    trusted = [*(names(trust) or ()), *_trusted, *variable]  # type: ignore[misc]
    return any(place == name or place.startswith(f"{name}.") for name in trusted if name)


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
    return {"class": f"{kind.__module__}:{kind.__qualname__}", "hyper_parameters": without_credentials(saved)}


def build(description: dict[str, Any], trust: Trust = False) -> torch.nn.Module:
    """Make the module a manifest describes.

    Nothing is imported from packages that this process has not imported and the caller does not trust, and nothing is
    called that is not a class of modules.

    Args:
        description: what ``describe`` gave.
        trust: packages that may be imported for it.

    Raises:
        RunError: its class may not or cannot be imported here, is no module, or refuses the saved hyper-parameters.
    """
    place, _, name = str(description["class"]).partition(":")
    try:
        found = _find(place, name, trust)
    except (ImportError, AttributeError) as error:
        remedy = "put its folder on the PYTHONPATH"
        if place == "__main__":
            remedy = "it was defined in the script that trained; define it in a file of its own and import it there"
        raise RunError(
            f"The run's module {description['class']} cannot be imported here ({error}): {remedy}, or open the run as "
            "Run(path, module=...)."
        ) from error
    if not (isinstance(found, type) and issubclass(found, torch.nn.Module)):
        raise RunError(
            f"The run names {description['class']} as its module, which is no torch.nn.Module and is not called: get the run "
            "anew from whoever recorded it, or open it as Run(path, module=...)."
        )
    try:
        return found(**description["hyper_parameters"])
    except Exception as error:
        raise RunError(
            f"The run's module {description['class']} cannot be rebuilt from its saved hyper-parameters "
            f"{sorted(description['hyper_parameters'])} ({error}): {REMEDY}."
        ) from error


def module_of(record: Record) -> torch.nn.Module:
    """The LightningModule of a record: as given, rebuilt, or still in use here; the values of its tensors are arbitrary.

    Raises:
        RunError: it cannot be rebuilt here, or is in a package that is not trusted.
    """
    if record.given_module is None:
        try:
            record.given_module = build(record.manifest["module"], record.trust)
        except RunError:
            record.given_module = LIVE.get(record.manifest["run_id"])
            if record.given_module is None:
                raise
    return record.given_module


def portable_trust(record: Record) -> tuple[str, ...]:
    """Whom a worker may trust with this record: what may be built here may be built there, and nothing else."""
    place = place_of(record.manifest["module"]) if "module" in record.manifest else ""
    return (place,) if place and is_allowed(place, record.trust) else ()


def portable(record: Record) -> Record:
    """The record with its module, as it may be sent to a worker, where nothing is imported yet.

    Raises:
        RunError: the module cannot be had here.
    """
    module_of(record)  # a class of a notebook travels with it, and need not be importable there
    twin = object.__new__(type(record))
    twin.__dict__.update(record.__dict__, trust=portable_trust(record))
    return twin


def _find(place: str, name: str, trust: Trust) -> Any:
    top = place.partition(".")[0]
    if not all(part.isidentifier() for part in place.split(".")):
        raise ImportError(f"{place!r} is no Python module")
    # Looking for a package executes nothing; importing it does.
    if top not in sys.modules and importlib.util.find_spec(top) is None:
        raise ModuleNotFoundError(f"No module named {top!r}")
    if not is_allowed(place, trust):
        raise RunError(
            f"The run's module {place}:{name} is in the package {top!r}, which importing would execute and nothing here has "
            f"imported: if you trust it, import it first, or open the run as Run(path, trust=[{top!r}]), with --trust {top}, "
            f"or with {TRUST_VARIABLE}={top} in the environment."
        )
    found: Any = sys.modules.get(place) or importlib.import_module(place)
    for part in name.split("."):
        found = getattr(found, part)
    return found


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
