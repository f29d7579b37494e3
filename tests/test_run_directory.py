"""A run directory that is missing, unfinished, damaged or too new ends in one clear sentence."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from problems import N, data, make, record
from torch.utils._python_dispatch import TorchDispatchMode

import lightning_acc as la
from lightning_acc.record import manifest as manifests
from lightning_acc.record.store import Store, digest


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recorded") / "run"
    record(path, make(hidden=4))
    return path


@pytest.fixture
def path(recorded: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(recorded, tmp_path / "run"))


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(bytes(content))


def replace(path: Path, old: str, new: str) -> None:
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))


def edit_manifest(path: Path, **changes: object) -> None:
    content = json.loads((path / "manifest.json").read_text())
    manifests.write(Store(path), {**content, **changes})


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no directory": (shutil.rmtree, "no run directory at .*record a run with TrajectoryRecorder"),
    "no manifest": (lambda p: (p / "manifest.json").unlink(), "not a run directory: it has no manifest.json"),
    "manifest cut": (lambda p: truncate(p / "manifest.json"), r"manifest.json is damaged.*record the run again"),
    "manifest edited": (
        lambda p: (p / "manifest.json").write_text(
            (p / "manifest.json").read_text().replace('"n_samples": 24', '"n_samples": 25')
        ),
        "manifest.json is damaged: its content does not match its hash",
    ),
    "another file": (lambda p: (p / "manifest.json").write_text("[1, 2]"), "manifest.json is damaged: it is not the manifest"),
    "unfinished": (lambda p: edit_manifest(p, status="recording"), "half written.*has not finished"),
    "file missing": (lambda p: (p / "steps/000000.safetensors").unlink(), r"steps/000000.safetensors is missing"),
    "file cut": (
        lambda p: truncate(p / "parameters/000000.safetensors"),
        r"is truncated: [\d,]+ bytes instead",
    ),
    "bit flipped": (lambda p: flip_a_bit(p / "parameters/000000.safetensors"), r"parameters/000000.safetensors is damaged"),
    "sample bit flipped": (lambda p: flip_a_bit(p / "samples/000000.safetensors"), r"samples/000000.safetensors is damaged"),
    "query bit flipped": (lambda p: flip_a_bit(p / "queries/val.safetensors"), r"queries/val.safetensors is damaged"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_named_with_its_file_and_the_remedy(path: Path, damage: str) -> None:
    do, message = DAMAGES[damage]
    do(path)
    with pytest.raises(la.RunError, match=message) as error:
        la.score(path, "acc-sgd-ie", [0], ray_address=None, check=0)
    assert "\n" not in str(error.value)
    assert not (path / "scores").exists()


def test_a_newer_schema_is_refused(path: Path) -> None:
    content = json.loads((path / "manifest.json").read_text())
    content["schema"] = 99
    content["hash"] = manifests.content_hash(content)
    (path / "manifest.json").write_text(json.dumps(content))
    with pytest.raises(la.RunError, match=r"schema 99, but this version reads up to 1: upgrade lightning_acc"):
        la.Run(path)


def test_opening_executes_nothing(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*_: object, **__: object) -> None:
        raise AssertionError("a run was unpickled")

    for module, name in ((pickle, "load"), (pickle, "loads"), (torch, "load")):
        monkeypatch.setattr(module, name, forbidden)
    edit_manifest(path, run_id="recorded elsewhere", module={"class": "no_such_module:Evil", "hyper_parameters": {}})
    run = la.Run(path)
    assert run.parameters(0).shape == (run.n_parameters,)
    assert len(run.steps[0].sample_ids) == 7
    with pytest.raises(la.RunError, match="no_such_module:Evil cannot be imported here"):
        run.audit()
    edit_manifest(path, run_id="recorded elsewhere", module={"class": "__main__:Mine", "hyper_parameters": {}})
    with pytest.raises(la.RunError, match="was defined in the script that trained; define it in a file of its own"):
        la.Run(path).audit()


def test_what_does_not_exist_is_named(path: Path) -> None:
    cases = {
        "There is no method 'acc'; choose one of loo, acc-sgd-ie": {"method": "acc"},
        "This run has no query 'test': it has val": {"query": "test"},
        f"There is no sample {N}: the training data of this run has the ids 0 to {N - 1}": {"removals": [0, N]},
        "There is no sample -1": {"removals": [[2, -1]]},
        "'a' is no removal": {"removals": ["a"]},
        "There is no readout 'both'; choose one of exact, linear": {"readout": "both"},
        "There is no dtype 'float16' to replay in": {"dtype": "float16"},
        "more than the budget": {"memory_gb": 1e-6},
        "'nowhere' is no Ray address": {"ray_address": "nowhere", "removals": list(range(N))},
    }
    for message, arguments in cases.items():
        with pytest.raises(la.RequestError, match=message):
            la.score(path, **{"ray_address": None, **arguments}, check=0)  # type: ignore[arg-type]
    assert not (path / "scores").exists()
    with pytest.raises(la.RequestError, match="no scores yet"):
        la.evaluate(path)
    with pytest.raises(la.RunError, match="no parameters at step 13: this run has the steps 0 to 12"):
        la.Run(path).parameters(13)


def test_scores_keep_their_conditions_and_are_merged_with_older_ones(path: Path) -> None:
    run = la.Run(path)
    la.score(run, "loo", [3, 1], ray_address=None, check=0)
    la.score(run, "loo", [[2, 5], [1]], ray_address=None, check=0)
    from lightning_acc.scoring import scores

    stored = scores.read(run.store, "loo")
    assert stored.removals == [(1,), (2, 5), (3,)]
    assert stored.table["rank"].to_pylist() == (stored.values.argsort().argsort() + 1).tolist()
    conditions = stored.conditions
    assert conditions["convention"] == "fixed-denominator"
    assert conditions["manifest_hash"] == run.hash
    for key in ("method", "query", "readout", "dtype", "version", "seconds", "peak_memory_gb", "n"):
        assert key in conditions
    la.score(run, "loo", [3], readout="linear", ray_address=None, check=0)
    la.score(run, "loo", [3], dtype="float32", ray_address=None, check=0)
    assert scores.names(run.store) == ["loo", "loo.float32", "loo.linear"]
    assert len(scores.read(run.store, "loo")) == 3


def test_tables_are_read_through_a_few_times_however_long_they_are(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once for each row would take minutes of 60 000 samples."""
    from lightning_acc.cli.shown import shown
    from lightning_acc.scoring.scores import Scores

    table = la.score(path, "sgd-ie", ray_address=None, check=0, save=False)
    made: list[int] = []
    removals = Scores.__dict__["_removals"]
    make = removals.func
    monkeypatch.setattr(removals, "func", lambda self: made.append(0) or make(self))
    one = la.score(path, "sgd-ie", [0], ray_address=None, check=0, save=False)
    assert len(one.merged(table)) == len(table) == 24
    shown(table, 3)
    assert 0 < len(made) < 8
    assert table.removals == [(i,) for i in range(24)]
    table.removals.clear()  # a copy
    assert len(table.removals) == 24


def test_a_page_goes_through_its_tables_a_few_times(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning_acc.scoring.scores import Scores

    la.score(path, "sgd-ie", ray_address=None, check=18)
    gone_through: list[int] = []
    rows, truths = Scores.by_removal, Scores.truths.fget
    assert truths is not None
    monkeypatch.setattr(Scores, "by_removal", lambda self, *column: gone_through.append(0) or rows(self, *column))
    monkeypatch.setattr(Scores, "truths", property(lambda self: gone_through.append(0) or truths(self)))
    la.write_report(path)
    assert 0 < len(gone_through) < 24


def test_a_table_of_scores_that_is_damaged_is_named(path: Path) -> None:
    la.score(path, "loo", [0, 1], ray_address=None, check=0)
    truncate(path / "scores/loo.parquet")
    with pytest.raises(la.RunError, match=r"scores/loo.parquet is damaged, or was written by an older version"):
        la.evaluate(path)


def test_a_query_of_another_run_is_not_taken_for_this_ones(path: Path, tmp_path: Path) -> None:
    other = record(tmp_path / "other", make(hidden=4))
    other.add_query("more", [tuple(data(n=16, seed=3).tensors)])
    for file in ("more.safetensors", "more.json"):
        shutil.copy(tmp_path / "other/queries" / file, path / "queries" / file)
    with pytest.raises(la.RunError, match=rf"queries/more.safetensors belongs to another run, {other.manifest['run_id']}"):
        la.score(path, "sgd-ie", query="more", ray_address=None, check=0)
    content = (tmp_path / "other/queries/more.safetensors").read_bytes()
    (path / "queries/val.safetensors").write_bytes(content)
    (path / "queries/val.json").write_text(json.dumps({"sha256": digest(content), "n_examples": 16}))
    with pytest.raises(la.RunError, match=r"queries/val.safetensors is (damaged|truncated)"):
        la.score(path, "sgd-ie", query="val", ray_address=None, check=0)


def test_a_query_recorded_with_the_run_stays_as_it_is(path: Path) -> None:
    run = la.Run(path)
    assert "queries/val.safetensors" in run.manifest["files"]
    with pytest.raises(la.RequestError, match="'val' was recorded with the run and stays as it is: choose another name"):
        run.add_query("val", [tuple(data(n=10, seed=3).tensors)])


def test_queries_of_ones_own(path: Path) -> None:
    run = la.Run(path)
    held_out = [tuple(data(n=10, seed=3).tensors), tuple(data(n=4, seed=4).tensors)]
    run.add_query("held-out", held_out)
    assert run.query_names() == ["held-out", "val"]
    stored = la.score(run, "loo", [0, 1], "held-out", ray_address=None, check=0)
    given = la.score(run, "loo", [0, 1], la.Query("mine", held_out), ray_address=None, check=0)
    assert stored.values.tolist() == given.values.tolist()

    def margin(module: torch.nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        logits = module.net(batch[0])  # type: ignore[operator]
        return logits[:, 0] - logits[:, 1]

    custom = la.score(run, "acc-sgd-ie", [0, 1], la.Query("margin", held_out, margin), ray_address=None, check=0)
    assert custom.conditions["query_fingerprint"] != given.conditions["query_fingerprint"]
    assert custom.values.all()
    with pytest.raises(la.RequestError, match="no name for a query"):
        run.add_query("../escape", held_out)
    with pytest.raises(la.RequestError, match="no data"):
        la.Query("empty", [])


class Calls(TorchDispatchMode):
    """Counts what torch computes in here."""

    def __init__(self) -> None:
        super().__init__()
        self.number = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.number += 1
        return function(*args, **(kwargs or {}))


def test_reading_a_step_takes_as_much_in_a_long_run(tmp_path: Path) -> None:
    """Its random states are found, and not looked for among those of all steps in their file."""
    counts = []
    for epochs in (1, 12):
        run = record(tmp_path / f"{epochs}", make(hidden=4, dropout=0.2), max_epochs=epochs)
        assert run.n_steps == 4 * epochs
        assert run.steps[0].rng[0].keys() == {"cpu"}  # and the file is read
        with Calls() as calls:
            step = run.steps[2]
        counts.append(calls.number)
        assert step.rng[0].keys() == {"cpu"}
        assert not torch.equal(step.rng[0]["cpu"], run.steps[0].rng[0]["cpu"])
        with Calls() as calls:
            assert run.steps[2] is step
        assert not calls.number
    assert counts[0] == counts[1] > 0
