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

from lightning_acc import arguments
from lightning_acc.core.modules.compiled import is_compiled, plain_copy, plain_name
from lightning_acc.credentials import without_credentials
from lightning_acc.errors import ImportRefused, RunError
from lightning_acc.record.record import Record, Trust

REMEDY = (
    "call self.save_hyperparameters() in its __init__, with arguments JSON can hold, or open the run as Run(path, module=...)"
)


TRUST_VARIABLE = "LIGHTNING_ACC_TRUST"
"""Environment variable with further ones, separated by commas."""
OWN, PROGRAM = "lightning_acc", "__main__"
LIGHTNING = ("pytorch_lightning.", "lightning.pytorch.")
"""Where Lightning's own classes are, under its two names."""
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
    """Whether the class of a module may be taken from the Python module ``place``, by its full name.

    What is imported already executes nothing any more. Importing ``a.b.c`` executes ``a`` and ``a.b`` too: that something
    beside it is imported says nothing about it, and whoever trusts ``a.b`` trusts ``a``, which holds it. A program
    (``__main__``) is executed as a whole, and never for its class.
    """
    if place in sys.modules:
        return True
    parts = place.split(".")
    if PROGRAM in parts:
        return False
    if trust is True or parts[0] == OWN:
        return True
    variable = [entry.strip() for entry in os.environ.get(TRUST_VARIABLE, "").split(",")]
    trusted = [*(arguments.trust(trust) or ()), *_trusted, *variable]  # type: ignore[misc]
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

    Nothing is imported that this process has not imported and the caller does not trust, and nothing is called that is not
    the class of a LightningModule.

    Args:
        description: what ``describe`` gave.
        trust: packages that may be imported for it.

    Raises:
        RunError: its class may not or cannot be imported here, is no LightningModule, or refuses the saved
            hyper-parameters.
    """
    place = place_of(description)
    words = str(description["class"])
    name, shown = words.partition(":")[2], " ".join(words.split())  # on one line, whatever stands there
    try:
        found = _find(place, name, trust)
    except (KeyboardInterrupt, RunError):
        raise
    except BaseException as error:  # what is imported may raise anything, SystemExit among it
        remedy = "put its folder on the PYTHONPATH"
        if PROGRAM in place.split("."):
            remedy = "it was defined in the script that trained; define it in a file of its own and import it there"
        said = (
            f"The run's module {shown} cannot be imported here ({_words(error)}): {remedy}, or open the run as "
            "Run(path, module=...)."
        )
        top = place.partition(".")[0]
        if top != PROGRAM and isinstance(error, ModuleNotFoundError) and error.name == top:
            raise ImportRefused(said, missing=top, untrusted="" if is_allowed(place, trust) else top) from error
        raise RunError(said) from error
    if not _is_lightning_module(found):
        raise RunError(
            f"The run names {shown} as its module, which is no LightningModule and is not called: get the run "
            "anew from whoever recorded it, or open it as Run(path, module=...)."
        )
    try:
        module: torch.nn.Module = found(**description["hyper_parameters"])
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        raise RunError(
            f"The run's module {shown} cannot be rebuilt from its saved hyper-parameters "
            f"{sorted(description['hyper_parameters'])} ({_words(error)}): {REMEDY}."
        ) from error
    return plain_copy(module) if is_compiled(module) else module


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
    if is_compiled(record.given_module):
        record.given_module = plain_copy(record.given_module)
    return record.given_module


def portable_trust(record: Record) -> tuple[str, ...]:
    """Whom a worker may trust with this record: what may be built here may be built there, and nothing else."""
    place = place_of(record.manifest["module"])
    return (place,) if is_allowed(place, record.trust) else ()


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
    if PROGRAM in place.split(".") and place not in sys.modules:
        raise ImportError(f"{place} is a program, which is never imported")
    # Looking for a package executes nothing; importing it does.
    if top not in sys.modules and importlib.util.find_spec(top) is None:
        raise ModuleNotFoundError(f"No module named {top!r}", name=top)
    if not is_allowed(place, trust):
        kind, needed = ("module", place) if top in sys.modules else ("package", top)
        raise ImportRefused(
            f"The run's module {place}:{name} is in the {kind} {needed!r}, which importing would execute and nothing here has "
            f"imported: if you trust it, import it first, or open the run as Run(path, trust=[{needed!r}]), with --trust "
            f"{needed}, or with {TRUST_VARIABLE}={needed} in the environment.",
            untrusted=needed,
        )
    found: Any = sys.modules[place] if place in sys.modules else importlib.import_module(place)
    for part in name.split("."):
        found = inspect.getattr_static(found, part)  # a module's __getattr__ and descriptors would execute
    return found


def _is_lightning_module(found: Any) -> bool:
    """Told by names, as Lightning, which takes seconds to import, may not be imported."""
    if not issubclass(type(found), type):  # isinstance would ask the thing itself
        return False
    line = type.__getattribute__(found, "__mro__")
    return any(kind.__name__ == "LightningModule" and kind.__module__.startswith(LIGHTNING) for kind in line)


def _words(error: BaseException) -> str:
    """The first line of what went wrong, which may quote a hyper-parameter."""
    return str(without_credentials(str(error).strip().partition("\n")[0])) or type(error).__name__


def why_not_rebuildable(module: torch.nn.Module) -> str | None:
    """Why ``build(describe(module))`` would not give a module like this one; None where it does."""
    with torch.random.fork_rng(devices=[]):
        try:
            twin = build(describe(module))
        except RunError as error:
            return str(error)
    shapes = {plain_name(name): tuple(value.shape) for name, value in module.state_dict().items()}
    if {name: tuple(value.shape) for name, value in twin.state_dict().items()} != shapes:
        return f"The module {describe(module)['class']} rebuilt from its hyper-parameters has other tensors: {REMEDY}."
    return None


def not_the_module(run: Record, why: str) -> str:
    """That the module is not the recorded one, in a sentence."""
    return (
        f"{run.path} is not a record of the module {run.manifest['module']['class']} ({why}): open it as Run(path, module=...) "
        "with the module that was trained, restore it, or record the run again."
    )


def refuse_misfit(run: Record, module: torch.nn.Module, shapes: Iterable[tuple[str, torch.Size]]) -> None:
    """Refuse a module that has not the recorded parameters, by name and shape.

    Raises:
        RunError: it has not.
    """
    there = {name: tuple(value.shape) for name, value in module.named_parameters(remove_duplicate=False)}
    for name, shape in shapes:
        if there.get(name) != tuple(shape):
            has = f"of shape {there[name]}" if name in there else "not there"
            raise RunError(not_the_module(run, f"its parameter {name!r} is {has}, the recorded one of shape {tuple(shape)}"))
