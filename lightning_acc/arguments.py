"""What users pass: each check gives the value in the form it is worked with, or says in one sentence what is wrong with it."""

from __future__ import annotations

import argparse
import difflib
import math
import numbers
import operator
import os
import re
import sys
from collections.abc import Collection, Iterable, Mapping
from typing import Any, Literal, NoReturn

from lightning_acc.errors import RequestError

Budget = float | Literal["auto"]
"""Gigabytes of 2^30 bytes for each process that computes, or as ``core.devices.budget`` says."""


def shown(value: object) -> str:
    """The value as a sentence shows it: short, on one line."""
    try:
        text = " ".join(repr(value).split())
    except Exception:  # of a class of the user's own, or of a number with thousands of digits
        return f"a value of type {type(value).__name__}"
    return text if len(text) <= 60 else f"{text[:57]}..."


def meant(word: str, words: Iterable[str]) -> str:
    """``: did you mean <one of words>?``, where one is like ``word``; else nothing."""
    near = difflib.get_close_matches(word, list(words), 1)
    return f": did you mean {near[0]}?" if near else ""


class NotUnderstood(argparse.ArgumentError):
    """Words of a command that no verb takes; one sentence."""


class InOneSentence:
    """Mixed into an ``argparse`` parser: what is wrong with the words of a command is raised as one sentence."""

    prog: str
    _option_string_actions: dict[str, Any]

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise ``NotUnderstood``, with the option that may have been meant."""
        raised = sys.exc_info()[1]
        if isinstance(raised, NotUnderstood):  # parsers take the errors of parsers up, to tell them once more
            raise raised
        unknown = re.match(r"(?:unrecognized arguments|ambiguous option): (?:.*? )??(--[^\s=,]+)", message)
        if unknown:
            word = unknown[1].replace("_", "-")
            options = (name.replace("_", "-") for name in self._option_string_actions if name.startswith("--"))
            message = f"There is no option {word}{meant(word, options)}"
        message = re.sub(r"<class '(\w+)'>", r"\1", re.sub(r'Parser key "(.+?)":', r"--\1:", message))
        sentence = " ".join(message.split()).rstrip(".")
        raise NotUnderstood(None, f"{sentence}{'' if sentence.endswith('?') else '.'} See {self.prog} --help.") from ex


def index(value: object) -> int | None:
    """A whole number, of NumPy or torch as well; None for anything else, truth values among it."""
    if type(value) is int:
        return value
    if isinstance(value, bool) or str(getattr(value, "dtype", "")).endswith("bool"):
        return None
    try:
        return operator.index(value)  # type: ignore[arg-type]
    except Exception:
        return None


def real(value: object) -> float | None:
    """A finite number, of NumPy as well; None for anything else, truth values among it."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def whole(name: str, value: object, wrong: str, least: int = 0) -> int:
    """A whole number from ``least``.

    Raises:
        RequestError: ``<name>=<value> <wrong>``, and what to give, as all below.
    """
    number = index(value)
    if number is None or number < least:
        raise RequestError(f"{name}={shown(value)} {wrong}: give a whole number, {least} or more.")
    return number


def memory_bytes(memory_gb: object) -> int:
    """``memory_gb`` in bytes."""
    number = positive("memory_gb", memory_gb, "leaves nothing to compute with")
    if math.isinf(number):
        raise RequestError("memory_gb=inf is no budget: give the memory there is.")
    return int(number * 2**30)


def choice(name: str, value: object, choices: Collection[str], purpose: str = "") -> str:
    """One of ``choices``."""
    if not isinstance(value, str) or value not in choices:
        raise RequestError(f"There is no {name} {shown(value)}{purpose}; choose one of {', '.join(choices)}.")
    return value


def option(name: str, value: object, choices: Collection[str]) -> None:
    """One of the ways in which something can be done."""
    if not isinstance(value, str) or value not in choices:
        raise RequestError(f"{name}={shown(value)} is none of its choices: give one of {', '.join(map(repr, choices))}.")


def positive(name: str, value: object, wrong: str) -> float:
    """A positive number, or infinity."""
    number = math.inf if isinstance(value, float) and value == math.inf else real(value)
    if number is None or not number > 0:
        raise RequestError(f"{name}={shown(value)} {wrong}: give a positive number.")
    return number


def listed(name: str, value: Any, what: str) -> list[Any]:
    """What a list holds, or a tuple, set, array, iterator: no text, no mapping, and not a thing by itself."""
    if not isinstance(value, (str, bytes, Mapping)):
        try:
            return list(value)
        except TypeError:  # also of arrays without a dimension, which call themselves iterable
            pass
    raise RequestError(f"{name}={shown(value)} is no list: give a list of {what}.")


def path(name: str, value: object) -> str:
    """A path or URL as a string."""
    if not isinstance(value, (str, os.PathLike)) or not isinstance(os.fspath(value), str):
        raise RequestError(f"{name}={shown(value)} is no path: give a string or a pathlib.Path.")
    if not isinstance(value, str) and re.match(r"[a-z][a-z0-9+]+:/[^/]", os.fspath(value)):
        raise RequestError(f"{name}={shown(value)} was a URL before it became a Path: pass it as a string.")
    return str(os.fspath(value))


def ray_address(value: object) -> str | None:
    """Where Ray is, as far as can be told without asking; None for no Ray."""
    if value is None or (isinstance(value, str) and (value in ("local", "auto") or ":" in value)):
        return value
    raise RequestError(
        f'ray_address={shown(value)} is no Ray address: use "local", "auto", "ray://host:port", or None for no Ray.'
    )


def trust(value: Any) -> bool | tuple[str, ...]:
    """Names of packages that are trusted, or True for any, in a form that can be kept and sent to workers."""
    if isinstance(value, bool):
        return value
    if isinstance(value, str):
        return (value,)
    names = tuple(listed("trust", value, "names of packages, or True for any"))
    if not all(isinstance(name, str) for name in names):
        raise RequestError(f"trust={shown(value)} names no packages: give their names, such as ['mine'], or True for any.")
    return names
