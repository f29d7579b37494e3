"""What is computed on another device is what the CPU computes: every method, readout and kind of question."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from pretend import CASES, DRAWN_THERE, LEFT_BEHIND

TESTS = Path(__file__).parent
ROUND_OFF = 1e-13
"""Autograd adds up what it meets on several devices in another order."""


@pytest.fixture(scope="module")
def differences(tmp_path_factory: pytest.TempPathFactory) -> dict[str, float | str]:
    path = os.pathsep.join([str(TESTS.parent), str(TESTS), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, str(TESTS / "pretend.py"), str(tmp_path_factory.mktemp("pretend"))]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=900, env={**os.environ, "PYTHONPATH": path})
    assert ran.returncode == 0, ran.stderr
    found: dict[str, float | str] = json.loads(ran.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("case", [case for case in CASES if case not in (LEFT_BEHIND, DRAWN_THERE)])
def test_another_device_computes_the_same(differences: dict[str, float | str], case: str) -> None:
    assert differences[case] == pytest.approx(0, abs=ROUND_OFF)


@pytest.mark.parametrize("case", [case for case in CASES if case.startswith("loo")])
def test_retraining_is_the_same_bit_for_bit(differences: dict[str, float | str], case: str) -> None:
    assert differences[case] == 0


def test_random_numbers_are_drawn_where_they_were(differences: dict[str, float | str]) -> None:
    assert "drew random numbers (dropout) on pretend, and cpu draws others: give" in str(differences[DRAWN_THERE])


def test_what_is_left_on_the_cpu_is_an_error(differences: dict[str, float | str]) -> None:
    assert "met a tensor of the CPU" in str(differences[LEFT_BEHIND])
