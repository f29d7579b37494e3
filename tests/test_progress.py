"""Progress in a terminal, in a log, and for whoever watches: how far, how fast, how long still."""

from __future__ import annotations

import io
import re
from collections.abc import Callable

import pytest

from lightning_acc import progress
from lightning_acc.progress import Progress, duration, watched_by


class Clock:
    """Time that passes when it is told to."""

    now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress.time, "monotonic", clock.monotonic)
    return clock


def work(clock: Clock, seconds: int, show: bool | None = None, told: Callable[..., None] = lambda *_: None) -> None:
    """Two pieces with 60 removals between them, a step a second."""
    with watched_by(told), Progress("loo", 2, show, amount=60, unit="removals") as bar:
        bar.update(0, 0.0)
        for second in range(1, seconds + 1):
            clock.now += 1
            bar.update(0, second / seconds)
            bar.update(1, second / seconds)


def test_a_log_gets_few_whole_lines(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    work(clock, 100)
    printed = capsys.readouterr().err
    assert "\r" not in printed
    lines = printed.splitlines()
    assert len(lines) == 5  # after 5, 35, 65 and 95 seconds, and at the end
    assert re.fullmatch(r"loo: \d+ %, 0\.[56]\d* removals/s, 5 s gone, \d min \d+ s left", lines[0])
    assert lines[-1] == "loo: 100 %, 0.6 removals/s, 1 min 40 s gone, 0 s left"


def test_a_log_gets_nothing_of_what_is_soon_over_or_not_to_be_shown(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    work(clock, 4)
    work(clock, 100, show=False)
    assert capsys.readouterr().err == ""


def test_a_terminal_gets_a_bar_with_rate_and_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    import time

    terminal = io.StringIO()
    terminal.isatty = lambda: True  # type: ignore[method-assign]
    monkeypatch.setattr(progress.sys, "stderr", terminal)
    with Progress("loo", 1, None, amount=60, unit="removals") as bar:
        bar.update(0, 0.0)
        for tenth in range(1, 8):
            time.sleep(0.2)
            bar.update(0, tenth / 10)
    shown = terminal.getvalue().split("\r")[-1]
    assert re.search(r"loo +70 % \|.+\| 00:01 gone, 00:00 left, [\d.]+ removals/s", terminal.getvalue()), shown
    assert "\n" not in terminal.getvalue().rstrip("\n")


def test_watchers_are_told_the_rate_in_removals(clock: Clock) -> None:
    told: list[tuple[float, float | None, float | None]] = []
    work(clock, 10, told=lambda *figures: told.append(figures))
    assert told[-1] == (1.0, 6.0, 0.0)
    assert told[10] == pytest.approx((0.5, 6.0, 5.0))


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0, "0 s"),
        (0.043, "0.043 s"),
        (3.04, "3 s"),
        (40.2, "40 s"),
        (59.6, "1 min"),
        (125.3, "2 min 5 s"),
        (599.4, "9 min 59 s"),
        (600, "10 min"),
        (3580, "1 h"),
        (18720, "5 h 12 min"),
        (39600, "11 h"),
        (5 * 86400, "5 days"),
    ],
)
def test_durations_are_words(seconds: float, words: str) -> None:
    assert duration(seconds) == words
