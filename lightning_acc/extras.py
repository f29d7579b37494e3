"""Packages that are installed where they are asked for, as ``lightning-acc[ray]``; the mathematics needs none of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec

from lightning_acc.errors import RequestError

EXTRAS = {"ray": "ray", "wandb": "wandb", "wandb_workspaces": "wandb", "datasets": "data", "sklearn": "data"}
"""The extra of ``pyproject.toml`` that brings each package."""


@contextmanager
def extra(otherwise: str = "") -> Iterator[None]:
    """In here packages are imported that may not be installed; ``otherwise`` says how to do without.

    Raises:
        RequestError: one is not; names the line to type.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in EXTRAS:
            raise
        raise _missing({package: otherwise}) from error


def required(packages: Mapping[str, str]) -> None:
    """Refuse, before anything is computed, what will need ``packages`` later; as ``extra``, but nothing is imported.

    Args:
        packages: what will be needed, and how to do without each.

    Raises:
        RequestError: some are not installed; names all of them, and the line to type.
    """
    missing = {package: otherwise for package, otherwise in packages.items() if find_spec(package) is None}
    if missing:
        raise _missing(missing)


def _missing(packages: Mapping[str, str]) -> RequestError:
    extras = ",".join(dict.fromkeys(EXTRAS[package] for package in packages))
    what = f"package {next(iter(packages))} is" if len(packages) == 1 else f"packages {' and '.join(packages)} are"
    instead = " and ".join(filter(None, packages.values()))
    return RequestError(f'The {what} not installed: type pip install "lightning-acc[{extras}]"{instead and f", or {instead}"}.')
