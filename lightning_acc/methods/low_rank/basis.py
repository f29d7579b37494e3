"""Q: the directions in which training contracts most, the top eigenvectors of the Hessian averaged over the run.

Randomised subspace iteration (Halko, Martinsson, Tropp 2011, arXiv 0909.4061, algorithm 4.4) on Hessian-vector products of
recorded batches, at recorded parameters, spread evenly over the run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_acc.core.optimizers import State
from lightning_acc.core.step import Step

ITERATIONS = 3
OVERSAMPLING = 8
MOST_STEPS = 32
"""Steps the Hessian is averaged over, at most."""


@dataclass(frozen=True)
class Basis:
    """An orthonormal basis and what it leaves out.

    Attributes:
        vectors: Q, (p, r).
        values: eigenvalues of the averaged Hessian that belong to them, (r,), the largest first; empty where r = p.
        left: size of the largest eigenvalue outside, estimated; 0 where there is none.
    """

    vectors: Tensor
    values: Tensor
    left: float

    @property
    def directions(self) -> int:
        """The number r of directions."""
        return self.vectors.shape[1]


def empty(like: Tensor) -> Basis:
    """Of no directions, for parameters ``like`` (p,); what it leaves out is not known."""
    return Basis(like.new_zeros(len(like), 0), like.new_zeros(0), float("nan"))


def find(places: Sequence[tuple[Step, State]], directions: int, enough: float = 0.0, seed: int = 0) -> Basis:
    """The basis of ``directions`` directions for a run.

    Args:
        places: steps and the states before them; the Hessian is averaged over these.
        directions: how many, at most.
        enough: directions whose eigenvalue is smaller than this in size are left out.
        seed: of the first, random directions.
    """
    like = places[0][1][0]
    p = len(like)
    if directions >= p:
        return Basis(torch.eye(p).to(like), like.new_zeros(0), 0.0)
    generator = torch.Generator().manual_seed(seed)
    width = min(p, directions + OVERSAMPLING)
    v = torch.randn(p, width, generator=generator, dtype=torch.float64).to(like)
    for _ in range(ITERATIONS):
        v = torch.linalg.qr(v)[0]
        product = torch.zeros_like(v)
        for step, state in places:
            product += step.at(state).hessian_product(v.T.contiguous()).T
        product /= len(places)
        last, v = v, product
    small = last.T @ product
    values, rotation = torch.linalg.eigh((small + small.T) / 2)
    order = values.abs().argsort(descending=True)
    kept = order[: min(directions, int((values.abs() >= enough).sum()))]
    outside = values.abs()[order[len(kept) :]]
    return Basis(last @ rotation[:, kept], values[kept], float(outside[0]) if len(outside) else 0.0)


def spread(n_steps: int) -> list[int]:
    """Steps to average the Hessian over, evenly spread over the run."""
    return sorted({round(t) for t in torch.linspace(0, n_steps - 1, min(n_steps, MOST_STEPS)).tolist()})
