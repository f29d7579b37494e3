"""The README is true: its snippets run, its commands work in the order given, its figures are those of the demo."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import lightning_acc as la

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_the_snippets_run_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "readme"}
    for block in blocks("python"):
        exec(compile(block, "README.md", "exec"), names)
    printed = capsys.readouterr().out
    assert "audit passed" in printed
    assert "Scores(sgd-ie: 100 removals, query margin" in printed
    assert re.search(r"num_rows: 9\d", printed)  # at most a tenth was dropped
    assert (tmp_path / "runs/mine/report/index.html").exists()
    described: Any = names["Digits"]
    data = described(n_train=100)
    data.setup("fit")
    assert {len(column) for column in data.describe_samples().values()} == {100}


@pytest.mark.timeout(900)  # all of them, one after the other
def test_the_commands_work_and_the_demo_keeps_its_promises(tmp_path: Path) -> None:
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    commands = [line.partition("#")[0].split() for block in blocks("bash") for line in block.splitlines()]
    verbs = [words for words in commands if words[0] == "lightning-acc"]
    assert len(verbs) == 15
    assert "lightning-acc run --config configs/digits.yaml" in (ROOT / "scripts/demo").read_text()
    for words in verbs:
        done = subprocess.run(
            [str(Path(sys.executable).parent / words[0]), *words[1:]], cwd=tmp_path, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{words}\n{done.stdout}\n{done.stderr}"
        if words[1] == "run":
            promises(tmp_path / "runs/digits")
    for words in re.findall(r"`lightning-acc (\w+) ", README):
        assert words in {verb[1] for verb in verbs}


def promises(directory: Path) -> None:
    rows = {row["method"]: row for row in json.loads((directory / "evaluation.json").read_text())["rows"]}
    assert rows["acc-sgd-ie"]["n"] == rows["sgd-ie"]["n"] == 600
    assert rows["acc-sgd-ie"]["kendall"] >= 0.93
    assert rows["acc-sgd-ie"]["rmse"] < rows["sgd-ie"]["rmse"]
    run = la.Run(directory)
    assert run.n_samples == 600
    info = run.sample_info()
    assert info is not None
    assert sum(info["corrupted"].to_pylist()) == 60
    shown = re.findall(r"^\| `([\w-]+)`, \w+ readout \| ([\d.e+-]+) \| ([\d.e+-]+) \|", README, re.MULTILINE)
    assert [method for method, *_ in shown] == ["loo", "acc-sgd-ie", "acc-low-rank", "sgd-ie", "tracin"]
    for method, error, kendall in shown:
        # Another processor rounds otherwise, and the training amplifies it a little.
        assert float(error) == pytest.approx(rows[method]["rmse_sd"], rel=0.1, abs=1e-9)
        assert float(kendall) == pytest.approx(rows[method]["kendall"], abs=0.01)
