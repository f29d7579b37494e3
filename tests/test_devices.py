"""Where scores are computed, what is said of it, and what scores of one device are to those of another."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from problems import make, record
from test_shards import CONDITIONS

import lightning_acc as la
from lightning_acc.cli.main import main
from lightning_acc.core import audit, devices
from lightning_acc.core.audit import ACROSS_DEVICES, IN_GRADIENT, RoundOff
from lightning_acc.core.replay import Replay
from lightning_acc.record.schema import files
from lightning_acc.scoring import scores, shards

HERE: dict[str, Any] = {"ray_address": None, "check": 0}
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> la.Run:
    return record(tmp_path_factory.mktemp("devices") / "run", make(hidden=4))


@no_gpu
@pytest.mark.parametrize("device", ["auto", "cpu"])
def test_tables_and_matrices_say_where_they_were_computed(run: la.Run, device: str) -> None:
    table = la.score(run, "sgd-ie", device=device, **HERE).table
    assert table.schema.metadata[b"device"] == b"cpu"
    assert la.score_matrix(run, "sgd-ie", device=device, examples=[0], **HERE).conditions["device"] == "cpu"
    assert len(la.plan(run, [0], device=device, ray_address=None, progress=False).table) == 5


@no_gpu
def test_a_gpu_that_is_not_there_is_one_sentence(run: la.Run, capsys: pytest.CaptureFixture[str]) -> None:
    for verb in (la.score, la.score_matrix, la.plan, la.clean):
        for device in ("cuda", "cuda:1"):
            with pytest.raises(la.RequestError, match=f"device='{device}' cannot be used, as torch finds no GPU here: give"):
                verb(run, device=device)
    for words in (["score", "--check=0"], ["plan"], ["matrix"], ["retrain"], ["clean"]):
        with pytest.raises(SystemExit):
            main([words[0], run.path, "--device=cuda", *words[1:]])
        assert "torch finds no GPU here" in capsys.readouterr().err


def test_the_budget_is_2_gb_on_the_cpu_and_half_of_what_is_free_of_a_gpu(run: la.Run, monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    free = {"mem_get_info": (60 * 2**30, 80 * 2**30), "memory_reserved": 10 * 2**30, "memory_allocated": 4 * 2**30}
    for name, found in free.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, found=found: found)
    assert devices.budget("auto", cpu) == devices.budget(2, cpu) == 2 * 2**30
    assert devices.budget("auto", gpu) == 33 * 2**30 - devices.CONTEXT_BYTES
    assert devices.budget(0.5, gpu) == 2**29
    for bad in ("2", "half", 0, None):
        with pytest.raises(la.RequestError, match="memory_gb="):
            devices.budget(bad, gpu)
    asked = {"check": 0, "save": False, "ray_address": None}
    assert np.array_equal(la.score(run, "loo", **asked).values, la.score(run, "loo", memory_gb=2, **asked).values)


def test_scores_of_another_device_are_others_and_those_that_do_not_say_are_of_the_cpu() -> None:
    assert shards.key(CONDITIONS) == shards.key({**CONDITIONS, "device": "cpu"}) != shards.key({**CONDITIONS, "device": "cuda"})
    assert shards.same(CONDITIONS, {**CONDITIONS, "device": "cpu"})
    assert not shards.same(CONDITIONS, {**CONDITIONS, "device": "cuda"})


def test_what_was_scored_before_devices_were_told_is_used_again(run: la.Run, tmp_path: Path) -> None:
    old = la.Run(shutil.copytree(run.path, tmp_path / "run"))
    found = la.score(old, "acc-sgd-ie", device="cpu", **HERE)
    silent = {name: value for name, value in found.conditions.items() if name != "device"}
    shutil.rmtree(tmp_path / "run/shards")
    scores.write(old.store, "acc-sgd-ie", found.picked(found.removals, silent))
    again = la.score(old, "acc-sgd-ie", device="cpu", **HERE)
    assert again.conditions["reused"] == len(found)
    assert np.array_equal(again.values, found.values)


def test_a_gradient_of_another_device_may_be_rounded_otherwise(run: la.Run) -> None:
    replay = Replay(run)
    step, state = replay.step(0), replay.initial
    gradient = step.gradient(state[0])
    here, apart = (RoundOff(state, replay.dtype, apart) for apart in (False, True))
    for one in (here, apart):
        one.advance(step, state, gradient)
    # SGD answers round-off in the gradient with lr times as much.
    moved = step.groups[0]["lr"] * IN_GRADIENT * torch.finfo(replay.dtype).eps * gradient.abs().max()
    more = apart.allowed - here.allowed
    torch.testing.assert_close(more, torch.full_like(more, 2 * (ACROSS_DEVICES - 1) * float(moved)), rtol=0.1, atol=0)


class TenBits(torch.autograd.Function):
    """What TF32 leaves of a float32, to the nearest; its derivative is rounded, too, where it is multiplied next."""

    @staticmethod
    def forward(_: Any, x: torch.Tensor) -> torch.Tensor:
        return ((x.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)

    @staticmethod
    def backward(_: Any, *slopes: torch.Tensor) -> torch.Tensor:
        return slopes[0]


def test_products_in_tf32_are_apart_by_its_rounding_where_their_factors_are_by_the_last_place() -> None:
    random = torch.Generator().manual_seed(0)
    x, target = torch.randn(32, 100, generator=random), torch.randn(32, 10, generator=random)
    first, last = torch.randn(100, 200, generator=random) / 10, torch.randn(200, 10, generator=random) / 14

    def gradient(weights: torch.Tensor) -> torch.Tensor:
        weights = weights.clone().requires_grad_()
        hidden = torch.nn.functional.gelu(TenBits.apply(x) @ TenBits.apply(weights))  # type: ignore[no-untyped-call]
        loss = (TenBits.apply(hidden) @ TenBits.apply(last) - target).square().mean()  # type: ignore[no-untyped-call]
        return torch.autograd.grad(loss, weights)[0]

    eps = torch.finfo(torch.float32).eps
    there, here = gradient(first), gradient(first * (1 + 4 * eps * torch.randn(first.shape, generator=random)))
    error = float((there - here).abs().max() / there.abs().max())
    of_gpu, of_cpu = (SimpleNamespace(device=torch.device(kind), rounded_to=torch.float32) for kind in ("cuda", "cpu"))
    run: Any = SimpleNamespace(manifest={"tf32": True}, dtype="float32")
    rounded = audit._rounded(run, of_gpu, False)  # type: ignore[arg-type]
    assert audit._rounded(run, of_cpu, True) == rounded  # type: ignore[arg-type]  # trained there, replayed on the CPU
    run.manifest["tf32"] = False
    assert audit._rounded(run, of_gpu, False) == audit._rounded(run, of_cpu, True) == torch.float32  # type: ignore[arg-type]
    assert IN_GRADIENT * eps < error < IN_GRADIENT * audit.IN_NARROW[rounded] * torch.finfo(rounded).eps


@no_gpu
def test_random_numbers_are_drawn_where_they_were(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = record(tmp_path / "run", make(hidden=4, dropout=0.5))
    assert devices.chosen("auto", run).type == devices.chosen("cpu", run).type == "cpu"
    monkeypatch.setattr(devices, "count", lambda kind: 1)
    assert devices.chosen("auto", run).type == "cpu"
    with pytest.raises(la.RequestError, match=r"drew random numbers \(dropout\) on cpu, and cuda draws others: give"):
        devices.chosen("cuda", run)


def test_states_of_a_gpus_generator_have_their_place_in_a_record(tmp_path: Path) -> None:
    run = record(tmp_path / "run", make(hidden=4, dropout=0.5))
    name = "steps/000000.safetensors"
    tensors, metadata = run._load(name)
    assert {"rng", "rng_batches"} <= set(tensors)  # as ever, so that what was recorded before is read
    states = {"rng_batches_cuda": torch.tensor([0, 2]), "rng_cuda": torch.zeros(2, 16, dtype=torch.uint8)}
    assert files.fault_of(name, {**tensors, **states}, metadata, run.manifest) is None
    run._loaded[name] = {**tensors, **states}, metadata
    assert [sorted(given) for step in run.steps[:3] for given in step.rng] == [["cpu", "cuda"], ["cpu"], ["cpu", "cuda"]]
    for wrong in ({"rng_cuda": torch.zeros(2, 15, dtype=torch.uint8)}, {"rng_batches_cuda": torch.tensor([0, 99])}):
        assert "cuda" in str(files.fault_of(name, {**tensors, **states, **wrong}, metadata, run.manifest))


def test_where_one_removal_needs_more_the_budget_is_what_it_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {"check": 0, "save": False, "ray_address": None}
    questions = [
        *(lambda run, name=name: la.score(run, name, [0, 3], **asked).values for name in ("loo", "acc-sgd-ie", "acc-low-rank")),
        lambda run: la.score_matrix(run, examples=[1], **asked).values,
        lambda run: la.plan(run, ray_address=None).table["seconds"].is_valid().to_numpy(),
    ]
    run = record(tmp_path / "run", make(hidden=4, optimizer={"class": "AdamW", "lr": 0.01}))
    expected = [ask(run) for ask in questions]
    monkeypatch.setattr(devices, "ON_CPU", 1)
    for ask, values in zip(questions, expected, strict=True):
        np.testing.assert_allclose(ask(run), values, rtol=1e-9, atol=1e-12)
    monkeypatch.setattr(devices, "available_bytes", lambda: 10.0)  # half of which is too little
    for ask in questions[:4]:
        with pytest.raises(la.RequestError, match=r"more than the budget of .*: give memory_gb="):
            ask(run)
    assert not questions[4](run)[:3].any()
