"""Whether W&B is online, and one W&B run of ours: its name, its group, its configuration."""

from __future__ import annotations

import netrc
import os
import sys
from typing import Any
from urllib.parse import urlparse

from lightning_acc.credentials import is_secret, without_credentials
from lightning_acc.extras import extra
from lightning_acc.record.record import Record

PROJECT = "lightning-acc"
"""The project where neither the caller nor the training's logger names one."""
MARK = "training_run"
"""In the configuration of every W&B run of ours: the id of the W&B run of the training; by it ours are told from others."""
LONGEST = 128
"""Characters W&B allows a name, and a group."""


def mode() -> Any:
    """``WANDB_MODE`` where it is set; else online where there is a key, and offline where there is none."""
    if os.environ.get("WANDB_MODE"):
        # Lightning's WandbLogger leaves W&B's older word for offline behind.
        return {"dryrun": "offline"}.get(os.environ["WANDB_MODE"], os.environ["WANDB_MODE"])
    if os.environ.get("WANDB_API_KEY"):
        return "online"
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    try:
        return "online" if netrc.netrc().authenticators(host) else "offline"
    except (OSError, netrc.NetrcParseError):
        return "offline"


def logger_options() -> dict[str, Any]:
    """Arguments for Lightning's WandbLogger that make it as quiet as ``track``, and never ask anything."""
    # Lightning does not read WANDB_DIR: its run would lie elsewhere than those of track.
    return {"offline": mode() == "offline", "save_dir": os.environ.get("WANDB_DIR") or ".", "settings": _settings()}


def finish() -> None:
    """End the W&B run that is open in this process, if there is one."""
    wandb = sys.modules.get("wandb")
    if wandb is not None and wandb.run is not None:
        wandb.finish()


def group_of(run: Record) -> str:
    """The W&B group of everything that belongs to a training run: that of its logger, else name and content hash."""
    group = training_of(run).get("group") or f"{last_part(run.path)[: LONGEST - 9]}-{run.hash[:8]}"
    return str(group)


def name_of(path: str, job: str, what: str = "") -> str:
    """What a W&B run is called: what it is about, and what is done there, as ``digits: score sgd-ie along``."""
    return f"{last_part(path)}: {job} {without_credentials(what)}".strip()[:LONGEST]


def last_part(path: str) -> str:
    """The last part of a path or URL; never a part of its credentials."""
    return str(without_credentials(path)).rstrip("/").rsplit("/", 1)[-1]


def training_of(run: Record) -> dict[str, Any]:
    """Project, group and id of the W&B run of the training, where it had one."""
    return dict(without_credentials(run.manifest["logger"] or {}))


def start(run: Record, job: str, project: str | None = None, directory: str | None = None, what: str = "") -> Any:
    """Open a W&B run about ``run``, beside any that is open in this process already.

    Args:
        run: the recorded run.
        job: what the W&B run is: its job type.
        project: None takes that of the training's logger, else ``lightning-acc``.
        directory: where W&B keeps its files; None takes ``WANDB_DIR``, else the working directory.
        what: what else tells it from others of this job, such as the method; stands in its name.
    """
    with extra():
        import wandb
    training = training_of(run)
    directory = directory or os.environ.get("WANDB_DIR") or "."
    os.makedirs(directory, exist_ok=True)
    manifest = {key: value for key, value in run.manifest.items() if key not in ("files", "layout")}
    config = {
        "run": run.path,
        MARK: training.get("id"),
        "manifest": {**manifest, "n_parameters": run.n_parameters},
        "content": {"manifest": run.hash},
    }
    return wandb.init(
        project=project or training.get("project") or PROJECT,
        group=group_of(run),
        job_type=job,
        name=name_of(run.path, job, what),
        config=without_credentials(config),
        dir=directory,
        mode=mode(),
        # Else a run of the user's own, open in this process, would be logged into, and ended.
        reinit="create_new",
        settings=_settings(),
    )


def _settings() -> Any:
    with extra("leave W&B out (--influence.wandb false)"):
        import wandb
    # W&B notes the words of the command line. It must not where one of them holds a password.
    words = sys.argv[1:]
    secret = any(without_credentials(word) != word or (word.startswith("-") and is_secret(word)) for word in words)
    return wandb.Settings(silent=True, console="off", x_disable_meta=secret)
