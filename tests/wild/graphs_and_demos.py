"""Graph networks as in torch_geometric's examples, and what Lightning ships and shows first."""

from __future__ import annotations

from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.demos.boring_classes import BoringModel, RandomDataset
from pytorch_lightning.demos.lstm import LightningLSTM, SequenceSampler
from pytorch_lightning.demos.transformer import LightningTransformer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from wild import LeavesOut, Setup

geometric = pytest.importorskip("torch_geometric")
from torch_geometric.data import Batch, Data  # noqa: E402
from torch_geometric.loader import DataLoader as GraphLoader  # noqa: E402
from torch_geometric.nn import DenseGCNConv, GCNConv, GINEConv, global_add_pool, global_mean_pool  # noqa: E402
from torch_geometric.utils import to_dense_adj, to_dense_batch  # noqa: E402


def molecules(n: int = 14, seed: int = 0) -> list[Any]:
    generator = torch.Generator().manual_seed(seed)
    graphs = []
    for size in torch.randint(3, 8, (n,), generator=generator).tolist():
        edges = torch.randint(0, size, (2, 2 * size), generator=generator)
        label = torch.randint(0, 2, (1,), generator=generator)
        graphs.append(Data(x=torch.randn(size, 4, generator=generator), edge_index=edges, y=label))
    return graphs


class Molecules(pl.LightningModule):
    """Graph classification: two convolutions, a mean over the nodes of each graph, dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = GCNConv(4, 8), GCNConv(8, 8)
        self.head = nn.Linear(8, 2)

    def forward(self, data: Any) -> Tensor:
        x = self.first(data.x.to(self.dtype), data.edge_index).tanh()
        x = self.second(x, data.edge_index).tanh()
        x = global_mean_pool(x, data.batch)
        return self.head(F.dropout(x, 0.3, self.training))

    def training_step(self, data: Any, batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self(data), data.y)
        self.log("train_loss", loss, batch_size=data.num_graphs)
        return loss

    def validation_step(self, data: Any, batch_idx: int) -> None:
        self.log("val_loss", F.cross_entropy(self(data), data.y), batch_size=data.num_graphs)

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=0.02, weight_decay=5e-4)


class MoleculesByHand(LeavesOut, Molecules):
    def training_step(self, data: Any, batch_idx: int) -> Tensor:
        return self.mean(F.cross_entropy(self(data), data.y, reduction="none"))


class Bonds(Molecules):
    """Regression, of edges with numbers and facts of the whole graph, without dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = GINEConv(nn.Linear(4, 8), edge_dim=3), GINEConv(nn.Linear(8, 8), edge_dim=3)
        self.head = nn.Linear(10, 1)

    def forward(self, data: Any) -> Tensor:
        bonds = data.edge_attr.to(self.dtype)
        x = self.first(data.x.to(self.dtype), data.edge_index, bonds).tanh()
        x = self.second(x, data.edge_index, bonds).tanh()
        return self.head(torch.cat([global_add_pool(x, data.batch) / 5, data.facts.to(self.dtype)], 1))

    def losses(self, data: Any) -> Tensor:
        return (self(data)[:, 0] - data.energy.to(self.dtype)).square()

    def training_step(self, data: Any, batch_idx: int) -> Tensor:
        assert len(data.name) == data.num_graphs
        return F.mse_loss(self(data)[:, 0], data.energy.to(self.dtype))

    def validation_step(self, data: Any, batch_idx: int) -> None:
        self.log("val_loss", F.mse_loss(self(data)[:, 0], data.energy.to(self.dtype)), batch_size=data.num_graphs)


class BondsByHand(LeavesOut, Bonds):
    def training_step(self, data: Any, batch_idx: int) -> Tensor:
        return self.mean(self.losses(data))


def bonded(n: int = 14, seed: int = 0) -> list[Any]:
    """With edges' numbers, facts of each graph, a number without dimensions and a name."""
    generator = torch.Generator().manual_seed(seed)
    for i, graph in enumerate(graphs := molecules(n, seed)):
        graph.edge_attr = torch.randn(graph.num_edges, 3, generator=generator)
        graph.facts = torch.randn(1, 2, generator=generator)
        graph.energy = torch.randn((), generator=generator)
        graph.name = f"molecule {i}"
    return graphs


class Dense(Molecules):
    """The same graphs filled up to one size, with a row a graph: ``to_dense_batch``, ``to_dense_adj``, dense layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = DenseGCNConv(4, 8), DenseGCNConv(8, 8)

    def forward(self, batch: Any) -> Tensor:
        x, adjacency, mask = batch["x"].to(self.dtype), batch["adjacency"].to(self.dtype), batch["mask"]
        x = self.second(self.first(x, adjacency, mask).tanh(), adjacency, mask).tanh()
        x = (x * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        return self.head(F.dropout(x, 0.3, self.training))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch), batch["y"])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", F.cross_entropy(self(batch), batch["y"]))


class DenseByHand(LeavesOut, Dense):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.mean(F.cross_entropy(self(batch), batch["y"], reduction="none"))


def filled_up(graphs: list[Any]) -> dict[str, Tensor]:
    batch = Batch.from_data_list(graphs)
    x, mask = to_dense_batch(batch.x, batch.batch, max_num_nodes=7)
    return {"x": x, "mask": mask, "adjacency": to_dense_adj(batch.edge_index, batch.batch, max_num_nodes=7), "y": batch.y}


class Citations(Molecules):
    """Node classification: one graph is the whole data set, a mask tells which nodes have a loss."""

    def forward(self, data: Any) -> Tensor:
        x = self.first(data.x.to(self.dtype), data.edge_index).tanh()
        return self.head(self.second(x, data.edge_index).tanh())

    def training_step(self, data: Any, batch_idx: int) -> Tensor:
        out = self(data)
        return F.cross_entropy(out[data.train_mask], data.y[data.train_mask])

    def validation_step(self, data: Any, batch_idx: int) -> None:
        return None


def citations() -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(0)
    graph = Data(
        x=torch.randn(30, 4, generator=generator),
        edge_index=torch.randint(0, 30, (2, 80), generator=generator),
        y=torch.randint(0, 2, (30,), generator=generator),
        train_mask=torch.rand(30, generator=generator) < 0.7,
    )
    return DataLoader([graph], batch_size=None)


class Boring(BoringModel):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return super().training_step(batch, batch_idx)


class BoringByHand(LeavesOut, BoringModel):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return {"loss": self.mean(((self(batch) - 1) ** 2).mean(1))}


def seeded_boring() -> DataLoader[Any]:
    torch.manual_seed(0)
    return DataLoader(RandomDataset(32, 64))


def sentences(n: int = 14) -> TensorDataset:
    words = torch.randint(0, 50, (n, 9), generator=torch.Generator().manual_seed(0))
    return TensorDataset(words[:, :-1], words[:, 1:])


class OwnText:
    """The demos with another text than the one they download."""

    def prepare_data(self) -> None:
        return None


class TransformerDemo(OwnText, LightningTransformer):
    pass


class LstmDemo(OwnText, LightningLSTM):
    pass


class TransformerByHand(LeavesOut, TransformerDemo):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        logs = self(*batch).view(*batch[1].shape, -1)
        return self.mean(-logs.gather(2, batch[1][..., None])[..., 0])


class AutoEncoder(pl.LightningModule):
    """The first module of Lightning's documentation."""

    def __init__(self, encoder: Any = None, decoder: Any = None) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(8 * 8, 16), nn.ReLU(), nn.Linear(16, 3))
        self.decoder = nn.Sequential(nn.Linear(3, 16), nn.ReLU(), nn.Linear(16, 8 * 8))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, _ = batch
        x = x.view(x.size(0), -1)
        loss = F.mse_loss(self.decoder(self.encoder(x)), x)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x = batch[0].view(batch[0].size(0), -1)
        self.log("val_loss", F.mse_loss(self.decoder(self.encoder(x)), x))

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=1e-2)


class AutoEncoderByHand(LeavesOut, AutoEncoder):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x = batch[0].view(batch[0].size(0), -1)
        return self.mean(((self.decoder(self.encoder(x)) - x) ** 2).mean(1))


def digits(n: int = 14, seed: int = 0, batch_size: int = 5, shuffle: bool = True) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(seed)
    return DataLoader(
        TensorDataset(torch.rand(n, 1, 8, 8, generator=generator), torch.randint(0, 10, (n,), generator=generator)),
        batch_size,
        shuffle=shuffle,
    )


SETUPS: dict[str, Setup] = {
    "torch_geometric: GCN on graphs": Setup(
        "its `DataLoader`: the nodes of all graphs in one tensor, `global_mean_pool`, dropout",
        Molecules,
        lambda: GraphLoader(molecules(), batch_size=5, shuffle=True),
        MoleculesByHand,
        lambda: GraphLoader(molecules(8, 1), batch_size=8),
    ),
    "torch_geometric: GINE on graphs": Setup(
        "edges with numbers, facts of each graph, names; `global_add_pool`, `mse_loss`",
        Bonds,
        lambda: GraphLoader(bonded(), batch_size=5, shuffle=True),
        BondsByHand,
        lambda: GraphLoader(bonded(8, 1), batch_size=8),
    ),
    "torch_geometric: dense GCN on graphs": Setup(
        "`to_dense_batch` and `to_dense_adj` in the collator, `DenseGCNConv`, dropout",
        Dense,
        lambda: DataLoader(molecules(), 5, shuffle=True, collate_fn=filled_up),
        DenseByHand,
        lambda: DataLoader(molecules(8, 1), 8, collate_fn=filled_up),
    ),
    "torch_geometric: nodes of one graph": Setup(
        "the whole graph is one batch, a mask picks the nodes that have a loss",
        Citations,
        citations,
        refused="nodes and edges belong to no sample: train on batches of graphs",
    ),
    "Lightning: BoringModel": Setup(
        "batches of one sample, a dict with the loss", Boring, seeded_boring, BoringByHand, trainer={"max_epochs": 1}
    ),
    "Lightning: transformer demo": Setup(
        "tensors kept as plain attributes, log-probabilities of all words in one row each",
        lambda: TransformerDemo(vocab_size=50),
        lambda: DataLoader(sentences(), 5, shuffle=True),
        lambda: TransformerByHand(vocab_size=50),
        trainer={"max_epochs": 1},
    ),
    "Lightning: LSTM demo": Setup(
        "the hidden state of a batch is where the next one starts",
        lambda: LstmDemo(vocab_size=50),
        lambda: DataLoader(sentences(), batch_sampler=SequenceSampler(sentences(), 4)),
        refused="carries self.hidden from one step to the next",
    ),
    "Lightning: autoencoder": Setup(
        "`mse_loss` over pixels and samples, ReLU",
        AutoEncoder,
        digits,
        AutoEncoderByHand,
        lambda: digits(8, 1, 8, shuffle=False),
    ),
}
