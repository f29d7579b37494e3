"""What the verbs tell W&B while they work, and the group in which training and results come together; read from its files."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
from problems import Data, data, make, record, trainer
from pytorch_lightning.loggers import WandbLogger
from test_tracking import Logged
from torch.utils.data import DataLoader

import lightning_acc as la
from lightning_acc.cli import main
from lightning_acc.show import tracking
from lightning_acc.show.headline import headline
from lightning_acc.show.tracking import driver

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> la.Run:
    run = record(tmp_path_factory.mktemp("live") / "run", make(hidden=4))
    run.add_query("test", DataLoader(data(n=8, seed=3), 8))
    return run


@pytest.fixture(autouse=True)
def every_step_is_logged(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(driver, "SECONDS_BETWEEN_LOGS", 0.0)
    return


def logged(run: la.Run, files: Path) -> Logged:
    (path,) = (files / "wandb-files" / "wandb").glob("offline-run-*")
    return Logged(run, [], path, files)


@pytest.mark.parametrize(
    ("words", "name", "key"),
    [
        ("score --method=sgd-ie --check=0", "run: score sgd-ie end all", "ranking/sgd-ie"),
        ("retrain --removals=random:5", "run: score loo end random:5", "ranking/loo"),
        ("matrix --examples=0,1 --check=0", "run: matrix sgd-ie 0,1", "predictions"),
        ("clean --fractions 0.25 --seeds=2", "run: clean", "cleaning"),
    ],
)
def test_a_verb_shows_its_progress_and_then_the_results_in_one_run(
    run: la.Run, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: str, name: str, key: str
) -> None:
    verb, *options = words.split()
    main([verb, run.path, *options, "--ray-address=null", "--wandb=true"])
    found = logged(run, tmp_path)
    first = next(record["run"] for record in found.records if record["type"] == "run")
    assert first["display_name"] == name
    assert first["job_type"] == name.split()[1]
    assert first["run_group"] == tracking.group_of(run)
    items = [record["history"]["item"] for record in found.records if record["type"] == "history"]
    fractions = [item["progress/fraction"] for item in items if "progress/fraction" in item]
    assert len(fractions) >= 2
    assert fractions[-1] == 1.0
    whole = [i for i, item in enumerate(items) if "progress/fraction" in item]
    assert max(whole) < min(i for i, item in enumerate(items) if any(k.startswith(key) for k in item))  # the results come last
    assert found.summary[key]["nrows"] >= 1
    said = capsys.readouterr().out
    assert str(found.path) in said
    assert (str(headline(run)) in said) == (verb == "clean")


@pytest.mark.parametrize(
    "words",
    [
        "score --method=sgdie",
        "score --removals=random:100",
        "score --query=nothing",
        "retrain --at=soon",
        "matrix --examples=nothing",
        "clean --fractions 2",
    ],
)
def test_what_is_refused_before_it_begins_leaves_no_run(
    run: la.Run, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: str
) -> None:
    verb, *options = words.split()
    with pytest.raises(SystemExit, match="1"):
        main([verb, run.path, *options, "--ray-address=null", "--wandb=true"])
    assert capsys.readouterr().err.startswith("lightning-acc: ")
    assert not list((tmp_path / "wandb-files").rglob("*.wandb"))


def test_results_that_were_there_before_are_logged_without_progress(run: la.Run, tmp_path: Path) -> None:
    words = ["score", run.path, "--method=tracin", "--check=0", "--ray-address=null"]
    main(words)
    main([*words, "--wandb=true"])
    assert logged(run, tmp_path).summary["ranking/tracin"]["nrows"] >= 1


def test_a_verb_tells_nothing_where_it_is_not_asked_to(run: la.Run, tmp_path: Path) -> None:
    main(["score", run.path, "--method=tracin", "--check=0", "--ray-address=null"])
    assert not list((tmp_path / "wandb-files").rglob("*.wandb"))


@pytest.mark.parametrize("own", [None, "mine"])
def test_training_and_results_are_in_one_group_also_where_the_logger_names_none(tmp_path: Path, own: str | None) -> None:
    options: dict[str, Any] = {} if own is None else {"group": own}
    logger = WandbLogger(project="theirs", save_dir=tmp_path, **options, **{"offline": True})
    pl.seed_everything(1)
    trainer(la.TrajectoryRecorder(tmp_path / "run"), logger=logger).fit(make(), datamodule=Data())
    group = logger.experiment.group
    tracking.finish()
    assert group == own or (own is None and group == f"training-{logger.experiment.id}")
    run = la.Run(tmp_path / "run")
    assert run.manifest["logger"]["group"] == group == tracking.group_of(run)
    (path,) = tmp_path.glob("wandb/offline-run-*")
    runs = [record["run"] for record in Logged(run, [], path, tmp_path).records if record["type"] == "run"]
    assert runs[-1]["run_group"] == group
    assert runs[-1]["project"] == "theirs"
    la.score(run, "sgd-ie", ray_address=None, check=0)
    results = Logged(run, [], Path(tracking.track(run, None, over_time=0)), tmp_path)
    first = next(record["run"] for record in results.records if record["type"] == "run")
    assert (first["run_group"], first["project"]) == (group, "theirs")
