"""A few hundred of the mutations that ``scripts/fuzz`` tries by the thousands: no traceback, no hang, no other answer."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest
from test_scripts import SCRIPTS, load

MUTATIONS = 300

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def fuzz() -> ModuleType:
    sys.path.insert(0, str(SCRIPTS))
    try:
        return load("fuzz")
    finally:
        sys.path.remove(str(SCRIPTS))


def test_damaged_and_malformed_runs_answer_as_before_or_refuse(fuzz: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "run"
    fuzz.record(path)
    files = fuzz.prepare(path)
    fuzz.restore(path, files)
    expected = fuzz.answers(path)
    assert not [answer for answer in expected.values() if isinstance(answer, (fuzz.Fault, fuzz.Refused))]
    words: Counter[str] = Counter()
    kinds: Counter[str] = Counter()
    for seed, kind, how, word, why in fuzz.explore(path, files, expected, list(range(MUTATIONS))):
        assert word != "BAD", f"scripts/fuzz --seed {seed} ({how}): {why}"
        words[word] += 1
        kinds[kind] += 1
    assert set(kinds) == set(fuzz.KINDS)
    # So that it would have been seen: mutations do change what is read, and most are noticed.
    assert words["refused"] > MUTATIONS / 3
    assert words["different"] > MUTATIONS / 20
    assert words["same"] > MUTATIONS / 20


def test_the_fuzzer_tells_a_fault_from_a_refusal(fuzz: ModuleType) -> None:
    assert fuzz.verdict({"a": 1}, {"a": fuzz.Fault("Traceback")}, sealed=True)[0] == "BAD"
    assert fuzz.verdict({"a": 1}, {"a": 2}, sealed=False)[0] == "BAD"
    assert fuzz.verdict({"a": 1}, {"a": 2}, sealed=True)[0] == "different"
    assert fuzz.verdict({"a": 1}, {"a": fuzz.Refused("no.")}, sealed=False)[0] == "refused"
    assert fuzz.verdict({"a": 1, "b": 2}, {"a": 1}, sealed=False)[0] == "same"
