"""``fit`` and ``run`` of the command line: a LightningCLI whose training is recorded, and everything that follows it."""

from __future__ import annotations

import sys
import time
from argparse import Namespace
from dataclasses import dataclass, field
from typing import Any

from jsonargparse import ActionConfigFile  # type: ignore[attr-defined]
from pytorch_lightning import LightningDataModule
from pytorch_lightning.cli import LightningArgumentParser, LightningCLI
from pytorch_lightning.utilities.model_helpers import is_overridden

from lightning_acc import arguments
from lightning_acc.credentials import without_credentials
from lightning_acc.errors import RunError
from lightning_acc.extras import required
from lightning_acc.judge.agreement import as_text, evaluate
from lightning_acc.judge.cleaning import BEST, clean
from lightning_acc.judge.cleaning_table import as_text as as_lines
from lightning_acc.methods import registry
from lightning_acc.progress import duration, watched_by
from lightning_acc.record.store import Store
from lightning_acc.recorder import TrajectoryRecorder
from lightning_acc.run import Run
from lightning_acc.scoring import cluster
from lightning_acc.scoring.matrices import score_matrix
from lightning_acc.scoring.score import score
from lightning_acc.scoring.selection import moment, select, some_examples
from lightning_acc.show import tracking
from lightning_acc.show.headline import headline
from lightning_acc.show.report import write_report


@dataclass
class Influence:
    """What ``run`` does after training.

    Args:
        methods: estimators and truth to compute, in order.
        removals: all, random:N, top:N@METHOD or a file, as for the verb score.
        query: name of the recorded query.
        at: when it is read: end, along, along:K, a step, several with commas between, or a checkpoint such as best.
        dtype: None as recorded, or float64.
        device: auto, cpu, cuda, or one of several, such as cuda:1.
        ray_address: local, auto, ray://..., or None for this process.
        memory_gb: budget of each process; auto is 2 on the CPU, or what one removal needs, and half of what is free of a GPU.
        examples: of the query whose predictions are explained (by sgd-ie): all, worst:N, numbers with commas; null for none.
        clean_fractions: of the training samples to drop before training anew; none by default.
        clean_methods: by whose rankings.
        clean_at: when these read the query.
        clean_seeds: trainings for each of them.
        project: W&B project.
        wandb: whether the training and the results are logged to W&B, offline where there is no key.
    """

    methods: list[str] = field(default_factory=lambda: ["loo", "acc-sgd-ie", "sgd-ie", "tracin"])
    removals: str = "all"
    query: str = "val"
    at: str = "end"
    dtype: str | None = None
    device: str = "auto"
    ray_address: str | None = "local"
    memory_gb: arguments.Budget = "auto"
    examples: str | None = "worst:60"
    clean_fractions: list[float] = field(default_factory=list)
    clean_methods: list[str] = field(default_factory=lambda: [BEST[0]])
    clean_at: str = BEST[1]
    clean_seeds: int = 5
    project: str = "lightning-acc"
    wandb: bool = True


class Parser(arguments.InOneSentence, LightningArgumentParser):
    """LightningCLI's parser."""


class RecordingCLI(LightningCLI):
    """LightningCLI with the recorder as a callback of its own and the options of ``run``."""

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """The parser, as LightningCLI makes its own."""
        parser = Parser(**kwargs)
        parser.add_argument("-c", "--config", action=ActionConfigFile, help="Path to a configuration file (YAML or JSON).")
        return parser

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the groups ``recorder`` and ``influence``."""
        parser.add_lightning_class_args(TrajectoryRecorder, "recorder")
        parser.add_class_arguments(Influence, "influence")


class FitCLI(RecordingCLI):
    """The same, for ``fit``: with the number of trainings."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add ``runs``."""
        super().add_arguments_to_parser(parser)
        parser.add_argument(
            "--runs",
            type=int,
            default=1,
            help="how often to train: more than once, each training has a seed of its own (seed_everything and on from it) and "
            "is recorded in recorder.directory/seed-0, seed-1, ...; the data module and its seed stay the same. They are "
            "trained in parallel over influence.ray_address, or with null one after another. Score them together: "
            "lightning-acc score DIR/seed-0 DIR/seed-1 ...",
        )


def build(verb: str, args: list[str]) -> RecordingCLI:
    """What the configuration describes, made: trainer, model and data."""
    # LightningCLI reads sys.argv, and warns where it is given arguments beside it.
    before, sys.argv = sys.argv, [f"lightning-acc {verb}", *args]
    try:
        return (FitCLI if verb == "fit" else RecordingCLI)(
            run=False,
            subclass_mode_model=True,
            subclass_mode_data=True,
            save_config_callback=None,
            parser_kwargs={"prog": f"lightning-acc {verb}"},
        )
    finally:
        sys.argv = before


def fit(args: list[str], verb: str = "fit") -> RecordingCLI:
    """Train as the configuration says, recorded; once, or several times."""
    cli = build(verb, args)
    if verb == "run":
        _can_follow(cli.config.influence)
    runs = cli.config.get("runs", 1)
    if runs != 1:
        from lightning_acc.studies import seeds  # which trains by what is here

        seeds.fit_several(cli, runs)
        return cli
    train(cli)
    print(f"recorded in {Store(cli.config.recorder.directory)}")
    return cli


def _can_follow(options: Any) -> None:
    """Refuse what could not be done after the training, before it takes its hours."""
    needed = {"wandb": "leave W&B out (--influence.wandb false)"} if options.wandb else {}
    if arguments.ray_address(options.ray_address) is not None:
        needed["ray"] = "compute in this process (--influence.ray_address null)"
    required(needed)
    for method in options.methods:
        registry.find(method)


def train(cli: RecordingCLI, group: str | None = None) -> None:
    """Train once, recorded; in W&B in this ``group``, by default one of its own."""
    options = cli.config.influence
    if options.wandb and cli.config.trainer.logger is None:
        cli.trainer.logger = wandb_logger(cli.config.recorder.directory, options.project, group)
    try:
        cli.trainer.fit(cli.model, datamodule=cli.datamodule)
    finally:
        if options.wandb:
            tracking.finish()
    if cli.trainer.interrupted:
        raise KeyboardInterrupt
    _keep_test_data(cli)


def _keep_test_data(cli: RecordingCLI) -> None:
    """Store the data module's test data as the query ``test``: what no ranking has seen."""
    if cli.trainer.is_global_zero and is_overridden("test_dataloader", cli.datamodule, LightningDataModule):
        cli.datamodule.setup("test")
        Run(cli.config.recorder.directory).add_query("test", cli.datamodule.test_dataloader())


def wandb_logger(directory: str, project: str, group: str | None = None) -> Any:
    """Lightning's logger to W&B, which is told no credentials among the hyper-parameters."""
    from pytorch_lightning import loggers

    class WandbLogger(loggers.WandbLogger):
        def log_hyperparams(self, params: Any) -> None:
            super().log_hyperparams(without_credentials(vars(params) if isinstance(params, Namespace) else params))

    return WandbLogger(
        project=project,
        name=tracking.name_of(directory, "training"),
        group=group or f"{tracking.last_part(directory)}-{time.strftime('%Y%m%d-%H%M%S')}",
        job_type="training",
        **tracking.logger_options(),
    )


def run(args: list[str]) -> None:
    """Train, audit, score with every method, compare, report and log."""
    cli = fit(args, "run")
    options = cli.config.influence
    recorded = Run(cli.config.recorder.directory)
    report = recorded.audit()
    print(report)
    if not report:
        raise RunError(f"The record in {recorded.path} does not reproduce the training, so it is not scored.")
    if options.wandb:
        # One W&B run shows the progress and then the results.
        with tracking.live(recorded, "influence", options.project) as shown, watched_by(shown.update):
            rows = _score_and_evaluate(recorded, options)
            print(f"W&B ({tracking.mode()}): {tracking.track(recorded, rows, options.project, into=shown)}")
    else:
        _score_and_evaluate(recorded, options)
    if (said := headline(recorded)) is not None:
        print(said)
    print(f"report: {write_report(recorded)}")


def _score_and_evaluate(recorded: Run, options: Any) -> list[dict[str, Any]] | None:
    with cluster.kept():
        _score_all(recorded, options)
    if registry.TRUTH not in options.methods:
        return None
    evaluation = evaluate(recorded)
    print(as_text(evaluation))
    rows: list[dict[str, Any]] = evaluation.to_pylist()
    return rows


def _score_all(recorded: Run, options: Any) -> None:
    removals, at = select(recorded, options.removals), moment(options.at)
    shared = {name: getattr(options, name) for name in ("device", "ray_address", "memory_gb")}
    for method in options.methods:
        scores = score(
            recorded,
            method,
            removals,
            options.query,
            at=at,
            dtype=options.dtype,
            **shared,
        )
        print(f"{scores}\n{duration(scores.conditions['seconds'])} of work")
    if options.examples:
        examples = some_examples(recorded, options.query, options.examples)
        print(score_matrix(recorded, query=options.query, examples=examples, at=at, dtype=options.dtype, **shared))
    if options.clean_fractions:
        when, seeds = moment(options.clean_at), options.clean_seeds
        cleaned = clean(recorded, options.clean_methods, options.clean_fractions, seeds, at=when, **shared)
        print(as_lines(cleaned))
