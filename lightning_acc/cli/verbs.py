"""The verbs of the command line: a function each, whose arguments are its options and whose docstring is its help.

None is called like something of the package: to find where a function is from, the parser asks ``lightning_acc`` for its name,
and for ``score`` it would be given the one that computes, and torch with it, only to show help.
"""

from __future__ import annotations

from typing import Any, Literal

from lightning_acc import arguments
from lightning_acc.cli.matrix import do_matrix
from lightning_acc.cli.results import do_dashboards, do_export, do_report, do_status, do_track
from lightning_acc.credentials import without_credentials
from lightning_acc.errors import RunError
from lightning_acc.studies.grid import Study


def do_fit() -> None:
    """Train with a LightningCLI configuration (trainer, model, data) and record the run.

    The directory is ``recorder.directory``. With ``--runs N`` it is trained from N seeds, on the same data, and recorded in
    ``seed-0``, ``seed-1`` and so on in there. See ``lightning-acc fit --help`` for every option.
    """


def do_run() -> None:
    """Everything in order: fit, audit, score with every method, evaluate, report, W&B.

    See ``lightning-acc run --help`` for every option.
    """


def do_audit(run: str) -> None:
    """Replay the training over the record and compare with the recorded parameters.

    Args:
        run: the run directory.
    """
    from lightning_acc.run import Run

    opened = Run(run)
    report = opened.audit()
    print(report)
    if not report:
        raise RunError(f"{opened.path} did not pass its audit.")


def do_repair(run: str) -> None:
    """Make the whole steps of a record whose training was killed a run.

    Args:
        run: the run directory.
    """
    from lightning_acc.recorder.ending import repair

    print(f"{without_credentials(run)} is a run of {repair(run)} steps now.")


def do_plan(
    run: str,
    removals: str = "all",
    query: str = "val",
    dtype: Literal["float32", "float64"] | None = None,
    device: str = "auto",
    ray_address: str | None = "local",
    workers: int | None = None,
    memory_gb: arguments.Budget = "auto",
    at: str = "end",
) -> None:
    """What each method would cost on this run, from a few of its steps, and which one to use.

    Args:
        run: the run directory.
        removals: all, random:N, top:N@METHOD, group:COLUMN, or a file with one removal on each line.
        query: a query recorded with the run.
        dtype: precision of the replay; by default as recorded.
        device: cpu, cuda, or one of several, such as cuda:1; auto for the GPU where there is one.
        ray_address: where it would be computed: local, auto, ray://host:port, or null for this process.
        workers: how many workers there are; by default as many as this machine has cores.
        memory_gb: budget of each process; auto is 2 on the CPU, or what one removal needs, and half of what is free of a GPU.
        at: when the query is read, as for score.
    """
    from lightning_acc.planning.plan import plan
    from lightning_acc.run import Run
    from lightning_acc.scoring.selection import moment, select

    opened = Run(run)
    wanted = select(opened, removals)
    print(plan(opened, wanted, query, dtype, ray_address, device=device, at=moment(at), workers=workers, memory_gb=memory_gb))


def do_score(
    run: list[str],
    method: str = "acc-sgd-ie",
    removals: str = "all",
    query: str = "val",
    at: str = "end",
    readout: Literal["exact", "linear"] | None = None,
    dtype: Literal["float32", "float64"] | None = None,
    device: str = "auto",
    ray_address: str | None = "local",
    memory_gb: arguments.Budget = "auto",
    check: str = "auto",
    directions: int | None = None,
    followed: int | None = None,
    trainings: int | None = None,
    processes: int = 1,
    confirm: str | None = None,
    top: int = 10,
    wandb: bool = False,
) -> None:
    """Estimate, for each removal, what the run would have ended with without it.

    Positive scores: the samples help. Negative: the model would be better without them.

    Args:
        run: the run directory; or several on the same data, whose scores are averaged, with the ids of the first.
        method: loo retrains and is the truth; acc-sgd-ie follows it closely at about the same cost; acc-low-rank does for
            many samples at once; sgd-ie, and tracin as a baseline, answer for all samples in one sweep.
        removals: all; random:N; top:N@METHOD, the most harmful by stored scores; group:COLUMN; random-groups:100x5%, drawn at
            random, for LDS; top-group:1%@METHOD, those that help most, as one; or a file with the sample ids of one removal on
            each line.
        query: a query recorded with the run, such as val.
        at: when it is read: end; along, the mean over every 20th step, 20 at least (along:K over K); a step, or several with
            commas between; or a checkpoint of the run by its name, such as best.
        readout: exact evaluates the query at the shifted parameters, linear multiplies the shift with its gradient; by
            default exact for loo and acc-sgd-ie, linear for sgd-ie and tracin, and for acc-low-rank of Adam and the like, where
            exact adds the query's curvature.
        dtype: precision of the replay; by default as recorded.
        device: cpu, cuda, or one of several, such as cuda:1; auto for the GPU where there is one.
        ray_address: local, auto, ray://host:port, or null for this process.
        memory_gb: budget of each process; auto is 2 on the CPU, or what one removal needs, and half of what is free of a GPU.
        check: how many removals to retrain without, so that the scores say how far they hold; auto for as many as the time
            of the scoring, or a minute, allows; 0 for none.
        directions: of acc-low-rank: in how many it follows what training contracts; by default as many as matter and
            trainings pay for.
        followed: of acc-low-rank: how many of the most influential samples it follows exactly; large runs are done so by
            default. Of Adam and the like, and where gradients are clipped: how many it takes through the optimizer's updates.
        trainings: of acc-low-rank: what its ranking of all samples may cost, in trainings of the run, 25 by default; where that
            pays for training again without each of them, it does this.
        processes: of Ray, that take the one sweep of sgd-ie or tracin together, each with some rows of every batch; for steps
            that are large.
        confirm: top:N also retrains without the N most harmful, and prints their true scores beside.
        top: how many of the most harmful to print.
        wandb: whether W&B is shown the progress, and then all results; offline where there is no key.
    """
    from lightning_acc.cli.live import live
    from lightning_acc.cli.shown import shown
    from lightning_acc.run import Run
    from lightning_acc.scoring.score import score
    from lightning_acc.scoring.selection import moment, most, select

    top = arguments.whole("top", top, "removals cannot be printed")
    opened = [Run(one) for one in run]
    with live(opened[0], "score", f"{method} {at} {removals}", wandb):
        scores = score(
            opened,
            method,
            select(opened[0], removals),
            query,
            readout,
            dtype,
            ray_address,
            device=device,
            at=moment(at),
            check=int(check) if check.isdecimal() else check,
            directions=directions,
            followed=followed,
            trainings=trainings,
            processes=processes,
            confirm=most(confirm) if confirm else 0,
            memory_gb=memory_gb,
        )
        print(shown(scores, top))


def do_retrain(
    run: list[str],
    removals: str = "all",
    query: str = "val",
    dtype: Literal["float32", "float64"] | None = None,
    device: str = "auto",
    ray_address: str | None = "local",
    memory_gb: arguments.Budget = "auto",
    at: str = "end",
    wandb: bool = False,
) -> None:
    """Retrain without each removal: the truth the estimates are compared with (score --method loo).

    Args:
        run: the run directory; or several on the same data, whose scores are averaged, with the ids of the first.
        removals: all; random:N; top:N@METHOD, the most harmful by stored scores; group:COLUMN; random-groups:100x5%, drawn at
            random, for LDS; top-group:1%@METHOD, those that help most, as one; or a file with the sample ids of one removal on
            each line.
        query: a query recorded with the run, such as val.
        at: when it is read: end; along, the mean over every 20th step, 20 at least (along:K over K); a step, or several with
            commas between; or a checkpoint of the run by its name, such as best.
        dtype: precision of the replay; by default as recorded.
        device: cpu, cuda, or one of several, such as cuda:1; auto for the GPU where there is one.
        ray_address: local, auto, ray://host:port, or null for this process.
        memory_gb: budget of each process; auto is 2 on the CPU, or what one removal needs, and half of what is free of a GPU.
        wandb: whether W&B is shown the progress, and then all results; offline where there is no key.
    """
    do_score(run, "loo", removals, query, at, None, dtype, device, ray_address, memory_gb, wandb=wandb)


def do_evaluate(run: str) -> None:
    """Compare all stored scores with leave-one-out retraining.

    Args:
        run: the run directory.
    """
    from lightning_acc.judge.agreement import as_text, evaluate

    print(as_text(evaluate(run)))


def do_clean(
    run: list[str],
    method: list[str] | None = None,
    fractions: list[float] = [0.05, 0.1, 0.2],  # noqa: B006
    seeds: int = 5,
    test: str | None = None,
    device: str = "auto",
    ray_address: str | None = "local",
    memory_gb: arguments.Budget = "auto",
    at: str | None = None,
    wandb: bool = False,
) -> None:
    """Drop the most harmful samples, train anew over several seeds, and test; beside controls.

    Args:
        run: the run directory; or several on the same data: the first is cleaned, by the mean of all their scores.
        method: whose rankings to use; by default sgd-ie, read along the run.
        fractions: of the training samples to drop.
        seeds: how many trainings, each from new initial parameters and in a new order.
        test: the recorded query to test on; by default test where there is one, else val.
        device: cpu, cuda, or one of several, such as cuda:1; auto for the GPU where there is one.
        ray_address: local, auto, ray://host:port, or null for this process.
        memory_gb: budget of each process; auto is 2 on the CPU, or what one removal needs, and half of what is free of a GPU.
        at: when the rankings read their query, as for score; by default at the end, where methods are named.
        wandb: whether W&B is shown the progress, and then all results; offline where there is no key.
    """
    from lightning_acc.cli.live import live
    from lightning_acc.judge.cleaning import clean
    from lightning_acc.judge.cleaning_table import as_text
    from lightning_acc.run import Run
    from lightning_acc.scoring.selection import moment
    from lightning_acc.show.headline import headline

    when = None if at is None else moment(at)
    opened = [Run(one) for one in run]
    with live(opened[0], "clean", " ".join(method or ()), wandb):
        table = clean(opened, method, fractions, seeds, test, ray_address, device=device, at=when, memory_gb=memory_gb)
        print(as_text(table))
        print(headline(opened[0]))


def do_study(study: Study, ray_address: str | None = "local") -> None:
    """Train, score and compare every cell of a grid of small trainings; goes on where it was stopped.

    Args:
        study: the grid.
        ray_address: local, auto, ray://host:port, or null for this process.
    """
    from lightning_acc.studies.study import run_study, summary

    table = run_study(study, ray_address)
    print(summary(table))
    print(f"{len(table)} rows: {without_credentials(study.directory)}/study.parquet")


LISTS = {"clean": ("--method", "--fractions")}
"""Options that take several values."""
SEVERAL = ("score", "retrain", "clean")
"""Verbs that take several runs."""
VERBS: dict[str, Any] = {
    "run": do_run,
    "fit": do_fit,
    "audit": do_audit,
    "repair": do_repair,
    "status": do_status,
    "plan": do_plan,
    "score": do_score,
    "matrix": do_matrix,
    "retrain": do_retrain,
    "evaluate": do_evaluate,
    "clean": do_clean,
    "export": do_export,
    "report": do_report,
    "track": do_track,
    "dashboards": do_dashboards,
    "study": do_study,
}
