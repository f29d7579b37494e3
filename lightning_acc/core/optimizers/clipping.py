"""Lightning's gradient clipping: by the joint norm of the gradient, or each number by value."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_acc.core.optimizers.rule import Hyperparameters


def clipped(gradient: list[Tensor], groups: list[Hyperparameters], summands: Sequence[int] | None = None) -> list[Tensor]:
    """The parameters' gradients (..., p_k), clipped as the hyper-parameters of the first group say.

    ``summands`` are the indices of those that the norm is taken of, in the order in which the training adds them up.
    """
    value = groups[0]["gradient_clip_val"]
    if not value:
        return gradient
    if groups[0]["gradient_clip_algorithm"] == "value":
        return [piece.clamp(-value, value) for piece in gradient]
    factor = _factor(_norm(gradient if summands is None else [gradient[i] for i in summands]), value)
    return [piece * factor for piece in gradient]


def through_clipping(gradient: Sequence[Tensor], groups: list[Hyperparameters], adjoint: Tensor) -> None:
    """An adjoint (..., p) of the clipped gradient through the clipping of the parameters' gradients (p_k); written over it.

    Clipped by its norm the gradient is ``f(|G|) G``, whose adjoint is ``f gamma + f' <gamma, G> G / |G|``.
    """
    value, pieces = groups[0]["gradient_clip_val"], adjoint.split([len(piece) for piece in gradient], -1)
    if not value:
        return
    if groups[0]["gradient_clip_algorithm"] == "value":
        for piece, back in zip(gradient, pieces, strict=True):
            back.mul_(piece.abs() <= value)
        return
    norm = _norm(gradient).detach().requires_grad_()
    factor = _factor(norm, value)
    (slope,) = torch.autograd.grad(factor, norm)
    if slope == 0:  # short enough
        return
    along = torch.stack([back @ piece for piece, back in zip(gradient, pieces, strict=True)]).sum(0)[..., None]
    along = along * slope / norm.detach()
    for piece, back in zip(gradient, pieces, strict=True):
        back.mul_(factor.detach()).add_(along * piece)


def _norm(gradient: Sequence[Tensor]) -> Tensor:
    """(..., 1)."""
    norms = torch.stack([torch.linalg.vector_norm(piece, dim=-1) for piece in gradient], -1)
    norm: Tensor = torch.linalg.vector_norm(norms, dim=-1, keepdim=True)
    return norm


def _factor(norm: Tensor, value: float) -> Tensor:
    factor: Tensor = torch.clamp(value / (norm + 1e-6), max=1.0)
    return factor
