"""A progress bar with the time left, for anything that may take longer than two seconds."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType

from tqdm import tqdm

Watcher = Callable[[float, float | None, float | None], None]
"""Told the fraction done, pieces of work a second, and the seconds left."""
_watchers: list[Watcher] = []


@contextmanager
def watched_by(watcher: Watcher) -> Iterator[None]:
    """In here ``watcher`` follows every progress bar too, shown or not."""
    _watchers.append(watcher)
    try:
        yield
    finally:
        _watchers.remove(watcher)


class Progress:
    """Follows ``parts`` pieces of work, each reporting the fraction of it that is done.

    Args:
        title: what is being done.
        parts: number of pieces.
        show: True or False; None shows the bar where stderr is a terminal.
    """

    def __init__(self, title: str, parts: int, show: bool | None) -> None:
        self._fractions = [0.0] * parts
        self._started = time.monotonic()
        self._bar = tqdm(
            total=100.0,
            desc=title,
            disable=(not sys.stderr.isatty()) if show is None else not show,
            delay=1.0,
            bar_format="{desc} {percentage:3.0f} % |{bar}| {elapsed} gone, {remaining} left",
        )

    def of(self, part: int) -> _Part:
        """The callback of one piece."""
        return _Part(self, part)

    def update(self, part: int, fraction: float) -> None:
        """Piece ``part`` is done to ``fraction``, from 0 to 1."""
        if not any(self._fractions):
            self._bar.reset()  # what went before, such as starting workers, says nothing of the time left
            self._started = time.monotonic()
        self._fractions[part] = fraction
        done = sum(self._fractions) / len(self._fractions)
        self._bar.update(100.0 * done - self._bar.n)
        gone = time.monotonic() - self._started
        for watcher in _watchers:
            watcher(done, len(self._fractions) * done / gone if gone else None, gone * (1 - done) / done if done else None)

    def note(self, text: str) -> None:
        """Say what is being waited for before the first piece begins."""
        if not self._bar.disable:
            tqdm.write(text, file=sys.stderr)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None) -> None:
        self._bar.close()


class _Part:
    def __init__(self, owner: Progress, part: int) -> None:
        self._owner, self._part = owner, part

    def __call__(self, fraction: float) -> None:
        self._owner.update(self._part, fraction)
