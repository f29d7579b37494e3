"""The verbs that show what was found, and hand it on."""

from __future__ import annotations

from lightning_acc.credentials import without_credentials


def do_export(
    run: str,
    scores: str = "acc-sgd-ie",
    csv: str | None = None,
    ids: str | None = None,
    fraction: float = 0.1,
) -> None:
    """Write a ranking as CSV, or the ids of the samples to drop.

    Args:
        run: the run directory.
        scores: which stored scores, such as sgd-ie.
        csv: file for the ranking: rank, sample, score and what is known of it.
        ids: file for the ids to drop, one on each line: the most harmful ones, of negative score.
        fraction: of the samples that ids may hold at most.
    """
    from lightning_acc.errors import RequestError
    from lightning_acc.judge import exports
    from lightning_acc.judge.agreement import stored_scores
    from lightning_acc.run import Run

    opened = Run(run)
    tables = stored_scores(opened)
    if scores not in tables:
        has = f"it has {', '.join(tables)}" if tables else "it has none yet"
        raise RequestError(f"This run has no scores {scores!r}: {has}. Compute them with lightning-acc score.")
    if csv is None and ids is None:
        raise RequestError("Nothing to write: name a file with --csv or --ids.")
    if csv is not None:
        exports.write_ranking_csv(opened, tables[scores], csv)
        print(f"ranking: {without_credentials(csv)}")
    if ids is not None:
        drop = exports.ids_to_drop(tables[scores], fraction=fraction)
        exports.write_ids(drop, ids)
        print(f"{len(drop)} ids to drop: {without_credentials(ids)}")


def do_status(run: str) -> None:
    """Say what is there of a run, what is missing, and which command is next.

    Args:
        run: the run directory.
    """
    from lightning_acc.show.status import status

    print(status(run))


def do_report(run: str, over_time: int = 0) -> None:
    """Write the page report/index.html in the run directory.

    Args:
        run: the run directory.
        over_time: how many samples from each end of the ranking to follow over training, at the price of three trainings.
    """
    from lightning_acc.show.report import write_report

    print(f"report: {write_report(run, over_time)}")


def do_track(run: str, project: str | None = None, report: bool = False) -> None:
    """Log rankings, agreement and cost to W&B; offline where there is no key.

    Args:
        run: the run directory.
        project: by default that of the training's own logger, else lightning-acc.
        report: whether to draft a W&B Report on it, too, which needs a key.
    """
    from lightning_acc.judge import agreement
    from lightning_acc.run import Run
    from lightning_acc.show import tracking

    opened = Run(run)
    print(f"W&B ({tracking.mode()}): {tracking.track(opened, agreement.read(opened), project)}")
    if report:
        print(f"W&B report: {tracking.report(opened, project, save=True).url}")


def do_dashboards(project: str | None = None) -> None:
    """Say how to open what was logged to W&B: its address, or the commands for runs that are offline.

    Args:
        project: by default every project that results were logged to from here.
    """
    from lightning_acc.show import tracking

    print(tracking.dashboards(project))
