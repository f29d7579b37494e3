"""The W&B Report on a run: its headline and verdicts in words, and the panels of the workspace, of its own group alone."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

from lightning_acc.core.queries.moments import END, in_words
from lightning_acc.credentials import without_credentials
from lightning_acc.errors import RequestError
from lightning_acc.extras import extra
from lightning_acc.judge import cleaning_table
from lightning_acc.judge.agreement import stored_scores
from lightning_acc.record.record import Record
from lightning_acc.scoring.scores import SIGN, Scores
from lightning_acc.show.headline import headline
from lightning_acc.show.predictions import stored_matrices
from lightning_acc.show.tracking.connection import LONGEST, PROJECT, group_of, last_part, training_of
from lightning_acc.show.tracking.layout import entity_for, refusals, sections

if TYPE_CHECKING:
    from wandb_workspaces.reports.v2.interface import Report

READING = (
    "A score says what the query of this very run would have been without a sample, or a group: the same initial parameters, "
    f"batches and random numbers, the sample's weight in the loss 0 in every step. {SIGN}."
)


def report(run: Record, project: str | None = None, entity: str | None = None, *, save: bool = False) -> Report:
    """A W&B Report on a run: what to do with it and how sure that is, and what ``track`` logged of its group.

    Args:
        run: the recorded run with its scores.
        project: None takes that of the training's logger, else ``lightning-acc``.
        entity: user or team; None takes ``WANDB_ENTITY``, else, where there is a key, the key's own.
        save: save it in the project, as a draft that nobody else sees.

    Returns:
        The report, checked against W&B's own description of one.

    Raises:
        RequestError: there are no scores to report; or it was to be saved, and there is no key, or W&B refused.
    """
    tables = stored_scores(run)
    said = headline(run, tables)
    if said is None:
        raise RequestError(f"{run.path} has no scores yet: compute some with score(run, method=...) first.")
    with extra(), warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # the library's own, of pydantic
        from wandb_workspaces.reports.v2 import interface as wr
    project = project or str(training_of(run).get("project") or PROJECT)
    group = group_of(run)
    what = f"report on {last_part(run.path)}"
    # A run set without a project is of the report's own; with one, W&B would be asked for it now.
    runs = wr.Runset(name=group[:LONGEST], filters=f"Group == {group!r}")
    blocks: list[Any] = [wr.H1(text=said.text), wr.P(text=READING), wr.TableOfContents()]
    blocks += [wr.H2(text="How far the scores can be trusted"), wr.UnorderedList(items=_verdicts(tables))]
    cleaned = cleaning_table.read(run)
    absent = {"Predictions": not stored_matrices(run), "Cleaning": cleaned is None}
    for name, _, panels in sections(list(tables)):
        if absent.get(name):
            continue
        blocks.append(wr.H2(text=name))
        if name == "Cleaning" and cleaned is not None:
            blocks += [wr.P(text=f"{note}.") for note in cleaning_table.notes(cleaned)]
        blocks.append(wr.PanelGrid(runsets=[runs], panels=panels))
    entity = entity_for(what, entity, save)
    built = wr.Report(project=project, entity=entity, title=_title(run), description=said.text, blocks=blocks, width="fluid")
    built._to_model()  # W&B's own description of a report refuses here what it would refuse when saving
    if save:
        with refusals(what):
            built.save(draft=True)
    return built


def _title(run: Record) -> str:
    return f"Influence of the training samples: {last_part(run.path)}"[:LONGEST]


def _verdicts(tables: dict[str, Scores]) -> list[Any]:
    """Of each table what it is, and its verdict."""
    said = []
    for table in tables.values():
        c = table.conditions
        when = "" if c["at"] == END else f" {in_words(c['at'])}"
        said.append(f"{c['method']}, {len(table)} removals, query {c['query']}{when}: {table.verdict}")
    return list(without_credentials(said))
