"""``lightning-acc``: words to functions."""

from __future__ import annotations

import re
import sys
from math import isnan, nan
from typing import Any, Literal

from lightning_acc.errors import InfluenceError, RunError
from lightning_acc.studies.grid import Study

Method = Literal["loo", "acc-sgd-ie", "acc-low-rank", "sgd-ie", "tracin"]


def fit() -> None:
    """Train with a LightningCLI configuration (trainer, model, data) and record the run.

    The directory is ``recorder.directory``. See ``lightning-acc fit --help`` for every option.
    """


def run() -> None:
    """Everything in order: fit, audit, score with every method, evaluate, report, W&B.

    See ``lightning-acc run --help`` for every option.
    """


def audit(run: str) -> None:
    """Replay the training over the record and compare with the recorded parameters.

    Args:
        run: the run directory.
    """
    from lightning_acc.record.record import Run

    report = Run(run).audit()
    print(report)
    if not report:
        raise RunError(f"{run} did not pass its audit.")


def plan(
    run: str,
    removals: str = "all",
    query: str = "val",
    dtype: Literal["float32", "float64"] | None = None,
    ray_address: str | None = "local",
    workers: int | None = None,
    memory_gb: float = 2.0,
) -> None:
    """What each method would cost on this run, from a few of its steps, and which one to use.

    Args:
        run: the run directory.
        removals: all, random:N, top:N@METHOD, group:COLUMN, or a file with one removal on each line.
        query: a query recorded with the run.
        dtype: precision of the replay; by default as recorded.
        ray_address: where it would be computed: local, auto, ray://host:port, or null for this process.
        workers: how many workers there are; by default as many as this machine has cores.
        memory_gb: budget of each process.
    """
    from lightning_acc.plan.forecast import plan as forecast
    from lightning_acc.record.record import Run
    from lightning_acc.scoring.selection import select

    opened = Run(run)
    print(forecast(opened, select(opened, removals), query, dtype, ray_address, workers=workers, memory_gb=memory_gb))


def score(
    run: str,
    method: Method = "acc-sgd-ie",
    removals: str = "all",
    query: str = "val",
    readout: Literal["exact", "linear"] | None = None,
    dtype: Literal["float32", "float64"] | None = None,
    ray_address: str | None = "local",
    memory_gb: float = 2.0,
    rank: int | None = None,
    state: Literal["parameters", "outputs", "screened"] | None = None,
    confirm: str | None = None,
    top: int = 10,
) -> None:
    """Estimate, for each removal, what the run would have ended with without it.

    Positive scores: the samples help. Negative: the model would be better without them.

    Args:
        run: the run directory.
        method: loo retrains and is the truth; acc-sgd-ie follows it closely at about the same cost; sgd-ie and tracin
            answer for all samples in one sweep.
        removals: all, random:N, top:N@METHOD, group:COLUMN, or a file with the sample ids of one removal on each line.
        query: a query recorded with the run, such as val.
        readout: exact evaluates the query at the shifted parameters, linear multiplies the shift with its gradient; by
            default exact for loo and acc-sgd-ie, linear for sgd-ie and tracin.
        dtype: precision of the replay; by default as recorded.
        ray_address: local, auto, ray://host:port, or null for this process.
        memory_gb: budget of each process.
        rank: of acc-low-rank; by default as many directions as matter and can be afforded.
        state: of acc-low-rank: parameters keeps all that counts of each sample, outputs few numbers of each; screened follows
            the few most influential samples exactly, and is what large runs get by default.
        confirm: top:N also retrains without the N most harmful, and prints their true scores beside.
        top: how many of the most harmful to print.
    """
    from lightning_acc.record.record import Run
    from lightning_acc.scoring.score import score as compute
    from lightning_acc.scoring.selection import in_words, most, select

    opened = Run(run)
    options: dict[str, Any] = {"memory_gb": memory_gb, "rank": rank, "state": state, "confirm": most(confirm) if confirm else 0}
    scores = compute(opened, method, select(opened, removals), query, readout, dtype, ray_address, **options)
    c = scores.conditions
    if c["reused"]:
        print(f"{c['reused']} of {c['n']} removals were stored before, {c['n'] - c['reused']} are new")
    print(f"{scores}, {c['seconds']:.1f} s of work in {c['wall_seconds']:.1f} s, peak {c['peak_memory_gb']:.2f} GB")
    rows = sorted(zip(scores.table["rank"].to_pylist(), scores.removals, scores.values.tolist(), strict=True))
    print("most harmful first:" if rows else "no removals")
    truth = scores.by_removal("loo") if confirm else {}
    for place, removal, value in rows[:top]:
        true = f"  ({truth[removal]:+.3e} by retraining)" if not isnan(truth.get(removal, nan)) else ""
        print(f"{place:6d}  {value:+.3e}  {in_words(opened, removals, removal)}{true}")


def retrain(
    run: str,
    removals: str = "all",
    query: str = "val",
    dtype: Literal["float32", "float64"] | None = None,
    ray_address: str | None = "local",
    memory_gb: float = 2.0,
) -> None:
    """Retrain without each removal: the truth the estimates are compared with (score --method loo).

    Args:
        run: the run directory.
        removals: all, random:N, top:N@METHOD, group:COLUMN, or a file with the sample ids of one removal on each line.
        query: a query recorded with the run, such as val.
        dtype: precision of the replay; by default as recorded.
        ray_address: local, auto, ray://host:port, or null for this process.
        memory_gb: budget of each process.
    """
    score(run, "loo", removals, query, None, dtype, ray_address, memory_gb)


def evaluate(run: str) -> None:
    """Compare all stored scores with leave-one-out retraining.

    Args:
        run: the run directory.
    """
    from lightning_acc.judge.agreement import as_text
    from lightning_acc.judge.agreement import evaluate as compare

    print(as_text(compare(run)))


def clean(
    run: str,
    method: list[Method] = ["acc-sgd-ie"],  # noqa: B006
    fractions: list[float] = [0.05, 0.1, 0.2],  # noqa: B006
    seeds: int = 5,
    test: str | None = None,
    ray_address: str | None = "local",
    memory_gb: float = 2.0,
) -> None:
    """Drop the most harmful samples, train anew over several seeds, and test; beside controls.

    Args:
        run: the run directory.
        method: whose rankings to use.
        fractions: of the training samples to drop.
        seeds: how many trainings, each from new initial parameters and in a new order.
        test: the recorded query to test on; by default test where there is one, else val.
        ray_address: local, auto, ray://host:port, or null for this process.
        memory_gb: budget of each process.
    """
    from lightning_acc.judge.cleaning import as_text
    from lightning_acc.judge.cleaning import clean as compute

    print(as_text(compute(run, method, fractions, seeds, test, ray_address, memory_gb=memory_gb)))


def export(
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
    from lightning_acc.record.record import Run

    opened = Run(run)
    tables = stored_scores(opened)
    if scores not in tables:
        has = f"it has {', '.join(tables)}" if tables else "it has none yet"
        raise RequestError(f"This run has no scores {scores!r}: {has}. Compute them with lightning-acc score.")
    if csv is None and ids is None:
        raise RequestError("Nothing to write: name a file with --csv or --ids.")
    if csv is not None:
        exports.write_ranking_csv(opened, tables[scores], csv)
        print(f"ranking: {csv}")
    if ids is not None:
        drop = exports.ids_to_drop(tables[scores], fraction=fraction)
        exports.write_ids(drop, ids)
        print(f"{len(drop)} ids to drop: {ids}")


def report(run: str) -> None:
    """Write the page report/index.html in the run directory.

    Args:
        run: the run directory.
    """
    from lightning_acc.show.report import write_report

    print(f"report: {write_report(run)}")


def study(study: Study, ray_address: str | None = "local") -> None:
    """Train, score and compare every cell of a grid of small trainings; goes on where it was stopped.

    Args:
        study: the grid.
        ray_address: local, auto, ray://host:port, or null for this process.
    """
    from lightning_acc.studies.study import run_study, summary

    table = run_study(study, ray_address)
    print(summary(table))
    print(f"{len(table)} rows: {study.directory}/study.parquet")


def track(run: str, project: str | None = None) -> None:
    """Log rankings, agreement and cost to W&B; offline where there is no key.

    Args:
        run: the run directory.
        project: by default that of the training's own logger, else lightning-acc.
    """
    import json

    from lightning_acc.record.record import Run
    from lightning_acc.show.tracking import mode
    from lightning_acc.show.tracking import track as log

    opened = Run(run)
    rows = json.loads(opened.store.read("evaluation.json"))["rows"] if opened.store.exists("evaluation.json") else None
    print(f"W&B ({mode()}): {log(opened, rows, project)}")


def dashboards(project: str | None = None) -> None:
    """Say how to open what was logged to W&B: its address, or the commands for runs that are offline.

    Args:
        project: by default lightning-acc.
    """
    from lightning_acc.show import tracking

    print(tracking.dashboards(project))


_OPTION = re.compile(r"(?<![\w-])--[a-z][\w-]*")
DESCRIPTION = (
    "Which training samples made your PyTorch Lightning model better or worse? With --trust PACKAGE a run may import its "
    "module from that package; without it only from what is imported already."
)
LISTS = {"clean": ("--method", "--fractions")}
"""Options that take several values."""
VERBS: dict[str, Any] = {
    "run": run,
    "fit": fit,
    "audit": audit,
    "plan": plan,
    "score": score,
    "retrain": retrain,
    "evaluate": evaluate,
    "clean": clean,
    "export": export,
    "report": report,
    "track": track,
    "dashboards": dashboards,
    "study": study,
}


def _underscored(option: re.Match[str]) -> str:
    return "--" + option[0][2:].replace("-", "_")


def _trusting(args: list[str]) -> list[str]:
    """The arguments without ``--trust PACKAGE[,PACKAGE]``, which holds for every verb, and is put into effect here."""
    out: list[str] = []
    rest = list(args)
    while rest:
        word = rest.pop(0)
        if word == "--trust" or word.startswith("--trust="):
            from lightning_acc.core.rebuild import allow

            named = word.partition("=")[2] or (rest.pop(0) if rest else "")
            allow(name for name in named.split(",") if name)
        else:
            out.append(word)
    return out


def _lists_in_brackets(args: list[str]) -> list[str]:
    """``--fractions 0.05 0.1`` as ``--fractions [0.05, 0.1]``, which is how the parser takes lists."""
    out: list[str] = []
    rest = list(args)
    while rest:
        word = rest.pop(0)
        if word.split("=")[0] not in LISTS.get(args[0], ()):
            out.append(word)
            continue
        option, given, value = word.partition("=")
        values = [value] if given else []
        while not given and rest and not rest[0].startswith("-"):
            values.append(rest.pop(0))
        whole = len(values) == 1 and values[0].startswith("[")
        out += [option, values[0] if whole else f"[{', '.join(values)}]"]
    return out


def main(args: list[str] | None = None) -> None:
    """Entry point: one line on stderr and exit status 1 for what cannot be done, 130 after Ctrl-C."""
    args = _trusting(list(sys.argv[1:] if args is None else args))
    try:
        if args and args[0] in ("fit", "run"):
            from lightning_acc.studies import fit as training

            getattr(training, args[0])(args[1:])
        else:
            from jsonargparse import ArgumentParser, auto_cli

            class DashedParser(ArgumentParser):
                def format_help(self, *formatter: Any) -> str:
                    return _OPTION.sub(lambda option: option[0].replace("_", "-"), super().format_help(*formatter))

            # Options are written with dashes, as users of other commands expect; underscores do as well.
            listed = _lists_in_brackets(args)
            dashed = [_OPTION.sub(_underscored, arg, count=1) if arg.startswith("--") else arg for arg in listed]
            auto_cli(VERBS, args=dashed, parser_class=DashedParser, prog="lightning-acc", description=DESCRIPTION)
    except InfluenceError as error:
        print(f"lightning-acc: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("lightning-acc: interrupted; what was finished before is kept", file=sys.stderr)
        sys.exit(130)
