from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from s3 import server as server

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
# Ray reads this once in a process: clusters of all tests must agree, and those of several nodes here have no token to share.
os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ.setdefault("RAY_gcs_server_port_wait_time_s", "120")  # the machine may be busy
os.environ.setdefault("LIGHTNING_ACC_TRUST", "problems")  # for processes that open a run without importing its module
torch.set_num_threads(1)  # small products on several threads wait for each other


@pytest.fixture(autouse=True)
def wandb_stays_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_DIR", "WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "wandb-files"))
    monkeypatch.setenv("WANDB_MODE", "offline")
    (tmp_path / "wandb-files").mkdir()
