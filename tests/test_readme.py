"""The README is true: its snippets run, its commands work in the order given, its figures are those of the demo."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
from test_scripts import load

import lightning_acc as la

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_the_snippets_run_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """And the first shows what it promises."""
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "readme"}
    first_steps = load("first_steps")
    first, *others = blocks("python")
    assert first == first_steps.SNIPPET
    exec(compile(first, "README.md", "exec"), names)
    printed = capsys.readouterr().out
    first_steps.check(printed)
    assert names["data"].corrupted.sum() == len(names["harmful"]) == 159
    tables = printed[printed.index(" method") :]
    assert max(map(len, tables.splitlines()[:-1])) <= 100  # all but the path of the page
    assert (tmp_path / "runs/mine/report/index.html").exists()
    kept = names["run"].cleaned_dataset(names["harmful"])
    assert len(kept) == 797 - len(names["harmful"])
    for block in others:
        exec(compile(block, "README.md", "exec"), names)
    assert "Scores(sgd-ie: 797 removals, query confidence" in capsys.readouterr().out


def test_it_is_short_and_its_links_lead_somewhere() -> None:
    assert len(README.splitlines()) <= 150
    for page in (ROOT / "README.md", ROOT / "scripts/study/README.md"):
        for link in re.findall(r"\]\((?!https:)([^)]+)\)", page.read_text()):
            assert (page.parent / link.partition("#")[0]).exists(), link


def test_the_wheel_of_the_install_section_holds_the_whole_package(tmp_path: Path) -> None:
    pytest.importorskip("setuptools", "77")  # else pip fetches it, which this test does not
    assert "\npip wheel --no-deps . " in README
    source = tmp_path / "checkout"
    shutil.copytree(ROOT / "lightning_acc", source / "lightning_acc", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    words = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "."]
    done = subprocess.run(words, cwd=source, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = source.glob("*.whl")
    assert f'pip install "{wheel.name}[all]"' in README
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("lightning_acc/")}
    assert packed == {path.relative_to(source).as_posix() for path in (source / "lightning_acc").rglob("*") if path.is_file()}


@pytest.mark.timeout(900)  # all of them, one after the other
def test_the_commands_work_and_the_demo_keeps_its_promises(tmp_path: Path) -> None:
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    commands = [line.partition("#")[0].split() for block in blocks("bash") for line in block.splitlines()]
    verbs = [words for words in commands if words[0] == "lightning-acc"]
    assert len(verbs) == 16
    assert "# estimates for every sample; or --removals group:label, whole groups" in README
    verbs.append(["lightning-acc", "score", "runs/digits", "--method", "acc-sgd-ie", "--removals", "group:label"])
    assert "lightning-acc run --config configs/digits.yaml" in (ROOT / "scripts/demo").read_text()
    assert verbs[0][1] == "run"
    # In one process, which imports and starts Ray once; the console script itself is tried by test_cli.
    printed = succeeds([sys.executable, "-c", IN_ONE.format(commands=[words[1:] for words in verbs])], tmp_path)
    assert [line.split()[1] for line in printed.splitlines() if line.startswith("$ ")] == [words[1] for words in verbs]
    promises(tmp_path / "runs/after-run")
    for words in re.findall(r"`lightning-acc (\w+) ", README):
        assert words in {verb[1] for verb in verbs}


IN_ONE = """
import shutil
from lightning_acc.cli import main
from lightning_acc.scoring import cluster

with cluster.connect("local"):
    for words in {commands!r}:
        print("$", *words)
        main(words)
        if words[0] == "run":
            shutil.copytree("runs/digits", "runs/after-run")
"""


def succeeds(words: list[str], where: Path) -> str:
    """What a command prints, which must end well."""
    done = subprocess.run(words, cwd=where, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{words}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def promises(directory: Path) -> None:
    rows = {row["method"]: row for row in json.loads((directory / "evaluation.json").read_text())["rows"]}
    assert rows["acc-sgd-ie"]["n"] == rows["sgd-ie"]["n"] == 600
    assert rows["acc-sgd-ie"]["kendall"] >= 0.93
    assert rows["acc-sgd-ie"]["rmse"] < rows["sgd-ie"]["rmse"]
    run = la.Run(directory)
    assert run.n_samples == 600
    info = run.sample_info()
    assert info is not None
    assert sum(info["corrupted"].to_pylist()) == 120
    shown = re.findall(r"^\| `([\w-]+)`, \w+ readout \| ([\d.e+-]+) \| ([\d.e+-]+) \|", README, re.MULTILINE)
    assert [method for method, *_ in shown] == ["loo", "acc-sgd-ie", "acc-low-rank", "sgd-ie", "tracin"]
    for method, error, kendall in shown:
        # Another processor rounds otherwise, and the training amplifies it a little.
        assert float(error) == pytest.approx(rows[method]["rmse_sd"], rel=0.1, abs=1e-9)
        assert float(kendall) == pytest.approx(rows[method]["kendall"], abs=0.01)
