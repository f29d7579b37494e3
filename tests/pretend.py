"""A pretend device, for machines without a GPU: what its tensors hold lies in the CPU's memory, and they refuse to meet others.

torch's Python backend for ``privateuse1``, and a wrapper subclass. What is computed is what the CPU computes, so that scores of
one device and the other are equal, and whatever was left on the CPU, or made there, is an error.

Meant for a process of its own: autograd learns of devices when it first goes back. Run as a script it records a few runs in a
folder, asks the questions of ``CASES`` on both devices, and prints as JSON the largest difference in each case, as a share of
the largest number, or what went wrong.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytorch_lightning as pl
import torch
from problems import N, Net, StepOnly, Weighted, data, fit, flat, make, record
from pytorch_lightning.accelerators import CPUAccelerator
from pytorch_lightning.strategies import SingleDeviceStrategy
from torch import Tensor
from torch.utils._pytree import tree_map
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

import lightning_acc as la
from lightning_acc.core import audit, devices
from lightning_acc.judge.self_influence import self_influence
from lightning_acc.record import steps
from lightning_acc.record.schema import keys, kinds
from lightning_acc.scoring.over_time import influence_over_time

NAME = "pretend"
aten = torch.ops.aten
MOVES = {aten._to_copy.default, aten.copy_.default, aten._local_scalar_dense.default}
"""Operations that take numbers from one device to the other."""
INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._unsafe_index.Tensor}
"""Operations that take indices of the CPU, as a GPU's do."""


class Pretend(Tensor):
    """A tensor of the pretend device; ``held`` are its numbers."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> Pretend:
        like = {"strides": held.stride(), "storage_offset": held.storage_offset(), "dtype": held.dtype}
        made: Pretend = torch.Tensor._make_wrapper_subclass(cls, held.size(), device=f"{NAME}:0", **like)  # type: ignore[arg-type]
        made.held = held
        return made

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.held.untyped_storage()

    def tolist(self) -> Any:
        return self.held.tolist()

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        to = kwargs.get("device")
        stays = to is None or torch.device(to).type == NAME
        if not (stays or function in MOVES or torch.device(to).type == "meta"):
            raise RuntimeError(f"{function} makes something on {to} of what is on the pretend device")
        if to is not None and stays:
            kwargs["device"] = "cpu"
        if function not in MOVES:
            met = [args[0], *args[2:]] if function in INDEXING else [*args, *kwargs.values()]
            tree_map(lambda one: _refuse_cpu(function, one), met)
        with _own_generator() if torch.Tag.nondeterministic_seeded in function.tags else nullcontext():
            out = function(*tree_map(_held, args), **tree_map(_held, kwargs))
        if function._schema.is_mutable:  # what was changed is what was given
            return args[0] if isinstance(out, Tensor) else tree_map(_wrapped, out)
        return tree_map(_wrapped, out) if stays else out


def _refuse_cpu(function: Any, one: Any) -> None:
    if isinstance(one, Tensor) and not isinstance(one, Pretend) and one.ndim:
        raise RuntimeError(f"{function} met a tensor of the CPU of shape {tuple(one.shape)}")


def _held(one: Any) -> Any:
    return one.held if isinstance(one, Pretend) else one


def _wrapped(one: Any) -> Any:
    return Pretend(one) if isinstance(one, Tensor) and not isinstance(one, Pretend) else one


def _empty(size: Any, *_: Any, dtype: Any = None, **__: Any) -> Tensor:
    return Pretend(torch.empty(size, dtype=dtype))


def _zeros(size: Any, *_: Any, dtype: Any = None, **__: Any) -> Tensor:
    return Pretend(torch.zeros(size, dtype=dtype))


def _empty_strided(size: Any, stride: Any, dtype: Any = None, **_: Any) -> Tensor:
    return Pretend(torch.empty_strided(size, stride, dtype=dtype))


def _arange(*ends: Any, dtype: Any = None, **_: Any) -> Tensor:
    return Pretend(torch.arange(*ends, dtype=dtype))


def _copy_from(source: Tensor, target: Tensor, non_blocking: bool = False) -> Tensor:
    _held(target).copy_(_held(source))
    return target


class _Module(_DummyBackendModule):
    """What stands at ``torch.pretend``."""

    default_generators = (torch.Generator(),)

    def manual_seed_all(self, seed: int) -> None:
        self.default_generators[0].manual_seed(seed)

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]


@contextmanager
def _own_generator() -> Iterator[None]:
    """In here the device's generator is drawn from, and not the CPU's."""
    theirs, ours = torch.default_generator, _Module.default_generators[0]
    before = theirs.get_state()
    theirs.set_state(ours.get_state())
    try:
        yield
    finally:
        ours.set_state(theirs.get_state())
        theirs.set_state(before)


def begin() -> torch.device:
    """The device, from now on there in this process."""
    _setup_privateuseone_for_python_backend(NAME, _Module())
    library = torch.library.Library("aten", "IMPL", "PrivateUse1")
    library.impl("empty.memory_format", _empty)
    library.impl("empty_strided", _empty_strided)
    library.impl("_efficientzerotensor", _zeros)
    for name in ("arange", "arange.start", "arange.start_step"):
        library.impl(name, _arange)
    library.impl("_copy_from", _copy_from)
    _libraries.append(library)
    return torch.device(NAME)


_libraries: list[Any] = []


# ---- what is asked, on both devices

DRAWN_THERE = "what was drawn there cannot be drawn here"
LEFT_BEHIND = "something was left on the CPU"
SOME = [0, 1, 5, (2, 3, 4), 17]
ADAMW = {"class": "AdamW", "lr": 0.02, "weight_decay": 0.1}


class Texts(pl.LightningModule):
    """Batches with words in them, which Python reads; tokens, whose embedding is trained; weights of the samples."""

    def __init__(self) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.embedding, self.layer = torch.nn.Embedding(7, 4), torch.nn.Linear(4, 3)

    def per_sample_loss(self, batch: Any) -> tuple[Tensor, Tensor]:
        assert all(text.startswith("sample") for text in batch["text"])
        out = self.layer(self.embedding(batch["tokens"]).mean(1)) * batch["factor"][:, None]
        return torch.nn.functional.cross_entropy(out, batch["y"], reduction="none"), batch["weight"]

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        losses, weights = self.per_sample_loss(batch)
        return (weights * losses).sum() / weights.sum()

    validation_step = training_step

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=0.02)


def texts() -> list[dict[str, Any]]:
    draw = torch.Generator().manual_seed(0)
    return [
        {
            "text": f"sample {i}",
            "tokens": torch.randint(0, 7, (5,), generator=draw),
            "y": torch.randint(0, 3, (), generator=draw),
            "weight": torch.rand((), generator=draw, dtype=torch.float64),
            "factor": torch.tensor(1.5, dtype=torch.float64),
        }
        for i in range(24)
    ]


class InTurn(Net):
    """The first layer rests in the second epoch; each layer has settings of its own."""

    def on_train_epoch_start(self) -> None:
        self.net[0].requires_grad_(self.current_epoch == 0)

    def configure_optimizers(self) -> Any:
        groups = [{"params": self.net[0].parameters(), "lr": 0.1}, {"params": self.net[3].parameters()}]
        return self.optimizer_class(groups, **self.options)


def in_turn(optimizer: dict[str, Any]) -> InTurn:
    torch.manual_seed(0)
    return InTurn(hidden=4, activation="gelu", optimizer=optimizer).double()


RUNS: dict[str, Callable[[], Any]] = {
    "sgd": lambda: make(hidden=4, activation="gelu", optimizer={"momentum": 0.9}),
    "adamw": lambda: make(hidden=4, activation="gelu", optimizer=ADAMW),
    "reductions": lambda: StepOnly().double(),
    "texts": lambda: Texts().double(),
    "sgd in turn": lambda: in_turn({"momentum": 0.9, "lr": 0.05}),
    "adamw in turn": lambda: in_turn(ADAMW),
}
THERE: dict[str, float] = {"there": 0.0, "dropout there": 0.3}
"""Runs that are recorded on the pretend device, and their dropout."""
OPTIONS: dict[str, dict[str, Any]] = {
    "adamw": {"gradient_clip_val": 0.3, "accumulate_grad_batches": 2},
    "texts": {"train": texts(), "validation": False},
    **{f"{name} in turn": {"recorder": {"frozen": "trained-later"}} for name in ("sgd", "adamw")},
}


def margin(module: Net, batch: Any) -> Tensor:
    logits = module.net(batch[0])
    return logits.gather(1, batch[1][:, None])[:, 0] - torch.zeros(len(logits), device=logits.device)


def scored(run: la.Run, device: str, method: str = "sgd-ie", **options: Any) -> np.ndarray:
    query = la.Query("words", [torch.utils.data.default_collate(texts()[:9])]) if "texts" in run.path else "val"
    asked = {"query": query, "removals": SOME, "ray_address": None, "check": 0, "save": False, **options}
    scores = la.score(run, method, device=device, **asked)
    assert scores.conditions["device"] == device
    return scores.values if scores.shifts is None else scores.shifts.numpy()


def over_time(run: la.Run, device: str) -> np.ndarray:
    return influence_over_time(run, [0, 5], device=device)["score"].to_numpy()


def matrix(run: la.Run, device: str, method: str) -> np.ndarray:
    return la.score_matrix(run, method, device=device, removals=SOME, ray_address=None, check=0, save=False).values


def banked(run: la.Run, device: str) -> np.ndarray:
    """What was retrained for one query answers another."""
    scored(run, device, "loo", save=True)
    return scored(run, device, "loo", query=la.Query("other", [data(n=5, seed=3).tensors]), save=True)


def audited(run: la.Run, device: str) -> np.ndarray:
    """On another device than it was recorded on, an audit says so."""
    with mock.patch.object(audit, "recorded_on", return_value=torch.device(device)):
        report = run.audit()
    recorded = run.manifest.get("device", "cpu")
    apart = f"(recorded on {recorded}, replayed on {device}: round-off explains up to {report.tolerance:.1e})"
    assert report.ok
    assert (apart in str(report)) == (report.apart is not None) == (device != recorded)
    return np.array([1.0 + report.max_abs_error])


def cleaned(run: la.Run, device: str) -> np.ndarray:
    controls = ["none", "random", "self-influence", "validation"]
    options = {"controls": controls, "test": la.Query("test", [data(n=9, seed=4).tensors]), "save": False}
    table = la.clean(run, "sgd-ie", [0.25], 2, device=device, ray_address=None, **options)
    return np.array(table["losses"].to_pylist())


class OnPretend(CPUAccelerator):
    """Lightning's way onto the device."""

    def setup_device(self, device: torch.device) -> None:
        pass


def trained_there(dropout: float, *callbacks: Any, without: int | None = None) -> Tensor:
    """Final parameters (p,) of a training on the device; one sample may have the weight 0."""
    torch.manual_seed(0)
    module = Weighted(hidden=5, activation="gelu", dropout=dropout, optimizer=ADAMW).double()
    kept = torch.ones(N, dtype=torch.float64)
    if without is not None:
        kept[without] = 0
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*data().tensors, kept), 5, shuffle=True)
    strategy = SingleDeviceStrategy(device=torch.device(NAME, 0), accelerator=OnPretend())
    fit(module, loader, *callbacks, strategy=strategy, accelerator="auto", gradient_clip_val=0.3, max_epochs=2)
    return flat(module)


def without_sample(run: la.Run, device: str) -> np.ndarray:
    """How a sample's absence shifts the parameters: asked of Lightning itself, or of what was recorded."""
    if device == NAME:
        return scored(run, device, "loo", removals=[11], keep_shifts=True)
    dropout = THERE[run.name]
    return (trained_there(dropout, without=11) - trained_there(dropout))[None].numpy()


CASES: dict[str, tuple[str, Callable[[la.Run, str], Any]]] = {
    **{
        f"{method}, {readout}, at {at}, {run}": (run, partial(scored, method=method, readout=readout, at=at))
        for run, methods in {"sgd": ["acc-low-rank"], "adamw": ["loo", "acc-sgd-ie", "sgd-ie", "tracin"]}.items()
        for method in methods
        for readout, at in (("exact", "end"), ("linear", "along:3"))
    },
    **{
        f"{method}, {run}, at {at}": (run, partial(scored, method=method, at=at, **options))
        for run, method, options in (
            ("adamw", "acc-low-rank", {"followed": N}),
            ("adamw in turn", "acc-low-rank", {"followed": N}),
            ("sgd in turn", "acc-low-rank", {"followed": N}),
            *(("adamw in turn", method, {}) for method in ("loo", "acc-sgd-ie", "sgd-ie")),
        )
        for at in ("end", "along:3")
    },
    "screened": ("sgd", partial(scored, method="acc-low-rank", removals=range(12), followed=8)),
    "few directions": ("sgd", partial(scored, method="acc-low-rank", directions=5)),
    "shifts": ("adamw", partial(scored, method="acc-sgd-ie", keep_shifts=True)),
    "function": ("adamw", partial(scored, query=la.Query("margin", [data(n=5, seed=3).tensors], margin))),
    "float32": ("adamw", partial(scored, method="acc-sgd-ie", dtype="float32")),
    "texts": ("texts", partial(scored, method="acc-sgd-ie")),
    "texts, all samples": ("texts", scored),
    "reductions": ("reductions", partial(scored, method="acc-sgd-ie")),
    "matrix, sgd-ie": ("adamw", partial(matrix, method="sgd-ie")),
    "matrix, acc-sgd-ie": ("adamw", partial(matrix, method="acc-sgd-ie")),
    "over time": ("adamw", over_time),
    "bank": ("adamw", banked),
    "audit": ("adamw", audited),
    "self-influence": ("adamw", lambda run, device: self_influence(run, 2**28, torch.device(device))),
    "clean": ("adamw", cleaned),
    "recorded there, scored here": ("there", partial(scored, method="acc-sgd-ie")),
    "retrained there": ("there", without_sample),
    "retrained there, dropout": ("dropout there", without_sample),
    "audited there, dropout": ("dropout there", lambda run, device: [1.0 + run.audit().max_abs_error * (device == NAME)]),
    "audited here": ("there", audited),
    DRAWN_THERE: ("dropout there", scored),
    LEFT_BEHIND: ("sgd", lambda run, device: torch.ones(2, device=device) @ torch.ones(2)),
}


def difference(run: la.Run, ask: Callable[[la.Run, str], Any]) -> float | str:
    """The largest between the devices, as a share of the largest number; or what went wrong."""
    try:
        ours, theirs = (np.asarray(ask(run, device)) for device in ("cpu", NAME))
    except Exception as error:
        cause = error.__cause__ or error
        return f"{type(cause).__name__}: {' '.join(str(cause).split())[:300]}"
    return float(np.abs(ours - theirs).max() / np.abs(ours).max()) if ours.shape == theirs.shape else "other shapes"


if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    begin()
    devices.KINDS.append(NAME)
    keys.WHERE_GIVEN["device"], steps.RANDOM[NAME] = kinds.TEXT, f"_{NAME}"
    options = {name: {"max_epochs": 2, **OPTIONS.get(name, {})} for name in RUNS}
    made = {name: record(Path(sys.argv[1]) / name, module(), **options[name]) for name, module in RUNS.items()}
    for name, dropout in THERE.items():
        trained_there(dropout, la.TrajectoryRecorder(Path(sys.argv[1]) / name))
        made[name] = la.Run(Path(sys.argv[1]) / name)
        assert made[name].manifest["device"] == NAME
    names = sys.argv[2:] or CASES
    print(json.dumps({name: difference(made[CASES[name][0]], CASES[name][1]) for name in names}))
