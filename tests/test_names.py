"""Lightning has two names, ``pytorch_lightning`` and ``lightning.pytorch``, whose classes are not the same."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

SCRIPT = """
import sys
if {alone!r}:
    sys.modules["pytorch_lightning"] = sys.modules["lightning_fabric"] = None  # as if they were not installed
import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader, TensorDataset
import lightning_acc as la


class Net(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(3, 2)

    def training_step(self, batch, batch_idx):
        return torch.nn.functional.cross_entropy(self.layer(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


torch.manual_seed(0)
data = TensorDataset(torch.randn(12, 3), torch.randint(0, 2, (12,)))
recorder = la.TrajectoryRecorder("run")
quiet = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
keep = pl.callbacks.ModelCheckpoint("kept", every_n_train_steps=3, save_last="link")
kept = {{**quiet, "enable_checkpointing": True}}
pl.Trainer(callbacks=[recorder, keep], max_epochs=2, accelerator="cpu", **kept).fit(Net(), DataLoader(data, 4, shuffle=True))
assert la.Run("run").checkpoints == {{"last": 6, keep.best_model_path: 6, keep.last_model_path: 6}}
assert type(recorder).__mro__[1].__module__.startswith("lightning.pytorch") == {alone!r}
print(la.Run("run").audit())
try:
    pl.Trainer(callbacks=[la.TrajectoryRecorder("run")], accelerator="cpu", **quiet).fit(Net(), DataLoader(data, 4))
except la.RunError as error:
    print(error)
"""


@pytest.fixture(scope="module")
def lightning(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package ``lightning`` as its makers build it: the sources of the others under new names."""
    folder = tmp_path_factory.mktemp("installed")
    for old, new in (("pytorch_lightning", "pytorch"), ("lightning_fabric", "fabric")):
        spec = find_spec(old)
        assert spec is not None
        assert spec.origin is not None
        source = Path(spec.origin).parent
        for path in source.rglob("*"):
            if path.suffix not in (".py", ".info"):
                continue
            target = folder / "lightning" / new / path.relative_to(source)
            target.parent.mkdir(parents=True, exist_ok=True)
            text = re.sub(r"\bpytorch_lightning\b", "lightning.pytorch", path.read_text())
            target.write_text(re.sub(r"\blightning_fabric\b", "lightning.fabric", text))
    (folder / "lightning/__init__.py").write_text("")
    return folder


@pytest.mark.parametrize("alone", [False, True], ids=["beside the other", "alone"])
def test_a_trainer_of_either_name_is_recorded(lightning: Path, tmp_path: Path, alone: bool) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(alone=alone)],
        cwd=tmp_path,
        env={"PYTHONPATH": f"{lightning}:{Path(__file__).parent.parent}", "PATH": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "audit passed: 6 steps reproduce the recorded parameters bit for bit" in done.stdout
    assert "already holds a run" in done.stdout
