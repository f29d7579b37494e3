"""The mathematics runs where Ray, W&B, datasets and Lightning's friends are not installed; imports are lazy."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from problems import make, record

import lightning_acc as la
from lightning_acc.extras import EXTRAS, extra, required
from lightning_acc.scoring import cluster
from lightning_acc.show import tracking
from lightning_acc.studies.data import AdultDataModule, DigitsDataModule

ROOT = Path(__file__).parent.parent

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


def test_an_extra_is_what_the_package_says_it_is() -> None:
    project = (ROOT / "pyproject.toml").read_text()
    core = re.search(r"^dependencies = \[(.*?)^\]", project, re.DOTALL | re.MULTILINE)
    assert core is not None
    for package, needed in EXTRAS.items():
        name = {"sklearn": "scikit-learn", "wandb_workspaces": "wandb-workspaces"}.get(package, package)
        assert re.search(rf'^{needed} = .*"{name}>=', project, re.MULTILINE), package
        assert f'"{name}' not in core[1]
    assert f'all = ["lightning-acc[{",".join(dict.fromkeys(EXTRAS.values()))}]"]' in project
    assert re.search(r"^dev = \[\n +\"lightning-acc\[all,", project, re.MULTILINE)


NEEDY: dict[str, Callable[[la.Run], object]] = {
    "ray": lambda run: cluster.connect("local").__enter__(),
    "wandb": lambda run: tracking.track(run, None),
    "wandb_workspaces": lambda run: tracking.workspace(save=False),
    "datasets": lambda run: run.cleaned_dataset([0]),
    "sklearn": lambda run: DigitsDataModule().setup(),
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> la.Run:
    run = record(tmp_path_factory.mktemp("extras") / "run", make(hidden=4))
    la.score(run, "sgd-ie", ray_address=None, check=0)
    return run


@pytest.mark.parametrize("package", EXTRAS)
def test_what_is_not_installed_is_one_sentence_with_the_line_to_type(
    run: la.Run, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in list(sys.modules):
        if name.partition(".")[0] == package:
            monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(la.RequestError) as error:
        NEEDY[package](run)
    said = rf'The package {package} is not installed: type pip install "lightning-acc\[{EXTRAS[package]}\]"(, or .*)?\.'
    assert re.fullmatch(said, str(error.value))


def test_all_that_a_command_will_need_and_is_not_installed_is_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("ray", "wandb"):
        monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(la.RequestError) as error:
        required({"wandb": "leave it out", "numpy": "", "ray": "compute here"})
    expected = 'ray]", or leave it out and compute here.'
    assert str(error.value) == f'The packages wandb and ray are not installed: type pip install "lightning-acc[wandb,{expected}'
    required({"numpy": ""})


def test_a_package_that_lacks_something_else_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(la.RequestError, match=r"datasets is not installed"):
        AdultDataModule("nowhere").setup()
    with pytest.raises(ModuleNotFoundError, match="no_such_package"), extra():
        import no_such_package  # noqa: F401


LIGHT = ("torch", "numpy", "pyarrow", "ray", "wandb", "datasets", "sklearn", "pandas", "pytorch_lightning", "jsonargparse")
SLOW = (
    "scipy",
    "pytorch_lightning",
    "lightning",
    "torchmetrics",
    "ray",
    "wandb",
    "datasets",
    "sklearn",
    "pandas",
    "jsonargparse",
    "jinja2",
)

HELP_OF_EVERY_VERB = """
from lightning_acc.cli import main
from lightning_acc.cli.verbs import VERBS
for verb in [name for name in VERBS if name not in ("fit", "run")]:  # theirs has the options of Lightning's Trainer
    try: main([verb, "--help"])
    except SystemExit: pass
"""


@pytest.mark.parametrize(
    ("words", "absent"),
    [
        ("import lightning_acc, lightning_acc.cli", LIGHT),
        ("from lightning_acc.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass", LIGHT),
        (HELP_OF_EVERY_VERB, tuple(name for name in LIGHT if name != "jsonargparse")),
        ("import lightning_acc as la; la.Run, la.score, la.score_matrix, la.evaluate, la.clean, la.plan", SLOW),
    ],
)
def test_what_is_not_needed_is_not_imported(words: str, absent: tuple[str, ...]) -> None:
    script = f"import sys\n{words}\nprint([name for name in {absent} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_only_one_part_each_imports_ray_and_wandb() -> None:
    root = ROOT / "lightning_acc"
    sources = {path.relative_to(root).as_posix(): path.read_text() for path in root.rglob("*.py")}
    assert {name for name, text in sources.items() if "import ray" in text} == {
        "scoring/cluster/connection.py",
        "scoring/worker.py",
    }
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
