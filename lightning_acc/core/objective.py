"""A LightningModule's per-sample losses as a pure function of a flat parameter vector.

Everything above differentiates these losses in the parameters and in the *loss weights* of one batched forward pass.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_acc.core.devices import CPU, generators_kept
from lightning_acc.core.losses.per_sample import Losses, Reduction, Source, losses_of
from lightning_acc.core.losses.tracing import traceable
from lightning_acc.core.modules.checkpointing import kept_activations
from lightning_acc.core.modules.compiled import eagerly
from lightning_acc.core.modules.precision import NARROW, PRECISIONS, default_dtype, of_other_dtypes, put
from lightning_acc.core.modules.twice import make_twice_differentiable
from lightning_acc.core.process import is_out_of_memory
from lightning_acc.core.stand_in import SETTINGS, Attributes, Place, Settings, put_into, set_to, silent_copy, trainer_of
from lightning_acc.record import batches
from lightning_acc.record.batches import Leaves, Structure, TakenApart

Parameters = Tensor | Mapping[str, Tensor]
"""The trained parameters as a flat vector (p,), or by name."""


class ParameterLayout:
    """The order of a module's trained parameters in a flat vector of length p: that of ``named_parameters``."""

    def __init__(self, shapes: list[tuple[str, list[int]]]) -> None:
        self.shapes = [(name, torch.Size(shape)) for name, shape in shapes]
        self.sizes = [shape.numel() for _, shape in self.shapes]

    def flat(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Named tensors as one new vector (p,)."""
        return torch.cat([tensors[name].detach().reshape(-1) for name, _ in self.shapes])

    def named(self, theta: Tensor) -> dict[str, Tensor]:
        """The parts of a vector (p,) by parameter name: views, but of pairs, as ``view_as_complex`` asks for whole ones."""
        # One split: its backward is one concatenation, where slices would each fill a vector of length p.
        pieces = theta.split(self.sizes)
        named = {name: piece.view(shape) for (name, shape), piece in zip(self.shapes, pieces, strict=True)}
        # Multiplied, and not cloned, so that what comes back to it by its derivatives is whole too.
        return {name: piece * 1 if piece.shape[-1:] == (2,) else piece for name, piece in named.items()}


class _Call(nn.Module):
    """Lets ``torch.func.functional_call`` call any function of a module."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, function: Callable[[nn.Module, Any], Any], batch: Any) -> Any:
        return function(self.module, batch)


class Objective:
    """Per-sample losses of ``module`` at given flat parameters.

    The module is copied; loggers and metrics in the copy do nothing. Nothing in it requires a gradient: parameters that do not
    either need no ``torch.no_grad``, in which a loss made of gradients (a penalty on them, a differential equation) fails.

    Args:
        module: the LightningModule.
        layout: which of its parameters are trained, in the order of the flat vector.
        structure: how the leaves make up a batch.
        source: how the losses of single samples are taken, see ``core.losses.per_sample``.
        reduction: how they make the loss of a batch.
        evaluation_modules: names of the submodules that are in evaluation mode during training.
        tensors: values of buffers and untrained parameters, by name.
        dtype: floating-point dtype of the computation.
        trained_in: that of the trained parameters in training, where it is another. What the module has in further dtypes, as a
            frozen part in bfloat16, stays as it was.
        device: where it is done.
        independent_rows: whether the loss of a sample alone equals its loss within a batch, so that single samples may
            be taken out of a batch to save time.
        penalised: whether the loss of a batch has terms that no sample is in.
        vectorised: whether many parameter vectors may be evaluated at once; one by one is slower.
        precision: Lightning's name for how training computes. What it casts to a narrower dtype (mixed precision) is cast
            from float32 alone: in float64 everything is computed in full, as are queries.
        trainer: what is known of the training's trainer; see ``stand_in``.
        settings: of the module, those that change in training, as they were in its first step.
    """

    def __init__(
        self,
        module: nn.Module,
        layout: ParameterLayout,
        structure: Structure,
        *,
        source: Source,
        reduction: Reduction,
        evaluation_modules: list[str] | None = None,
        tensors: Mapping[str, Tensor] | None = None,
        dtype: torch.dtype = torch.float32,
        trained_in: torch.dtype | None = None,
        device: torch.device = CPU,
        independent_rows: bool = False,
        penalised: bool = False,
        vectorised: bool = True,
        precision: str = "32-true",
        trainer: Mapping[str, Any] | None = None,
        settings: Settings | None = None,
    ) -> None:
        self.layout = layout
        self.structure = structure
        self.source = source
        self.reduction = reduction
        self.dtype, self.device = dtype, device
        self.independent_rows = independent_rows
        self.penalised = penalised
        module = silent_copy(module, trainer)
        others = of_other_dtypes(module, tensors, trained_in or dtype, {name for name, _ in layout.shapes})
        module.to(device, dtype).train()  # before the values: a narrower dtype would round them
        module.load_state_dict({**module.state_dict(), **(tensors or {})}, strict=False)
        for name, value in others.items():
            put(module, name, value.to(device))
        self._narrow = any(value.dtype in NARROW for value in others.values())
        for name in evaluation_modules or []:
            module.get_submodule(name).training = False
        for part in module.modules():
            if isinstance(part, nn.modules.batchnorm._BatchNorm) and part.training:
                part.track_running_stats = False  # in training it normalises with the batch; leave the running ones alone
            if isinstance(part, (nn.Embedding, nn.EmbeddingBag)):
                part.sparse = False  # a sparse gradient is the same, but has no derivative
        make_twice_differentiable(module)
        self._call = _Call(module.requires_grad_(False))
        self.attributes = Attributes(module)
        self.trainer = trainer_of(module)
        self._settings = settings or {}
        set_to(module, self._settings)
        self.vectorised = vectorised
        self._default = PRECISIONS[precision].default
        self._autocast = PRECISIONS[precision].autocast

    def call(self, theta: Parameters, function: Callable[[nn.Module, Any], Any], batch: Any) -> Any:
        """``function(module, batch)`` with the trained parameters replaced by ``theta`` (p,), or by tensors by their names.

        The batch may be ``TakenApart``: then it is known in there what it is made of.
        """
        with self.attributes.kept():
            return self.call_once(theta, function, batch)

    def call_once(self, theta: Parameters, function: Callable[[nn.Module, Any], Any], batch: Any) -> Any:
        """The same, but what the module keeps of it in its attributes is there for the next call."""
        pieces = self.layout.named(theta) if isinstance(theta, Tensor) else theta
        named = {f"module.{name}": value for name, value in pieces.items()}
        narrower = torch.autocast(self.device.type, self._autocast, enabled=self._autocast is not None, cache_enabled=False)
        with narrower, default_dtype(self._default), kept_activations(), eagerly(), batches.put_together(batch) as whole:
            return torch.func.functional_call(self._call, named, (function, whole))

    def taken(self, source: Source, reduction: Reduction, penalised: bool = False) -> Objective:
        """The same module, whose losses are taken in another way."""
        other = copy.copy(self)
        other.source, other.reduction, other.penalised = source, reduction, penalised
        return other

    @property
    def full_precision(self) -> bool:
        """Whether everything is computed in ``dtype``."""
        return self._autocast is None and not self._narrow

    @property
    def undivided(self) -> str | None:
        """Why the gradient of a batch is not the sum over its rows taken apart, in a clause; None where it is."""
        if not self.independent_rows:
            return "its rows depend on each other, or could not be seen to be independent"
        return "its loss has a term that no sample is in" if self.penalised else None

    def submodule(self, name: str) -> nn.Module:
        """The submodule ``name`` of the module, as it is called."""
        return self._call.module.get_submodule(name)

    def tensors(self) -> list[Tensor]:
        """The module's own tensors, which all parameter vectors share."""
        return [*self._call.module.parameters(), *self._call.module.buffers()]

    def named_tensors(self) -> dict[str, dict[str, Tensor]]:
        """Those that are not trained, by their names, under ``parameter`` and ``buffer``."""
        module, trained = self._call.module, {name for name, _ in self.layout.shapes}
        untrained: dict[str, Tensor] = {name: value for name, value in module.named_parameters() if name not in trained}
        return {"parameter": untrained, "buffer": dict(module.named_buffers())}

    def loss(self, module: nn.Module, batch: Any) -> Tensor:
        """The losses (B,) of a batch, for ``call``."""
        return self.weighted_loss(module, batch).losses

    def weighted_loss(self, module: nn.Module, batch: Any) -> Losses:
        """The losses of a batch and their weights in its loss, for ``call``."""
        return losses_of(module, batch, self.source, self.reduction, self.penalised)

    def losses(self, theta: Parameters, leaves: Leaves) -> Tensor:
        """Per-sample losses (B,) at ``theta`` (p,), in training mode."""
        losses: Tensor = self.call(theta, self.loss, TakenApart(leaves, self.structure))
        return losses

    def terms(self, theta: Parameters, leaves: Leaves) -> Tensor:
        """The losses, and last, where the objective is penalised, the penalty: (B,) or (B + 1,)."""
        if not self.penalised:
            return self.losses(theta, leaves)
        found: Losses = self.call(theta, self.weighted_loss, TakenApart(leaves, self.structure))
        penalty = torch.zeros_like(found.losses[0]) if found.penalty is None else found.penalty
        return torch.cat([found.losses, penalty.to(found.losses.dtype)[None]])

    def weights(self, theta: Parameters, leaves: Leaves) -> Tensor:
        """What each sample weighs in the loss of its batch, (B,)."""
        found: Losses = self.call(theta, self.weighted_loss, TakenApart(leaves, self.structure))
        return found.weights.detach()

    def weights_each(self, thetas: Tensor, leaves: Leaves) -> Tensor:
        """What each sample weighs in the loss of its batch, (n, B), of n batches (n, B, ...)."""
        return self.each(lambda theta, own: self.weights(theta, own), thetas, leaves, own_rows=True)

    def losses_each(self, thetas: Tensor, leaves: Leaves, own_rows: bool = False) -> Tensor:
        """Losses (n, B) at each of ``thetas`` (n, p); with ``own_rows`` the leaves are (n, B, ...), a batch for each."""
        return self.each(self.losses, thetas, leaves, own_rows)

    def terms_each(self, thetas: Tensor, leaves: Leaves, own_rows: bool = False) -> Tensor:
        """``terms`` at each of ``thetas`` (n, p): (n, B) or (n, B + 1)."""
        return self.each(self.terms, thetas, leaves, own_rows)

    def each(self, function: Callable[..., Tensor], thetas: Tensor, leaves: Leaves, own_rows: bool = False) -> Tensor:
        """``function(theta, leaves)`` for each row of ``thetas``: vectorised, or one by one where the module resists."""
        if self.vectorised:
            try:
                with traceable():
                    each = torch.vmap(function, in_dims=(0, batches.in_dims(leaves) if own_rows else None), randomness="same")
                    return each(thetas, batches.unmapped(leaves) if own_rows else leaves)
            except RuntimeError as error:
                if is_out_of_memory(error):
                    raise
                self.vectorised = False
        results = []
        for i, theta in enumerate(thetas):
            again = generators_kept(self.device, enabled=i < len(thetas) - 1)  # the same random numbers for each
            with again, traceable():  # these too may be differentiated twice
                results.append(function(theta, batches.rows(leaves, torch.tensor(i)) if own_rows else leaves))
        return torch.stack(results)

    def gradient_of_each(self, function: Callable[..., Tensor], theta: Tensor, leaves: Leaves) -> Tensor:
        """Gradients (n, p) at ``theta`` (p,) of the scalars ``function(theta, leaves)``, for each of n rows of leaves.

        Unlike many parameter vectors, which each need products of their own, the rows share one.
        """
        if self.vectorised:
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
    def within(self, place: Place) -> Iterator[None]:
        """In here the module is as at this step of the training."""
        before = None if self.trainer is None else self.trainer.place
        if self.trainer is not None:
            self.trainer.place = lambda: place
        try:
            with put_into(self._call.module, {**self._settings, **place.get(SETTINGS, {})}):
                yield
        finally:
            if self.trainer is not None and before is not None:
                self.trainer.place = before

    def settle(self, end: Callable[[], Place]) -> None:
        """Let the module, but ``within`` a step, be as at the ``end`` of the training: so queries read it."""
        if self.trainer is not None:
            self.trainer.place = end
        if self._settings:
            set_to(self._call.module, end().get(SETTINGS, {}))

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
