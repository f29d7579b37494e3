"""The benchmarks run; their figures are for people, not for tests."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

SCRIPTS = Path(__file__).parent.parent / "scripts"
pytestmark = pytest.mark.filterwarnings("ignore")


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
    load("bench_methods", BUDGETS=(0.5,)).memory()
    printed = capsys.readouterr().out
    peaks = {method: float(peak) for method, peak in re.findall(r"^ +([a-z-]+) +([\d.]+)$", printed, re.MULTILINE)}
    for method in ("loo", "acc-sgd-ie", "sgd-ie", "tracin"):
        assert 0 < peaks[method] < 1.5 * 0.5, printed


def test_bench_recorder(capsys: pytest.CaptureFixture[str]) -> None:
    load("bench_recorder", HIDDEN={"10^2": (2,)}, STEPS={"10^2": 12}, PAIRS=1, FEATURES=20, BATCH=16).main()
    assert re.search(r"10\^2 +[\d.]+ ms +[\d.]+ ms +-?[\d.]+ % +[\d,]+", capsys.readouterr().out)
