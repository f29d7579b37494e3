"""Several processes take a sweep back together, each with some rows of every batch, and come by the scores of one."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from problems import N, SharedNoise, StepOnly, data, make, record
from torch import Tensor

import lightning_acc as la
from lightning_acc.core import queries, ranks
from lightning_acc.core import tape as tapes
from lightning_acc.core.queries import moments
from lightning_acc.core.ranks import ALONE, Ranks
from lightning_acc.core.replay import Replay
from lightning_acc.core.tape import Tape
from lightning_acc.methods import sweeps
from lightning_acc.methods.method import Question
from lightning_acc.methods.rules import AdjointSgdIe, AdjointTracIn
from lightning_acc.scoring import score as scoring
from lightning_acc.scoring import worker
from lightning_acc.scoring.work import Result, compute

pytestmark = [
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


class Table:
    """Where threads of this process meet, in place of processes: what each adds is added up.

    One of them works at a time, as they share random numbers and filters of warnings.
    """

    def __init__(self, size: int) -> None:
        self.size, self.given = size, [torch.zeros(())] * size
        self.barrier, self.turn = threading.Barrier(size, timeout=60), threading.Lock()

    def met(self, rank: int, tensor: Tensor) -> list[Tensor]:
        self.given[rank] = tensor.clone()
        self.turn.release()
        try:
            self.barrier.wait()
            all_given = list(self.given)
            self.barrier.wait()
        finally:
            self.turn.acquire()
        return all_given


@dataclass(frozen=True)
class Threads(Ranks):
    table: Table | None = None

    def add_up(self, *parts: Tensor) -> None:
        assert self.table is not None
        for part in parts:
            part.copy_(torch.stack(self.table.met(self.rank, part)).sum(0))

    def least(self, count: int) -> int:
        assert self.table is not None
        return int(torch.stack(self.table.met(self.rank, torch.tensor(int(count)))).min())


def together(size: int, do: Callable[[Ranks], Any]) -> list[Any]:
    """What ``do`` gives each of so many threads."""
    table, found = Table(size), [None] * size
    failed: list[BaseException] = []

    def work(rank: int) -> None:
        try:
            with table.turn, torch.enable_grad():
                found[rank] = do(Threads(rank, size, table))
        except BaseException as error:
            failed.append(error)
            table.barrier.abort()

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failed:
        raise failed[0]
    return found


def swept(run: la.Run, rank: Ranks, at: Any = "end", memory: int = 2**30, rule: type[AdjointSgdIe] = AdjointSgdIe) -> Tensor:
    when = moments.find(run, at)
    question = Question(queries.find(run, "val"), when, "linear", False, memory)
    return sweeps.reverse(Replay(run, until=when.last, ranks=rank), rule(), question)


@pytest.mark.parametrize("size", [1, 2, 3, 5])
@pytest.mark.parametrize("sizes", [[1], [7], [4, 4], [5, 2, 9], [1, 1, 1]])
@pytest.mark.parametrize("divisible", [True, False])
def test_every_row_is_somebodys_once(sizes: Sequence[int], size: int, divisible: bool) -> None:
    seen = [[0] * count for count in sizes]
    loads = []
    for rank in range(size):
        shares, weighs = Ranks(rank, size).share(sizes, divisible)
        assert shares
        assert all(rows for _, rows in shares)
        loads.append(sum(len(rows) for _, rows in shares) * weighs)
        for number, rows in shares if weighs else ():
            assert divisible or len(rows) == sizes[number]
            for row in rows:
                seen[number][row] += 1
    assert seen == [[1] * count for count in sizes]
    if divisible:
        assert max(loads) - min(loads) <= 1


SETTINGS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "momentum": ({"optimizer": {"momentum": 0.9, "weight_decay": 0.01}}, {}),
    "adamw, clipped": ({"optimizer": {"class": "AdamW", "lr": 0.01}}, {"gradient_clip_val": 0.3}),
    "sgd, clipped": ({}, {"gradient_clip_val": 0.3}),
    "accumulated": ({}, {"accumulate_grad_batches": 2}),
    "accumulated, with dropout": ({"dropout": 0.4}, {"accumulate_grad_batches": 2}),
    "dropout": ({"dropout": 0.4}, {"batch_size": 8}),
    "schedule": ({"decay_lr": 0.5}, {}),
}


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("setting", SETTINGS)
def test_scores_are_those_of_one_process(tmp_path: Path, setting: str, size: int) -> None:
    """Of batches of 7 and a last one of 3, of which some have no row where they are 3 and the others 2."""
    module, options = SETTINGS[setting]
    run = record(tmp_path / "run", make(hidden=4, activation="gelu", **module), **options)
    for at, rule in (("end", AdjointSgdIe), ("along:4", AdjointSgdIe), ("end", AdjointTracIn)):
        alone = swept(run, ALONE, at, rule=rule)
        for mine in together(size, lambda rank, at=at, rule=rule: swept(run, rank, at, rule=rule)):  # type: ignore[misc]
            assert float((mine - alone).abs().max()) <= 1e-12 * float(alone.abs().max())


def test_fewer_rows_than_processes(tmp_path: Path) -> None:
    run = record(tmp_path / "run", make(hidden=4), batch_size=2)
    alone = swept(run, ALONE)
    for mine in together(5, lambda rank: swept(run, rank)):
        assert float((mine - alone).abs().max()) <= 1e-12 * float(alone.abs().max())


def test_a_loss_with_a_penalty_is_shared_batch_by_batch(tmp_path: Path) -> None:
    run = record(tmp_path / "run", StepOnly(penalty=0.1), accumulate_grad_batches=3)
    replay = Replay(run)
    assert replay.objective.penalised
    assert not replay.divisible(run.steps[0])
    alone = swept(run, ALONE)
    for mine in together(2, lambda rank: swept(run, rank)):
        assert float((mine - alone).abs().max()) <= 1e-12 * float(alone.abs().max())


@pytest.mark.parametrize("slow", [None, 0, 1])
def test_states_are_kept_alike_whatever_memory_and_disk_each_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, slow: int | None
) -> None:
    """Else one would wait for the sum of a step that another does not take."""
    run = record(tmp_path / "run", make(hidden=4, optimizer={"momentum": 0.9}))
    state = 2 * 8 * run.n_parameters
    written: dict[int, int] = {}
    write = tapes._Stack._write

    def failing(stack: Any, t: int, kept: Any) -> None:
        rank = stack._ranks.rank
        written[rank] = written.get(rank, 0) + 1
        if rank == slow and written[rank] == 2:
            stack._file = Full(stack._file)
        write(stack, t, kept)

    class Full:
        def __init__(self, file: Any) -> None:
            self.seek, self.readinto = file.seek, file.readinto

        def write(self, data: Any) -> int:
            raise OSError("no space left")

    def back(rank: Ranks) -> tuple[list[float], int]:
        replay = Replay(run, ranks=rank)
        taken = 0
        step = replay.step

        def counted(t: int) -> Any:
            nonlocal taken
            taken += 1
            return step(t)

        monkeypatch.setattr(replay, "step", counted)
        tape = Tape(replay, (2 + 3 * rank.rank) * state, disk=(6 - rank.rank) * state)
        return [float(before[0].sum()) for _, before in tape.backwards()], taken

    if slow is not None:
        monkeypatch.setattr(tapes._Stack, "_write", failing)
    (first, steps), (second, others) = together(2, back)
    assert steps == others
    assert first == second
    monkeypatch.undo()
    assert np.allclose(first, back(ALONE)[0], rtol=1e-12)
    assert written.get(0) == written.get(1) == (None if slow is None else 2)


def lost_once(job: Any, removals: Any, progress: Callable[[float], None], replay: Any = None) -> Result:
    """``compute``; the second process is killed, once."""
    once = Path(job.run.path).parent / "lost"
    if job.ranks.rank == 1 and not once.exists():
        once.write_text("")
        os.kill(os.getpid(), signal.SIGKILL)
    return compute(job, removals, progress, replay)


def asks(run: la.Run, method: str = "sgd-ie", **options: Any) -> la.Scores:
    return la.score(run, method, **{"processes": 2, "save": False, "check": 0, **options})


def test_two_workers_take_a_sweep_together(tmp_path: Path, local_ray: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where one is lost on the way: both begin again."""
    run = record(tmp_path / "run", make(hidden=4, optimizer={"class": "AdamW", "lr": 0.01}))
    alone = asks(run, processes=1, ray_address=None)
    both = asks(run)
    assert both.conditions["processes"] == "2"
    assert "processes" not in alone.conditions
    assert np.abs(both.values - alone.values).max() <= 1e-12 * np.abs(alone.values).max()
    monkeypatch.setattr(scoring, "compute", lost_once)
    again = asks(run)
    assert (tmp_path / "lost").exists()
    assert np.array_equal(again.values, both.values)


def without_a_gradient(job: Any, removals: Any, progress: Callable[[float], None], replay: Any = None) -> Result:
    """``compute``; the second process finds a fault of the user's."""
    if job.ranks.rank == 1:
        raise la.RequestError("The second has found it.")
    return compute(job, removals, progress, replay)


def test_what_another_fails_of_is_told(tmp_path: Path, local_ray: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = record(tmp_path / "run", make(hidden=4))
    monkeypatch.setattr(scoring, "compute", without_a_gradient)
    with pytest.raises(la.RequestError, match=r"The second has found it\."):
        asks(run)


def test_more_than_the_cluster_takes_at_once_are_refused(tmp_path: Path, local_ray: Path) -> None:
    run = record(tmp_path / "run", make(hidden=4))
    with pytest.raises(la.RequestError, match=r"processes=3 work at the same time, and .* has CPUs for 2: give processes=2"):
        asks(run, processes=3)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"processes": 0}, r"processes=0 is no number of processes: give a whole number, 1 or more\."),
        ({"ray_address": None}, r"processes=2 are started by Ray: give ray_address='local'"),
        ({"method": "loo"}, r"processes=2 share one sweep back, .* which this is not: leave it out"),
        ({"readout": "exact"}, r"processes=2 share one sweep back"),
        ({"keep_shifts": True}, r"processes=2 share one sweep back"),
    ],
)
def test_where_there_is_nothing_to_share_they_are_refused(tmp_path: Path, options: dict[str, Any], words: str) -> None:
    run = record(tmp_path / "run", make(hidden=4))
    with pytest.raises(la.RequestError, match=words):
        asks(run, **options)


@pytest.mark.parametrize(
    ("module", "why"),
    [
        (lambda: SharedNoise(hidden=4), r"its random numbers \(dropout\) are drawn for a batch as a whole"),
        (lambda: StepOnly(penalty=0.1), "its loss has a term that no sample is in"),
    ],
)
def test_batches_that_cannot_be_divided_are_told(tmp_path: Path, module: Any, why: str) -> None:
    run = record(tmp_path / "run", module())
    with pytest.raises(la.RequestError, match=rf"processes=2 have nothing to share, as no batch .* divided: {why}\. Leave"):
        asks(run)


def test_processes_meet_and_part(tmp_path: Path) -> None:
    """One of one: what is asked of torch.distributed is there."""
    with ranks.joined(ranks.Seat(0, 1, "127.0.0.1", 0), "gloo") as met:
        assert met == ALONE
        part = torch.ones(3)
        met.add_up(part)
        assert part.tolist() == [1, 1, 1]
        assert met.least(4) == 4
    assert not torch.distributed.is_initialized()


def test_a_lost_one_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(tensor: Tensor, **options: Any) -> None:
        raise RuntimeError("Connection closed by peer [127.0.0.1]:4711\nmore")

    monkeypatch.setattr(torch.distributed, "all_reduce", fails)
    with pytest.raises(ConnectionError, match=r"has ended, or is not reached \(Connection closed by peer .*:4711\)"):
        Ranks(0, 2).add_up(torch.ones(1))


def test_what_is_agreed_on_is_a_number(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also of yes and no, of which gloo knows no least."""
    asked: list[torch.dtype] = []
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor, **_: asked.append(tensor.dtype))
    assert Ranks(0, 2).least(True) == 1
    assert asked == [torch.int64]


def test_gloo_listens_where_the_node_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)

    class Ray:
        class util:  # noqa: N801
            @staticmethod
            def get_node_ip_address() -> str:
                return "127.0.0.1"

    assert worker._own_address(Ray) == "127.0.0.1"
    assert os.environ.pop("GLOO_SOCKET_IFNAME", "") == "lo"


def test_all_samples_are_scored(tmp_path: Path) -> None:
    """By as many as there are samples in no step: zero is theirs."""
    run = record(tmp_path / "run", make(hidden=4), data(n=N), limit_train_batches=2, max_epochs=1)
    for mine in together(2, lambda rank: swept(run, rank)):
        assert int((mine != 0).sum()) == 14
