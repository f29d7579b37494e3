"""Where scores are computed, what is said of it, and what scores of one device are to those of another."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from problems import make, record
from test_shards import CONDITIONS

import lightning_acc as la
from lightning_acc.cli.main import main
from lightning_acc.core import devices
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


@no_gpu
def test_random_numbers_are_drawn_where_they_were(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = record(tmp_path / "run", make(hidden=4, dropout=0.5))
    assert devices.chosen("auto", run).type == devices.chosen("cpu", run).type == "cpu"
    monkeypatch.setattr(devices, "count", lambda kind: 1)
    assert devices.chosen("auto", run).type == "cpu"
    with pytest.raises(la.RequestError, match=r"drew random numbers \(dropout\) on cpu, and cuda draws others: give"):
        devices.chosen("cuda", run)
