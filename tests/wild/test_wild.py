"""Every set-up is recorded, audited and equal to real Lightning retraining, or refused in a sentence."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from table import MISSING, SETUPS, listed
from wild import EXACT, compare, record

from lightning_acc.recorder import RecordingRefused

pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{message}")
    for message in (
        # Of the packages, about themselves.
        "`is_gradient_checkpointing` is deprecated",
        "`gradient_checkpointing_enable` is deprecated",
        "'set_vital' is deprecated",
        "enable_nested_tensor is True",
        "Trying to infer the `batch_size`",
        "Converting a tensor with requires_grad=True to a scalar",
        ".*torch.jit.script. is deprecated",
        # Of what the set-ups are on purpose: rebuilt by hand, with a best checkpoint before the end.
        "The module .* rebuilt from its hyper-parameters",
        "The best checkpoint of",
    )
]
RECORDED = [name for name, setup in SETUPS.items() if setup.refused is None]
DOUBLE = [name for name in RECORDED if SETUPS[name].double]
REFUSED = [name for name, setup in SETUPS.items() if setup.refused is not None]


@pytest.mark.parametrize("name", RECORDED)
def test_as_its_users_train_it(tmp_path: Path, name: str) -> None:
    setup = SETUPS[name]
    outcome = compare(setup, tmp_path, "float32")
    assert outcome.unchanged
    assert outcome.audited, outcome.audit
    assert outcome.within(setup.tolerance or EXACT["float32"]), outcome


@pytest.mark.parametrize("name", DOUBLE)
def test_exact_in_double_precision(tmp_path: Path, name: str) -> None:
    outcome = compare(SETUPS[name], tmp_path, "float64")
    assert outcome.unchanged
    assert outcome.audited, outcome.audit
    assert outcome.within(EXACT["float64"]), outcome


@pytest.mark.parametrize("name", REFUSED)
def test_refused_in_a_sentence(tmp_path: Path, name: str) -> None:
    setup = SETUPS[name]
    with pytest.raises(RecordingRefused, match=f"(?s){setup.refused}") as refusal:
        record(setup, tmp_path / "run", "float32")
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("file", MISSING)
def test_what_is_not_installed(file: str) -> None:
    pytest.skip(MISSING[file])


@pytest.mark.skipif(bool(MISSING), reason="not all packages are installed")
def test_the_table_is_of_these_setups() -> None:
    lines = listed()
    assert list(lines) == list(SETUPS)
    assert len(SETUPS) >= 30
    for name, setup in SETUPS.items():
        assert setup.has in lines[name]
        assert re.search(setup.refused or r"\| recorded \|", lines[name]), name
