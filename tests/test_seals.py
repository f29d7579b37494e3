"""Results carry a seal: whatever bit of them changes is noticed, and what can be computed again is."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pyarrow.parquet
import pytest
from problems import data, make, record

import lightning_acc as la
from lightning_acc.judge import agreement, cleaning_table
from lightning_acc.record import seal
from lightning_acc.record.store import Store, digest
from lightning_acc.show import over_time

BITS = 40
"""Single bits that are flipped in each file."""


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recorded") / "run"
    run = record(path, make(hidden=4))
    run.add_query("more", [tuple(data(n=16, seed=3).tensors)])
    for method in ("loo", "sgd-ie"):
        la.score(run, method, ray_address=None, check=0)
    la.evaluate(run)
    over_time.follow(run, 2)
    la.clean(run, "sgd-ie", [0.2], seeds=2, test="more", controls=["random"], ray_address=None)
    return path


@pytest.fixture
def path(recorded: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(recorded, tmp_path / "run"))


def flips(path: Path) -> list[bytes]:
    content, chosen = path.read_bytes(), random.Random(0)
    flipped = []
    for _ in range(BITS):
        changed = bytearray(content)
        changed[chosen.randrange(len(changed))] ^= 1 << chosen.randrange(8)
        flipped.append(bytes(changed))
    return flipped


def shard(path: Path, ends: str) -> Path:
    return sorted((path / "shards").glob(f"*{ends}"))[0]


READ: dict[str, tuple[str, Callable[[la.Run], Any]]] = {
    "scores/loo.parquet": ("delete it and score again", la.evaluate),
    "scores/sgd-ie.parquet": ("delete it and score again", la.write_report),
    "cleaning.parquet": ("delete it and clean again", cleaning_table.read),
    "over_time.parquet": ("delete it and ask for it again", over_time.stored),
    "evaluation.json": ("delete it and evaluate again", lambda run: agreement.read(run)),
    "queries/more.json": ("store it again with run.add_query", lambda run: run.query("more")),
}


@pytest.mark.parametrize("file", READ)
def test_every_bit_that_flips_is_noticed(path: Path, file: str) -> None:
    remedy, read = READ[file]
    assert read(la.Run(path)) is not None
    for content in flips(path / file):
        (path / file).write_bytes(content)
        with pytest.raises(la.RunError, match=rf"{file} is damaged, .*: {remedy}\.$") as error:
            read(la.Run(path))
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("file", READ)
def test_what_is_not_sealed_or_has_another_name_is_refused(path: Path, file: str) -> None:
    remedy, read = READ[file]
    if file == "scores/loo.parquet":
        shutil.copy(path / "scores/sgd-ie.parquet", path / file)
    elif file.endswith(".parquet"):
        pyarrow.parquet.write_table(pyarrow.parquet.read_table(path / file).replace_schema_metadata({}), path / file)
    else:
        content = json.loads((path / file).read_text())
        content.pop("seal", None)
        (path / file).write_text(json.dumps(content))
    with pytest.raises(la.RunError, match=rf"{file} is damaged, .*: {remedy}\.$"):
        read(la.Run(path))


def test_a_damaged_shard_is_left_out_with_one_warning_and_computed_again(path: Path) -> None:
    shutil.rmtree(path / "scores")
    whole = la.score(path, "loo", ray_address=None, check=0, save=False).values
    files = {file: file.read_bytes() for file in (path / "shards").glob("*.parquet")}
    reused = la.score(path, "loo", ray_address=None, check=0)
    assert reused.conditions["reused"] == len(whole)
    for file, content in files.items():
        if pyarrow.parquet.read_schema(file).metadata[b"method"] != b"loo":
            continue
        for damaged in flips(file)[:5]:
            shutil.rmtree(path / "scores")
            file.write_bytes(damaged)
            with pytest.warns(
                UserWarning, match=rf"{file.name} is damaged, .* left out and deleted, and computed again"
            ) as warned:
                again = la.score(path, "loo", ray_address=None, check=0)
            assert len(warned) == 1
            assert again.values.tolist() == whole.tolist()
            assert again.conditions["reused"] == len(whole) - pyarrow.parquet.read_metadata(file).num_rows
            assert file.read_bytes() != damaged
            file.write_bytes(content)


def test_a_shard_of_another_question_is_none_of_this(path: Path) -> None:
    shutil.rmtree(path / "scores")
    whole = la.score(path, "sgd-ie", ray_address=None, check=0, save=False).values
    by_method = {pyarrow.parquet.read_schema(file).metadata[b"method"]: file for file in (path / "shards").glob("*.parquet")}
    shutil.copy(by_method[b"loo"], by_method[b"sgd-ie"])
    with pytest.warns(UserWarning, match=f"{by_method[b'sgd-ie'].name} is damaged"):
        again = la.score(path, "sgd-ie", ray_address=None, check=0)
    assert again.values.tolist() == whole.tolist()


def test_a_damaged_table_is_left_out_and_written_anew(path: Path) -> None:
    table = path / "scores/loo.parquet"
    whole = la.score(path, "loo", ray_address=None, check=0, save=False).values
    for damaged in flips(table)[:5]:
        table.write_bytes(damaged)
        with pytest.warns(UserWarning, match=r"scores/loo.parquet is damaged") as warned:
            assert la.score(path, "loo", ray_address=None, check=0).values.tolist() == whole.tolist()
        assert len(warned) == 1
        la.evaluate(path)


def test_damaged_figures_of_a_training_are_trained_again(path: Path) -> None:
    arguments: dict[str, Any] = {"seeds": 2, "test": "more", "controls": ["random"], "ray_address": None}
    before = la.clean(path, "sgd-ie", [0.2], **arguments)
    file = shard(path, ".json")
    for damaged in flips(file)[:5]:
        file.write_bytes(damaged)
        with pytest.warns(UserWarning, match=f"{file.name} is damaged") as warned:
            assert la.clean(path, "sgd-ie", [0.2], **arguments).equals(before)
        assert len(warned) == 1


def test_sealed_files_are_what_they_were_to_all_others(path: Path) -> None:
    run = la.Run(path)
    scores = la.score(run, "loo", ray_address=None, check=0)
    frame = pandas.read_parquet(path / "scores/loo.parquet")
    assert np.array_equal(frame["score"], scores.values)
    assert pyarrow.parquet.read_table(path / "scores/loo.parquet").schema.metadata[b"method"] == b"loo"
    assert json.loads((path / "evaluation.json").read_text())["rows"] == agreement.read(run)
    assert "seal" not in scores.conditions
    # The hash can be checked by hand: that of the name and the file, with zeros in the hash's place.
    content = (path / "evaluation.json").read_bytes()
    found = json.loads(content)["seal"].rpartition(":")[2]
    assert found == digest(b"evaluation.json\0" + content.replace(found.encode(), b"0" * 64))


def test_results_of_another_content_are_not_shown(path: Path) -> None:
    run = la.Run(path)
    run.store.write("evaluation.json", seal.to_json({"manifest_hash": "another", "rows": []}, "evaluation.json"))
    table = cleaning_table.read(run)
    assert table is not None
    cleaning_table.write(run, table.replace_schema_metadata({"manifest_hash": "another"}))
    assert agreement.read(run) is None
    assert cleaning_table.read(run) is None


def test_what_holds_the_mark_itself_is_not_sealed(tmp_path: Path) -> None:
    with pytest.raises(la.RunError, match="cannot be sealed"):
        seal.to_json({"name": seal.BLANK}, "x.json")
    store = Store(tmp_path)
    store.write("x.json", seal.to_json({"deep": 1}, "x.json"))
    assert seal.from_json(store, "x.json", "delete it") == {"deep": 1}
    store.write(
        "x.json", seal.sealed(b'{"seal": "' + seal.BLANK.encode() + b'", "x": ' + b"[" * 10**5 + b"]" * 10**5 + b"}", "x.json")
    )
    with pytest.raises(la.RunError, match=r"x\.json is damaged"):
        seal.from_json(store, "x.json", "delete it")
