"""README's first snippet prints what its comments say; ``scripts/release`` runs it, as pasted, where the package is new."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from pathlib import Path

SNIPPET = (Path(__file__).parent.parent / "README.md").read_text().split("```python\n")[1].split("```")[0]


def figures(pattern: str, text: str) -> list[float]:
    found = re.search(pattern, text, re.MULTILINE)
    assert found is not None, f"{pattern} is not in\n{text}"
    return [float(group) for group in found.groups()]


def near(found: list[float], said: list[float], within: float) -> bool:
    """Elsewhere numbers round otherwise, and the training amplifies it a little."""
    return all(abs(a - b) <= within for a, b in zip(found, said, strict=True))


def check(printed: str) -> None:
    """A model that learned, wrong labels that are found, estimates that hold, a cleaning that gains; and by how much."""
    accuracy = figures(r"^accuracy ([\d.]+)%", printed)
    assert accuracy[0] > 90
    assert near(accuracy, figures(r"# accuracy ([\d.]+)%", SNIPPET), 1.5), accuracy
    assert SNIPPET.partition("# audit passed: ")[2].partition("\n")[0] in printed
    assert re.search(r"^faithful: Spearman [\d.]+ ", printed, re.MULTILINE)
    found = figures(r"^wrong labels among the most harmful fifth: (\d+)%", printed)
    assert near(found, figures(r"fifth: .*# (\d+)%", SNIPPET), 5), found
    gain = figures(r"^\d +sgd-ie +[\d.]+ +([\d.-]+) +([\d.-]+) +([\d.-]+)$", printed)
    assert gain[0] > 0
    assert gain[1] > figures(r"^\d +random +[\d.]+ +([\d.-]+)", printed)[0]  # the whole interval beside dropping at random
    assert near(gain, figures(r"# sgd-ie gains ([\d.]+) \(([\d.]+) to ([\d.]+)\)", SNIPPET), 0.015), gain
    assert figures(r"^\d +sgd-ie +\d+ +[\d.]+ +([\d.]+)", printed)[0] > 0.9  # Kendall's tau against retraining


def main() -> None:
    started = time.monotonic()
    done = subprocess.run([sys.executable, "-"], input=SNIPPET, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    check(done.stdout)
    print(done.stdout[done.stdout.index("\naccuracy ") + 1 :], end="")  # before that are Lightning's progress bars
    print(f"README's first snippet prints what it says, after {time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()
