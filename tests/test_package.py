"""The mathematics runs where Ray, W&B, datasets and Lightning's friends are not installed; imports are lazy."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from problems import make, record

BLOCKED = """
import sys
for name in ("ray", "wandb", "datasets", "sklearn", "jinja2"):
    sys.modules[name] = None
sys.path.insert(0, {tests!r})
import lightning_acc as la
run = la.Run({path!r})
assert run.audit().ok
from lightning_acc.methods.registry import METHODS
for method in METHODS:
    la.score(run, method, ray_address=None)
print(la.evaluate(run).to_pylist()[1]["method"])
"""


def test_scoring_needs_neither_ray_nor_wandb_nor_datasets(tmp_path: Path) -> None:
    record(tmp_path / "run", make(hidden=4))
    script = BLOCKED.format(tests=str(Path(__file__).parent), path=str(tmp_path / "run"))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "acc-sgd-ie\n"


def test_importing_the_package_imports_nothing_heavy() -> None:
    script = "import sys, lightning_acc, lightning_acc.cli; print([m for m in ('torch', 'ray', 'wandb') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_only_one_part_each_imports_ray_and_wandb() -> None:
    root = Path(__file__).parent.parent / "lightning_acc"
    sources = {path.relative_to(root).as_posix(): path.read_text() for path in root.rglob("*.py")}
    assert [name for name, text in sources.items() if "import ray" in text] == ["scoring/cluster.py"]
    assert {name.rpartition("/")[0] for name, text in sources.items() if "import wandb" in text} == {"show/tracking"}


READING = """
import os
import sys
import pyarrow as pa
import pyarrow.parquet
from lightning_acc.record import tables

table = pa.table({"score": [0.5, -0.5]}, metadata={"method": "loo"})
sink = pa.BufferOutputStream()
pa.parquet.write_table(table, sink)
threads = len(os.listdir("/proc/self/task"))
found = tables.read(sink.getvalue().to_pybytes())
assert found.equals(table, check_metadata=True)
print(len(os.listdir("/proc/self/task")) - threads)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counts threads as Linux lists them")
def test_reading_a_table_leaves_no_threads_that_abort_the_end_of_a_process() -> None:
    done = subprocess.run([sys.executable, "-c", READING], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "0\n"), done.stderr
