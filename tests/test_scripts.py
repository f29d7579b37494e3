"""The benchmarks run, their figures being for people and not for tests; what is shown of clusters ends as it should."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from problems import trainer

import lightning_acc as la
from lightning_acc.methods import memory
from lightning_acc.studies.data import DigitsDataModule
from lightning_acc.studies.models import Classifier

SCRIPTS = Path(__file__).parent.parent / "scripts"
pytestmark = pytest.mark.filterwarnings("ignore")


sys.path.append(str(SCRIPTS))  # as for a script: they import each other


def load(name: str, **constants: Any) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    vars(module).update(constants)
    return module


def test_bench_methods(capsys: pytest.CaptureFixture[str]) -> None:
    load("bench_methods", N=40, EPOCHS=2, BATCH=20, LOOP_STEPS=1, BUDGETS=(0.5,)).speed()
    printed = capsys.readouterr().out
    for ratio in ("acc-sgd-ie / loo", "sgd-ie / replay", "loop / acc-sgd-ie"):
        assert float(re.search(rf"^{ratio} +([\d.]+)", printed, re.MULTILINE)[1]) > 0  # type: ignore[index]


def test_bench_methods_measures_memory(capsys: pytest.CaptureFixture[str]) -> None:
    load("bench_methods", N=200, BUDGETS=(0.5,)).memory()
    printed = capsys.readouterr().out
    peaks = {method: float(peak) for method, peak in re.findall(r"^ +([a-z-]+) +([\d.]+)$", printed, re.MULTILINE)}
    for method in ("loo", "acc-sgd-ie", "sgd-ie", "tracin"):
        assert 0 < peaks[method] < 1.5 * 0.5, printed


def test_bench_defect(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    script = load("bench_defect")
    few = {"digits": script.Cell(script.data.DigitsDataModule, 40, (4,), 20, 2, 1e-2)}
    script.CELLS = {**few, "some": few["digits"]._replace(checked=9)}
    monkeypatch.setattr(sys, "argv", ["bench_defect.py"])
    script.main()
    row = r"^\| (\w+) \| ([^|]+) \| (\d*) \| (\d*) \| (-?[\d.]+) \| [\d.]+ \| \d+ \|$"
    rows = re.findall(row, capsys.readouterr().out, re.MULTILINE)
    methods = list(script.METHODS)
    assert [(name, method) for name, method, *_ in rows] == [
        *(("digits", method) for method in methods),
        *(("some", method) for method in (*script.FOR_ALL, "loo")),
    ]
    assert {tuple(told) for name, method, *told, _ in rows if method in methods[1:5]} == {("40", "4")}
    assert float(rows[-1][-1]) == float(rows[len(methods) - 1][-1]) == 1.0


def test_bench_recorder(capsys: pytest.CaptureFixture[str]) -> None:
    script = load("bench_recorder", PAIRS=1, BATCHES=4)
    script.CASES = {"tiny": script.Case(16, 20, (2,), 12)}
    script.main()
    row = r"tiny +(SGD|AdamW) +(\w+) +[\d.]+ ms +(?:-?[\d.]+ % +){4}-?[\d.]+ +([\d,]+)"
    printed = capsys.readouterr().out
    assert len({found[:2] for found in re.findall(row, printed) if int(found[2].replace(",", "")) > 0}) == 4, printed


def script(name: str, *arguments: str) -> str:
    """What a script prints, run as people do."""
    words = [sys.executable, str(SCRIPTS / name), *arguments]
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=800)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_bench_gpu(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    script = load("bench_gpu")
    monkeypatch.setattr("sys.argv", ["bench_gpu", "mnist", "--smoke"])
    script.main()
    row = r"^  ([a-z-]+)(?: of 2)? +[\d.]+ s +[\d.]+ trainings +[\d.]+ times a CPU core$"
    assert re.findall(row, capsys.readouterr().out, re.MULTILINE) == list(script.METHODS)


def test_bench_cluster(no_ray: None, capsys: pytest.CaptureFixture[str]) -> None:
    load("bench_cluster", N=130, EPOCHS=2, SECONDS=0.5, BATCH=16).main()
    printed = capsys.readouterr().out
    assert float(re.search(r"^2 workers / 1 +([\d.]+)", printed, re.MULTILINE)[1]) > 0  # type: ignore[index]
    assert float(re.search(r"the same to ([\de+-]+)$", printed, re.MULTILINE)[1]) < 1e-5  # type: ignore[index]
    assert float(re.search(r"^resuming a finished job +([\d.]+) s", printed, re.MULTILINE)[1]) < 5  # type: ignore[index]


def test_bench_scaling() -> None:
    printed = script("bench_scaling.py", "--quick")
    rows = re.findall(r"^MLP-(\d) +(\d+) +([\d,]+) +[\d.]+ s((?: +[\d.]+){10})$", printed, re.MULTILINE)
    assert [row[:3] for row in rows] == [("8", "64", "6,370"), ("8", "256", "6,370"), ("2", "64", "1,600")]
    for row in rows:
        assert min(map(float, row[3].split()[::2])) > 0, row  # in trainings; so little memory is added by some that it fits


def test_soak(no_ray: None, capsys: pytest.CaptureFixture[str]) -> None:
    load("soak", N=24, DRIVERS=0.0, STRIKES=2, SECONDS_BETWEEN_KILLS=(0.5, 1.0), SECONDS_OF_RECORDING=(2.0, 4.0)).main(
        minutes=0, recordings=1
    )
    printed = capsys.readouterr().out
    assert "1 trainings killed: all records pass their audit" in printed
    assert sum(map(int, re.search(r"round 1: (\d+) workers and (\d+) drivers", printed).groups())) > 0  # type: ignore[union-attr]
    assert "rounds equal to the undisturbed run" in printed


def test_cluster_demo(no_ray: None, capsys: pytest.CaptureFixture[str]) -> None:
    load("cluster_demo").main(str(SCRIPTS.parent / "configs/digits.yaml"), "--trainer.max_epochs=5")
    printed = capsys.readouterr().out
    assert re.search(r"dashboard: http://127\.0\.0\.1:\d+", printed)
    assert "killed: the second node" in printed
    assert printed.endswith("the same ranking of 600 samples, to the last bit\n")


def test_all_of_a_run_is_ranked_and_held_against_the_truth(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As of all of MNIST, of a few digits."""
    script = importlib.import_module("mnist_full")  # its functions go to processes of their own
    module = Classifier(64, 10, (8,), lr=0.05, momentum=0.9)
    loader = DigitsDataModule(n_train=80, n_val=50, batch_size=20, label_noise=0.1)
    trainer(la.TrajectoryRecorder(tmp_path / "run"), precision="32-true", max_epochs=2).fit(module, datamodule=loader)
    asked = ["--run", str(tmp_path / "run"), "--samples", "8", "--ray-address", "none", "--out", str(tmp_path / "table.md")]
    monkeypatch.setattr(sys, "argv", ["mnist_full.py", *asked])
    monkeypatch.setattr("lightning_acc.methods.memory.LARGEST_CHUNK", memory.LARGEST_CHUNK)  # which it sets
    script.main()
    text = (tmp_path / "table.md").read_text()
    found = re.findall(r"^\| `([\w.-]+)` \| ([\d.]+) \| (-?[\d.]+) \|.*\|$", text, re.MULTILINE)
    assert [name for name, *_ in found[:4]] == ["acc-sgd-ie.float64", "acc-low-rank", "sgd-ie", "tracin"]
    assert float(found[0][1]) < float(found[2][1])
    assert [name for name, *_ in found[4:]] == ["acc-low-rank", "sgd-ie", "tracin", "loss", "cleanlab"]


def test_what_can_go_wrong_is_drawn_and_told_in_figures(tmp_path: Path) -> None:
    script = load("what_can_go_wrong", N=60, BATCH=20, EPOCHS=2, HIDDEN=4, LEFT_OUT=4, SIZES=(1,))
    figures = script.write(tmp_path)
    text = (tmp_path / "what-can-go-wrong.md").read_text()
    for picture in ("relu", "groups", "end-of-run", "batch-norm"):
        assert f"]({picture}.svg)" in text
        assert (tmp_path / f"{picture}.svg").read_text().rstrip().endswith("</svg>")
    for name in ("gelu", "relu", "end", "along", "batch_norm"):
        assert -1 <= figures[name] <= 1
        assert f"{figures[name]:.2f}" in text
    assert figures["gelu"] > 0.9  # of 6 steps of a smooth network
    assert "60 images, 2 epochs" in text
