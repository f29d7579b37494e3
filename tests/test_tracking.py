"""Influence over time adds up; what W&B wrote is read back; progress, workspace and how to open them."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import subprocess
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
import pytorch_lightning as pl
from problems import CLASSES, Data, N, data, make, record, trainer
from torch.utils.data import DataLoader

import lightning_acc as la
from lightning_acc.core import queries
from lightning_acc.core.replay import Replay, parameters_at
from lightning_acc.judge import cleaning_table, samples
from lightning_acc.methods.registry import METHODS
from lightning_acc.record import tables
from lightning_acc.scoring.over_time import influence_over_time
from lightning_acc.scoring.selection import select
from lightning_acc.show import over_time, tracking
from lightning_acc.show.headline import headline
from lightning_acc.show.tracking import artifacts, connection, driver, opening, panels
from lightning_acc.studies.data.base import png

MOMENTUM = {"momentum": 0.9, "weight_decay": 0.01}
ADAMW = {"class": "AdamW", "lr": 0.05, "weight_decay": 0.01}


@pytest.mark.parametrize("optimizer", [MOMENTUM, ADAMW], ids=["momentum SGD", "AdamW"])
def test_what_the_visits_contribute_adds_up_to_the_score(tmp_path: Path, optimizer: dict[str, Any]) -> None:
    run = record(tmp_path / "run", make(hidden=4, optimizer=optimizer, decay_lr=0.9))
    scores = la.score(run, "sgd-ie", ray_address=None, save=False, check=0).by_removal()
    chosen = [5, 0, 17, 5]
    table = influence_over_time(run, chosen)
    assert table.schema.names == ["sample", "step", "score", "cumulative"]
    assert [str(kind) for kind in table.schema.types] == ["int64", "int64", "double", "double"]
    rows = table.to_pylist()
    assert [row["step"] for row in rows] == sorted(row["step"] for row in rows)
    expected = [(t, i) for t, step in enumerate(run.steps) for i in (0, 5, 17) if i in step.sample_ids.tolist()]
    assert [(row["step"], row["sample"]) for row in rows] == expected
    for sample in set(chosen):
        own = [row for row in rows if row["sample"] == sample]
        assert len(own) == 3  # epochs
        assert sum(row["score"] for row in own) == pytest.approx(scores[(sample,)], rel=1e-12)
        assert [row["cumulative"] for row in own] == pytest.approx(np.cumsum([row["score"] for row in own]), rel=1e-14)
        assert len({row["score"] for row in own}) == 3
    # Where the states do not fit they are computed again, with the same result.
    assert influence_over_time(run, chosen, memory_gb=1e-9).equals(table)


def test_the_curve_is_the_query_along_the_run(tmp_path: Path) -> None:
    run = record(tmp_path / "run", make(hidden=4, optimizer=MOMENTUM))
    told = influence_over_time(run, [0]).schema.metadata
    curve = json.loads(told[b"curve"])
    assert [t for t, _ in curve][:: len(curve) - 1] == [0, run.n_steps]
    replay, query = Replay(run), queries.find(run, "val")
    for t, value in curve:
        assert value == pytest.approx(float(query.value(replay.objective, parameters_at(run, t))), rel=1e-12)
    assert len(curve) * query.n_examples <= 0.25 * 3 * sum(len(step.sample_ids) for step in run.steps)


def test_samples_are_followed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = record(tmp_path / "run", make(hidden=4))
    assert over_time.follow(run, 2) is None
    assert over_time.stored(run) is None
    la.score(run, "acc-sgd-ie", ray_address=None, check=0)
    first = over_time.follow(run, 2)
    assert first is not None

    def compute(run: la.Run, samples: list[int], *rest: Any, **options: Any) -> None:
        raise RuntimeError(f"computed for {samples}")

    monkeypatch.setattr(over_time, "influence_over_time", compute)
    again = over_time.follow(run, 2)
    assert again == over_time.stored(run)
    assert again is not None
    assert again.visits.equals(first.visits, check_metadata=True)
    assert again.samples == first.samples
    with pytest.raises(RuntimeError, match=rf"computed for \[{first.harmful[0]}, {first.helpful[0]}\]"):  # others than those
        over_time.follow(run, 1)


def test_what_was_followed_is_held_against_what_was_written(tmp_path: Path) -> None:
    run = record(tmp_path / "run", make(hidden=4))
    la.score(run, "sgd-ie", ray_address=None, check=0)
    followed = over_time.follow(run, 2)
    assert followed is not None
    other = record(tmp_path / "other", make(hidden=4, optimizer=MOMENTUM))
    path = Path(run.path) / over_time.NAME
    (Path(other.path) / over_time.NAME).write_bytes(path.read_bytes())
    assert over_time.stored(other) is None  # of another run
    for broken in (followed.visits.drop_columns("step"), followed.visits.replace_schema_metadata({"manifest_hash": run.hash})):
        run.store.write(over_time.NAME, tables.sealed(broken, over_time.NAME))
        with pytest.raises(la.RunError, match="delete it and ask for it again"):
            over_time.stored(run)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(la.RunError, match="delete it and ask for it again"):
        over_time.stored(run)


def test_samples_that_were_never_visited_have_no_row(tmp_path: Path) -> None:
    loader = DataLoader(data(), 7, sampler=list(range(0, N, 2)))
    run = record(tmp_path / "run", make(), loader)
    table = influence_over_time(run, range(N))
    assert set(table["sample"].to_pylist()) == set(range(0, N, 2))
    nothing = influence_over_time(run, [1, 3])
    assert nothing.num_rows == 0
    assert nothing.schema == table.schema
    with pytest.raises(la.RequestError, match="no sample 24"):
        influence_over_time(run, [24])
    with pytest.raises(la.RequestError, match="no query 'test'"):
        influence_over_time(run, [0], query="test")


class Described(Data):
    """The shared problem with pictures, texts and two samples known to be corrupted."""

    def describe_samples(self) -> dict[str, Any]:
        return {
            "image": [png(np.full((6, 6), i / N)) for i in range(N)],
            "text": [f"words of {i}" for i in range(N)],
            "label": [str(i % CLASSES) for i in range(N)],
            "true_label": ["8"] * N,
            "corrupted": [i in (3, 11) for i in range(N)],
            "source": ["north" if i < 10 else "south" for i in range(N)],
            "age": [20.5 + i for i in range(N)],
            "rank": list(range(N)),
        }

    def describe_examples(self, query: str) -> dict[str, Any]:
        assert query == "val"
        return {
            "image": [png(np.full((6, 6), i / 16)) for i in range(16)],
            "label": [f"shown as {i}" for i in range(16)],
        }


def cleaned(accuracy: bool = True) -> pa.Table:
    """Made up: removing by sgd-ie gains, removing at random loses; one row a method and fraction."""
    rows = [{"method": "none", "fraction": 0.0, "n_removed": 0, "gain": 0.0, "gain_low": 0.0, "gain_high": 0.0, "loss": 1.0}]
    for method, sign in (("random", -1), ("sgd-ie", 1)):
        for fraction in (0.25, 0.1):  # not in order
            gain = sign * fraction
            rows.append({"method": method, "fraction": fraction, "n_removed": round(N * fraction), "loss": 1 - gain})
            rows[-1].update({"gain": gain, "gain_low": gain - 0.05, "gain_high": gain + 0.05})
    for row in rows:
        row.update({"seeds": 2, "losses": [row["loss"]] * 2, "loss_low": row["loss"] - 0.1, "loss_high": row["loss"] + 0.1})
        if accuracy:
            middle = 0.7 + row["gain"]
            row.update({"accuracy": middle, "accuracy_low": middle - 0.02, "accuracy_high": middle + 0.02})
            row["accuracies"] = [middle] * 2
    return pa.Table.from_pylist(rows, schema=cleaning_table.SCHEMA)


def inspect(path: Path, *words: str) -> str:
    command = [str(Path(sys.executable).parent / "wandb"), "leet", "inspect", "--json", *words, str(path)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@dataclass
class Logged:
    """A recorded run, and what W&B has of it."""

    run: la.Run
    evaluation: list[dict[str, Any]]
    path: Path
    files: Path

    @functools.cached_property
    def facts(self) -> dict[str, Any]:
        return dict(json.loads(inspect(self.path, "--summary")))

    @functools.cached_property
    def records(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in inspect(self.path).splitlines()]

    @property
    def summary(self) -> dict[str, Any]:
        return dict(self.facts["summary"])

    def rows(self, key: str) -> list[dict[str, Any]]:
        """The rows of a logged table as W&B keeps them for its upload."""
        content = json.loads((self.path / "files" / self.summary[key]["path"]).read_text())
        return [dict(zip(content["columns"], row, strict=True)) for row in content["data"]]

    def lines(self, key: str) -> dict[str, list[tuple[float, float]]]:
        """The lines of a logged line plot."""
        found: dict[str, list[tuple[float, float]]] = {}
        for row in self.rows(f"{key}_table"):
            found.setdefault(row["lineKey"], []).append((row["step"], row["lineVal"]))
        return found

    def artifact(self, kind: str) -> tuple[dict[str, Any], dict[str, Path]]:
        """What the one artifact of a kind tells of itself, and its files."""
        (found,) = (r["artifact"] for r in self.records if r["type"] == "artifact" and r["artifact"]["type"] == kind)
        told = found["metadata"]
        files = {entry["path"]: Path(entry["local_path"]) for entry in found["manifest"]["contents"]}
        return told if isinstance(told, dict) else json.loads(told), files


def environment(patch: pytest.MonkeyPatch, files: Path) -> None:
    files.mkdir(exist_ok=True)
    for name in ("WANDB_DIR", "WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR"):
        patch.setenv(name, str(files))
    patch.setenv("WANDB_MODE", "offline")


@pytest.fixture(scope="module")
def logged(tmp_path_factory: pytest.TempPathFactory) -> Logged:
    directory = tmp_path_factory.mktemp("tracking")
    with pytest.MonkeyPatch.context() as patch:
        environment(patch, directory / "files")
        pl.seed_everything(1)
        trainer(la.TrajectoryRecorder(directory / "run")).fit(make(hidden=4), datamodule=Described())
        run = la.Run(directory / "run")
        for method in METHODS:
            la.score(run, method, ray_address=None, check=0)
            la.score(run, method, [[3, 11], list(range(10))], ray_address=None, check=0)
        la.score_matrix(run, "tracin", ray_address=None, check=0)
        la.score_matrix(run, "sgd-ie", ray_address=None, check=18)
        cleaning_table.write(run, cleaned())
        evaluation = la.evaluate(run).to_pylist()
        path = Path(tracking.track(run, evaluation, "somewhere"))
    return Logged(run, evaluation, path, directory / "files")


def test_rankings_show_every_sample_with_picture_and_text(logged: Logged) -> None:
    scores = la.score(logged.run, "acc-sgd-ie", ray_address=None, save=False, check=0).by_removal()
    rows = logged.rows("ranking/acc-sgd-ie")
    assert [row["rank"] for row in rows] == list(range(1, N + 3))
    assert [row["score"] for row in rows] == sorted(row["score"] for row in rows)
    for row in rows:
        if " " in row["sample"]:
            assert row["samples"] == len(row["sample"].split())
            assert (row["text"], row["picture"], row["label"], row["described source"], row["age"]) == (None,) * 5
            continue
        sample = int(row["sample"])
        assert row["score"] == pytest.approx(scores[(sample,)], rel=1e-9)
        assert row["text"] == f"words of {sample}"
        assert (row["label"], row["true label"]) == (str(sample % CLASSES), "8")
        assert row["corrupted"] == (sample in (3, 11))
        assert row["picture"] == "Image"
        assert row["source"] == "estimate"
        assert row["samples"] == 1
        own = (row["described source"], row["age"], row["described rank"])
        assert own == ("north" if sample < 10 else "south", 20.5 + sample, sample)
    # The pictures of a table are in the artifact it is uploaded as.
    artifacts = [record["artifact"] for record in logged.records if record["type"] == "artifact"]
    (staged,) = (artifact["manifest"]["contents"] for artifact in artifacts if "rankingacc-sgd-ie" in artifact["name"])
    pictures = [Path(entry["local_path"]) for entry in staged if entry["path"].endswith(".png")]
    assert len(pictures) == N
    assert all(picture.read_bytes().startswith(b"\x89PNG") for picture in pictures)
    captions = logged.summary["most harmful/loo"]["captions"]
    single = [row for row in logged.rows("ranking/loo") if " " not in row["sample"]]
    assert [caption.split(":")[0] for caption in captions] == [f"#{row['sample']}" for row in single[: len(captions)]]
    pictures = [logged.path / "files" / name for name in logged.summary["most harmful/loo"]["filenames"]]
    assert all(picture.read_bytes().startswith(b"\x89PNG") for picture in pictures)


def test_the_headline_is_in_the_summary_and_the_notes_and_the_name_is_readable(logged: Logged) -> None:
    said = str(headline(logged.run))
    assert said == f"drop 6 of {N}: +25.0 points (20.0 to 30.0), the surest of 2 tried; ranking unchecked"
    assert logged.summary["headline"] == said
    runs = [record["run"] for record in logged.records if record["type"] == "run"]
    assert runs[-1]["notes"] == said
    assert {run["display_name"] for run in runs} == {"run: influence"}


def test_groups_say_what_a_ranking_says_of_each_value_that_is_described(logged: Logged) -> None:
    rows = logged.rows("groups/sgd-ie")
    assert {row["column"] for row in rows} == {"label", "corrupted", "source", "text", "age", "rank"}
    north = next(row for row in rows if row["value"] == "north")
    scores = {
        name: la.score(logged.run, name, ray_address=None, save=False, check=0).by_removal() for name in ("loo", "sgd-ie")
    }
    mine = [scores["sgd-ie"][(i,)] for i in range(10)]
    assert (north["samples"], north["column"]) == (10, "source")
    assert north["sum of scores"] == pytest.approx(sum(mine), rel=1e-9)
    assert north["mean score"] == pytest.approx(sum(mine) / 10, rel=1e-9)
    # Adjoints are linear: what they say of a group as a whole is the sum.
    assert north["removed as a whole"] == pytest.approx(sum(mine), rel=1e-6)
    whole = la.score(logged.run, "loo", [list(range(10))], ray_address=None, save=False, check=0).values[0]
    assert north["loo"] == pytest.approx(whole, rel=1e-6)
    south = next(row for row in rows if row["value"] == "south")
    assert (south["removed as a whole"], south["loo"]) == (None, None)
    worst = sorted(scores["sgd-ie"], key=lambda removal: scores["sgd-ie"][removal])[:2]
    assert south["share among the most harmful tenth"] == sum(i >= 10 for (i,) in worst) / 14
    assert north["share among the most harmful tenth"] == sum(i < 10 for (i,) in worst) / 10


def test_the_worst_predictions_stand_with_the_samples_that_made_them(logged: Logged) -> None:
    matrix = la.score_matrix(logged.run, "sgd-ie", ray_address=None, save=False, check=0)
    query = logged.run.query("val")
    objective = Replay(logged.run).objective
    losses = query.values(objective, logged.run.parameters(logged.run.n_steps)[None], each=True)[0].tolist()
    rows = logged.rows("predictions")
    assert [row["example"] for row in rows] == sorted(range(16), key=lambda example: -losses[example])
    for row in rows:
        example = row["example"]
        assert row["loss"] == pytest.approx(losses[example], rel=1e-12)
        assert row["label"] == f"shown as {example}"
        assert row["picture"] == "Image"
        for word, (near, scores) in (("helped", matrix.helpful(example, 5)), ("harmed", matrix.harmful(example, 5))):
            kept = [(i, score) for (i,), score in zip(near, scores.tolist(), strict=True) if (score > 0) == (word == "helped")]
            labels = [f"{i % CLASSES}{', was 8' * (i in (3, 11))}" for i, _ in kept]
            said = [f"#{i} {label} ({score:+.2e})" for (i, score), label in zip(kept, labels, strict=True)]
            assert row[word] == ", ".join(said)
            assert [row[f"{word} {k}"] for k in (1, 2, 3)] == (["Image"] * len(kept) + [None] * 3)[:3]
    artifacts = [record["artifact"] for record in logged.records if record["type"] == "artifact"]
    (staged,) = (artifact["manifest"]["contents"] for artifact in artifacts if artifact["name"].endswith("-predictions"))
    pictures = [Path(entry["local_path"]).read_bytes() for entry in staged if entry["path"].endswith(".png")]
    assert pictures
    assert all(picture.startswith(b"\x89PNG") for picture in pictures)
    assert logged.summary["verdict/predictions by sgd-ie/n"] == 18
    assert str(logged.summary["verdict/predictions by sgd-ie/sentence"]).startswith(
        str(logged.summary["verdict/predictions by sgd-ie/word"])
    )


def test_agreement_names_the_sample_of_every_point(logged: Logged) -> None:
    truth = {row["sample"]: row["score"] for row in logged.rows("ranking/loo")}
    for name in list(METHODS)[1:]:
        estimate = {row["sample"]: row["score"] for row in logged.rows(f"ranking/{name}")}
        points = logged.rows(f"agreement/{name}-against-loo_table")
        assert {row["sample id"] for row in points} == set(truth)
        for row in points:
            assert (row["loo"], row[name]) == pytest.approx((truth[row["sample id"]], estimate[row["sample id"]]), rel=1e-12)
    assert repr(logged.rows("agreement")) == repr(logged.evaluation)  # NaN, where one group correlates with nothing
    assert {row["removals"] for row in logged.evaluation} == {"samples", "groups"}
    for row in logged.evaluation:
        for figure in ("rmse", "rmse_sd", "kendall", "spearman", "jaccard_10", "n", "seconds", "peak_memory_gb"):
            label = f"{row['method']} ({row['readout']}{', groups' * (row['removals'] == 'groups')})"
            if np.isfinite(row[figure]):
                assert logged.summary[f"{label}/{figure}"] == pytest.approx(row[figure])


def test_cleaning_curves_begin_with_nothing_removed_and_carry_intervals(logged: Logged) -> None:
    assert logged.rows("cleaning") == cleaned().to_pylist()
    curves = logged.lines("cleaning/gain")
    assert curves == {"random": [(0, 0), (0.1, -0.1), (0.25, -0.25)], "sgd-ie": [(0, 0), (0.1, 0.1), (0.25, 0.25)]}
    assert logged.lines("cleaning/loss")["sgd-ie"] == [(0, 1), (0.1, 0.9), (0.25, 0.75)]
    assert [y for _, y in logged.lines("cleaning/accuracy")["sgd-ie"]] == pytest.approx([0.7, 0.8, 0.95])
    one = logged.lines("cleaning by sgd-ie")
    assert set(one) == {"sgd-ie", "sgd-ie, 95 % low", "sgd-ie, 95 % high", "random"}
    assert [y for _, y in one["sgd-ie, 95 % low"]] == pytest.approx([0.68, 0.78, 0.93])
    assert [y for _, y in one["sgd-ie, 95 % high"]] == pytest.approx([0.72, 0.82, 0.97])
    assert set(logged.lines("cleaning by random")) == {"random", "random, 95 % low", "random, 95 % high"}
    assert logged.summary["cleaning/sgd-ie 10 %/gain"] == pytest.approx(0.1)
    assert logged.summary["cleaning/random 25 %/gain_high"] == pytest.approx(-0.2)
    assert logged.summary["cleaning/none/accuracy"] == pytest.approx(0.7)


def test_cleaning_without_accuracy_shows_the_loss(tmp_path: Path) -> None:
    shown = panels.cleaning(cleaned(accuracy=False))
    assert "cleaning/accuracy" not in shown
    rows = shown["cleaning by sgd-ie"].table.data
    assert [y for _, key, y in rows if key == "sgd-ie, 95 % low"] == pytest.approx([0.9, 0.8, 0.65])
    assert not any("accuracy" in name for name in panels.cleaning_summary(cleaned(accuracy=False)))


def test_what_removes_nothing_is_a_level_beside_the_curves() -> None:
    rows = cleaned().to_pylist()
    added = {**rows[-1], "method": "validation added", "fraction": 0.0, "n_removed": 0, "n_added": 37}
    table = pa.Table.from_pylist([*rows, added], schema=cleaning_table.SCHEMA)
    shown = panels.cleaning(table)
    points = [(x, y) for x, key, y in shown["cleaning/gain"].table.data if key == "validation added"]
    assert points == [(0, added["gain"]), (0.25, added["gain"])]
    whole = shown["cleaning"]
    assert whole.data[-1][whole.columns.index("n_added")] == 37
    assert panels.cleaning_summary(table)["cleaning/validation added/gain"] == added["gain"]


def test_lines_over_time_end_at_the_scores_of_the_extreme_samples(logged: Logged) -> None:
    ranked = [int(row["sample"]) for row in logged.rows("ranking/loo") if " " not in row["sample"]]
    lines = logged.lines("over time")
    assert set(lines) == {
        *(f"harmful #{sample}" for sample in ranked[:5]),
        *(f"helpful #{sample}" for sample in ranked[-5:]),
    }
    scores = la.score(logged.run, "sgd-ie", ray_address=None, save=False, check=0).by_removal()
    for name, points in lines.items():
        assert [t for t, _ in points] == sorted(t for t, _ in points)
        assert points[-1][1] == pytest.approx(scores[(int(name.split("#")[1]),)], rel=1e-9)
    visits = logged.rows("over time/visits")
    assert len(visits) == 10 * 3  # epochs
    expected = influence_over_time(logged.run, ranked[:5] + ranked[-5:]).to_pylist()
    assert [{key: row[key] for key in expected[0]} for row in visits] == expected


def test_cost_and_detection_are_there(logged: Logged) -> None:
    conditions = logged.facts["config"]["scores"]
    for key in ("cost_table", "cost/memory_table"):
        rows = {row["method"]: row for row in logged.rows(key)}
        assert set(rows) == {"loo (exact)", "acc-sgd-ie (exact)", "acc-low-rank (exact)", "sgd-ie (linear)", "tracin (linear)"}
        for label, row in rows.items():
            of = conditions[label.split()[0]]
            assert row["seconds"] == pytest.approx(of["seconds"])
            assert row["peak_memory_gb"] == pytest.approx(of["peak_memory_gb"])
            assert row["peak_memory_gb"] > 0.01
    curves = logged.lines("finding the corrupted")
    assert set(curves) == {*METHODS, "chance"}
    assert curves["chance"] == [(1, 2 / N), (N, 2 / N)]
    order = [int(row["sample"]) for row in logged.rows("ranking/loo") if " " not in row["sample"]]
    for k, share in curves["loo"]:
        assert share == pytest.approx(sum(sample in (3, 11) for sample in order[: int(k)]) / k)


def test_content_hashes_tie_the_runs_together(logged: Logged) -> None:
    folder = Path(logged.run.path)
    names = [f"scores/{name}.parquet" for name in METHODS]
    names += ["evaluation.json", "cleaning.parquet"]
    content = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names}
    content["manifest"] = logged.run.hash
    config = logged.facts["config"]
    assert {name: config["content"][name] for name in content} == content
    assert config["manifest"]["n_parameters"] == logged.run.n_parameters
    run = next(record["run"] for record in logged.records if record["type"] == "run")
    assert (run["project"], run["job_type"]) == ("somewhere", "influence")
    assert run["run_group"] == tracking.group_of(logged.run) == f"run-{logged.run.hash[:8]}"
    metadata, entries = logged.artifact("influence")
    assert {"manifest": metadata["made_of"]["manifest"], **metadata["content"]} == content
    assert metadata["group"] == run["run_group"]
    assert set(entries) == set(names)
    for name, staged in entries.items():
        assert staged.is_relative_to(logged.files)  # WANDB_DATA_DIR
        assert staged.read_bytes() == (folder / name).read_bytes()


def test_hashes_lead_from_the_cleaned_set_to_the_ids_to_the_scores_to_the_record(logged: Logged) -> None:
    sgd_ie = la.score(logged.run, "sgd-ie", ray_address=None, save=False, check=0)
    worst = [removal[0] for removal in sgd_ie.most_harmful(6)]  # as many as the headline says
    drop, ids = logged.artifact("drop")
    assert ids["drop.txt"].read_text().split() == [str(i) for i in worst]
    assert select(logged.run, str(ids["drop.txt"])) == [(i,) for i in worst]
    content = logged.facts["config"]["content"]
    made_of = {name: content[name] for name in ("manifest", "scores/sgd-ie.parquet", "cleaning.parquet")}
    assert drop["made_of"] == made_of
    cleaned, files = logged.artifact("cleaned")
    assert cleaned["made_of"] == {"manifest": logged.run.hash, "drop.txt": drop["content"]["drop.txt"]}
    for told, staged in ((drop, ids), (cleaned, files)):
        assert told["content"] == {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in staged.items()}
        assert told["content"].items() <= content.items()
    kept = [i for i in range(N) if i not in worst]
    assert files["kept.txt"].read_text().split() == [str(i) for i in kept]
    rows = parquet.read_table(files["cleaned.parquet"])
    assert rows["sample"].to_pylist() == kept
    assert np.array_equal(np.array(rows["0"].to_pylist()), data().tensors[0][kept].numpy())
    assert rows["source"].to_pylist() == ["north" if i < 10 else "south" for i in kept]
    pictures = datasets.Dataset(rows)["image"]  # which the file says they are
    assert [picture.size for picture in pictures] == [(6, 6)] * len(kept)


def test_of_a_large_training_set_the_ids_are_logged_and_not_the_data(
    logged: Logged, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(artifacts, "LARGEST", 100)
    again = Logged(logged.run, [], Path(tracking.track(logged.run, None, over_time=0)), tmp_path)
    assert set(again.artifact("cleaned")[1]) == {"kept.txt"}


def test_every_panel_of_the_workspace_shows_something_that_is_logged(logged: Logged) -> None:
    built = tracking.workspace("somewhere", "someone", save=False)
    assert [section.name for section in built.sections] == [
        "Rankings",
        "Predictions",
        "Agreement",
        "Cleaning",
        "Over training time",
        "Cost",
    ]
    assert (built.project, built.entity) == ("somewhere", "someone")
    model = built._to_model()
    spec = json.loads(model.spec.model_dump_json(by_alias=True, exclude_none=True))
    assert [section["name"] for section in spec["section"]["panelBankConfig"]["sections"]] == [s.name for s in built.sections]
    known = set(logged.summary) | {"progress/fraction", "progress/seconds_left"}
    # Only what cleaning was done by is there.
    assert built.runset_settings.pinned_columns[:2] == ["run:displayName", "summary:headline"]
    known |= {f"cleaning by {method}_table" for method in ("loo", "acc-sgd-ie", "acc-low-rank", "tracin")}
    charts = {}
    for section in built.sections:
        assert section.is_open
        for panel in section.panels:
            kind = type(panel).__name__
            if kind == "CustomChart":
                key = panel.query["summaryTable"]["tableKey"]
                charts[key.removesuffix("_table")] = (panel.chart_name, panel.chart_fields)
                keys = [key]
            else:
                keys = {"WeavePanelSummaryTable": lambda p: [p.table_name], "MediaBrowser": lambda p: p.media_keys}.get(
                    kind, lambda p: list(p.y)
                )(panel)
            assert set(keys) <= known
    # The charts are those W&B was told of when they were logged.
    updates = [record["config"]["update"] for record in logged.records if record["type"] == "config"]
    shown = {
        key.split(".", 2)[2]: value["panel_config"] for update in updates for key, value in update.items() if "visualize" in key
    }
    assert len(shown) >= 10
    for key, panel in shown.items():
        if key != "cleaning by random":
            assert charts[key] == (panel["panelDefId"], panel["fieldSettings"])


def texts(block: Any) -> str:
    """All that is to be read in a block of a report."""
    if isinstance(block, dict):
        return "".join(texts(value) for key, value in block.items() if key in ("children", "text"))
    return "".join(map(texts, block)) if isinstance(block, list) else str(block)


def test_the_report_has_headline_verdicts_and_panels_of_what_is_there(logged: Logged) -> None:
    built = tracking.report(logged.run, "somewhere", "someone")
    assert (built.project, built.entity) == ("somewhere", "someone")
    assert built.title == "Influence of the training samples: run"
    spec = json.loads(built._to_model().spec.model_dump_json(by_alias=True, exclude_none=True))
    blocks = [block for block in spec["blocks"] if texts(block) or block["type"] == "panel-grid"]
    said = [texts(block) for block in blocks if block["type"] == "heading"]
    assert said[0] == str(headline(logged.run)) == built.description
    assert said[2:] == ["Rankings", "Predictions", "Agreement", "Cleaning", "Over training time", "Cost"]
    (verdicts,) = (texts(block) for block in blocks if block["type"] == "list")
    for method in METHODS:
        assert f"{method}, 26 removals, query val: " in verdicts
    assert "these are true scores" in verdicts
    assert any(cleaning_table.MAY_ERR in texts(block) for block in blocks)
    grids = [block["metadata"] for block in blocks if block["type"] == "panel-grid"]
    assert len(grids) == 6
    known = {*logged.summary, "progress/fraction", "progress/seconds_left"}
    for grid in grids:
        (runs,) = grid["runSets"]
        (shown,) = runs["filters"]["filters"]
        assert (shown["key"]["name"], shown["op"], shown["value"]) == ("group", "=", tracking.group_of(logged.run))
        assert grid["panelBankSectionConfig"]["panels"]
    first = json.dumps(grids[0]["panelBankSectionConfig"]["panels"])
    assert all(f"ranking/{method}" in first and f"groups/{method}" in first for method in METHODS)
    assert {f"ranking/{method}" for method in METHODS} <= known


def test_a_report_leaves_out_what_is_not_there_and_needs_scores_and_to_be_saved_a_key(tmp_path: Path) -> None:
    run = record(tmp_path / "run", make())
    with pytest.raises(la.RequestError, match="no scores yet"):
        tracking.report(run)
    la.score(run, "sgd-ie", ray_address=None, check=0)
    run.manifest = {**run.manifest, "logger": {"project": "theirs", "group": 'it\'s "a" group', "id": "x"}}
    built = tracking.report(run)
    assert built.project == "theirs"
    spec = json.loads(built._to_model().spec.model_dump_json(by_alias=True, exclude_none=True))
    said = [texts(block) for block in spec["blocks"] if block["type"] == "heading"]
    assert said[2:] == ["Rankings", "Agreement", "Over training time", "Cost"]
    runs = [block["metadata"]["runSets"][0] for block in spec["blocks"] if block["type"] == "panel-grid"]
    assert {one["filters"]["filters"][0]["value"] for one in runs} == {'it\'s "a" group'}
    with pytest.raises(la.RequestError, match="report on run cannot be saved without a key"):
        tracking.report(run, save=True)


def test_the_workspace_is_saved_once_where_there_is_a_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    saved: list[Any] = []

    class Api:
        default_entity = "someone"
        client = type("Client", (), {"app_url": "https://wandb.example"})

    def upsert(view: Any) -> dict[str, Any]:
        saved.append(view)
        return {"upsertView": {"view": {"name": view.name, "id": "7"}}}

    monkeypatch.setattr("wandb.Api", Api)
    tracking.workspace("quiet")  # imports the library, offline
    monkeypatch.setattr("wandb_workspaces.workspaces.internal.upsert_view2", upsert)
    assert "Nothing of quiet was logged" in tracking.dashboards("quiet")
    with pytest.raises(la.RequestError, match="wandb login"):
        tracking.workspace("quiet", save=True)
    assert not saved
    monkeypatch.setenv("WANDB_MODE", "online")
    text = tracking.dashboards("mine")
    assert text == tracking.dashboards("mine")
    assert [(view.entity, view.project, view.display_name) for view in saved] == [("someone", "mine", "Influence")]
    project, workspace = (line.split()[-1] for line in text.splitlines())
    assert project == "https://wandb.example/someone/mine"
    assert workspace.startswith(f"{project}?nw=")

    def refuse(view: Any) -> dict[str, Any]:
        raise OSError("no route to host")

    monkeypatch.setattr("wandb_workspaces.workspaces.internal.upsert_view2", refuse)
    assert tracking.dashboards("other") == "The workspace of other was not saved: no route to host"


def test_dashboards_name_the_commands_for_offline_runs(logged: Logged, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("WANDB_DIR", str(logged.files))
    text = tracking.dashboards("somewhere")
    assert f"  wandb leet {logged.path}\n" in text
    assert text.endswith(f"  wandb sync {logged.path}")
    assert "Nothing of elsewhere" in tracking.dashboards("elsewhere")
    assert "Nothing of somewhere" in tracking.dashboards("somewhere", str(tmp_path))
    uploaded = next(logged.path.glob("*.wandb")).with_suffix(".wandb.synced")
    uploaded.touch()
    try:
        assert "Nothing of somewhere" in tracking.dashboards("somewhere")
    finally:
        uploaded.unlink()


def test_dashboards_find_every_project_that_results_were_logged_to(
    logged: Logged, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import wandb

    monkeypatch.chdir(tmp_path)
    directory = str(tmp_path / "several")
    quiet = wandb.Settings(silent=True, console="off")
    paths = {}
    for project in ("one", "two"):
        paths[project] = tracking.track(logged.run, None, project, directory, over_time=0)
    for project in ("two", "of others"):  # a training of its own, and what has nothing to do with us
        other = wandb.init(project=project, dir=directory, settings=quiet, entity="some-team", config={"a": "training"})
        paths[f"{project}, other"] = str(Path(other.dir).parent)
        other.finish()
    text = tracking.dashboards(directory=directory)
    assert "2 offline runs of two " in text
    assert "1 offline run of one " in text
    assert text.index(" of two ") < text.index(" of one ")  # the newest first
    for name, path in paths.items():
        assert (f"wandb sync {Path(path).relative_to(tmp_path)}" in text) == ("of others" not in name)
    assert "1 offline run of of others" in tracking.dashboards("of others", directory)
    assert tracking.dashboards(directory=str(tmp_path)).startswith("Nothing of lightning-acc was logged")


def test_what_wandb_is_about_to_write_is_waited_for_and_what_it_never_wrote_is_not(tmp_path: Path) -> None:
    file, header = tmp_path / "run-1.wandb", b":W&B\xe1\xbe\x00"
    file.write_bytes(header)
    later = threading.Timer(0.3, lambda: file.write_bytes(header + b"the run"))
    later.start()
    assert opening._head(file) == header + b"the run"
    later.join()
    file.write_bytes(header)
    os.utime(file, (0, 0))
    assert opening._head(file) == header


def test_a_file_of_the_future_is_not_waited_for_without_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(opening, "_WRITTEN_IN", 0.2)
    file = tmp_path / "run-1.wandb"
    file.write_bytes(b":W&B")
    os.utime(file, (2**33, 2**33))
    assert opening._head(file) == b":W&B"


def test_one_live_run_shows_progress_and_receives_the_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    import wandb

    run = record(tmp_path / "run", make())
    la.score(run, "sgd-ie", ray_address=None, check=0)
    now = [100.0]
    monkeypatch.setattr(driver, "time", SimpleNamespace(monotonic=lambda: now[0]))
    mine = wandb.init(project="mine", dir=tmp_path / "wandb-files", settings=wandb.Settings(silent=True, console="off"))
    with tracking.live(run, "scoring", "live") as shown:
        for i in range(101):
            shown.update(i / 100, 10.0, (100 - i) / 10)
            now[0] += 0.125
        shown.update(1.0)
        path = Path(tracking.track(run, None, into=shown, over_time=0))
    assert wandb.run is mine  # a run of the user's own goes on
    mine.finish()
    assert len(list((tmp_path / "wandb-files/wandb").glob("offline-run-*"))) == 2
    history = [json.loads(line) for line in inspect(path).splitlines()]
    items = [record["history"]["item"] for record in history if record["type"] == "history"]
    logged = [item["progress/fraction"] for item in items if "progress/fraction" in item]
    assert logged == [0.0, 0.16, 0.32, 0.48, 0.64, 0.8, 0.96, 1.0]
    facts = json.loads(inspect(path, "--summary"))
    assert facts["summary"]["progress/seconds_left"] == 0
    assert facts["summary"]["progress/rate"] == 10
    assert {"ranking/sgd-ie", "cost_table"} <= set(facts["summary"])
    assert "over time_table" not in facts["summary"]
    assert set(facts["config"]["scores"]) == {"sgd-ie"}
    assert facts["project"] == "live"
    assert facts["state"] == "finished"
    captured = capfd.readouterr()
    assert "wandb" not in captured.out + captured.err


def test_a_live_run_that_fails_says_so(tmp_path: Path) -> None:
    run = record(tmp_path / "run", make())
    paths = []

    def fail() -> None:
        with tracking.live(run, "scoring") as shown:
            paths.append(Path(shown.tracked.dir).parent)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    (path,) = paths
    assert json.loads(inspect(path, "--summary"))["exit_code"] == 1


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("s3://key:sec/ret@bucket/runs/a", "s3://bucket/runs/a"),
        ("s3://key:secret@bucket/runs/a", "s3://bucket/runs/a"),
        ("https://u:p@ss@host:80/a?token=secret&x=1", "https://host:80/a"),
        ("simplecache::ftp://u:p@host/a", "simplecache::ftp://host/a"),
        ("/home/me/what?/user@host", "/home/me/what?/user@host"),
        (
            {"a": [{"url": "http://u:p@h"}], "api_key": "secret", "n_tokens": 3},
            {"a": [{"url": "http://h"}], "api_key": "***", "n_tokens": 3},
        ),
    ],
)
def test_credentials_are_left_out(given: Any, kept: Any) -> None:
    assert connection.without_credentials(given) == kept


def test_no_credentials_reach_the_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = record(tmp_path / "run", make())
    la.score(run, "sgd-ie", ray_address=None, check=0)
    url = "https://me:pass-word@host/folder/run?signature=sig-nature"
    monkeypatch.setattr(type(run), "path", url, raising=False)
    monkeypatch.setattr(sys, "argv", ["lightning-acc", "track", url])
    run.__dict__.pop("path", None)
    assert tracking.group_of(run) == f"run-{run.hash[:8]}"
    path = Path(tracking.track(run, None))
    content = b"".join(file.read_bytes() for file in path.rglob("*") if file.is_file())
    assert b"https://host/folder/run" in content
    assert b"pass-word" not in content
    assert b"sig-nature" not in content


def test_a_loss_that_cannot_be_followed_over_time_has_all_the_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = record(tmp_path / "run", make())
    la.score(run, "loo", ray_address=None, check=0)

    def refuse(*_: Any) -> None:
        raise NotImplementedError("no second derivative")

    monkeypatch.setattr("lightning_acc.core.step.Point.pullback", refuse)
    facts = json.loads(inspect(Path(tracking.track(run, None)), "--summary"))
    assert "differentiates the loss twice" in facts["summary"]["over time/left out"]
    assert "ranking/loo" in facts["summary"]


def test_curves_are_thinned_but_keep_their_ends() -> None:
    views = samples.detection_precision(np.arange(5000.0), np.arange(5000) < 50)
    table = la.Scores.build([(i,) for i in range(5000)], np.arange(5000.0), {})
    rows = panels.detection({"x": table}, np.arange(5000) < 50).table.data
    own = [(k, share) for k, name, share in rows if name == "x"]
    assert len(own) == panels.POINTS
    assert own[0] == (1, 1.0)
    assert own[-1] == (5000, views[-1])
