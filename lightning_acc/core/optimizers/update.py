"""``Update``: U over the whole flat state, made of the rule of the optimizer for each parameter."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_acc.core.objective import ParameterLayout
from lightning_acc.core.optimizers.clipping import clipped
from lightning_acc.core.optimizers.known import RULES
from lightning_acc.core.optimizers.rule import PARAMETER_STEPS, UNUSED, Hyperparameters, State, moves
from lightning_acc.errors import RequestError, RunError
from lightning_acc.record.schema.keys import DTYPES

COUNTS = ("step", PARAMETER_STEPS, UNUSED, "global_step", "current_epoch", "settings", "settings_of_batches")
"""What is something else in every step, or epoch, whatever the optimizer."""
RESTS = "rests"
"""What a parameter is ``given`` that the step leaves as it is."""
BLOCK = defaultdict(lambda: 2**22, cpu=2**16)
"""Numbers that are updated together in place, by kind of device: what is made on the way stays in a core's caches; a card is
kept busy."""


def _typed(h: Hyperparameters) -> Hyperparameters:
    """The hyper-parameters of a group, as tensors those that were tensors in training."""
    dtypes = h.get("dtypes")
    return {**h, **{key: _as_tensors(h[key], DTYPES[dtype]) for key, dtype in dtypes.items()}} if dtypes else h


def _as_tensors(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, (list, tuple)):
        return [_as_tensors(one, dtype) for one in value]
    return torch.tensor(value, dtype=dtype)


def _of_one_number(h: Hyperparameters, rank: int = 1) -> Hyperparameters:
    """The hyper-parameters of a group as the rule is given them for a parameter of one number, in so many dimensions."""
    return {**_typed(h), "shape": torch.Size([1] * rank)}


class Update:
    """U over the whole flat state, parameter by parameter, each with the hyper-parameters of its group.

    Args:
        optimizer: name of the rule.
        layout: the trained parameters.
        group_of: for each of them, the index of its parameter group; None where it was in none.
        slots: number of slots of the state.
        rests: whether some steps leave some of the parameters as they are (see ``PARAMETER_STEPS``).
    """

    def __init__(
        self, optimizer: str, layout: ParameterLayout, group_of: list[int | None], slots: int, rests: bool = False
    ) -> None:
        if optimizer not in RULES:
            raise RunError(f"The optimizer {optimizer} is unknown; known are {', '.join(sorted(RULES))}.")
        self.rule = RULES[optimizer]
        self.layout = layout
        self.group_of = group_of
        self.slots = slots
        self.rests = rests
        self._usable: list[Hyperparameters] | None = None

    def initial(self, theta: Tensor) -> State:
        """The state before the first step: parameters ``theta`` and zero slots."""
        return theta, *(torch.zeros_like(theta) for _ in range(self.slots))

    def __call__(self, state: State, gradient: Tensor, groups: list[Hyperparameters]) -> State:
        """The state after the update; all tensors (..., p)."""
        pieces = self._by_parameter(state, self.clipped(gradient.split(self.layout.sizes, -1), groups), groups)
        updated = [self.one(piece, g, h) for h, g, piece in pieces]
        return tuple(torch.cat(parts, -1) for parts in zip(*updated, strict=True))

    def in_place(self, state: State, gradients: Sequence[Tensor], groups: list[Hyperparameters]) -> None:
        """The same, to the last bit, written over ``state`` (..., p), by the parameters' gradients (..., p_k)."""
        for _, block, gradient, h in self.blocks(state, self.clipped(gradients, groups), groups):
            self._write(block, gradient, h)

    def clipped(self, gradients: Sequence[Tensor], groups: list[Hyperparameters]) -> list[Tensor]:
        """The parameters' gradients (..., p_k), clipped by the norm of those that move, in the order of their groups."""
        if not groups[0]["gradient_clip_val"]:
            return list(gradients)
        moving = moves(groups) or [True] * len(self.group_of)
        members = sorted((group, i) for i, group in enumerate(self.group_of) if group is not None and moving[i])
        return clipped(list(gradients), groups, [i for _, i in members])

    def blocks(
        self, state: State, gradients: Sequence[Tensor], groups: list[Hyperparameters]
    ) -> Iterator[tuple[slice, State, Tensor, Hyperparameters]]:
        """What can be updated by itself and stays in the processor's caches, given gradients (..., p_k) that are clipped.

        Of each its place in the flat parameters, views of its state and gradient, and what is ``given`` of its parameter.
        """
        first, on_cpu = 0, state[0].device.type == "cpu"
        apart = self._by_parameter if on_cpu or not self.rule.by_number else self._by_range
        for h, gradient, pieces in apart(state, gradients, groups):
            length = gradient.shape[-1]
            rows = max(1, gradient.numel() // max(1, length))
            size = max(BLOCK[gradient.device.type] // rows, 1024) if self.rule.by_number else max(1, length)
            for g, *block in zip(*(part.split(size, -1) for part in (gradient, *pieces)), strict=True):
                yield slice(first, first + g.shape[-1]), tuple(block), g, h
                first += g.shape[-1]

    def _by_parameter(
        self, state: State, gradients: Sequence[Tensor], groups: list[Hyperparameters]
    ) -> Iterator[tuple[Hyperparameters, Tensor, State]]:
        """What the rule is given of each parameter: hyper-parameters, its gradient, clipped before, and views of its state."""
        # Parameter by parameter and not in one sweep: vectorised kernels round the last few elements of a tensor
        # differently, so that the bits depend on where a tensor ends.
        pieces = (part.split(self.layout.sizes, -1) for part in state)
        for h, g, *piece in zip(self.given(groups), gradients, *pieces, strict=True):
            yield h, g, tuple(piece)

    def _by_range(
        self, state: State, gradients: Sequence[Tensor], groups: list[Hyperparameters]
    ) -> Iterator[tuple[Hyperparameters, Tensor, State]]:
        """The same of each of the ``ranges``: of a card every operation takes a while to be asked for, and every number is
        rounded alike."""
        given, gradient = self.given(groups), torch.cat(list(gradients), -1)
        for place, parameter in self.ranges():
            yield given[parameter], gradient[..., place], tuple(part[..., place] for part in state)

    def given(self, groups: list[Hyperparameters]) -> list[Hyperparameters]:
        """What the rule is told of each parameter: the hyper-parameters of its group, the number of the step by its own count,
        and its shape; or that it rests."""
        steps = groups[0].get(PARAMETER_STEPS)
        groups = [_typed(h) for h in groups]
        given: list[Hyperparameters] = []
        for i, (group, (_, shape)) in enumerate(zip(self.group_of, self.layout.shapes, strict=True)):
            if steps is None or steps[i]:
                assert group is not None
                own = {} if steps is None else {"step": steps[i]}
                given.append({**groups[group], **own, "shape": shape})
            else:
                given.append({RESTS: True, "shape": shape})
        return given

    def ranges(self) -> list[tuple[slice, int]]:
        """The flat parameters in ranges that can be updated by themselves, each with the index of a parameter in it: of one
        group where the rule goes number by number, else of one parameter; of one, too, where parameters rest.
        """
        ends = list(itertools.accumulate(self.layout.sizes, initial=0))
        groups, apart = self.group_of, self.rests or not self.rule.by_number
        firsts = [i for i, group in enumerate(groups) if apart or i == 0 or groups[i - 1] != group]
        return [(slice(ends[i], ends[j]), i) for i, j in itertools.pairwise([*firsts, len(groups)])]

    def in_one_pass(self, state: State, gradient: Tensor, h: Hyperparameters) -> None:
        """U of one of the ``ranges``, written over ``state`` (..., size), by its gradient (..., size), clipped.

        To round-off the same; and in a tenth of the time where the rule knows how and the tensors are contiguous.

        Args:
            state: of the range.
            gradient: of the range.
            h: what is ``given`` of its parameter.
        """
        one_pass, dense = self.rule.one_pass, all(part.is_contiguous() for part in (gradient, *state))
        if one_pass is not None and dense and "dtypes" not in h and RESTS not in h and gradient.device.type == "cpu":
            one_pass(state, gradient, h)
        else:
            self._write(state, gradient, h)

    def _write(self, state: State, gradient: Tensor, h: Hyperparameters) -> None:
        updated = self.one(state, gradient, h)
        if not self.rule.by_number:  # what it hands back may be what it was given, in another place
            updated = tuple(part.clone() for part in updated)
        for part, new in zip(state, updated, strict=True):
            part.copy_(new)

    def check(self, groups: list[Hyperparameters]) -> None:
        """See that the hyper-parameters of the parameter groups are such as this optimizer takes.

        Raises:
            RunError: they are not, as where a record is not what a recorder writes.
        """
        moving = moves(groups) or [True] * len(self.group_of)
        lasting = [{key: value for key, value in h.items() if key not in COUNTS} for h in groups]
        lasting.append({RESTS: moving})
        if lasting == self._usable:
            return
        remedy = "restore the run, or record it again"
        each = zip(self.group_of, self.layout.shapes, moving, strict=True)
        for group, rank in sorted({(group, len(shape)) for group, (_, shape), moved in each if moved and group is not None}):
            h = groups[group]
            try:
                given = _of_one_number(h, rank)
                used = len(self.rule.slots({key: given[key] for key in (*self.rule.hyperparameters, "shape")}))
                zero = torch.zeros(1, dtype=torch.float64)
                self.rule.update(tuple(zero for _ in range(1 + used)), zero, given)
            except (ArithmeticError, LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
                raise RunError(
                    f"The hyper-parameters {h} cannot be used ({type(error).__name__}: {error}): {remedy}."
                ) from error
            if used > self.slots:
                raise RunError(f"The hyper-parameters {h} need {used} slots, but the record has {self.slots}: {remedy}.")
        self._usable = lasting

    def one(self, state: State, gradient: Tensor, h: Hyperparameters) -> State:
        """The state of one parameter after the update; slots that only others use stay as they are, and all of what rests."""
        if RESTS in h:
            return state
        used = 1 + len(self.rule.slots(h))
        return *self.rule.update(state[:used], gradient, h), *state[used:]

    def moves_unused(self, parameter: int, h: Hyperparameters) -> bool:
        """Whether a parameter without a gradient, and with empty slots, would move all the same, as by weight decay."""
        _, shape = self.layout.shapes[parameter]
        one, zero = torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
        moved = self.one((one, *(zero for _ in range(self.slots))), zero, _of_one_number(h, len(shape)))
        return not torch.equal(moved[0], one)

    def response(self, groups: list[Hyperparameters]) -> tuple[Tensor, Tensor]:
        """What an affine U makes of one number: the changes ``A d + e c`` of the state's parts for changes d and c.

        Args:
            groups: hyper-parameters of the parameter groups.

        Returns:
            A of shape (parts, parts), for changes d of the parts of the state (the parameter, then its slots), and e of shape
            (parts,), for a change c of the gradient; both float64.

        Raises:
            RequestError: U is not affine, or not the same for all parameters.
        """
        obstacle = self.not_uniform(groups)
        if obstacle is not None:
            raise RequestError(obstacle)
        return self._response(_of_one_number(groups[0]))

    def responses(self, groups: list[Hyperparameters]) -> list[tuple[slice, Tensor, Tensor]]:
        """The ``response`` of an affine U in each of the ``ranges``, with the range; where all are the same, in one."""
        if self.not_uniform(groups) is None:
            return [(slice(None), *self.response(groups))]
        given = self.given(groups)
        return [(place, *self._response({**given[i], "shape": torch.Size([1])})) for place, i in self.ranges()]

    def _response(self, h: Hyperparameters) -> tuple[Tensor, Tensor]:
        parts = 1 + self.slots
        # Row k: a change of the k-th part; the last but one: of the gradient; the last: none.
        changes = torch.cat([torch.eye(parts + 1, dtype=torch.float64), torch.zeros(1, parts + 1, dtype=torch.float64)])
        *state, gradient = changes.split(1, -1)
        answers = torch.cat(self.one(tuple(state), gradient, h), -1)
        answers = answers - answers[-1]
        return answers[:parts].T.contiguous(), answers[parts]

    def is_affine(self, groups: list[Hyperparameters]) -> bool:
        """Whether U is affine in state and gradient."""
        return self.rule.affine and not groups[0]["gradient_clip_val"]

    def not_uniform(self, groups: list[Hyperparameters]) -> str | None:
        """Why U is not one affine function for all numbers, in a sentence; None where it is."""
        if not self.rule.affine:
            return "its optimizer is not affine in the gradient, as SGD is"
        if groups[0]["gradient_clip_val"]:
            return "its gradients are clipped"
        if self.rests:
            return "some of its steps leave some parameters as they are"
        if any(group != groups[0] for group in groups[1:]):
            return "its parameter groups have different hyper-parameters"
        return None
