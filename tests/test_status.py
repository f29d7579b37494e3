"""``lightning-acc status``: what it says is next leads, typed as it stands, from a record to a cleaned data set."""

from __future__ import annotations

import shlex
import shutil
from pathlib import Path

import pytest
from problems import data, make, record
from torch.utils.data import DataLoader

import lightning_acc as la
from lightning_acc.cli import main
from lightning_acc.record import manifest
from lightning_acc.record.store import Store
from lightning_acc.show.status import status

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("status") / "run"
    run = record(path, make(hidden=4))
    run.add_query("test", DataLoader(data(n=8, seed=3), 8))
    return path


@pytest.fixture
def path(recorded: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(recorded, tmp_path / "a run"))


def next_command(said: str) -> list[str]:
    last = said.splitlines()[-1]
    assert last.startswith("next: lightning-acc ")
    return shlex.split(last)[2:]


def test_its_commands_lead_from_the_record_to_the_samples_to_drop(
    path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(path.parent)
    typed = []
    while not Path("drop.txt").exists():
        main(["status", "a run"])
        said = capsys.readouterr().out
        assert max(map(len, said.splitlines()[1:])) <= 100
        words = next_command(said)
        assert words[1] == "a run"
        typed.append(words[0])
        assert len(typed) < 10
        options = {"clean": ["--seeds=2"], "score": ["--check=0"]}.get(words[0], [])
        here = ["--ray-address=null"] if words[0] in ("score", "retrain", "matrix", "clean") else []
        main([*words, *options, *here])
        capsys.readouterr()
    assert typed == ["score", "retrain", "evaluate", "matrix", "clean", "report", "export"]
    assert "missing:" not in said
    there = [line.split() for line in said.partition("there:")[2].splitlines()]
    for row in (
        ["scores", "loo", "24", "removals", "val", "at"],
        ["scores", "sgd-ie", "24", "removals", "val", "at"],
        ["matrix", "sgd-ie", "24", "x"],
        ["evaluation"],
        ["cleaning"],
        ["page"],
    ):
        assert any(line[: len(row)] == row for line in there), row
    verdicts = {
        line[1]: set(line) & {"truth", "faithful", "rough", "unreliable", "unchecked"} for line in there if len(line) > 3
    }
    assert verdicts["loo"] == {"truth"}


def test_a_verdict_is_a_word_and_a_time_in_words(path: Path) -> None:
    scores = la.score(la.Run(path), "sgd-ie", ray_address=None)
    row = next(line for line in status(path).splitlines() if "  scores " in line and "sgd-ie" in line)
    assert f" {scores.verdict.word} " in row
    assert row.endswith(" s")


def test_a_package_that_is_not_trusted_yet_stands_in_the_command(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "--trust" not in status(path)
    monkeypatch.delenv("LIGHTNING_ACC_TRUST")
    assert next_command(status(path))[-2:] == ["--trust", "problems"]


def test_a_record_that_is_not_finished_is_to_be_repaired(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = manifest.read(Store(path))
    del content["n_steps"], content["stopped"]
    manifest.write(Store(path), {**content, "status": "recording"})
    said = status(path)
    assert "half written" in said
    main(next_command(said))
    assert "is a run of" in capsys.readouterr().out
    assert "half written" not in status(path)


def test_a_password_in_the_address_is_not_said() -> None:
    record(url := "memory://me:hunter2@host/status", make(hidden=4))  # type: ignore[arg-type]
    said = status(url)
    assert "hunter2" not in said
    assert next_command(said)[0] == "score"


def test_what_is_no_run_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(la.RunError, match="There is no run directory at"):
        status(tmp_path / "nowhere")
