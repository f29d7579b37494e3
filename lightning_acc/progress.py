"""Progress with the rate and the time left, for anything that may take longer than two seconds."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType

from tqdm import tqdm

Watcher = Callable[[float, float | None, float | None], None]
"""Told the fraction done, what is done a second (removals, trainings), and the seconds left."""
_watchers: list[Watcher] = []
SECONDS_BEFORE_LINES, SECONDS_BETWEEN_LINES = 5.0, 30.0
"""A log gets its first line after so long, and the next ones so far apart."""


@contextmanager
def watched_by(watcher: Watcher) -> Iterator[None]:
    """In here ``watcher`` follows every progress bar too, shown or not."""
    _watchers.append(watcher)
    try:
        yield
    finally:
        _watchers.remove(watcher)


def duration(seconds: float) -> str:
    """Seconds in words, to about two digits: ``0.45 s``, ``40 s``, ``2 min 5 s``, ``10 min``, ``5 h 12 min``, ``3 days``."""
    if seconds < 59.5:
        return f"{two_digits(seconds)} s"
    for limit, size, unit, smaller in ((3570, 60, "min", "s"), (172800, 3600, "h", "min")):
        if seconds < limit:
            whole, rest = divmod(round(seconds / size * 60), 60)
            return f"{whole} {unit} {rest} {smaller}" if whole < 10 and rest else f"{round(seconds / size)} {unit}"
    return f"{two_digits(seconds / 86400)} days"


def two_digits(value: float) -> str:
    """A positive number, to two digits, or as many as stand before its point."""
    return f"{value:.0f}" if value >= 9.95 else f"{value:.2g}"


class Progress:
    """Follows ``parts`` pieces of work, each reporting the fraction of it that is done.

    In a terminal it is a bar; elsewhere, as in a log file or the log of a job, a line now and then once it takes a while.

    Args:
        title: what is being done.
        parts: number of pieces.
        show: True shows the bar, False nothing; None the bar where stderr is a terminal, else the lines.
        amount: of what the pieces hold together, such as the number of removals; None counts the pieces.
        unit: what is counted.
    """

    def __init__(self, title: str, parts: int, show: bool | None, amount: int | None = None, unit: str = "pieces") -> None:
        self._fractions = [0.0] * parts
        self._amount, self._unit = parts if amount is None else amount, unit
        self._started = time.monotonic()
        terminal = sys.stderr.isatty()
        self._lines = _Lines(title) if show is None and not terminal else None
        self._bar = tqdm(
            total=100.0,
            desc=title,
            disable=(not terminal) if show is None else not show,
            delay=1.0,
            bar_format="{desc} {percentage:3.0f} % |{bar}| {elapsed} gone, {remaining} left{postfix}",
        )

    def of(self, part: int) -> _Part:
        """The callback of one piece."""
        return _Part(self, part)

    def update(self, part: int, fraction: float) -> None:
        """Piece ``part`` is done to ``fraction``, from 0 to 1."""
        if not fraction and not any(self._fractions):
            self._bar.reset()  # what went before, such as starting workers, says nothing of the time left
            self._started = time.monotonic()
            if self._lines is not None:
                self._lines.restart()
        self._fractions[part] = fraction
        done = sum(self._fractions) / len(self._fractions)
        gone = time.monotonic() - self._started
        rate = self._amount * done / gone if gone else None
        left = gone * (1 - done) / done if done else None
        speed = f"{rate:.3g} {self._unit}/s" if rate else ""
        self._bar.postfix = speed
        self._bar.update(100.0 * done - self._bar.n)
        if self._lines is not None and left is not None:
            self._lines.say(done, f"{100 * done:.0f} %, {speed}, {duration(round(gone))} gone, {duration(round(left))} left")
        for watcher in _watchers:
            watcher(done, rate, left)

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


class _Lines:
    """What a log file is told: whole lines, few of them, none of work that is over at once."""

    def __init__(self, title: str) -> None:
        self._title = title
        self._said = False
        self.restart()

    def restart(self) -> None:
        self._next = time.monotonic() + SECONDS_BEFORE_LINES

    def say(self, done: float, text: str) -> None:
        now = time.monotonic()
        if now >= self._next or (self._said and done >= 1):
            self._next = now + SECONDS_BETWEEN_LINES
            self._said = done < 1
            print(f"{self._title}: {text}", file=sys.stderr, flush=True)
