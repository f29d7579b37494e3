"""Threads: large steps are computed on those that other pieces leave, small ones on one; which, every table says."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from problems import N, Noting, make, record

import lightning_acc as la
from lightning_acc.core import replay as replays
from lightning_acc.core.replay import Replay
from lightning_acc.planning import plan as plans
from lightning_acc.planning.calibration import Calibration, Cost
from lightning_acc.planning.plan import Resources
from lightning_acc.progress import Progress
from lightning_acc.scoring import cluster, scores
from lightning_acc.scoring.over_time import influence_over_time

pytestmark = [
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]
SHIFTED = ("loo", "acc-sgd-ie", "sgd-ie")


@pytest.fixture
def all_large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every step is large, and all cores are free."""
    monkeypatch.setattr(replays, "THREADS_BYTES", 0)
    monkeypatch.setattr(Replay, "seconds_on", lambda replay, threads: 1 / threads)


@pytest.fixture
def run(tmp_path: Path) -> la.Run:
    """A run whose tensors are long enough to be shared out among threads."""
    return record(tmp_path / "run", Noting(hidden=6000).double(), max_epochs=1)


def noted(ask: Callable[[], Any]) -> tuple[Any, set[int]]:
    """What is answered, and the numbers of threads that losses were computed on."""
    Noting.seen.clear()
    return ask(), set(Noting.seen)


def score(run: la.Run, method: str, removals: Any = None, **options: Any) -> la.Scores:
    return la.score(run, method, removals, **{"ray_address": None, "save": False, "check": 0, **options})


def test_steps_of_few_bytes_are_computed_on_one_thread(run: la.Run, two_threads: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Replay, "seconds_on", lambda replay, threads: 1 / threads)
    replay = Replay(run)
    size = replay.initial[0].nbytes + replay.activation_bytes
    for least, worth in ((size, True), (size + 1, False)):
        monkeypatch.setattr(replays, "THREADS_BYTES", least)
        assert Replay(run).threads == 1 + worth
    for method in SHIFTED:
        found, seen = noted(lambda method=method: score(run, method, [0, 1]))  # type: ignore[misc]
        assert 1 in seen  # beside what memory a step takes, which is looked at on all
        assert found.conditions["threads"] == "1"
    assert torch.get_num_threads() == 2


def test_threads_that_wait_for_each_other_are_left_alone(
    run: la.Run, two_threads: None, all_large: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Replay, "seconds_on", lambda replay, threads: threads)
    assert score(run, "sgd-ie").conditions["threads"] == "1"


def test_a_step_is_timed_on_the_threads_asked_about(run: la.Run) -> None:
    replay = Replay(run)
    replay.step(0)  # looks at what memory it takes, once
    for threads in (2, 1):
        seconds, seen = noted(lambda threads=threads: replay.seconds_on(threads))  # type: ignore[misc]
        assert seen == {threads}
        assert seconds > 0
    assert torch.get_num_threads() == 1


def test_small_runs_stay_on_one_thread(tmp_path: Path, two_threads: None) -> None:
    assert Replay(record(tmp_path / "run", make(hidden=300))).threads == 1


@pytest.mark.parametrize("method", SHIFTED)
def test_the_same_number_of_threads_gives_the_same_bits_and_another_the_same_scores(
    run: la.Run, two_threads: None, all_large: None, method: str
) -> None:
    (first, seen), again = noted(lambda: score(run, method, [0, 1, 2])), score(run, method, [0, 1, 2])
    assert seen == {2}
    assert np.array_equal(first.values, again.values)
    torch.set_num_threads(1)
    one, seen = noted(lambda: score(run, method, [0, 1, 2]))
    assert seen == {1}  # a user's bound
    assert np.abs(one.values).min() > 0
    np.testing.assert_allclose(first.values, one.values, rtol=1e-9)
    assert [table.conditions["threads"] for table in (first, again, one)] == ["2", "2", "1"]


def test_what_one_thread_scored_is_used_by_two_and_the_table_says_so(run: la.Run, two_threads: None, all_large: None) -> None:
    torch.set_num_threads(1)
    some = score(run, "loo", [3, 5], save=True)
    torch.set_num_threads(2)
    more = score(run, "loo", [3, 5, 7], save=True)
    assert more.conditions["reused"] == 2
    assert more.values[:2].tolist() == some.values.tolist()
    assert [table.conditions["threads"] for table in (some, more, scores.read(run.store, "loo"))] == ["1", "1 2", "1 2"]
    torch.set_num_threads(1)
    banked = score(run, "loo", [7], at="end", readout="linear", save=True)  # another question, no retraining
    assert (banked.conditions["banked"], banked.conditions["threads"]) == (1, "2")


def test_matrices_and_influence_over_time_say_so_too(run: la.Run, two_threads: None, all_large: None) -> None:
    asked = {"removals": [0, 1], "examples": [0, 1], "ray_address": None, "check": 0}
    for threads, said in ((2, "2"), (1, "2"), (1, "1")):  # made on two, read, made on one
        torch.set_num_threads(threads)
        matrix = la.score_matrix(run, "sgd-ie", **asked, save=(threads, said) != (1, "1"))
        assert matrix.conditions["threads"] == said
    torch.set_num_threads(2)
    table, seen = noted(lambda: influence_over_time(run, [0, 1]))
    assert seen == {2}
    assert table.schema.metadata[b"threads"] == b"2"


def test_a_table_that_tells_no_numbers_is_damaged(run: la.Run) -> None:
    found = score(run, "loo", [0])
    scores.write(run.store, "loo", scores.Scores.build(found.removals, found.values, {**found.conditions, "threads": "many"}))
    with pytest.raises(la.RunError, match=r"loo\.parquet"):
        scores.read(run.store, "loo")


@dataclass(frozen=True)
class Told:
    """A job, told on how many threads it is done."""

    threads: int = 1


def given(job: Told, piece: int, progress: Callable[[float], None]) -> tuple[int, float]:
    """The threads of a job, and the CPUs that Ray keeps for it."""
    import ray

    return job.threads, ray.get_runtime_context().get_assigned_resources()["CPU"]


def test_a_piece_asks_ray_for_as_many_cpus_as_it_has_threads(local_ray: Path) -> None:
    for pieces, threads, each in ((1, 16, 2), (2, 16, 1), (3, 16, 1), (1, 1, 1)):
        with Progress("pieces", pieces, False, pieces, "pieces") as bar:
            done = list(cluster.each(given, Told(), range(pieces), "local", bar, threads=threads))
        assert [found for _, found in done] == [(each, each)] * pieces


def test_a_single_sweep_takes_the_cores_of_the_cluster(
    run: la.Run, local_ray: Path, two_threads: None, all_large: None
) -> None:
    there, here = (score(run, "sgd-ie", ray_address=address) for address in ("auto", None))
    assert there.conditions["threads"] == here.conditions["threads"] == "2"
    assert np.array_equal(there.values, here.values)


@pytest.mark.parametrize(
    ("pieces", "most", "held", "each"),
    [(1, 64, 0, 16), (1, 4, 0, 4), (2, 64, 0, 8), (3, 64, 0, 8), (4, 64, 0, 5), (24, 64, 0, 1), (99, 64, 0, 1), (1, 64, 6, 10)],
)
def test_pieces_share_the_cores_of_all_nodes(
    pieces: int, most: int, held: int, each: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = {16: True, 8: True, 128: False}  # the last one is gone
    ray = SimpleNamespace(
        nodes=lambda: [{"Alive": alive, "Resources": {"CPU": float(cpus)}} for cpus, alive in sizes.items()],
        cluster_resources=lambda: {"CPU": 24.0},
        available_resources=lambda: {"CPU": 24.0 - held},
    )
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    assert cluster.cpus_for(ray, pieces, most) == each


def test_the_plan_waits_for_the_share_of_the_work_that_threads_do_not_take() -> None:
    cost = Cost(load=0.0, per_chunk=0.0, per_removal=1.0, largest=100)
    assert Resources(None, 1, False, 1.0, 4, 0.2).seconds(cost, 50) == pytest.approx(50 * (0.2 + 0.8 / 4))
    start = plans.RAY_SECONDS + plans.WORKER_SECONDS
    farmed = Resources("local", 8, False, 1.0, 8, 0.2)
    assert farmed.seconds(cost, 100) == pytest.approx(start + 50 * (0.2 + 0.8 / 4))  # two chunks, four threads each
    assert farmed.seconds(cost, 800) == pytest.approx(start + 100)  # eight chunks keep eight workers busy
    assert cost.work_seconds(50) == 50


def test_what_threads_do_not_share_is_timed(run: la.Run, monkeypatch: pytest.MonkeyPatch) -> None:
    timer = Calibration(run, run.query("val"), None, 2**30, [(i,) for i in range(N)])
    monkeypatch.setattr(Replay, "seconds_on", lambda replay, threads: {1: 8.0, 4: 3.5}[threads])
    assert timer.serial(1) == 0
    assert timer.serial(4) == pytest.approx(0.25)  # 2 of 8 seconds, and 6 / 4


def test_a_plan_waits_for_the_threads_there_are(run: la.Run, two_threads: None, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = []
    for least in (0, 2**40):
        monkeypatch.setattr(replays, "THREADS_BYTES", least)
        monkeypatch.setattr(Replay, "seconds_on", lambda replay, threads: 1 / threads)
        monkeypatch.setattr(Calibration, "busy", 1.0)
        rows.append(la.plan(run, [0], ray_address=None).table.to_pylist())
    for two, one in zip(*rows, strict=True):
        assert two["seconds"] == pytest.approx(two["work_seconds"] / 2)
        assert one["seconds"] == pytest.approx(one["work_seconds"])
