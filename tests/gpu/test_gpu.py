"""The same facts on real cards; skipped where there is none. ``tests/pretend.py`` stands in for one elsewhere."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from problems import N, Weighted, data, fit, flat, make, record
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

import lightning_acc as la
from lightning_acc.core import queries, ranks
from lightning_acc.core import replay as replays
from lightning_acc.core.queries import moments
from lightning_acc.core.replay import Replay
from lightning_acc.core.tape import Tape, filed
from lightning_acc.methods import sweeps
from lightning_acc.methods.method import Question
from lightning_acc.methods.rules import AdjointSgdIe

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.filterwarnings(
        "ignore:.*Skipping val loop", "ignore:Training has no validation data", "ignore:GPU available but not used"
    ),
]
HERE: dict[str, Any] = {"ray_address": None, "check": 0, "save": False}
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "sgd": {"momentum": 0.9, "nesterov": True, "weight_decay": 0.01, "lr": 0.05},
    "adamw": {"class": "AdamW", "lr": 0.02, "weight_decay": 0.1},
}
ROUND_OFF = {"float64": 1e-9, "float32": 1e-2}
"""How far scores of the CPU and of a GPU may be apart, as a share of the largest."""


def train(optimizer: str, *callbacks: Any, without: int | None = None, dropout: float = 0.0, **options: Any) -> Tensor:
    torch.manual_seed(0)
    module = Weighted(hidden=5, activation="gelu", dropout=dropout, optimizer=OPTIMIZERS[optimizer]).double()
    kept = torch.ones(N, dtype=torch.float64)
    if without is not None:
        kept[without] = 0
    loader = DataLoader(TensorDataset(*data().tensors, kept), 5, shuffle=True)
    return fit(module, loader, *callbacks, validation=False, **{"accelerator": "gpu", **options}).cpu()


def held_out() -> la.Query:
    return la.Query("held-out", [data(n=8, seed=5).tensors])


def alike(ours: np.ndarray, theirs: np.ndarray, share: float) -> None:
    assert np.abs(ours - theirs).max() <= share * np.abs(ours).max()


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("options", [{}, {"gradient_clip_val": 0.3, "accumulate_grad_batches": 2}], ids=["plain", "clipped"])
def test_a_gpu_training_is_recorded_and_replayed(
    tmp_path: Path, optimizer: str, options: dict[str, Any], dropout: float
) -> None:
    base = train(optimizer, la.TrajectoryRecorder(tmp_path / "run"), dropout=dropout, **options)
    assert torch.equal(base, train(optimizer, dropout=dropout, **options))
    run = la.Run(tmp_path / "run")
    assert run.manifest["device"] == "cuda"
    assert run.audit().ok
    shifts = la.score(run, "loo", (0, 11, 23), held_out(), keep_shifts=True, device="auto", **HERE).shifts
    assert shifts is not None
    assert shifts.device.type == "cpu"
    for sample, shift in zip((0, 11, 23), shifts, strict=True):
        change = train(optimizer, without=sample, dropout=dropout, **options) - base
        assert float((shift - change).norm() / change.norm()) < 1e-6


@pytest.mark.parametrize("dtype", ROUND_OFF)
@pytest.mark.parametrize("trained", ["cpu", "gpu"])
@pytest.mark.parametrize("method", ["loo", "acc-sgd-ie", "sgd-ie", "tracin", "acc-low-rank"])
def test_scores_of_a_gpu_are_those_of_the_cpu(tmp_path: Path, method: str, trained: str, dtype: str) -> None:
    run = record(tmp_path / "run", make(hidden=6, activation="gelu", optimizer={"momentum": 0.9}), accelerator=trained)
    for at in ("end", "along"):
        ours, theirs = (la.score(run, method, at=at, dtype=dtype, device=device, **HERE) for device in ("cpu", "cuda"))
        assert (ours.conditions["device"], theirs.conditions["device"]) == ("cpu", "cuda")
        alike(ours.values, theirs.values, ROUND_OFF[dtype])


def test_a_matrix_of_a_gpu_is_that_of_the_cpu(tmp_path: Path) -> None:
    run = record(tmp_path / "run", make(hidden=6, activation="gelu"))
    for method in ("loo", "sgd-ie"):
        ours, theirs = (la.score_matrix(run, method, device=device, **HERE).values for device in ("cpu", "cuda"))
        alike(ours, theirs, 1e-6)  # it is float32


def test_the_audit_of_a_gpu_training_on_the_cpu_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train("adamw", la.TrajectoryRecorder(tmp_path / "run"))
    monkeypatch.setattr("lightning_acc.core.audit.recorded_on", lambda run: torch.device("cpu"))
    report = la.Run(tmp_path / "run").audit()
    assert report.ok
    assert report.apart == "recorded on cuda, replayed on cpu"


def test_random_numbers_are_drawn_where_they_were(tmp_path: Path) -> None:
    train("sgd", la.TrajectoryRecorder(tmp_path / "run"), dropout=0.3)
    with pytest.raises(la.RequestError, match=r"drew random numbers \(dropout\) on cuda, and cpu draws others: give"):
        la.score(tmp_path / "run", "loo", query=held_out(), device="cpu", **HERE)
    run = record(tmp_path / "cpu", make(hidden=6, dropout=0.3))
    assert la.score(run, "sgd-ie", device="auto", **HERE).conditions["device"] == "cpu"


def test_recording_leaves_the_training_as_it_is(tmp_path: Path) -> None:
    plain, recorded = (make(hidden=6, dropout=0.3) for _ in range(2))
    fit(plain, None, accelerator="gpu")
    record(tmp_path / "run", recorded, accelerator="gpu")
    assert torch.equal(flat(plain), flat(recorded))


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")
def test_workers_share_a_card(tmp_path: Path, local_ray: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_acc.methods.memory.LARGEST_CHUNK", 8)
    run = record(tmp_path / "run", make(hidden=6, activation="gelu"))
    alone = la.score(run, "loo", device="cuda", **HERE)
    farmed = la.score(run, "loo", device="cuda", **{**HERE, "ray_address": "local"})
    alike(alone.values, farmed.values, ROUND_OFF["float64"])


def test_loo_of_a_gpu_in_turn_is_that_of_the_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As it goes where parameter vectors are long."""
    run = record(tmp_path / "run", make(hidden=6, activation="gelu", optimizer={"momentum": 0.9}))
    expected = la.score(run, "loo", device="cpu", **HERE)
    monkeypatch.setitem(replays.STATES_BYTES, "cuda", 0)
    alike(la.score(run, "loo", device="cuda", **HERE).values, expected.values, ROUND_OFF["float64"])


def test_states_of_a_gpu_go_to_a_file_and_come_back(tmp_path: Path) -> None:
    run = record(tmp_path / "run", make(hidden=6, activation="gelu", optimizer={"momentum": 0.9}))
    replay = Replay(run, device=torch.device("cuda"))
    tape = Tape(replay, 0)
    there = [(state, t) for t, (_, state) in zip(reversed(range(len(replay))), tape.backwards(), strict=True)]
    assert filed(replay, 0) == len(replay) - 2
    state = replay.initial
    for t, (found, number) in enumerate(reversed(there)):
        assert number == t
        assert all(part.is_cuda for part in found)
        alike(found[0].cpu().numpy(), state[0].cpu().numpy(), ROUND_OFF["float64"])
        state = replay.step(t)(state)


@pytest.mark.parametrize("backend", ["gloo", "cpu:gloo,cuda:nccl"])
def test_a_sweep_of_several_processes(tmp_path: Path, backend: str) -> None:
    """Two on one card by way of the CPU; by that of the cards as many as there are."""
    run = record(tmp_path / "run", make(hidden=6, activation="gelu", optimizer={"class": "AdamW", "lr": 0.01}))
    expected = la.score(run, "sgd-ie", device="cpu", **HERE).values
    size = 2 if backend == "gloo" else torch.cuda.device_count()
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    listener.close()
    torch.multiprocessing.spawn(swept, (size, port, backend, str(run.path), str(tmp_path)), nprocs=size)
    for rank in range(size):
        alike(np.load(tmp_path / f"{rank}.npy"), expected, ROUND_OFF["float64"])


def swept(rank: int, size: int, port: int, backend: str, path: str, folder: str) -> None:
    """One of these processes."""
    run = la.Run(path)
    device = torch.device("cuda", rank % torch.cuda.device_count())
    question = Question(queries.find(run, "val"), moments.find(run, "end"), "linear", False, 2**30)
    with ranks.joined(ranks.Seat(rank, size, "127.0.0.1", port), backend) as met:
        found = sweeps.reverse(Replay(run, device=device, ranks=met), AdjointSgdIe(), question)
    np.save(Path(folder) / f"{rank}.npy", found.cpu().numpy())


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_over_nccl(tmp_path: Path) -> None:
    train("adamw", la.TrajectoryRecorder(tmp_path / "run"), strategy="ddp_spawn", devices=2)
    run = la.Run(tmp_path / "run")
    assert run.manifest["world_size"] == 2
    assert run.audit().ok
