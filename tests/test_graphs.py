"""Batches of graphs, as torch_geometric's loaders make them: each graph is a sample, and the batch is what it was."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from problems import flat, trainer
from torch import Tensor, nn
from torch.nn import functional as F

import lightning_acc as la
from lightning_acc.errors import RunError
from lightning_acc.record import batches
from lightning_acc.recorder import RecordingRefused

geometric = pytest.importorskip("torch_geometric")
from torch_geometric.data import Batch, Data, HeteroData  # noqa: E402
from torch_geometric.loader import DataLoader  # noqa: E402
from torch_geometric.nn import GCNConv, global_mean_pool  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:.*Skipping val loop", "ignore:Training has no validation data")
N = 12


class Pair(Data):
    """Two node sets in one graph: what counts the second ones is said by the class."""

    def __inc__(self, key: str, value: Any, *args: Any, **kwargs: Any) -> Any:
        return len(self.other) if key == "matched" else super().__inc__(key, value, *args, **kwargs)


def graphs(kind: type[Any] = Data, n: int = N) -> list[Any]:
    draw = torch.Generator().manual_seed(0)
    made = []
    for i in range(n):
        size = 2 + i % 4
        graph = kind(
            x=torch.randn(size, 3, generator=draw, dtype=torch.float64),
            edge_index=torch.randint(0, size, (2, 2 * size), generator=draw),
            edge_attr=torch.randn(2 * size, generator=draw),
            facts=torch.randn(1, 2, generator=draw),
            energy=torch.randn((), generator=draw),
            y=torch.tensor([i % 2]),
            mask=torch.rand(size, generator=draw) < 0.5,
            name=f"graph {i}",
            charge=i - 3,
        )
        if kind is Pair:
            graph.other = torch.randn(1 + i % 3, 2, generator=draw)
            graph.matched = torch.randint(0, len(graph.other), (size,), generator=draw)
        made.append(graph)
    return made


@pytest.mark.parametrize("kind", [Data, Pair])
@pytest.mark.parametrize("size", [1, 5])
def test_what_is_taken_apart_is_joined_as_it_was(kind: type[Any], size: int) -> None:
    batch = Batch.from_data_list(graphs(kind)[:size])
    leaves, structure = batches.flatten(batch)
    assert batches.batch_size(leaves) == size
    assert set(batches.leaf_names(structure)) == set(leaves)
    # As it is stored, too: without what fills it up.
    for found in (batches.unflatten(structure, leaves), batches.unflatten(structure, batches.unpacked(batches.packed(leaves)))):
        assert type(found) is type(batch)
        assert set(found.keys()) == set(batch.keys())
        for key in list(batch.keys()):
            if isinstance(batch[key], Tensor):
                assert torch.equal(found[key], batch[key]), key
                assert found[key].dtype == batch[key].dtype
            else:
                assert list(found[key]) == list(batch[key])
    some = batches.unflatten(structure, batches.rows(leaves, torch.tensor([size - 1, 0])))
    expected = Batch.from_data_list([graphs(kind)[size - 1], graphs(kind)[0]])
    assert torch.equal(some.edge_index, expected.edge_index)
    assert torch.equal(some.x, expected.x)


def test_a_graph_is_the_same_beside_larger_ones() -> None:
    small, large = graphs()[0], graphs()[3]
    alone, _ = batches.flatten(Batch.from_data_list([small, small]))
    beside, _ = batches.flatten(Batch.from_data_list([small, large]))
    assert alone["x#rows"].shape != beside["x#rows"].shape
    assert batches.digests(alone)[0] == batches.digests(beside)[0] != batches.digests(beside)[1]
    shown = batches.readable(batches.row(beside, 0))
    assert torch.equal(shown["x"], small.x)
    assert shown["name"] == "graph 0"


def test_a_precision_is_that_of_numbers_alone() -> None:
    leaves, structure = batches.flatten(Batch.from_data_list(graphs()[:3]))
    found = batches.unflatten(structure, batches.cast(leaves, torch.float32, torch.device("cpu")))
    assert (found.x.dtype, found.edge_index.dtype, found.mask.dtype) == (torch.float32, torch.int64, torch.bool)


class Graphs(pl.LightningModule):
    """A graph network; the samples in ``kept`` have their weights in the loss."""

    def __init__(self, kept: Tensor | None = None) -> None:
        super().__init__()
        self.layer, self.head = GCNConv(3, 4), nn.Linear(4, 2)
        self.kept = kept

    def forward(self, batch: Any) -> Tensor:
        return self.head(global_mean_pool(self.layer(batch.x, batch.edge_index).tanh(), batch.batch))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if self.kept is None:
            return F.cross_entropy(self(batch), batch.y)
        losses = F.cross_entropy(self(batch), batch.y, reduction="none")
        return (losses * self.kept[batch.charge + 3]).mean()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val", F.cross_entropy(self(batch), batch.y), batch_size=batch.num_graphs)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.3, momentum=0.9)


def fitted(*callbacks: Any, kept: Tensor | None = None) -> Tensor:
    torch.manual_seed(0)
    module = Graphs(kept)
    torch.manual_seed(1)
    trainer(*callbacks).fit(module, DataLoader(graphs(), batch_size=5, shuffle=True), DataLoader(graphs()[:4], batch_size=4))
    return flat(module)


def test_loo_is_real_retraining_and_acc_is_near_to_it(tmp_path: Path) -> None:
    base = fitted(la.TrajectoryRecorder(tmp_path / "run"))
    run = la.Run(tmp_path / "run")
    assert run.audit().ok
    assert run.n_samples == N
    options: dict[str, Any] = {"ray_address": None, "save": False, "check": 0}
    shifts = la.score(run, "loo", (2, 7), keep_shifts=True, **options).shifts
    assert shifts is not None
    for i, shift in zip((2, 7), shifts, strict=True):
        kept = torch.ones(N, dtype=torch.float64)
        kept[i] = 0
        torch.testing.assert_close(shift, fitted(kept=kept) - base, rtol=0, atol=1e-11)
    truth = la.score(run, "loo", **options).values
    for method in ("acc-sgd-ie", "sgd-ie", "acc-low-rank"):
        assert np.corrcoef(la.score(run, method, **options).values, truth)[0, 1] > 0.9


def test_what_belongs_to_no_graph_is_refused_in_a_sentence(tmp_path: Path) -> None:
    hetero = HeteroData()
    hetero["a"].x = torch.ones(2, 3)
    for batch, words in (
        (graphs()[0], "a Data of torch_geometric, whose nodes and edges belong to no sample: train on batches of graphs"),
        (Batch.from_data_list([hetero, hetero]), "HeteroData.* of torch_geometric, whose nodes"),
        (Batch.from_data_list(graphs(n=3), follow_batch=["x"]), "holds 'x_batch', 'x_ptr', which is not of its graphs"),
        (
            Batch.from_data_list(_each(graphs(n=3), lambda i: [torch.ones(i + 1)])),
            "hold under 'extra' what is no tensor, text or number",
        ),
        (Batch.from_data_list(_each(graphs(n=2), lambda i: {"a": torch.ones(1)})), "hold under 'extra' what is no tensor"),
        (_with_more(graphs()), "holds 'extra', which is not of its graphs: .* no attributes set on the batch"),
    ):
        with pytest.raises(RunError, match=words):
            batches.flatten(batch)
    loader = DataLoader(graphs(), batch_size=4, follow_batch=["x"])
    with pytest.raises(RecordingRefused, match="no follow_batch"):
        trainer(la.TrajectoryRecorder(tmp_path / "run")).fit(Graphs(), loader)


def _each(some: list[Any], extra: Any) -> list[Any]:
    """The graphs, each with something more."""
    for i, graph in enumerate(some):
        graph.extra = extra(i)
    return some


@pytest.mark.parametrize("named", ["builtins:dict", "subprocess:Popen", "torch_geometric.data:HeteroData", "nowhere:Data"])
def test_a_class_that_is_no_kind_of_graph_is_never_made(named: str) -> None:
    leaves, structure = batches.flatten(Batch.from_data_list(graphs()[:2]))
    structure["graphs"]["class"] = named
    assert type(batches.unflatten(structure, leaves)) is type(Batch.from_data_list(graphs()[:2]))


def _with_more(some: list[Any]) -> Any:
    """A batch that an attribute was set on afterwards."""
    batch = Batch.from_data_list(some[:2])
    batch.extra = torch.ones(2)
    return batch


def test_a_run_is_opened_without_torch_geometric_and_a_replay_says_what_to_import(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fitted(la.TrajectoryRecorder(tmp_path / "run"))
    opened = f"la.Run({str(tmp_path / 'run')!r}).n_samples"
    code = f"import sys; import lightning_acc as la; print({opened}, 'torch_geometric' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(N), "False"]
    leaves, structure = batches.flatten(Batch.from_data_list(graphs()[:2]))
    monkeypatch.delitem(sys.modules, "torch_geometric.data")
    with pytest.raises(RunError, match="recorded on batches of torch_geometric: import it, or the module"):
        batches.unflatten(structure, leaves)
