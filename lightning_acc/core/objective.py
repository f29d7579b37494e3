"""A LightningModule's per-sample losses as a pure function of a flat parameter vector.

Everything above differentiates these losses in the parameters and in the *loss weights* of one batched forward pass.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from lightning_acc.contract import HasPerSampleLoss
from lightning_acc.core.checkpointing import kept_activations
from lightning_acc.core.process import is_out_of_memory
from lightning_acc.core.stand_in import Attributes, silent_copy, trainer_of
from lightning_acc.errors import RunError
from lightning_acc.record import batches
from lightning_acc.record.batches import Leaves, Structure

LossFunction = Callable[[nn.Module, Any], Tensor]
"""Module and batch to values of shape (B,), or one value for the whole batch."""
Parameters = Tensor | Mapping[str, Tensor]
"""The trained parameters as a flat vector (p,), or by name."""


AUTOCAST: dict[str, torch.dtype | None] = {"32-true": None, "64-true": None, "bf16-mixed": torch.bfloat16}
"""For each of Lightning's precisions that can be replayed, what its forward passes are cast to."""


class ParameterLayout:
    """The order of a module's trained parameters in a flat vector of length p: that of ``named_parameters``."""

    def __init__(self, shapes: list[tuple[str, list[int]]]) -> None:
        self.shapes = [(name, torch.Size(shape)) for name, shape in shapes]
        self.sizes = [shape.numel() for _, shape in self.shapes]

    def flat(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Named tensors as one new vector (p,)."""
        return torch.cat([tensors[name].detach().reshape(-1) for name, _ in self.shapes])

    def named(self, theta: Tensor) -> dict[str, Tensor]:
        """Views of a vector (p,) by parameter name."""
        # One split: its backward is one concatenation, where slices would each fill a vector of length p.
        pieces = theta.split(self.sizes)
        return {name: piece.view(shape) for (name, shape), piece in zip(self.shapes, pieces, strict=True)}


class _Call(nn.Module):
    """Lets ``torch.func.functional_call`` call any function of a module."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, function: LossFunction, batch: Any) -> Tensor:
        return function(self.module, batch)


class Objective:
    """Per-sample losses of ``module`` at given flat parameters.

    The module is copied; loggers and metrics in the copy do nothing.

    Args:
        module: the LightningModule.
        layout: which of its parameters are trained, in the order of the flat vector.
        structure: how the leaves make up a batch.
        evaluation_modules: names of the submodules that are in evaluation mode during training.
        tensors: values of buffers and untrained parameters, by name.
        dtype: floating-point dtype of the computation.
        independent_rows: whether the loss of a sample alone equals its loss within a batch, so that single samples may
            be taken out of a batch to save time.
        vectorised: whether many parameter vectors may be evaluated at once; one by one is slower.
        autocast: the narrower dtype training's forward passes compute in (mixed precision), or None. It acts on float32
            alone: in float64 everything is computed in full, as are queries.
        trainer: what is known of the training's trainer; see ``stand_in``.
    """

    def __init__(
        self,
        module: nn.Module,
        layout: ParameterLayout,
        structure: Structure,
        *,
        evaluation_modules: list[str] | None = None,
        tensors: Mapping[str, Tensor] | None = None,
        dtype: torch.dtype = torch.float32,
        independent_rows: bool = False,
        vectorised: bool = True,
        autocast: torch.dtype | None = None,
        trainer: Mapping[str, Any] | None = None,
    ) -> None:
        self.layout = layout
        self.structure = structure
        self.dtype = dtype
        self.independent_rows = independent_rows
        module = silent_copy(module, trainer)
        module.to("cpu", dtype).train()  # before the values: a narrower dtype would round them
        module.load_state_dict({**module.state_dict(), **(tensors or {})}, strict=False)
        for name in evaluation_modules or []:
            module.get_submodule(name).training = False
        for part in module.modules():
            if isinstance(part, nn.modules.batchnorm._BatchNorm) and part.training:
                part.track_running_stats = False  # in training it normalises with the batch; leave the running ones alone
        self._call = _Call(module.requires_grad_(False))
        self.attributes = Attributes(module)
        self.trainer = trainer_of(module)
        self.loss = loss_function(module)
        self._vmap = vectorised
        self._autocast = autocast

    def call(self, theta: Parameters, function: LossFunction, batch: Any) -> Tensor:
        """``function(module, batch)`` with the trained parameters replaced by ``theta`` (p,), or by tensors by their names."""
        with self.attributes.kept():
            return self.call_once(theta, function, batch)

    def call_once(self, theta: Parameters, function: LossFunction, batch: Any) -> Tensor:
        """The same, but what the module keeps of it in its attributes is there for the next call."""
        pieces = self.layout.named(theta) if isinstance(theta, Tensor) else theta
        named = {f"module.{name}": value for name, value in pieces.items()}
        narrower = torch.autocast("cpu", self._autocast, enabled=self._autocast is not None, cache_enabled=False)
        with narrower, kept_activations():
            values: Tensor = torch.func.functional_call(self._call, named, (function, batch))
        return values

    @property
    def full_precision(self) -> bool:
        """Whether everything is computed in ``dtype``."""
        return self._autocast is None

    def submodule(self, name: str) -> nn.Module:
        """The submodule ``name`` of the module, as it is called."""
        return self._call.module.get_submodule(name)

    def tensors(self) -> list[Tensor]:
        """The module's own tensors, which all parameter vectors share."""
        return [*self._call.module.parameters(), *self._call.module.buffers()]

    def named_tensors(self) -> dict[str, dict[str, Tensor]]:
        """The same by their names, under ``parameter`` and ``buffer``."""
        module = self._call.module
        return {"parameter": dict(module.named_parameters()), "buffer": dict(module.named_buffers())}

    def losses(self, theta: Parameters, leaves: Leaves, structure: Structure | None = None) -> Tensor:
        """Per-sample losses (B,) at ``theta`` (p,), in training mode; ``structure`` is the batch's, where it is another."""
        structure = self.structure if structure is None else structure
        return self.call(theta, partial(self.loss, parts=(leaves, structure)), batches.unflatten(structure, leaves))

    def losses_each(self, thetas: Tensor, leaves: Leaves, own_rows: bool = False) -> Tensor:
        """Losses (n, B) at each of ``thetas`` (n, p); with ``own_rows`` the leaves are (n, B, ...), a batch for each."""
        return self.each(self.losses, thetas, leaves, own_rows)

    def each(self, function: Callable[..., Tensor], thetas: Tensor, leaves: Leaves, own_rows: bool = False) -> Tensor:
        """``function(theta, leaves)`` for each row of ``thetas``: vectorised, or one by one where the module resists."""
        if self._vmap:
            try:
                with traceable():
                    each = torch.vmap(function, in_dims=(0, batches.in_dims(leaves) if own_rows else None), randomness="same")
                    return each(thetas, batches.unmapped(leaves) if own_rows else leaves)
            except RuntimeError as error:
                if is_out_of_memory(error):
                    raise
                self._vmap = False
        results = []
        for i, theta in enumerate(thetas):
            again = torch.random.fork_rng(devices=[], enabled=i < len(thetas) - 1)  # the same random numbers for each
            with again, traceable():  # these too may be differentiated twice
                results.append(function(theta, batches.rows(leaves, torch.tensor(i)) if own_rows else leaves))
        return torch.stack(results)

    def gradient_of_each(self, function: Callable[..., Tensor], theta: Tensor, leaves: Leaves) -> Tensor:
        """Gradients (n, p) at ``theta`` (p,) of the scalars ``function(theta, leaves)``, for each of n rows of leaves.

        Unlike many parameter vectors, which each need products of their own, the rows share one.
        """
        if self._vmap:
            try:
                with traceable():
                    each = torch.vmap(torch.func.grad(function), in_dims=(None, batches.in_dims(leaves)), randomness="same")
                    gradients: Tensor = each(theta.detach(), batches.unmapped(leaves))
                    return gradients
            except RuntimeError as error:
                if is_out_of_memory(error):
                    raise
        found = []
        for i in range(batches.batch_size(leaves)):
            leaf = theta.detach().requires_grad_()
            value = function(leaf, batches.rows(leaves, torch.tensor(i)))
            found.append(torch.autograd.grad(value, leaf)[0] if value.requires_grad else torch.zeros_like(theta))
        return torch.stack(found)

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """In here the whole module is in evaluation mode and full precision, as a query reads it."""
        module, autocast = self._call.module, self._autocast
        self._autocast = None
        modes = [(part, part.training) for part in module.modules()]
        module.eval()
        try:
            yield
        finally:
            self._autocast = autocast
            for part, mode in modes:
                part.training = mode


def loss_function(module: nn.Module) -> Callable[..., Tensor]:
    """How the per-sample losses of a module are taken: by its own ``per_sample_loss``, or by its ``training_step``."""
    return per_sample_loss if isinstance(module, HasPerSampleLoss) else losses_of_training_step


Parts = tuple[Leaves, Structure]
"""A batch taken apart."""


def per_sample_loss(module: nn.Module, batch: Any, parts: Parts | None = None) -> Tensor:
    """The module's own ``per_sample_loss``, checked to give one loss a sample."""
    losses: Any = module.per_sample_loss(batch)  # type: ignore[operator]
    leaves, _ = parts or batches.flatten(batch)
    size = batches.batch_size(leaves)
    if not isinstance(losses, Tensor) or losses.shape != (size,):
        got = tuple(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
        raise RunError(
            f"{type(module).__name__}.per_sample_loss returned {got} for a batch of {size} samples: "
            f"it must return one loss a sample, a tensor of shape ({size},)."
        )
    return losses


def losses_of_training_step(module: nn.Module, batch: Any, parts: Parts | None = None) -> Tensor:
    """Per-sample losses (B,) by ``training_step`` on batches of one sample: slower than ``per_sample_loss``, and as good."""
    leaves, structure = parts or batches.flatten(batch)

    def alone(row: Leaves) -> Tensor:
        single = {name: leaf.unsqueeze(0) for name, leaf in row.items()}
        return whole_loss_of_training_step(module, batches.unflatten(structure, single))

    with traceable():
        if not module.__dict__.get("_rows_resist_vmap"):
            try:
                return torch.vmap(alone, in_dims=(batches.in_dims(leaves),), randomness="different")(batches.unmapped(leaves))
            except RuntimeError:
                module.__dict__["_rows_resist_vmap"] = True
        return torch.stack([alone(batches.rows(leaves, torch.tensor(i))) for i in range(batches.batch_size(leaves))])


def whole_loss_of_training_step(module: nn.Module, batch: Any) -> Tensor:
    """What ``training_step`` returns for the batch, a scalar."""
    step: Any = module.training_step
    extra = (0,) if len(inspect.signature(step).parameters) > 1 else ()  # the batch index, whatever it is called
    return loss_of(step(batch, *extra))


def loss_of(output: Any) -> Tensor:
    """The loss in what ``training_step`` returned.

    Raises:
        RunError: there is none.
    """
    loss = output.get("loss") if isinstance(output, Mapping) else output
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        raise RunError(
            f"training_step returned {type(output).__name__} without a single loss: it must return a scalar tensor, or a "
            'dict with one under "loss".'
        )
    return loss.reshape(())


@contextmanager
def traceable() -> Iterator[None]:
    """In here operations are chosen that can be vectorised and differentiated twice, without warnings that some are slow.

    Flash attention has no second derivative, and the fused transformer layer cannot be vectorised.
    """
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH), quiet():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)


@contextmanager
def quiet() -> Iterator[None]:
    """In here torch does not warn that an operation is vectorised by a loop, or about its own deprecations."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="There is a performance drop")
        warnings.filterwarnings("ignore", message=".*torch.jit.script. is deprecated", category=DeprecationWarning)
        yield
