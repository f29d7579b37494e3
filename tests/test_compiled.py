"""Compiled modules are recorded by what they were before, under its names, and replayed without the compiler."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from problems import N, Net, Weighted, data, fit
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_acc as la
from lightning_acc.core.modules.compiled import is_compiled, plain_copy
from lightning_acc.recorder import RecordingRefused

pytestmark = pytest.mark.filterwarnings(
    *(
        "ignore:.*Skipping val loop",
        "ignore:Training has no validation data",
        "ignore:.*torch.jit.script_method. is deprecated",
    ),
    *("ignore:.*isinstance.treespec, LeafSpec.. is deprecated",),
)
SAMPLES = (0, 11)


class Silent(Weighted):
    """Logs nothing: what Lightning logs with cannot be compiled."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.per_sample_loss(batch).mean()


class OfItself(Weighted):
    """Compiles its layers where it is made."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.net = torch.compile(self.net, backend="aot_eager")


class ByMethod(Weighted):
    @torch.compile(backend="aot_eager")
    def per_sample_loss(self, batch: Any) -> Tensor:
        return super().per_sample_loss(batch)


def whole(backend: Any) -> Any:
    return torch.compile(net(Silent), backend=backend)


def in_place(backend: Any) -> Any:
    module = net()
    module.compile(backend=backend)
    return module


def layers(backend: Any) -> Any:
    module = net()
    module.net = torch.compile(module.net, backend=backend)
    return module


def layers_in_place(backend: Any) -> Any:
    module = net()
    module.net.compile(backend=backend)
    return module


def net(kind: type[Weighted] = Weighted, dropout: float = 0.2) -> Any:
    torch.manual_seed(0)
    return kind(hidden=4, activation="gelu", dropout=dropout)


WAYS: dict[str, Any] = {
    "the module": lambda: whole("aot_eager"),
    "in place": lambda: in_place("aot_eager"),
    "layers": lambda: layers("aot_eager"),
    "layers in place": lambda: layers_in_place("aot_eager"),
    "of itself": lambda: net(OfItself),
    "by method": lambda: net(ByMethod),
}


def train(module: Any, *callbacks: Any, kept: Tensor | None = None, precision: str = "32-true") -> Tensor:
    kept = torch.ones(N) if kept is None else kept
    samples = TensorDataset(*data(dtype=torch.float32).tensors, kept)
    return fit(module, DataLoader(samples, 6, shuffle=True), *callbacks, validation=False, max_epochs=2, precision=precision)


@pytest.mark.parametrize("way", WAYS)
def test_compiled_modules(tmp_path: Path, way: str) -> None:
    torch._dynamo.reset()
    make = WAYS[way]
    base = train(make(), la.TrajectoryRecorder(tmp_path / "run"))
    assert torch.equal(base, train(make()))
    run = la.Run(tmp_path / "run")
    assert run.manifest["compiled"] is True
    assert [name for name, _ in run.manifest["layout"]] == ["net.0.weight", "net.0.bias", "net.3.weight", "net.3.bias"]
    assert run.audit().max_abs_error < 1e-7
    assert not is_compiled(run.module()) or way == "by method"
    held_out = la.Query("held-out", [data(n=8, seed=5, dtype=torch.float32).tensors])
    for opened in (run, la.Run(tmp_path / "run", module=make())):
        found = la.score(opened, "loo", SAMPLES, held_out, keep_shifts=True, ray_address=None, save=False, check=0).shifts
        assert found is not None
        for sample, shift in zip(SAMPLES, found, strict=True):
            kept = torch.ones(N)
            kept[sample] = 0
            change = train(make(), kept=kept) - base
            assert float((shift - change).norm() / change.norm()) < 1e-4
    assert la.score(run, "sgd-ie", SAMPLES, held_out, ray_address=None, check=0).values.all()


def test_a_plain_copy_shares_nothing_with_what_is_compiled() -> None:
    module = layers("eager")
    module.tied = module.net._orig_mod[0]
    twin = plain_copy(module)
    assert is_compiled(module)
    assert not is_compiled(twin)
    assert twin.tied is twin.net[0]
    assert not {id(p) for p in twin.parameters()} & {id(p) for p in module.parameters()}
    assert torch.equal(twin.net[0].weight, module.tied.weight)


def drawing_others(graph: Any, inputs: Any) -> Any:
    """As inductor does: random numbers, and others than torch's."""

    def run(*given: Any) -> Any:
        torch.rand(1)
        return graph(*given)

    return run


def rounding_otherwise(graph: Any, inputs: Any) -> Any:
    """As fused kernels in mixed precision do."""
    return lambda *given: tuple(out * 1.002 if out.is_floating_point() else out for out in graph(*given))


def test_random_numbers_of_the_compiler_are_refused_by_their_cause(tmp_path: Path) -> None:
    import torch._inductor.config

    torch._dynamo.reset()
    with pytest.raises(RecordingRefused, match=r"draws random numbers .* torch.compile makes.*fallback_random = True"):
        train(layers(drawing_others), la.TrajectoryRecorder(tmp_path / "run"))


def test_mixed_precision_is_audited_to_the_rounding_of_the_narrow_dtype(tmp_path: Path) -> None:
    torch._dynamo.reset()
    module = net(dropout=0.0)
    module.net = torch.compile(module.net, backend=rounding_otherwise)
    train(module, la.TrajectoryRecorder(tmp_path / "run"), precision="bf16-mixed")
    report = la.Run(tmp_path / "run").audit()
    assert report.ok
    assert 1e-6 < report.max_abs_error < report.tolerance
    torch._dynamo.reset()
    module = net(dropout=0.0)
    module.net = torch.compile(module.net, backend=rounding_otherwise)
    with pytest.raises(RecordingRefused, match="gradients differ by"):
        train(module, la.TrajectoryRecorder(tmp_path / "full"))


def test_inductor(tmp_path: Path) -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    module = Weighted()
    module.net = torch.compile(nn.Sequential(*module.net))
    train(module, la.TrajectoryRecorder(tmp_path / "run"))
    report = la.Run(tmp_path / "run").audit()
    assert report.ok
    assert report.max_abs_error < 1e-6


def test_plain_modules_are_not_taken_for_compiled() -> None:
    assert not is_compiled(Net(hidden=4))
