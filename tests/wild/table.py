"""All set-ups, and the table of what became of them.

``python tests/wild/table.py`` trains them and writes README.md; with names of set-ups it renews their lines alone.
"""

from __future__ import annotations

import importlib
import re
import sys
import tempfile
from pathlib import Path

import pytest
from wild import Setup, compare, record

from lightning_acc.recorder import RecordingRefused

FILES = (
    "texts",
    "language_models",
    "vision",
    "graphs_and_demos",
    "generative",
    "losses",
    "pairs_and_tables",
    "steps",
    "unfreezing",
    "schedules",
    "derivatives",
)
README = Path(__file__).parent / "README.md"
HEAD = """# Trainings that people have

Each set-up is written as its users write it, trained by Lightning with `TrajectoryRecorder`, audited, and its `loo` of three
samples held against real Lightning retraining in which the samples' losses are multiplied by 0, by hand, and nothing else
changes (`wild.py`); or it is refused in a sentence. `python tests/wild/table.py` makes this table, `test_wild.py` asserts it.

The error is the largest `|shift - truth| / |truth|` of the parameters over the three samples; behind the semicolon that of the
scores, the changes of the validation loss that Lightning logs, relative to the largest of them. In parentheses stands what
round-off alone does: how far trainings without the recorder end apart that are the same on paper (with the loss as it is
written, by hand, and by hand times 1 and four units in the last place), and at least a tenth of a unit in the last place of
every parameter. In float32 it drowns the shifts where a gradient is 0 but for round-off, as of a key's bias in attention, and
Adam moves that number by lr all the same; the scores do not see it, and float64 shows the shifts.

| set-up | what it has | recorded, or why not | float32: shift; score | float64: shift; score |
| --- | --- | --- | --- | --- |
"""

SETUPS: dict[str, Setup] = {}
MISSING: dict[str, str] = {}
"""Files whose packages are not installed, with the reason."""
for file in FILES:
    try:
        SETUPS.update(importlib.import_module(file).SETUPS)
    except pytest.skip.Exception as reason:
        MISSING[file] = str(reason)


def row(name: str) -> str:
    """One line of the table."""
    setup = SETUPS[name]
    cells = [name, setup.has]
    with tempfile.TemporaryDirectory() as folder:
        if setup.refused is not None:
            try:
                record(setup, Path(folder) / "run", "float32")
                cells += ["recorded", "", ""]
            except RecordingRefused as refusal:
                cells += [f"refused: {refusal}", "", ""]
        else:
            cells.append("recorded")
            for dtype in ("float32", "float64"):
                if dtype == "float64" and not setup.double:
                    cells.append("")
                    continue
                outcome = compare(setup, Path(folder) / dtype, dtype)
                cell = f"{outcome.shift_error:.0e} ({outcome.shift_roundoff:.0e})"
                scored = f"; {outcome.score_error:.0e} ({outcome.score_roundoff:.0e})" if outcome.score_roundoff else ""
                cells.append(cell + scored)
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def listed() -> dict[str, str]:
    """The lines of the table by set-up."""
    lines = [line for line in README.read_text().splitlines() if line.startswith("| ")][2:]
    return {re.split(r"(?<!\\) \| ", line)[0].removeprefix("| "): line for line in lines}


if __name__ == "__main__":
    if MISSING:
        sys.exit(f"The table is of all set-ups, and some cannot be trained here: {MISSING}")
    known = listed() if sys.argv[1:] else {}
    lines = [row(name) if name not in known or name in sys.argv[1:] else known[name] for name in SETUPS]
    README.write_text(HEAD + "".join(f"{line}\n" for line in lines))
