"""Batches of graphs, as torch_geometric's loaders make them: taken apart into graphs, each a sample, and joined again.

What a graph has of its nodes and edges differs in length from graph to graph and is a ragged leaf, along the dimension in which
torch_geometric joins it; what it has one of is a row. torch_geometric itself splits a batch and joins it again, so that indices
count the nodes of the batch as they did.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_acc.errors import RunError
from lightning_acc.record.batches.leaves import LENGTH, ROWS, Leaves

PACKAGE = "torch_geometric"
JOINING = {"batch", "ptr"}
"""What joining adds to what the graphs have."""


def is_batch(part: Any) -> bool:
    """Whether this is a batch of graphs of one kind of nodes and edges."""
    return _is_geometric(part) and is_kind(type(part)) and hasattr(part, "ptr") and hasattr(part, "to_data_list")


def refuse_others(part: Any, at: str) -> None:
    """Refuse what torch_geometric makes otherwise.

    Raises:
        RunError: this is such a thing.
    """
    if _is_geometric(part):
        raise RunError(
            f"A batch holds{at} a {type(part).__name__} of torch_geometric, whose nodes and edges belong to no sample: train "
            "on batches of graphs (torch_geometric.loader.DataLoader over Data), of which each is one."
        )


def taken_apart(batch: Any, at: str) -> tuple[type[Any], dict[str, list[Any]]]:
    """The kind of the graphs, and what each of them has, by its name.

    Raises:
        RunError: joining them would not give the batch.
    """
    graphs = batch.to_data_list()
    keys = list(graphs[0].keys())
    if lost := sorted(set(batch.keys()) - set(keys) - JOINING):
        raise RunError(
            f"A batch of graphs holds {', '.join(map(repr, lost))}{at}, which is not of its graphs: let these have all "
            "there is before the loader joins them (no follow_batch, no attributes set on the batch)."
        )
    return type(graphs[0]), {key: [graph[key] for graph in graphs] for key in keys}


def dimension(batch: Any, key: str, value: Tensor) -> int | None:
    """Along which the values of the graphs are joined; None where they are stacked."""
    dim = batch.__cat_dim__(key, value) if value.ndim else None
    return None if dim is None else int(dim) % value.ndim


def ragged(name: str, values: Sequence[Tensor], dim: int) -> Leaves:
    """Values of different lengths along ``dim`` as a ragged leaf ``name``.

    Raises:
        RunError: they differ in another dimension, too.
    """
    moved = [value.detach().movedim(dim, 0) for value in values]
    if len({value.shape[1:] for value in moved}) > 1:
        raise RunError(f"The graphs of a batch have tensors {name.removesuffix(ROWS)!r} of different widths: make them one.")
    lengths = torch.tensor([len(value) for value in moved], dtype=torch.int64)
    return {name: torch.nn.utils.rnn.pad_sequence(moved, batch_first=True), name + LENGTH: lengths}


def stacked(name: str, values: Sequence[Tensor]) -> Tensor:
    """Values of one shape, one a graph, with a row for each.

    Raises:
        RunError: they are of different shapes.
    """
    if len({value.shape for value in values}) > 1:
        raise RunError(f"The graphs of a batch have tensors {name!r} of different shapes: make them one.")
    return torch.stack(list(values))


def rows(name: str, dim: int, leaves: Mapping[str, Tensor]) -> list[Tensor]:
    """What each graph has of a ragged leaf: the inverse of ``ragged``.

    Raises:
        RuntimeError: it is vectorised over, so that its lengths cannot be read.
    """
    lengths = leaves[name + LENGTH].tolist()
    return [leaf[:length].movedim(0, dim) for leaf, length in zip(leaves[name], lengths, strict=True)]


def joined(kind: type[Any] | None, fields: Mapping[str, Sequence[Any]]) -> Any:
    """The batch of graphs with these fields, of each of which there is one a graph.

    Raises:
        RunError: nothing has imported torch_geometric.
    """
    geometric = sys.modules.get(f"{PACKAGE}.data")
    if geometric is None:
        raise RunError("The run was recorded on batches of torch_geometric: import it, or the module, before it is replayed.")
    made = []
    for values in zip(*fields.values(), strict=True):
        graph = (kind or geometric.Data)()  # torch_geometric makes one of the kind, too, to join them
        for key, value in zip(fields, values, strict=True):
            graph[key] = value
        made.append(graph)
    return geometric.Batch.from_data_list(made)


def _is_geometric(part: Any) -> bool:
    return any(base.__module__.startswith(f"{PACKAGE}.") for base in type(part).__mro__)


def is_kind(found: type[Any]) -> bool:
    """Whether this is a class of graphs of one kind of nodes and edges."""
    data = sys.modules.get(f"{PACKAGE}.data")
    return data is not None and issubclass(found, data.Data)
