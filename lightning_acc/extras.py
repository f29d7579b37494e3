"""Packages that are installed where they are asked for, as ``lightning-acc[ray]``; the mathematics needs none of them."""

from __future__ import annotations

from collections.abc import Iterator
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
        line = f'pip install "lightning-acc[{EXTRAS[package]}]"'
        raise RequestError(
            f"The package {package} is not installed: type {line}{otherwise and f', or {otherwise}'}."
        ) from error


def required(package: str, otherwise: str = "") -> None:
    """Refuse, before anything is computed, what will need ``package`` later; as ``extra``, but nothing is imported."""
    if find_spec(package) is None:
        with extra(otherwise):
            raise ModuleNotFoundError(name=package)
