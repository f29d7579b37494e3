"""The verb that asks about single predictions."""

from __future__ import annotations

from typing import Literal

from lightning_acc import arguments


def do_matrix(
    run: str,
    method: str = "sgd-ie",
    removals: str = "all",
    query: str = "val",
    examples: str = "worst:20",
    at: str = "end",
    dtype: Literal["float32", "float64"] | None = None,
    device: str = "auto",
    ray_address: str | None = "local",
    memory_gb: arguments.Budget = "auto",
    check: str = "auto",
    top: int = 5,
    wandb: bool = False,
) -> None:
    """Say of single predictions which samples helped and harmed them most; the page shows them.

    sgd-ie takes about half a training for each example, loo and acc-sgd-ie little more than for score.

    Args:
        run: the run directory.
        method: sgd-ie or tracin, which take many examples back through the run together; acc-sgd-ie; acc-low-rank, which asks
            anew for each; or loo, the truth.
        removals: all, random:N, top:N@METHOD, group:COLUMN, or a file with the sample ids of one removal on each line.
        query: a query recorded with the run, such as val.
        examples: all; worst:N, those with the highest loss at the end of the run; or their numbers, from 0, with commas.
        at: when they are read, as for score.
        dtype: precision of the replay; by default as recorded.
        device: cpu, cuda, or one of several, such as cuda:1; auto for the GPU where there is one.
        ray_address: local, auto, ray://host:port, or null for this process.
        memory_gb: budget of each process; auto is 2 on the CPU, or what one removal needs, and half of what is free of a GPU.
        check: how many removals to retrain without, as for score.
        top: how many samples to print for each of the first ten examples.
        wandb: whether W&B is shown the progress, and then all results; offline where there is no key.
    """
    from lightning_acc.cli.live import live
    from lightning_acc.run import Run
    from lightning_acc.scoring.matrices import score_matrix
    from lightning_acc.scoring.matrices.matrix import as_text
    from lightning_acc.scoring.selection import moment, select, some_examples

    top = arguments.whole("top", top, "samples cannot be printed", least=1)
    opened = Run(run)
    with live(opened, "matrix", f"{method} {examples}", wandb):
        found = score_matrix(
            opened,
            method,
            query,
            some_examples(opened, query, examples),
            select(opened, removals),
            moment(at),
            None,
            dtype,
            ray_address,
            device=device,
            check=int(check) if check.isdecimal() else check,
            memory_gb=memory_gb,
        )
        print(as_text(found, found.examples[:10], top))
