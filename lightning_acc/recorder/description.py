"""What is recorded beside the steps: where the run comes from, frozen tensors, what is known about the samples, queries."""

from __future__ import annotations

import importlib.metadata
import io
import json
import platform
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

import safetensors.torch
import torch
from torch import Tensor

from lightning_acc.contract import DescribesExamples, DescribesSamples
from lightning_acc.core import queries, rebuild, stand_in
from lightning_acc.core.devices import CPU
from lightning_acc.core.modules.compiled import is_compiled, plain_name
from lightning_acc.errors import InfluenceError, RunError
from lightning_acc.record.samples.names import COLUMN, Numbers
from lightning_acc.record.writer import RunWriter
from lightning_acc.recorder.checks.randomness import random_state_kept
from lightning_acc.recorder.checks.rows import transferred
from lightning_acc.recorder.optimizer import TrainedOptimizer

if TYPE_CHECKING:
    import pyarrow as pa


def header(trainer: Any, module: Any, optimizer: TrainedOptimizer, dtype: torch.dtype) -> dict[str, Any]:
    """The part of the manifest that says where the run comes from and what it trains."""
    versions = {"lightning-acc": importlib.metadata.version("lightning-acc"), "torch": str(torch.__version__)}
    return {
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "packages": {**versions, "python": platform.python_version()},
        "world_size": trainer.world_size,
        "trainer": stand_in.facts(trainer),
        "threads": torch.get_num_threads(),
        "module": rebuild.describe(module),
        "data": data(trainer),
        "logger": logger(trainer),
        "precision": str(trainer.precision),
        "matmul_precision": torch.get_float32_matmul_precision(),
        **({"compiled": True} if is_compiled(module) else {}),
        **({} if optimizer.device == CPU else {"device": optimizer.device.type, "tf32": _is_tf32(module)}),
        "dtype": str(dtype).removeprefix("torch."),
        "layout": [[name, list(shape)] for name, shape in optimizer.layout.shapes],
        "optimizer": of_optimizer(optimizer),
    }


def of_optimizer(optimizer: TrainedOptimizer) -> dict[str, Any]:
    """What the manifest says of the optimizer, as far as is known by now."""
    update = optimizer.update
    rests = {"rests": True} if update.rests else {}
    return {"name": optimizer.name, "group_of": list(update.group_of), "slots": update.slots, **rests}


def warn_if_not_rebuildable(module: torch.nn.Module) -> None:
    """Say, before training, if the module cannot be built again from what ``header`` writes of it."""
    with random_state_kept():  # making the module draws its first parameters
        reason = rebuild.why_not_rebuildable(module)
    if reason:
        warnings.warn(reason, UserWarning, stacklevel=3)


def _is_tf32(module: torch.nn.Module) -> bool:
    """Whether a GPU rounds what the layers of a module multiply to the ten bits of TF32."""
    convolves = any(isinstance(part, torch.nn.modules.conv._ConvNd) for part in module.modules())
    return torch.get_float32_matmul_precision() != "highest" or (convolves and torch.backends.cudnn.allow_tf32)


def data(trainer: Any) -> dict[str, Any]:
    """Identity of the training data: the data module's class and plain hyper-parameters, or the data set's class."""
    module = trainer.datamodule
    if module is None:
        loader = trainer.train_dataloader
        return {"class": type(getattr(loader, "dataset", loader)).__qualname__}
    plain = {}
    for key, value in dict(getattr(module, "hparams", {})).items():
        try:
            plain[key] = json.loads(json.dumps(value))
        except (TypeError, ValueError):
            continue
    return {"class": f"{type(module).__module__}:{type(module).__qualname__}", "hyper_parameters": plain}


def logger(trainer: Any) -> dict[str, Any] | None:
    """Project, group and id of the training's W&B run, so that later runs can join it; None without one.

    A W&B run that has no group gets one, as it is what brings its results together with it.
    """
    for candidate in trainer.loggers:
        if type(candidate).__name__ == "WandbLogger":
            run = candidate.experiment
            return {"project": run.project, "group": run.group or _grouped(run), "id": run.id}
    return None


def _grouped(run: Any) -> str | None:
    """The group that a W&B run has from now on; None where it takes none."""
    group = f"training-{run.id}"
    try:
        # W&B has no way to say it once a run has begun, but tells its server all of a run whenever its notes are set.
        run._settings.run_group = group
        run.notes = run.notes
    except Exception:  # an ornament: another version of W&B, or one that is disabled
        return None
    return group if run.group == group else None


def write_frozen(writer: RunWriter, state: Mapping[str, Any]) -> None:
    """Of the state of the module buffers and untrained parameters, which the losses depend on too."""
    trained = {name for name, _ in writer.header["layout"]}
    frozen = {name: value for full, value in state.items() if (name := plain_name(full)) not in trained}
    values = {name: value.detach().cpu().contiguous().clone() for name, value in frozen.items() if isinstance(value, Tensor)}
    if values:
        writer.write_file("module.safetensors", safetensors.torch.save(values))


def write_sample_info(writer: RunWriter, trainer: Any, seen: Numbers) -> None:
    """What ``describe_samples()`` of the data module tells: columns with one value per training sample.

    ``seen`` are the names of samples of the first batches, where batches name them.
    """
    if not isinstance(trainer.datamodule, DescribesSamples):
        return
    table, data = _as_parquet(trainer.datamodule.describe_samples())
    if "sample_id" in writer.header:
        reason = _why_not_by_name(table, seen)
        if reason:
            warnings.warn(f"What describe_samples() tells is not recorded, for {reason}.", UserWarning, stacklevel=2)
            return
    elif len(table) != writer.header["n_samples"]:
        raise RunError(
            f"describe_samples() gives {len(table)} rows for {writer.header['n_samples']} training samples: "
            "it must give one row a sample, in the order of the dataset."
        )
    writer.write_file("samples/info.parquet", data)


def _why_not_by_name(table: pa.Table, seen: Numbers) -> str | None:
    """Why the rows of a table cannot be told by the names of samples; None where they can."""
    if COLUMN not in table.column_names:
        return (
            f"the samples are known by their ids in the batches and the table has no column {COLUMN!r}: add one with the id of "
            "each row"
        )
    names = table[COLUMN].to_pylist()
    if len(set(names)) < len(names):
        return f"its column {COLUMN!r} has the same id in several rows: give every sample one row"
    if not any(name in seen for name in names):
        return f"its column {COLUMN!r} has none of the ids in the first batches: give ids as the batches have them"
    return None


def write_example_info(writer: RunWriter, trainer: Any, query: str) -> None:
    """What ``describe_examples(query)`` of the data module tells; where it fails, or tells of others, nothing.

    It is for the eye alone: no training and no record is given up for it.
    """
    n_examples = writer.files[f"queries/{query}.safetensors"]["n_examples"]
    try:
        columns = trainer.datamodule.describe_examples(query)
        if columns is None:
            return
        table, data = _as_parquet(columns)
        limit = trainer.limit_val_batches
        if limit and (isinstance(limit, int) or limit < 1.0):  # of a whole number, batches; of another, a share
            table, data = _as_parquet(table[:n_examples])
        if len(table) != n_examples:
            raise RunError(f"it gives {len(table)} rows for {n_examples} examples")
    except Exception as error:
        words = " ".join(str(error).split())[:200].rstrip(".")
        warnings.warn(
            f"What describe_examples({query!r}) tells is not recorded ({type(error).__name__}: {words}): it must give columns "
            "with a value for each example, in the order of the query's data.",
            UserWarning,
            stacklevel=2,
        )
        return
    writer.write_file(f"queries/{query}.info.parquet", data)


def _as_parquet(columns: Any) -> tuple[pa.Table, bytes]:
    import pyarrow as pa
    import pyarrow.parquet

    table = columns if isinstance(columns, pa.Table) else pa.table(columns)
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(table, buffer)
    return table, buffer.getvalue()


def write_queries(writer: RunWriter, trainer: Any) -> None:
    """The validation batches, as Lightning would hand them to ``validation_step``, become the query ``val``.

    Those of further loaders become ``val-1``, ``val-2`` and so on.
    """
    with validating(trainer):
        loaders = _validation_loaders(trainer)
        if not loaders:
            warnings.warn(
                "Training has no validation data, so no query is recorded: scoring will ask for a Query, or add one with "
                "run.add_query(name, loader).",
                UserWarning,
                stacklevel=2,
            )
        for i, loader in enumerate(loaders):
            name = "val" if i == 0 else f"val-{i}"
            with random_state_kept(loader):
                try:
                    queries.record_as(writer, name, (transferred(trainer, batch, i) for batch in _limited(loader, trainer, i)))
                except InfluenceError as error:
                    warnings.warn(f"The validation data is not recorded as a query: {error}", UserWarning, stacklevel=2)
                    continue
                if isinstance(trainer.datamodule, DescribesExamples):
                    write_example_info(writer, trainer, name)


@contextmanager
def validating(trainer: Any) -> Iterator[None]:
    """In here the trainer validates and the module is in evaluation mode, as hooks that treat batches by either expect."""
    modes = [(part, part.training) for part in trainer.lightning_module.modules()]
    stage = trainer.state.stage
    trainer.validating = True
    trainer.lightning_module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        trainer.state.stage = stage
        for part, mode in modes:
            part.training = mode


def _validation_loaders(trainer: Any) -> list[Any]:
    # As the user gave them: under several processes Lightning's own share the data out.
    source = trainer.fit_loop.epoch_loop.val_loop._data_source
    if not source.is_defined():
        return []
    with random_state_kept():
        loaders = source.dataloader()
    if loaders is None:
        return []
    if isinstance(loaders, dict):
        return list(loaders.values())
    return list(loaders) if isinstance(loaders, (list, tuple)) else [loaders]


def _limited(loader: Any, trainer: Any, index: int) -> Iterator[Any]:
    """The batches Lightning would validate on; all of them where validation is switched off."""
    limit = trainer.limit_val_batches
    if isinstance(limit, float):
        limit = int(limit * len(loader)) if limit < 1.0 and hasattr(loader, "__len__") else 0
    limit = limit or float("inf")
    for i, batch in enumerate(loader):
        if i >= limit:
            return
        yield batch
