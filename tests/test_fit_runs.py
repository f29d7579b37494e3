"""``fit --runs``: several seeds on the same data, one after another and over Ray."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

import lightning_acc as la
from lightning_acc.cli import main

CONFIG = Path(__file__).parent.parent / "configs/digits.yaml"
SMALL = [
    "--data.init_args.n_train=40",
    "--data.init_args.batch_size=20",
    "--trainer.max_epochs=2",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
    "--recorder.overwrite=false",
    "--recorder.directory=runs/several",
]
HERE = "--influence.ray_address=null"
QUIET = "--influence.wandb=false"

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::ResourceWarning")


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def fit(*options: str) -> None:
    main(["fit", "--config", str(CONFIG), *SMALL, *options])


def runs(n: int, directory: str = "runs/several") -> list[la.Run]:
    return [la.Run(f"{directory}/seed-{i}") for i in range(n)]


def final(run: la.Run) -> torch.Tensor:
    return run.parameters(run.n_steps)


def assert_same_data(recorded: list[la.Run]) -> None:
    """Sample by sample; but other parameters to begin with, and in another order."""
    first, *others = recorded
    for run in others:
        for i in range(first.n_samples):
            ours, theirs = first.content_of(i), run.content_of(i)
            assert ours is not None
            assert theirs is not None
            assert all(torch.equal(ours[name], theirs[name]) for name in ours)
        assert run.manifest["data"] == first.manifest["data"]
        assert run.sample_info() == first.sample_info()
        assert not torch.equal(run.parameters(0), first.parameters(0))
        assert run.steps[0].sample_ids.tolist() != first.steps[0].sample_ids.tolist()
    assert len({run.manifest["run_id"] for run in recorded}) == len(recorded)


def test_one_after_another(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Each is what ``fit`` records with its seed, bit for bit."""
    fit("--runs=3", "--seed_everything=7", "--data.init_args.seed=4", HERE, QUIET)
    out = capsys.readouterr().out
    paths = [str(tmp_path / f"runs/several/seed-{i}") for i in range(3)]
    assert out.endswith(
        "".join(f"recorded in {path}\n" for path in paths) + f"score them together: lightning-acc score {' '.join(paths)}\n"
    )
    recorded = runs(3)
    assert_same_data(recorded)
    main(["score", *paths, "--method=sgd-ie", "--at", "along", "--check=0", "--ray-address=null"])
    assert "query val at along, linear readout, float32, mean of 3 runs)" in capsys.readouterr().out
    assert all(run.query_names() == ["test", "val"] for run in recorded)
    for i in (0, 2):
        alone = [f"--seed_everything={7 + i}", f"--recorder.directory=runs/alone-{i}", "--data.init_args.seed=4", QUIET]
        fit(*alone)
        assert torch.equal(final(la.Run(f"runs/alone-{i}")), final(recorded[i]))


def test_over_ray(local_ray: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Paths start where the command is given, not where the workers stand; what was asked for by null is the same."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        fit("--runs=2", HERE, QUIET, "--recorder.directory=runs/here")
    finally:
        torch.set_num_threads(threads)
    fit("--runs=2", QUIET)
    assert f"score {tmp_path}/runs/several/seed-0 {tmp_path}/runs/several/seed-1\n" in capsys.readouterr().out
    assert_same_data(runs(2))
    for here, there in zip(runs(2, "runs/here"), runs(2), strict=True):
        assert torch.equal(final(here), final(there))
        assert there.manifest["threads"] == 1
    assert not list(local_ray.rglob("several*"))


@pytest.mark.filterwarnings("ignore:No seed found")
@pytest.mark.parametrize("seed", ["true", "false"])
def test_without_a_seed_they_count_from_0(seed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning_acc.studies import fit as training

    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)
    seen: list[Any] = []
    train = training.train
    monkeypatch.setattr(training, "train", lambda cli, group=None: (seen.append(cli.config.seed_everything), train(cli, group)))
    fit("--runs=2", f"--seed_everything={seed}", HERE, QUIET)
    assert seen == [0, 1]


def test_one_that_fails_costs_the_others_nothing(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """It is named. What is there already is refused before any training begins."""
    (tmp_path / "runs/several/seed-1/steps").mkdir(parents=True)
    (tmp_path / "runs/several/seed-1/steps/000000.safetensors").write_text("mine")
    with pytest.raises(SystemExit):
        fit("--runs=3", HERE, QUIET)
    said = capsys.readouterr()
    assert re.search(r"1 of 3 trainings failed\. \S+/seed-1: .* would be written over.*The others are kept\.", said.err)
    assert said.out.count("recorded in") == 2
    assert "seed-0" in said.out
    assert "seed-2" in said.out
    hashes = [la.Run(f"runs/several/seed-{i}").hash for i in (0, 2)]
    with pytest.raises(SystemExit):
        fit("--runs=4", HERE, QUIET)
    assert re.search(r"There are runs already: \S+/seed-0, \S+/seed-2\. .*overwrite=true", capsys.readouterr().err)
    assert not (tmp_path / "runs/several/seed-3").exists()
    assert [la.Run(f"runs/several/seed-{i}").hash for i in (0, 2)] == hashes


def test_overwriting_and_checkpoints(tmp_path: Path) -> None:
    """What Lightning itself writes does not meet, either."""
    fit("--runs=2", HERE, QUIET)
    before = [run.hash for run in runs(2)]
    fit("--runs=2", HERE, QUIET, "--recorder.overwrite=true", "--trainer.enable_checkpointing=true")
    assert all(run.hash not in before for run in runs(2))
    paths = [set(run.checkpoints) - {"last"} for run in runs(2)]
    assert all(len(names) == 1 for names in paths)
    assert not paths[0] & paths[1]
    assert all(torch.load(*names, weights_only=False)["global_step"] == 4 for names in paths)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--runs=0"], "runs=0 is no training: give a whole number, 1 or more"),
        (["--runs=2", "--trainer.devices=2"], "one process, but the trainer takes 2: start fit once for each seed"),
    ],
)
def test_what_cannot_be_done(options: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        fit(*options, HERE, QUIET)
    assert words in capsys.readouterr().err


def test_a_run_is_no_place_for_several(capsys: pytest.CaptureFixture[str]) -> None:
    fit(QUIET)
    with pytest.raises(SystemExit):
        fit("--runs=2", HERE, QUIET, "--recorder.overwrite=true")
    assert "runs/several is a run itself" in capsys.readouterr().err


def test_one_group_in_wandb_with_a_run_for_each(tmp_path: Path) -> None:
    fit("--runs=2", HERE)
    loggers = [run.manifest["logger"] for run in runs(2)]
    assert loggers[0]["group"] == loggers[1]["group"]
    assert loggers[0]["group"].startswith("several-")
    assert loggers[0]["id"] != loggers[1]["id"]
    assert len(list((tmp_path / "wandb-files").rglob("run-*.wandb"))) == 2


def test_help_says_it(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["fit", "--help"], ["--help"]):
        with pytest.raises(SystemExit):
            main(words)
    out = " ".join(capsys.readouterr().out.split())
    assert "--runs RUNS" in out
    assert "recorder.directory/seed-0, seed-1" in out
    with pytest.raises(SystemExit):
        main(["run", "--help"])
    assert "--runs" not in capsys.readouterr().out


def test_run_reads_the_query_when_it_is_told_to(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--influence.at=2,4", "--influence.methods=[loo,sgd-ie]", "--influence.clean_fractions=[0.1]"]
    main(["run", "--config", str(CONFIG), *SMALL, *options, "--influence.clean_seeds=2", HERE, QUIET])
    out = capsys.readouterr().out
    assert "Scores(loo: 40 removals, query val at along:2, " in out  # of four steps
    assert "Scores(sgd-ie: 40 removals, query val at along:2, " in out
    assert "sgd-ie along:2 " in out
    assert {row["at"] for row in la.evaluate("runs/several").to_pylist()} == {"along:2"}
