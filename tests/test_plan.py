"""``plan``: what it says follows from what was timed; the timing itself is tested once, generously."""

from __future__ import annotations

import itertools
import math
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from problems import FEATURES, N, make, record
from torch.utils.data import DataLoader, TensorDataset

import lightning_acc as la
from lightning_acc.core import tape
from lightning_acc.core.queries import moments
from lightning_acc.core.replay import Replay
from lightning_acc.methods import memory
from lightning_acc.methods.registry import METHODS
from lightning_acc.methods.swept import Swept
from lightning_acc.planning import plan as plans
from lightning_acc.planning.calibration import Calibration, Cost
from lightning_acc.planning.forecasts import forecast
from lightning_acc.planning.plan import Plan, Resources, amount, plan, recommend

NUMBERS = ("seconds", "work_seconds", "peak_memory_gb", "chunks")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> la.Run:
    return record(tmp_path_factory.mktemp("forecast") / "run", make(hidden=4))


@pytest.fixture(scope="module")
def planned(run: la.Run) -> Plan:
    return plan(run, ray_address=None)


def calibration(run: la.Run, removals: list[tuple[int, ...]], memory: int = 2**30) -> Calibration:
    return Calibration(run, run.query("val"), None, memory, removals)


def test_every_method_has_a_row_with_its_default_readout(planned: Plan) -> None:
    rows = planned.table.to_pylist()
    assert [row["method"] for row in rows] == list(METHODS)
    assert {row["method"]: row["readout"] for row in rows} == {name: method.readout for name, method in METHODS.items()}
    assert planned.table.schema == plans.SCHEMA
    for row in rows:
        assert row["n"] == N
        assert all(row[key] > 0 for key in (*NUMBERS, "disk_gb"))
        assert row["seconds"] >= row["work_seconds"] / 1.001  # one process waits for all of its work


def test_the_check_has_its_price(planned: Plan, run: la.Run) -> None:
    rows = {row["method"]: row for row in planned.table.to_pylist()}
    assert rows["loo"]["check_seconds"] == 0
    assert rows["sgd-ie"]["check_seconds"] == pytest.approx(rows["loo"]["seconds"], rel=1e-6)  # all 24 of them
    assert " check " in str(planned).splitlines()[0]


def test_prints_and_converts(planned: Plan) -> None:
    text = str(planned)
    assert text.endswith(planned.recommendation)
    assert [line.split()[0] for line in text.splitlines()[1 : 1 + len(METHODS)]] == list(METHODS)
    assert len({len(line) for line in text.splitlines()[: 1 + len(METHODS)]}) == 1  # columns are aligned
    assert list(planned.to_pandas()["method"]) == list(METHODS)


@pytest.mark.parametrize(("removals", "n"), [([3, 5, 3], 2), ([[1, 2, 3], [4], [2, 1, 3]], 2), ([], 0), ([[]], 1)])
def test_removals_are_those_asked_for(run: la.Run, removals: Any, n: int) -> None:
    rows = plan(run, removals, ray_address=None).table.to_pylist()
    assert {row["n"] for row in rows} == {n}
    assert {row["chunks"] for row in rows} == {min(n, 1)}


def test_planning_leaves_everything_as_it_was(run: la.Run) -> None:
    before = {path: path.stat().st_mtime_ns for path in Path(run.path).rglob("*")}
    threads, numbers = torch.get_num_threads(), torch.get_rng_state()
    plan(run, ray_address=None)
    assert {path: path.stat().st_mtime_ns for path in Path(run.path).rglob("*")} == before
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.get_rng_state(), numbers)


def test_work_grows_with_the_removals() -> None:
    cost = Cost(load=0.1, per_chunk=2.0, per_removal=0.5, largest=100)
    work = [cost.work_seconds(n) for n in range(1, 400)]
    assert all(a < b for a, b in itertools.pairwise(work))
    assert cost.work_seconds(50) == pytest.approx(0.1 + 2 + 25)
    sweep = Cost(0.1, 2.0, 0.0, None)
    assert sweep.work_seconds(10) == sweep.work_seconds(10_000)


def test_steps_that_are_not_asked_about_cost_nothing_and_readings_add_up(run: la.Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Were every piece of work a second: a step forward, one back, a reading of all removals, the query's gradient."""
    monkeypatch.setattr(Calibration, "seconds", lambda timer, work: 1.0)

    def seconds(method: str, at: Any) -> float:
        timer = Calibration(run, run.query("val"), None, 2**30, [(i,) for i in range(N)], moments.find(run, at))
        timer.scan = 0.0
        cost = forecast(METHODS[method], timer).cost()
        return cost.per_chunk + (2 * cost.per_removal if method == "loo" else 0)  # two were timed together

    for at, samples, readings in (("end", 72, 1), (4, 24, 1), ("along:3", 72, 3), ([2, 5], 31, 2)):
        steps = samples / 7  # steps of 7 samples are timed, and shorter ones taken in proportion
        before = (17 + 10 + 3) / 24  # shares of the samples that the first three steps have not seen
        assert seconds("loo", at) == pytest.approx(steps - before + readings)
        assert seconds("sgd-ie", at) == pytest.approx(2 * steps + readings)
    assert seconds("acc-low-rank", 4) < seconds("acc-low-rank", "end") < seconds("acc-low-rank", "along")
    one, several = (plan(run, ray_address=None, at=at).table["seconds"].to_pylist() for at in (4, "along"))
    assert all(a < b for a, b in zip(one, several, strict=True))


@pytest.mark.parametrize("n", [0, 1, 63, 64, 150, 601])
def test_chunks_are_those_of_score(n: int) -> None:
    removals = [(i,) for i in range(n)]
    assert Cost(0, 1, 1, 100).chunks(n) == [len(part) for part in memory.chunks(removals, 100)]


def test_one_chunk_is_computed_here_and_several_by_the_workers() -> None:
    cost = Cost(load=0.0, per_chunk=0.0, per_removal=1.0, largest=100)
    alone, two = Resources(None, 1, False, 1.0), Resources("local", 2, False, 1.0)
    assert two.seconds(cost, 50) == alone.seconds(cost, 50) == 50
    start = plans.RAY_SECONDS + plans.WORKER_SECONDS
    assert two.seconds(cost, 100) == start + 50
    assert two.seconds(cost, 400) == start + 200
    assert Resources("local", 8, False, 1.0).seconds(cost, 400) == start + 100  # four chunks keep four workers busy
    assert Resources("local", 2, True, 1.0).seconds(cost, 400) == plans.WORKER_SECONDS + 200
    assert Resources("local", 2, False, 1.5).seconds(cost, 400) == 1.5 * (start + 200)


def test_recommends_the_truth_where_it_can_be_waited_for() -> None:
    assert recommend({"loo": lambda n: n / 15, "sgd-ie": lambda n: 1.0}, 600) == (
        "loo for all 600 removals takes 40 s here: use it."
    )


def test_recommends_to_screen_where_it_cannot() -> None:
    seconds = {"loo": lambda n: 3.0 * n, "acc-sgd-ie": lambda n: 5.0 * n, "sgd-ie": lambda n: 30.0, "tracin": lambda n: 20.0}
    assert recommend(seconds, 6240) == (
        "loo for all 6240 removals would take 5 h 12 min; sgd-ie takes 30 s: screen with it, then confirm the top 200 with loo "
        "(10 min)."
    )


def test_recommends_the_truer_screen_where_it_can_be_waited_for() -> None:
    seconds = {"loo": lambda n: 3.0 * n, "sgd-ie": lambda n: 30.0, "acc-low-rank": lambda n: 300.0}
    assert "acc-low-rank takes 5 min: screen with it" in recommend(seconds, 6240)
    assert "sgd-ie takes 30 s: screen with it" in recommend({**seconds, "acc-low-rank": lambda n: 3000.0}, 6240)


def test_recommends_the_truth_where_estimates_cost_more() -> None:
    assert "use it" in recommend({"loo": lambda n: 700.0 * n, "sgd-ie": lambda n: 2100.0}, 1)


def test_recommends_what_is_left() -> None:
    assert recommend({"sgd-ie": lambda n: 30.0}, 10) == "sgd-ie takes 30 s: use it."
    assert recommend({}, 10) == "No method can be computed."
    assert "nothing to compute" in recommend({}, 0)


@pytest.mark.parametrize("megabytes", [0.2, 1, 64])
@pytest.mark.parametrize("method", [name for name, method in METHODS.items() if isinstance(method, Swept)])
def test_memory_is_within_the_budget(run: la.Run, method: str, megabytes: float) -> None:
    entry = METHODS[method]
    assert isinstance(entry, Swept)
    replay, budget, copies, query = Replay(run), int(megabytes * 2**20), entry.copies, run.query("val")
    size = memory.chunk_size(replay, method, copies, budget)
    assert memory.chunk_bytes(replay, copies, query, budget, size) <= budget
    few = memory.chunk_bytes(replay, copies, query, budget, 1)
    assert few < memory.chunk_bytes(replay, copies, query, budget, 2)


def test_a_reverse_sweep_keeps_the_states_its_tape_keeps(run: la.Run) -> None:
    replay = Replay(run)
    state = sum(part.nbytes for part in replay.initial)
    roomy, tight = (memory.reverse_bytes(replay, budget) for budget in (2**30, 1))
    assert tight < roomy
    assert tape.taken_again(replay, 2**30) == tape.taken_again(replay, 1) == 0.0
    assert tape.taken_again(replay, 1, disk=0) == (12 * 11 / 2 - 11) / 12  # each state from the first one
    assert roomy - tight == (12 - 2) * state


def test_the_peak_follows_the_budget(run: la.Run) -> None:
    peaks = [plan(run, ray_address=None, memory_gb=gb).table["peak_memory_gb"][0].as_py() for gb in (0.00003, 2.0)]
    assert peaks[0] < peaks[1] + 0.05
    chunks = plan(run, ray_address=None, memory_gb=0.00003).table["chunks"].to_pylist()
    assert chunks[0] > 1
    assert chunks[-2:] == [1, 1]  # a reverse sweep answers for all


def test_a_method_that_does_not_fit_is_named(run: la.Run) -> None:
    found = plan(run, ray_address=None, memory_gb=1e-6)
    for row in found.table.to_pylist()[:2]:
        assert [row[key] for key in NUMBERS] == [None] * 4
    assert "loo cannot be computed on this run" in found.recommendation
    assert "sgd-ie takes" in found.recommendation
    assert " - " in str(found)
    assert math.isnan(found.to_pandas()["seconds"][0])


def test_timings_are_fitted_by_a_line(run: la.Run) -> None:
    timer = calibration(run, [(i,) for i in range(N)])
    a, slope, largest = timer.line(lambda m: 0.0003 + 0.00002 * m, 300, 10)
    assert (a, slope, largest) == (pytest.approx(0.0003), pytest.approx(0.00002), 300)
    a, slope, largest = timer.line(lambda m: 30.0 + 2.0 * m, 300, 1)  # not worth timing all 300
    assert largest < 300
    a, slope, largest = timer.line(lambda m: 1.0, 1, 1)
    assert (a + slope, largest) == (1.0, 1)


def test_steps_of_all_sizes_count(tmp_path: Path) -> None:
    edges = [0, 1, 3, 9, 10, 16, 24]
    sampler = [list(range(a, b)) for a, b in itertools.pairwise(edges)]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(N, FEATURES, generator=generator, dtype=torch.float64)
    loader: Any = DataLoader(TensorDataset(x, torch.zeros(N, dtype=torch.long)), batch_sampler=sampler)
    unequal = record(tmp_path / "run", make(), loader)
    timer = calibration(unequal, [(i,) for i in range(N)])
    asked: list[int] = []

    def seconds(t: int) -> float:
        asked.append(len(unequal.steps[t].sample_ids))
        return 1e-6 + 1e-7 * asked[-1]

    assert timer.over_the_run(seconds) == pytest.approx(unequal.n_steps * 1e-6 + 3 * N * 1e-7)
    assert {1, 8} <= set(asked)


def test_a_sample_of_the_removals_is_seen_as_often(run: la.Run) -> None:
    removals = [(i,) for i in range(N)]
    timer = calibration(run, removals)
    for m in (2, 8, N):
        chunk = timer.sample(0, m)
        assert len(chunk) == m
        seen = len(chunk.occurrences(run.steps[0].sample_ids)[0])
        assert seen == round(m * 7 / N)


def test_samples_no_step_saw_cost_next_to_nothing(tmp_path: Path) -> None:
    run = record(tmp_path / "run", make(), limit_train_batches=1, max_epochs=1)
    unseen = [i for i in range(N) if i not in run.steps[0].sample_ids.tolist()]
    rows = plan(run, unseen, ray_address=None).table.to_pylist()
    assert rows[0]["n"] == len(unseen)
    assert rows[0]["work_seconds"] > 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"workers": 0}, "workers=0"),
        ({"workers": 1.5}, "workers=1.5"),
        ({"workers": True}, "workers=True"),
        ({"memory_gb": 0}, "memory_gb=0"),
        ({"memory_gb": math.nan}, "memory_gb=nan"),
        ({"removals": [N]}, f"no sample {N}"),
        ({"query": "missing"}, "no query 'missing'"),
        ({"dtype": "float8"}, "float8"),
        ({"ray_address": "ray://somewhere:10001"}, "give workers="),
    ],
)
def test_bad_arguments_are_named(run: la.Run, arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(la.RequestError, match=words) as caught:
        plan(run, **arguments)
    assert "\n" not in str(caught.value)


def test_amounts() -> None:
    assert [amount(x) for x in (2.0, 0.5, 14 / 2**20)] == ["2 GB", "512 MB", "14 kB"]


@pytest.mark.parametrize(
    ("module", "options"),
    [
        ({"hidden": 4, "dropout": 0.5}, {"accumulate_grad_batches": 2}),
        ({"optimizer": {"class": "AdamW", "lr": 0.01}}, {"gradient_clip_val": 0.1}),
        ({"optimizer": {"momentum": 0.9}}, {"precision": "32-true"}),
    ],
)
def test_any_recorded_run_can_be_planned(tmp_path: Path, module: dict[str, Any], options: dict[str, Any]) -> None:
    network = make(**module)
    run = record(tmp_path / "run", network.float() if "precision" in options else network, **options)
    for dtype in (None, "float64"):
        rows = plan(run, [[0, 1], [5]], dtype=dtype, ray_address=None).table.to_pylist()
        assert all(row["work_seconds"] > 0 for row in rows)


def test_predicts_within_a_factor_of_three(tmp_path: Path) -> None:
    run = record(tmp_path / "run", make(hidden=300), batch_size=8, max_epochs=20)
    rows = {row["method"]: row for row in plan(run, ray_address=None).table.to_pylist()}
    for method in METHODS:
        la.score(run, method, [0], ray_address=None, save=False, check=0)  # warm up
        started = time.process_time()
        scores = la.score(run, method, ray_address=None, save=False, check=0)
        actual = time.process_time() - started
        assert 1 / 3 < rows[method]["work_seconds"] / actual < 3, method
        assert 1 / 3 < rows[method]["peak_memory_gb"] / scores.conditions["peak_memory_gb"] < 3, method
