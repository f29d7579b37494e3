"""The W&B workspace that arranges what ``track`` logs."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_acc.errors import RequestError
from lightning_acc.extras import extra
from lightning_acc.methods import registry
from lightning_acc.show.tracking import panels
from lightning_acc.show.tracking.connection import PROJECT, mode

if TYPE_CHECKING:
    from wandb_workspaces.workspaces import Workspace

NAME = "Influence"
PINNED = ["run:displayName", "summary:headline", "run:group", "run:jobType"]
"""Columns of the list of runs that come first."""
SAVED = "lightning-acc-workspaces.json"


def workspace(
    project: str | None = None,
    entity: str | None = None,
    tables: Sequence[str] | None = None,
    *,
    save: bool | None = None,
    directory: str | None = None,
) -> Workspace:
    """The workspace of a project: rankings, predictions, agreement, cleaning, influence over time, and cost, arranged.

    Args:
        project: None for ``lightning-acc``.
        entity: user or team; None takes ``WANDB_ENTITY``, else, where there is a key, the key's own.
        tables: names of the score tables to show, as in ``scores/<name>.parquet``; None for one of each method.
        save: whether to save it as a new view of the project; None where there is a key and none was saved from here before.
        directory: where W&B keeps its files, and where it is noted what was saved; None takes ``WANDB_DIR``, else the
            working directory.

    Returns:
        The workspace, checked against W&B's own description of one.

    Raises:
        RequestError: it was to be saved, and there is no key, or W&B refused or could not be reached.
    """
    project = project or PROJECT
    online = mode() == "online"
    what = f"workspace of {project}"
    entity = entity_for(what, entity, save)
    built = _build(project, entity, tables)
    known = saved(directory)
    if save or (save is None and online and f"{entity}/{project}" not in known):
        with refusals(what):
            built.save()
            note = files(directory) / SAVED
            note.parent.mkdir(parents=True, exist_ok=True)
            note.write_text(json.dumps({**known, f"{entity}/{project}": built.url}, indent=1))
    return built


def entity_for(what: str, entity: str | None, save: bool | None) -> str:
    """The user or team for whom ``what`` is made: as given, by ``WANDB_ENTITY``, or that of the key; nothing without one.

    Raises:
        RequestError: it is to be saved, and there is no key, or W&B cannot be asked.
    """
    entity = entity or os.environ.get("WANDB_ENTITY") or ""
    if save and mode() != "online":
        raise RequestError(f"The {what} cannot be saved without a key: run wandb login first.")
    if mode() == "online" and not entity:
        with refusals(what):
            with extra():
                import wandb
            entity = str(wandb.Api().default_entity or "")
    return entity


@contextmanager
def refusals(what: str) -> Iterator[None]:
    """In here whatever the network and the server answer is one sentence."""
    try:
        yield
    except Exception as error:
        raise RequestError(f"The {what} was not saved: {error}") from error


def files(directory: str | None) -> Path:
    """Where W&B puts its runs."""
    return Path(directory or os.environ.get("WANDB_DIR") or ".") / "wandb"


def saved(directory: str | None) -> dict[str, str]:
    """Addresses of the workspaces saved from here, by entity and project."""
    try:
        return dict(json.loads((files(directory) / SAVED).read_text()))
    except (OSError, ValueError):
        return {}


def _build(project: str, entity: str, tables: Sequence[str] | None) -> Workspace:
    with extra(), warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # the library's own, of pydantic
        from wandb_workspaces import workspaces as ws

    def section(name: str, columns: int, content: list[Any]) -> Any:
        rows = -(-len(content) // columns)
        layout = ws.SectionLayoutSettings(columns=columns, rows=min(rows, 3))
        return ws.Section(name=name, panels=content, is_open=True, layout_settings=layout)

    built = ws.Workspace(
        entity=entity,
        project=project,
        name=NAME,
        sections=[section(*one) for one in sections(list(registry.METHODS) if tables is None else tables)],
        runset_settings=ws.RunsetSettings(pinned_columns=PINNED),
    )
    built._to_model()  # W&B's own description of a workspace refuses here what it would refuse when saving
    return built


def sections(tables: Sequence[str]) -> list[tuple[str, int, list[Any]]]:
    """What is shown of these score tables: of each section its name, the number of its columns, and its panels."""
    with extra(), warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        from wandb_workspaces.reports.v2 import interface as wr

    estimates = [name for name in tables if not registry.is_truth(name.split("-")[0].split(".")[0])]

    def table(key: str) -> Any:
        return wr.WeavePanelSummaryTable(table_name=key)

    def chart(key: str, kind: str, fields: Sequence[str], title: str, x: str | None = None) -> Any:
        strings = {"title": title} if x is None else {"title": title, "xname": x}
        query = {"summaryTable": {"tableKey": f"{key}_table"}}
        by_name = dict(zip(fields[::2], fields[1::2], strict=True))
        return wr.CustomChart(query=query, chart_name=f"wandb/{kind}/v0", chart_fields=by_name, chart_strings=strings)

    def lines(key: str, title: str, x: str) -> Any:
        return chart(key, "lineseries", ("step", "step", "lineKey", "lineKey", "lineVal", "lineVal"), title, x)

    def bars(key: str, value: str, title: str) -> Any:
        return chart(key, "bar", ("label", "method", "value", value), title)

    removing = "fraction removed"
    galleries = [f"most harmful/{name}" for name in tables]
    rankings = [*(table(f"ranking/{name}") for name in tables), *(table(f"groups/{name}") for name in tables)]
    agreement = [
        table("agreement"),
        lines("finding the corrupted", "Share of corrupted samples among the k most harmful", "k"),
        *(
            chart(f"agreement/{name}-against-loo", "scatter", ("x", "loo", "y", name), f"{name} against retraining")
            for name in estimates
        ),
    ]
    cleaning = [
        *(lines(f"cleaning/{quantity}", f"{quantity} after removing", removing) for quantity in panels.CLEANED),
        *(lines(f"cleaning by {name}", f"Removing by {name}, 95 % interval", removing) for name in tables),
        table("cleaning"),
    ]
    cost = [
        bars("cost", "seconds", "Seconds of work"),
        bars("cost/memory", "peak_memory_gb", "Peak memory of a process, GB"),
        wr.LinePlot(title="Progress", y=["progress/fraction"], range_y=(0, 1)),
        wr.LinePlot(title="Seconds left", y=["progress/seconds_left"]),
    ]
    over_time = [lines("over time", "Influence gathered over training", "step"), table("over time/visits")]
    return [
        ("Rankings", 1, [*rankings, wr.MediaBrowser(media_keys=galleries, title="Most harmful", num_columns=8)]),
        ("Predictions", 1, [table("predictions")]),
        ("Agreement", 2, agreement),
        ("Cleaning", 3, cleaning),
        ("Over training time", 1, over_time),
        ("Cost", 2, cost),
    ]
