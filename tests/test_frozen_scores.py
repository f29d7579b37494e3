"""What every method says of one small run, number by number, as it was before: a change that moves a score is seen here.

The figures were made by ``python tests/test_frozen_scores.py``, in float64, where another processor differs in the last digits
alone. ``scripts/frozen_scores.py`` holds more runs, to the last bit, before and after a change on one machine.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
from problems import make, record

import lightning_acc as la

FROZEN = Path(__file__).parent / "frozen_scores.json"
QUESTIONS: dict[str, dict[str, Any]] = {
    **{
        f"{method} {readout}": {"method": method, "readout": readout}
        for method in ("loo", "acc-sgd-ie", "acc-low-rank", "sgd-ie", "tracin")
        for readout in ("exact", "linear")
    },
    "acc-low-rank in 4 directions": {"method": "acc-low-rank", "directions": 4},
    "acc-low-rank, 8 followed": {"method": "acc-low-rank", "followed": 8},
    "acc-sgd-ie of groups": {"method": "acc-sgd-ie", "removals": [[0, 1, 2], [7, 9]]},
}


def recorded(directory: str) -> la.Run:
    optimizer = {"momentum": 0.9, "weight_decay": 0.01, "nesterov": True, "lr": 0.05}
    return record(Path(directory) / "run", make(hidden=4, activation="gelu", optimizer=optimizer, decay_lr=0.8))


def scores(run: la.Run, question: dict[str, Any]) -> list[float]:
    return la.score(run, ray_address=None, save=False, check=0, **question).values.tolist()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> la.Run:
    return recorded(str(tmp_path_factory.mktemp("frozen")))


@pytest.mark.filterwarnings("ignore:In . directions")
@pytest.mark.parametrize("name", QUESTIONS)
def test_scores_are_as_they_were(run: la.Run, name: str) -> None:
    frozen = json.loads(FROZEN.read_text())
    assert set(frozen) == set(QUESTIONS)
    assert scores(run, QUESTIONS[name]) == pytest.approx(frozen[name], rel=1e-8, abs=1e-14)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place:
        one = recorded(place)
        FROZEN.write_text(json.dumps({name: scores(one, question) for name, question in QUESTIONS.items()}, indent=1) + "\n")
