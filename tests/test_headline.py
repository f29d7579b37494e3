"""The headline: what to do with a run, how sure that is, and what was not tried; one sentence wherever it stands."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from problems import N, make, record

import lightning_acc as la
from lightning_acc.judge import cleaning_table
from lightning_acc.scoring.trust.verdict import Verdict
from lightning_acc.show.headline import headline
from lightning_acc.show.status import status

FAITHFUL = Verdict("faithful", 32, 0.987, 0.95, 0.995, 0.92, 0.1)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> la.Run:
    return record(tmp_path_factory.mktemp("headline") / "run", make())


def table(method: str, values: Any, at: str = "end", verdict: Verdict | None = None) -> la.Scores:
    conditions = {"method": method, "at": at, **({"verdict": verdict.to_json()} if verdict else {})}
    return la.Scores.build([(i,) for i in range(len(values))], np.array(values, dtype=float), conditions)


def row(method: str, fraction: float, gain: float, reach: float, accuracy: float | None = 0.7) -> dict[str, Any]:
    ends = {"gain": gain, "gain_low": gain - reach, "gain_high": gain + reach, "loss": 1.0, "loss_low": 0.9, "loss_high": 1.1}
    known = {} if accuracy is None else {"accuracy": accuracy, "accuracy_low": accuracy, "accuracy_high": accuracy}
    own = {"method": method, "fraction": fraction, "n_removed": round(N * fraction), "seeds": 2, "losses": [1.0, 1.0]}
    return {**own, **ends, **known}


def clean(run: la.Run, *rows: dict[str, Any]) -> None:
    first = row("none", 0.0, 0.0, 0.0)
    cleaning_table.write(run, pa.Table.from_pylist([first, *rows], schema=cleaning_table.SCHEMA))


@pytest.fixture(autouse=True)
def nothing_cleaned(run: la.Run) -> None:
    (Path(run.path) / cleaning_table.NAME).unlink(missing_ok=True)


def test_a_run_without_scores_has_none(run: la.Run) -> None:
    assert headline(run) is None


def test_it_says_what_to_drop_what_that_gains_and_how_far_the_ranking_is_trusted(run: la.Run) -> None:
    tables = {"a": table("sgd-ie", range(N)), "b": table("sgd-ie", range(N), "along", FAITHFUL)}
    clean(run, row("sgd-ie along", 0.25, 0.0234, 0.0195))
    said = headline(run, tables)
    assert said is not None
    assert str(said) == f"drop 6 of {N}: +2.3 points (0.4 to 4.3); ranking faithful, Spearman 0.99"
    assert (said.scores, said.n_dropped) == ("b", 6)


def test_of_several_it_is_the_surest_and_says_how_many_were_tried(run: la.Run) -> None:
    rows = [row("sgd-ie along", 0.25, 0.05, 0.06), row("sgd-ie along", 0.125, 0.02, 0.01), row("oracle", 0.25, 0.2, 0.01)]
    clean(run, *rows)
    said = headline(run, {"b": table("sgd-ie", range(N), "along")})
    assert str(said) == f"drop 3 of {N}: +2.0 points (1.0 to 3.0), the surest of 2 tried; ranking unchecked"


def test_a_gain_that_may_be_none_is_called_so(run: la.Run) -> None:
    clean(run, row("sgd-ie along", 0.25, 0.004, 0.012))
    assert str(headline(run, {})) == f"no sure gain: drop 6 of {N}: +0.4 points (-0.8 to 1.6); ranking not stored"


def test_a_control_that_gains_as_much_is_named_and_one_that_knows_more_is_not(run: la.Run) -> None:
    influence = row("sgd-ie along", 0.25, 0.02, 0.01)
    clean(run, influence, row("loss", 0.25, 0.03, 0.01), row("oracle", 0.25, 0.05, 0.01), row("validation", 0.25, 0.05, 0.01))
    assert ", loss gains as much; " in str(headline(run, {}))
    clean(run, influence, row("loss", 0.25, 0.019, 0.01), row("random", 0.5, 0.03, 0.01))
    assert "as much" not in str(headline(run, {}))


def test_without_an_accuracy_it_tells_the_loss_with_its_own_sign(run: la.Run) -> None:
    clean(run, row("loo", 0.25, 0.12, 0.07, accuracy=None))
    said = str(headline(run, {"x": table("loo", range(N))}))
    assert said == f"drop 6 of {N}: loss -0.12 (-0.19 to -0.05); ranking by retraining"


def test_before_cleaning_it_names_the_fullest_ranking_and_only_what_harms(run: la.Run) -> None:
    few, whole = table("loo", [-3.0, 1.0]), table("sgd-ie", [-1.0, -2.0, *range(1, N - 1)], verdict=FAITHFUL)
    said = headline(run, {"a": few, "b": whole})
    assert str(said) == f"{N} samples ranked by sgd-ie: faithful, Spearman 0.99; most harmful #1, #0; not cleaned yet"
    assert said is not None
    assert (said.scores, said.n_dropped) == ("b", 0)
    assert "most harmful" not in str(headline(run, {"b": table("sgd-ie", range(1, N))}))


def test_the_terminal_is_told_it_and_exports_the_fullest_ranking(run: la.Run) -> None:
    la.score(run, "loo", [0, 1], ray_address=None)
    la.score(run, "sgd-ie", ray_address=None, check=0)
    la.evaluate(run)
    la.score_matrix(run, "tracin", ray_address=None, check=0)
    la.write_report(run)
    clean(run, row("sgd-ie", 0.25, 0.02, 0.01))
    said = status(run.path)
    assert str(headline(run)) in said.replace("\n", " ")
    assert "--scores sgd-ie --csv" in said
