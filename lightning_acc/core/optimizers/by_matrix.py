"""Updates in which the numbers of a parameter have to do with each other: they see its shape."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from lightning_acc.core.optimizers.rule import Hyperparameters, State

ROUNDED_TO = torch.bfloat16
"""What Muon computes its directions in, whatever the dtype of the parameters."""


def adafactor(state: State, gradient: Tensor, h: Hyperparameters) -> State:
    """``torch.optim.Adafactor``: the second moment of a matrix as the product of its rows' and its columns' means.

    The means are kept expanded to the matrix. Those of more dimensions are stacks of matrices, vectors keep a number each.
    """
    theta, *slots = state
    if h["maximize"]:
        gradient = -gradient
    root, (eps1, eps2), share = theta.shape[-1] ** 0.5, h["eps"], h["step"] ** h["beta2_decay"]
    rate = min(h["lr"], 1 / h["step"] ** 0.5)
    # Torch computes with single numbers in double precision, but with a learning rate that is a tensor in its dtype.
    dtype = rate.dtype if isinstance(rate, Tensor) else torch.float64
    rate = _norm(theta).div(root).clamp(min=eps2).to(dtype) * rate
    if h["weight_decay"] != 0:
        theta = theta.mul(1 - h["lr"] * h["weight_decay"])
    if len(h["shape"]) > 1:
        gradients, rows, columns = (_shaped(part, h) for part in (gradient, *slots))
        rows = rows[..., :1].lerp(_mean_square(gradients, -1), share)
        columns = columns[..., :1, :].lerp(_mean_square(gradients, -2), share)
        variance = (rows @ columns).div(rows.mean(-2, keepdim=True).clamp(min=eps1)).reshape(gradient.shape)
        slots = [means.expand(gradients.shape).reshape(gradient.shape) for means in (rows, columns)]
    else:
        variance = slots[0].lerp(gradient * gradient, share)
        slots = [variance]
    move = variance.clamp(min=eps1 * eps1).rsqrt().mul(gradient)
    size = _norm(move).div(root * h["d"]).clamp(min=1.0).to(dtype)
    return theta.sub(move * (rate / size).to(theta.dtype)), *slots


def adafactor_slots(h: Hyperparameters) -> tuple[str, ...]:
    """What Adafactor keeps: of matrices the means of their rows and columns."""
    return ("row_var", "col_var") if len(h["shape"]) > 1 else ("variance",)


def adafactor_numbers(parameter: Tensor, kept: Mapping[str, Any], h: Hyperparameters) -> Hyperparameters:
    """Its ``eps``, of which the first is the parameter's round-off where it is not given."""
    eps1, eps2 = h["eps"]
    return {"eps": [torch.finfo(parameter.dtype).eps if eps1 is None else eps1, eps2]}


def _shaped(flat: Tensor, h: Hyperparameters) -> Tensor:
    """Of (..., p_k) the view as parameters."""
    return flat.reshape(*flat.shape[:-1], *h["shape"])


def _norm(x: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return norm.double()


def _mean_square(x: Tensor, dim: int) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(x, dim=dim, keepdim=True)
    return norm.square().div(x.shape[dim])


def muon(state: State, gradient: Tensor, h: Hyperparameters) -> State:
    """``torch.optim.Muon``: a step along the momentum with all its singular values brought near 1.

    The directions are those of training, computed in ``ROUNDED_TO``; their derivative is taken in the parameters' own dtype.
    """
    theta, buffer = state
    buffer = buffer.lerp(gradient, 1 - h["momentum"])
    move = gradient.lerp(buffer, h["momentum"]) if h["nesterov"] else buffer
    count = math.prod(move.shape[:-1])
    if count:  # one by one: together their products would be rounded otherwise
        matrices = move.reshape(count, *h["shape"])
        move = torch.stack([_direction(matrix, h) for matrix in matrices]).reshape(move.shape)
    rows, columns = h["shape"]
    ratio = {"match_rms_adamw": 0.2 * math.sqrt(max(rows, columns))}.get(h["adjust_lr_fn"], math.sqrt(max(1, rows / columns)))
    return theta.mul(1 - h["lr"] * h["weight_decay"]).add(move, alpha=-(h["lr"] * ratio)), buffer


def _direction(matrix: Tensor, h: Hyperparameters) -> Tensor:
    rounded = _orthogonalised(matrix.to(ROUNDED_TO), h).to(matrix.dtype)
    if not matrix.requires_grad and forward_ad.unpack_dual(matrix).tangent is None:
        return rounded
    exact = _orthogonalised(matrix, h)
    return rounded.detach() + (exact - exact.detach())


def _orthogonalised(matrix: Tensor, h: Hyperparameters) -> Tensor:
    """The Newton-Schulz iteration of Muon (Jordan et al. 2024)."""
    a, b, c = h["ns_coefficients"]
    if h["ns_steps"] >= 100:  # as torch does
        raise ValueError("100 Newton-Schulz steps or more")
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if tall else matrix
    x = x.div(x.norm().clamp(min=h["eps"]))
    for _ in range(h["ns_steps"]):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x
