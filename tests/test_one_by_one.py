"""Removals set out from the run's own way at the step that first sees them, and go on together or one by one, in place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from problems import N, make, record

import lightning_acc as la
from lightning_acc.core import products
from lightning_acc.core import replay as replays
from lightning_acc.core.objective import ParameterLayout
from lightning_acc.core.optimizers import Update
from lightning_acc.core.optimizers import update as updates
from lightning_acc.core.queries import moments
from lightning_acc.core.removals import Removals
from lightning_acc.core.replay import Replay
from lightning_acc.core.step import Step
from lightning_acc.methods import sweeps
from lightning_acc.methods.memory import IN_TURN, TRAINING
from lightning_acc.methods.method import Question
from lightning_acc.methods.rules import LeaveOneOut
from lightning_acc.methods.swept import RETRAINING

SINGLES = [(i,) for i in range(N)]
SETTINGS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"hidden": 4, "optimizer": {"momentum": 0.9, "weight_decay": 0.01}}, {}),
    ({"hidden": 4, "dropout": 0.3, "optimizer": {"class": "AdamW", "lr": 0.01}}, {"gradient_clip_val": 0.5}),
    ({"hidden": 4}, {"accumulate_grad_batches": 2}),
]
GROUPS: dict[str, dict[str, Any]] = {
    "SGD": {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01, "nesterov": True, "dampening": 0, "maximize": False},
    "AdamW": {
        **{"lr": 0.1, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.01},
        **{"amsgrad": False, "maximize": False, "decoupled_weight_decay": True},
    },
    "Muon": {
        **{"lr": 0.1, "weight_decay": 0.1, "momentum": 0.9, "nesterov": True, "ns_coefficients": (3.4445, -4.775, 2.0315)},
        **{"eps": 1e-7, "ns_steps": 5, "adjust_lr_fn": None},
    },
}


def one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(replays.STATES_BYTES, "cpu", 0)


def shifts(run: la.Run, method: str = "loo", removals: Any = None, **options: Any) -> torch.Tensor:
    found = la.score(run, method, removals, keep_shifts=True, ray_address=None, check=0, **options).shifts
    assert found is not None
    return found


@pytest.mark.parametrize("clipped", [None, 0.1])
@pytest.mark.parametrize("rows", [(), (3,)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("optimizer", "slots"), [("SGD", 1), ("AdamW", 2), ("Muon", 1)])
def test_an_update_in_place_is_the_update_to_the_last_bit(
    optimizer: str, slots: int, dtype: torch.dtype, rows: tuple[int, ...], clipped: float | None
) -> None:
    """Also where a parameter is taken in several blocks, the last of which is short."""
    sizes = [("small", [3, 5]), ("large", [101, (2 * updates.BLOCK["cpu"] + 700) // 101])]
    update = Update(optimizer, ParameterLayout(sizes), [0, 0], slots)
    p = sum(a * b for _, (a, b) in sizes)
    generator = torch.Generator().manual_seed(0)
    *state, gradient = (torch.randn(*rows, p, generator=generator, dtype=dtype) for _ in range(2 + slots))
    state[-1] = state[-1].abs()
    groups = [{**GROUPS[optimizer], "step": 3, "gradient_clip_val": clipped, "gradient_clip_algorithm": "norm"}]
    expected = update(tuple(state), gradient, groups)
    update.in_place(tuple(state), gradient.split(update.layout.sizes, -1), groups)
    assert all(torch.equal(part, other) for part, other in zip(state, expected, strict=True))


@pytest.mark.parametrize("clipping", [(None, "norm"), (0.5, "norm"), (1e6, "norm"), (0.7, "value")])
@pytest.mark.parametrize("rows", [(), (3,)])
@pytest.mark.parametrize("block", [1, 7, 2**16])
@pytest.mark.parametrize(("optimizer", "slots"), [("SGD", 1), ("AdamW", 2), ("Muon", 1)])
def test_an_adjoint_goes_through_the_update_block_by_block(
    monkeypatch: pytest.MonkeyPatch,
    optimizer: str,
    slots: int,
    block: int,
    rows: tuple[int, ...],
    clipping: tuple[float | None, str],
) -> None:
    """As autograd takes it through the whole of it."""
    monkeypatch.setitem(updates.BLOCK, "cpu", block)
    update = Update(optimizer, ParameterLayout([("a", [3, 5]), ("b", [4, 600])]), [0, 0], slots)
    generator = torch.Generator().manual_seed(0)
    *state, gradient = torch.randn(2 + slots, 2415, generator=generator, dtype=torch.float64)
    state[-1] = state[-1].abs()
    adjoint = tuple(torch.randn(*rows, 2415, generator=generator, dtype=torch.float64) for _ in state)
    how = {"gradient_clip_val": clipping[0], "gradient_clip_algorithm": clipping[1]}
    groups = [{**GROUPS[optimizer], "step": 3, **how}]
    inputs = [part.clone().requires_grad_() for part in (*state, gradient)]
    after = update(tuple(inputs[:-1]), inputs[-1], groups)
    expected = torch.autograd.grad(after, inputs, adjoint, is_grads_batched=bool(rows))
    gamma = products.through_the_update(update, tuple(state), gradient, groups, adjoint, 2)
    for found, there in zip((*adjoint, gamma), expected, strict=True):
        torch.testing.assert_close(found, there, rtol=1e-10, atol=1e-13)


def test_an_adjoint_goes_through_an_update_that_hands_on_what_it_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    """Then what autograd says of one part of the state is the adjoint of another, which is written over."""

    def handing_on(state: Any, gradient: torch.Tensor, h: dict[str, Any]) -> Any:
        return state[1], gradient

    monkeypatch.setitem(updates.RULES, "HandingOn", la.OptimizerRule(handing_on, lambda h: ("before",), ()))
    update = Update("HandingOn", ParameterLayout([("w", [4])]), [0], 1)
    adjoint = (torch.arange(4.0), torch.arange(4.0) + 10)
    gamma = products.through_the_update(
        update, (torch.ones(4), torch.ones(4)), torch.ones(4), [{"gradient_clip_val": None}], adjoint, 1
    )
    assert torch.equal(adjoint[0], torch.zeros(4))
    assert torch.equal(adjoint[1], torch.arange(4.0))
    assert torch.equal(gamma, torch.arange(4.0) + 10)


def test_a_rule_may_hand_back_what_it_was_given(monkeypatch: pytest.MonkeyPatch) -> None:
    def remembering(state: Any, gradient: torch.Tensor, h: dict[str, Any]) -> Any:
        return state[0] - gradient, state[0]

    monkeypatch.setitem(updates.RULES, "Remembering", la.OptimizerRule(remembering, lambda h: ("before",), ()))
    update = Update("Remembering", ParameterLayout([("w", [4])]), [0], 1)
    state, gradient = (torch.arange(4.0), torch.zeros(4)), torch.ones(4)
    expected = update(state, gradient, [{"gradient_clip_val": None}])
    update.in_place(state, [gradient], [{"gradient_clip_val": None}])
    assert torch.equal(state[1], expected[1])
    assert torch.equal(state[0], expected[0])


@pytest.mark.parametrize(("module", "options"), SETTINGS)
def test_one_by_one_a_late_start_changes_no_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: dict[str, Any], options: dict[str, Any]
) -> None:
    run = record(tmp_path / "run", make(**module), **options)
    one_by_one(monkeypatch)
    replay, rule, chunk = Replay(run), LeaveOneOut(), Removals(SINGLES)
    carry = rule.init(replay.initial, chunk)
    for t in range(len(replay)):
        carry = rule.advance(replay.step(t), carry, chunk)
    theta, from_the_start = rule.finish(carry)
    for found in (sweeps.forward(replay, LeaveOneOut(), SINGLES), sweeps.in_turn(replay, SINGLES)):
        assert torch.equal(found.theta, theta)
        assert torch.equal(found.shifts, from_the_start)
        assert found.shifts.abs().sum(1).min() > 0


@pytest.mark.parametrize(("module", "options"), SETTINGS)
@pytest.mark.parametrize("method", ["loo", "acc-sgd-ie"])
def test_together_and_one_by_one_are_equal_but_for_round_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, module: dict[str, Any], options: dict[str, Any]
) -> None:
    run = record(tmp_path / "run", make(**module), **options)
    removals = [[i] for i in range(N)] + [[0, 1, 2], [20, 3]]
    together = shifts(run, method, removals)
    monkeypatch.setitem(replays.STATES_BYTES, "cpu", 9 * run.n_parameters * 8)  # nine at a time, and a rest
    assert Replay(run).states_at_once == 9
    torch.testing.assert_close(shifts(run, method, removals), together, rtol=1e-9, atol=1e-11)
    one_by_one(monkeypatch)
    assert Replay(run).states_at_once == 1
    torch.testing.assert_close(shifts(run, method, removals), together, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("at_once", [1, 9, 512])
def test_what_no_step_has_seen_is_not_taken_along(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_once: int) -> None:
    run = record(tmp_path / "run", make(hidden=4), max_epochs=1, batch_size=4)
    monkeypatch.setitem(replays.STATES_BYTES, "cpu", at_once * run.n_parameters * 8)
    taken = 0
    advance = Step.advance

    def counted(step: Step, states: Any, weights: torch.Tensor) -> None:
        nonlocal taken
        taken += len(weights)
        advance(step, states, weights)

    monkeypatch.setattr(Step, "advance", counted)
    seen: dict[int, torch.Tensor] = {}

    def reading(t: int, theta: torch.Tensor, moved: torch.Tensor) -> None:
        seen[t] = moved

    sweeps.forward(Replay(run), LeaveOneOut(), SINGLES, reading=reading, steps=range(7))
    assert taken == 6 + 4 * (6 + 5 + 4 + 3 + 2 + 1)  # of 24 removals; from the start it would be 6 * 25
    for t in range(7):
        gone = {i for earlier in range(t) for i in run.steps[earlier].sample_ids.tolist()}
        assert {i for i in range(N) if seen[t][i].any()} == gone


def test_in_turn_each_goes_from_where_it_is_seen_to_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the run is taken once for all of them, in the memory of two states."""
    run = record(tmp_path / "run", make(hidden=4, optimizer={"class": "AdamW", "lr": 0.01}), max_epochs=1, batch_size=4)
    one_by_one(monkeypatch)
    taken = {1: 0}
    advance = Step.advance

    def counted(step: Step, states: Any, weights: torch.Tensor) -> None:
        taken[len(weights)] += 1
        advance(step, states, weights)

    monkeypatch.setattr(Step, "advance", counted)
    told: list[float] = []
    question = Question(run.query("val"), moments.find(run, "end"), "exact", True, 2**30)
    found = RETRAINING.answer(Replay(run), [*SINGLES, (0, 20)], question, told.append)
    first = {i: t for t in reversed(range(6)) for i in run.steps[t].sample_ids.tolist()}
    assert taken == {1: 6 + 4 * (6 + 5 + 4 + 3 + 2 + 1) + 6 - min(first[0], first[20])}
    assert told == sorted(told)
    assert len(told) == taken[1]
    assert found.shifts is not None
    assert found.shifts.abs().sum(-1).min() > 0
    replay = Replay(run)
    state, each, beside = 3 * replay.initial[0].nbytes, replay.initial[0].nbytes, IN_TURN.step(replay)
    assert RETRAINING.copies_for(replay, question.moments).chunk(replay, 10) == 2 * state + 10 * each + beside
    assert RETRAINING.copies_for(replay, moments.find(run, [3, 6])) is TRAINING


@pytest.mark.parametrize("at", ["end", 4, "along:3"])
def test_in_turn_and_together_score_alike_wherever_they_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: str | int
) -> None:
    run = record(tmp_path / "run", make(hidden=4, optimizer={"class": "AdamW", "lr": 0.01}), max_epochs=1, batch_size=4)
    together = la.score(run, "loo", at=at, ray_address=None, save=False).values
    one_by_one(monkeypatch)
    np.testing.assert_allclose(
        la.score(run, "loo", at=at, ray_address=None, save=False).values, together, rtol=1e-8, atol=1e-12
    )


def test_in_float32_differences_are_free_of_round_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a run and the run beside it, whatever the number of states that are taken together."""
    run = record(tmp_path / "run", make(hidden=4).float(), precision="32-true", max_epochs=2)
    exact = shifts(run, dtype="float64")
    for at_once in (1, 9, 512):
        monkeypatch.setitem(replays.STATES_BYTES, "cpu", at_once * run.n_parameters * 4)
        assert (shifts(run) - exact).norm() < 1e-5 * exact.norm()
