"""acc-low-rank by the update's defect: SGD-IE where the update is affine, and beyond, what the optimizer makes of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from problems import CLASSES, N, Net, asked, data, make, record
from torch import Tensor

import lightning_acc as la
from lightning_acc.core.optimizers import clipped
from lightning_acc.core.replay import Replay
from lightning_acc.methods.low_rank import budget, prices
from lightning_acc.methods.low_rank.defect import scores as defects
from lightning_acc.methods.low_rank.defect import touched, windows
from lightning_acc.methods.low_rank.defect.windows import Windows
from lightning_acc.methods.low_rank.entry import LowRank
from lightning_acc.scoring.trust.figures import kendall

ROUND_OFF = 1e-12
EVERYONE = [(i,) for i in range(N)]
SOME = [*EVERYONE, (), (0, 5, 9), (1, 2, 3, 4, 20)]
State = list[Tensor]
ADAMW = {"class": "AdamW", "lr": 0.01, "weight_decay": 0.1}
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "AdamW": (ADAMW, {}),
    "RMSprop": ({"class": "RMSprop", "lr": 0.003, "alpha": 0.9}, {}),
    "clipped": ({"lr": 0.1, "momentum": 0.9}, {"gradient_clip_val": 0.3}),
    "AdamW clipped": (ADAMW, {"gradient_clip_val": 0.3}),
}


def scored(run: la.Run, method: str = "acc-low-rank", removals: Any = None, **options: Any) -> la.Scores:
    return la.score(run, method, removals, **{"ray_address": None, "save": False, "check": 0, **options})


def by_defect(
    run: la.Run,
    removals: Sequence[Any] = SOME,
    window: int | None = None,
    at_once: int = 99,
    at: Any = "end",
    stride: int = 1,
) -> Any:
    replay, n = Replay(run), len(removals)
    chosen = windows.usual(replay) if window is None else Windows(window, stride)
    return defects.defect(replay, removals, asked(run, at=at), n, at_once, chosen)


@pytest.mark.parametrize("at", ["end", "along"])
@pytest.mark.parametrize("optimizer", [{}, {"momentum": 0.9, "weight_decay": 0.1, "nesterov": True, "lr": 0.05}])
def test_of_an_affine_update_it_is_sgd_ie_for_any_window(tmp_path: Path, optimizer: dict[str, Any], at: str) -> None:
    run = record(tmp_path / "run", make(hidden=4, activation="gelu", optimizer=optimizer, decay_lr=0.7))
    first = scored(run, "sgd-ie", SOME, at=at).values
    assert np.abs(first).max() > 1e-3
    for window in (0, 1, 4, 99):
        found = by_defect(run, window=window, at=at)
        np.testing.assert_allclose(found.scores.numpy(), first, rtol=0, atol=ROUND_OFF)
        np.testing.assert_allclose(found.first.numpy(), first, rtol=0, atol=ROUND_OFF)


class Straight(Net):
    """Losses linear in the parameters: no gradient depends on these, and the shift by the update alone is the true one."""

    def per_sample_loss(self, batch: Any) -> Tensor:
        return (self.net(batch[0]) * torch.nn.functional.one_hot(batch[1], CLASSES)).sum(1)


STRAIGHT: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    **CASES,
    "by value": ({**ADAMW, "class": "Adam"}, {"gradient_clip_val": 0.1, "gradient_clip_algorithm": "value"}),
    "amsgrad": ({**ADAMW, "amsgrad": True}, {"accumulate_grad_batches": 2}),
    "Adagrad": ({"class": "Adagrad", "lr": 0.05}, {}),
    "Adafactor": ({"class": "Adafactor", "lr": 0.05}, {}),
}


@pytest.mark.parametrize("name", STRAIGHT)
def test_where_losses_are_linear_it_is_the_truth(tmp_path: Path, name: str) -> None:
    optimizer, options = STRAIGHT[name]
    torch.manual_seed(0)
    run = record(tmp_path / "run", Straight(optimizer=optimizer).double(), **options)
    for at in ("end", "along", [2, 5]):
        truth, first = (scored(run, method, SOME, at=at).values for method in ("loo", "sgd-ie"))
        found = scored(run, removals=SOME, at=at, followed=N)
        np.testing.assert_allclose(found.values, truth, rtol=0, atol=1e-10)
        assert np.abs(first - truth).max() > 1e-3 * np.abs(truth).max()  # which is more than SGD-IE can say
    assert found.conditions["followed_by_the_update"] == len(SOME)
    assert found.conditions["readout"] == "linear"


def adamw(state: State, gradient: Tensor, t: int, h: dict[str, Any]) -> State:
    theta, mean, square = state
    beta1, beta2 = h["betas"]
    mean = beta1 * mean + (1 - beta1) * gradient
    square = beta2 * square + (1 - beta2) * gradient**2
    root = (square / (1 - beta2 ** (t + 1))).sqrt() + h["eps"]
    return [theta * (1 - h["lr"] * h["weight_decay"]) - h["lr"] * mean / (1 - beta1 ** (t + 1)) / root, mean, square]


def rmsprop(state: State, gradient: Tensor, t: int, h: dict[str, Any]) -> State:
    square = h["alpha"] * state[1] + (1 - h["alpha"]) * gradient**2
    return [state[0] - h["lr"] * gradient / (square.sqrt() + h["eps"]), square]


def momentum(state: State, gradient: Tensor, t: int, h: dict[str, Any]) -> State:
    buffer = h["momentum"] * state[1] + gradient
    return [state[0] - h["lr"] * buffer, buffer]


RULES: dict[str, tuple[Callable[..., State], int]] = {
    "AdamW": (adamw, 2), "RMSprop": (rmsprop, 1), "clipped": (momentum, 1), "AdamW clipped": (adamw, 2)
}  # fmt: skip


def dense(
    run: la.Run, net: torch.nn.Module, name: str, removals: Sequence[tuple[int, ...]], window: int, stride: int = 1
) -> list[float]:
    """The scores by their definition alone: every D~ in full, one removal after the other, and derivatives by autograd.

    Shares nothing with the package but the record.
    """
    rule, slots = RULES[name]
    shapes = {key: p.shape for key, p in net.named_parameters()}
    total = run.n_steps

    def losses(theta: Tensor, x: Tensor, y: Tensor) -> Tensor:
        pieces = theta.split([shape.numel() for shape in shapes.values()])
        named = {key: piece.view(shape) for (key, shape), piece in zip(shapes.items(), pieces, strict=True)}
        return torch.nn.functional.cross_entropy(torch.func.functional_call(net, named, x), y, reduction="none")

    def update(t: int, state: State, gradient: Tensor) -> State:
        (h,) = run.steps[t].groups
        if h["gradient_clip_val"]:
            gradient = gradient * torch.clamp(h["gradient_clip_val"] / (gradient.norm() + 1e-6), max=1.0)
        return rule(state, gradient, t, h)

    def gradient(t: int, theta: Tensor, only: Sequence[int] | None = None) -> Tensor:
        (leaves,), step = run.batches(t), run.steps[t]
        counted = torch.tensor([only is None or i in only for i in step.sample_ids.tolist()])
        loss = (step.weights * counted * losses(theta, leaves["0"], leaves["1"])).sum()
        return torch.autograd.grad(loss, theta, create_graph=True)[0]

    theta = run.parameters(0).double()
    states: list[State] = [[theta, *(torch.zeros_like(theta) for _ in range(slots))]]
    for t in range(total):
        g = gradient(t, states[t][0].requires_grad_()).detach()
        states.append([part.detach() for part in update(t, states[t], g)])

    x, y = data(n=16, seed=9).tensors  # what validates
    end = states[total][0].requires_grad_()
    adjoints = {total: [torch.autograd.grad(losses(end, x, y).mean(), end)[0], *(torch.zeros_like(end) for _ in range(slots))]}
    curvatures = {}
    for t in reversed(range(total)):
        leaves = [part.detach().requires_grad_() for part in states[t]]
        inner = gradient(t, leaves[0])
        g = inner.detach().requires_grad_()
        after = update(t, leaves, g)
        *adjoint, gamma = torch.autograd.grad(after, [*leaves, g], adjoints[t + 1], materialize_grads=True)
        (curvatures[t],) = torch.autograd.grad(inner, leaves[0], gamma)
        adjoints[t] = [adjoint[0] + curvatures[t], *adjoint[1:]]

    scores = []
    for removal in removals:
        visits = [t for t in range(total) if set(removal) & set(run.steps[t].sample_ids.tolist())]
        ends = [-(-(visit + window + 1) // stride) * stride for visit in visits]
        inside = {t for visit, end in zip(visits, ends, strict=True) for t in range(visit, min(end, total))}
        score, shift = 0.0, [torch.zeros_like(part) for part in states[0]]
        for t in sorted(inside):
            if t - 1 not in inside:
                shift = [torch.zeros_like(part) for part in states[0]]
            score += float(curvatures[t] @ shift[0])
            g = gradient(t, states[t][0].requires_grad_()).detach()
            own = gradient(t, states[t][0].requires_grad_(), removal).detach()
            moved = update(t, [part + by for part, by in zip(states[t], shift, strict=True)], g - own)
            shift = [(new - part).detach() for new, part in zip(moved, update(t, states[t], g), strict=True)]
            if t + 1 not in inside:
                score += sum(float(adjoint @ by) for adjoint, by in zip(adjoints[t + 1], shift, strict=True))
        scores.append(score)
    return scores


@pytest.mark.parametrize("name", RULES)
def test_it_is_what_its_definition_says(tmp_path: Path, name: str) -> None:
    optimizer, options = CASES[name]
    module = make(hidden=3, optimizer=optimizer)
    run = record(tmp_path / "run", module, max_epochs=4, **options)
    usual = windows.usual(Replay(run)).length
    assert usual == 2 * 4
    some = [(0,), (7,), (13,), (), (2, 3, 11)]
    different = []
    for window, stride in ((0, 1), (1, 1), (3, 1), (1, 3), (usual, 1)):
        expected = dense(run, module.net, name, some, window, stride)
        np.testing.assert_allclose(by_defect(run, some, window, stride=stride).scores.numpy(), expected, rtol=1e-8, atol=1e-12)
        different.append(expected)
    assert not np.allclose(different[0], different[2], rtol=1e-4) or name == "clipped"
    np.testing.assert_allclose(scored(run, removals=some, followed=N).values, different[-1], rtol=1e-8, atol=1e-12)
    assert not np.allclose(different[-1], scored(run, "sgd-ie", some).values, rtol=1e-2)


@pytest.mark.parametrize("name", ["RMSprop", "AdamW clipped"])
def test_it_is_the_same_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    optimizer, options = CASES[name]
    run = record(tmp_path / "run", make(hidden=4, optimizer=optimizer), **options)
    whole = by_defect(run, window=2).scores
    for cached in (5 * run.n_parameters, 4):  # some removals together, or each by itself
        monkeypatch.setitem(touched.CACHED, "cpu", cached)
        for at_once in (1, 10):
            torch.testing.assert_close(by_defect(run, window=2, at_once=at_once).scores, whole, rtol=1e-9, atol=1e-13)
    each, at_a_step = prices.bytes_by_the_update(Replay(run))
    everyone = scored(run, followed=N)
    little = (at_a_step + 10 * each) / 2**30
    question = asked(run, memory=int(little * 2**30))
    replay = Replay(run)
    chosen = LowRank(followed=N).settled(replay, keep_shifts=False)
    assert len(chosen.pieces(replay, EVERYONE, question)) == 1  # what two sweeps cost is many more
    monkeypatch.setattr(budget, "SWEEPS", 0)
    assert len(chosen.pieces(replay, EVERYONE, question)) == 3
    in_pieces = scored(run, followed=N, memory_gb=little)
    np.testing.assert_allclose(in_pieces.values, everyone.values, rtol=1e-9, atol=1e-13)
    assert in_pieces.conditions["followed_by_the_update"] == N
    np.testing.assert_allclose(scored(run, removals=[5, 3], followed=N).values, everyone.values[[5, 3]], rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("name", ["AdamW", "clipped"])
def test_several_steps_are_the_mean_of_each(tmp_path: Path, name: str) -> None:
    """With windows that end on the way, too."""
    optimizer, options = CASES[name]
    run = record(tmp_path / "run", make(hidden=4, optimizer=optimizer), **options)
    for window in (1, 99):
        alone = []
        for t in (3, 6, 12):
            replay = Replay(run, until=t)
            alone.append(defects.defect(replay, SOME, asked(run, at=t), len(SOME), 99, Windows(window)).scores)
        together = by_defect(run, window=window, at=[3, 6, 12]).scores
        torch.testing.assert_close(together, sum(alone) / 3, rtol=0, atol=ROUND_OFF)
    each = [scored(run, at=t).values for t in (2, 9)]
    np.testing.assert_allclose(scored(run, at=[2, 9]).values, np.mean(each, 0), rtol=0, atol=ROUND_OFF)


def test_a_sample_that_a_step_sees_twice_and_one_that_none_sees(tmp_path: Path) -> None:
    sampler = [0, 0, 1, 2, 3, 3, 3, 4, 0, 5, 6, 7]
    loader = torch.utils.data.DataLoader(data(n=9), 4, sampler=sampler)
    module = make(hidden=4, optimizer=ADAMW)
    run = record(tmp_path / "run", module, loader)
    removals = [(i,) for i in range(9)] + [(0, 3, 8)]
    expected = dense(run, module.net, "AdamW", removals, windows.usual(Replay(run)).length)
    found = scored(run, removals=removals, followed=N).values
    np.testing.assert_allclose(found, expected, rtol=1e-8, atol=1e-12)
    assert found[8] == 0.0


@pytest.mark.parametrize("name", ["AdamW", "AdamW clipped"])
def test_it_is_nearer_to_the_truth_than_sgd_ie(tmp_path: Path, name: str) -> None:
    optimizer, options = CASES[name]
    run = record(
        tmp_path / "run", make(hidden=16, activation="gelu", optimizer=optimizer), data(n=60), batch_size=10, **options
    )
    truth, first, found = (scored(run, method).values for method in ("loo", "sgd-ie", "acc-low-rank"))
    assert kendall(found, truth) > 0.95 > kendall(first, truth)
    assert np.linalg.norm(found - truth) < 0.5 * np.linalg.norm(first - truth)


def test_no_more_are_followed_than_are_affordable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = record(tmp_path / "run", make(hidden=4, optimizer=ADAMW))
    # 39 parameters in 4 tensors; 12 steps of 6 samples, of which each is seen by 3.
    usual = windows.usual(Replay(run))
    left, training = 25 - prices.SWEEP, 12 * (200_000 + 39 * 6 / 25 + 4 * 30_000 + 3 * 39)
    assert budget.most_by_the_update(Replay(run), 25, windows.usual(Replay(run))) == int(
        left * training / (12 * 3039 + 3 * 5 * 39 + 3 * 39 / 25)
    )
    dropping = record(tmp_path / "dropping", make(hidden=4, optimizer=ADAMW, dropout=0.5))
    assert budget.most_by_the_update(Replay(dropping), 25, usual) == int(
        left * training / (12 * 3039 + 3 * 5 * 39 + 2 * 3 * 6 * 39 / 25)
    )
    everyone, first = scored(run), scored(run, "sgd-ie").values
    assert everyone.conditions["followed_by_the_update"] == N
    assert "among" not in everyone.conditions
    monkeypatch.setattr(prices.Prices, "retrained", lambda self, n: 1e9)
    some = scored(run, trainings=1)
    assert some.conditions["followed_by_the_update"] == budget.FEWEST_FOLLOWED == 1
    assert "among" in some.conditions
    few = scored(run, followed=5, memory_gb=1e-4)
    assert few.conditions["label"] == "acc-low-rank.5-followed"
    order = np.argsort(-np.abs(first), kind="stable")
    for found, k in ((some, 1), (few, 5)):
        np.testing.assert_allclose(found.values[order[:k]], everyone.values[order[:k]], rtol=0, atol=ROUND_OFF)
        np.testing.assert_allclose(found.values[order[k:]], first[order[k:]], rtol=0, atol=ROUND_OFF)
        assert (found.table["uncertainty"].to_numpy() > 0).all()
    np.testing.assert_allclose(
        everyone.table["uncertainty"].to_numpy(), np.abs(everyone.values - first), rtol=0, atol=ROUND_OFF
    )


UNCURVED = la.Query("sure", [data(n=8).tensors], lambda module, batch: module.net(batch[0]).softmax(1).amax(1))


@pytest.mark.parametrize("accumulated", [1, 2])
def test_it_is_read_by_the_querys_curvature(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, accumulated: int) -> None:
    """Where the update is affine after all, and every sample is seen once, that is all that SGD-IE misses."""
    options = {"max_epochs": 1, "gradient_clip_val": 1e9, "accumulate_grad_batches": accumulated}
    run = record(tmp_path / "run", make(optimizer={"lr": 0.02, "momentum": 0.9}), **options)
    monkeypatch.setattr(prices.Prices, "retrained", lambda self, n: 1e9)
    monkeypatch.setattr(budget, "curves", lambda *_: 4000)
    first, truth = scored(run, "sgd-ie").values, scored(run, "acc-sgd-ie").values
    np.testing.assert_allclose(scored(run).values, first, rtol=0, atol=ROUND_OFF)
    some = scored(run, readout="exact", followed=9)
    assert some.conditions["readout"] == "exact"
    assert np.linalg.norm(truth - some.values) < 5 * (2 / 4000) ** 0.5 * np.linalg.norm(truth - first)


def test_what_it_cannot_do_is_refused_in_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = record(tmp_path / "run", make(optimizer=ADAMW))
    for options, words in (
        ({"directions": 3}, r"directions=3 of acc-low-rank is for updates that are affine.*leave it out"),
        ({"keep_shifts": True}, r"keep_shifts=True of acc-low-rank .*use acc-sgd-ie"),
        ({"readout": "exact", "query": UNCURVED}, r"query 'sure' is not made of losses of torch.*use readout='linear'"),
    ):
        with pytest.raises(la.RequestError, match=words):
            scored(run, **options)
    monkeypatch.setattr(budget, "MOST_CURVES", 3)
    with pytest.raises(la.RequestError, match=r"curvature, but 4 directions of it take .* allow: use readout='linear'"):
        scored(run, readout="exact")


def test_a_plan_knows_it(tmp_path: Path) -> None:
    run = record(tmp_path / "run", make(hidden=4, optimizer=ADAMW), gradient_clip_val=0.5)
    plan = la.plan(run, ray_address=None)
    row = {row["method"]: row for row in plan.table.to_pylist()}["acc-low-rank"]
    assert row["seconds"] > 0
    assert row["readout"] == "linear"
    assert row["disk_gb"] * 2**30 > run.n_steps * run.n_parameters * 8
    assert "acc-low-rank cannot" not in str(plan)


class Grouped(Net):
    """Weights decay and biases do not, as is usual of transformers."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        weights, biases = ([p for p in self.parameters() if (p.ndim > 1) == matrix] for matrix in (True, False))
        return self.optimizer_class([{"params": weights}, {"params": biases, "weight_decay": 0.0, "lr": 0.03}], **self.options)


@pytest.mark.parametrize("optimizer", [{"momentum": 0.9, "weight_decay": 0.1, "lr": 0.05}, ADAMW], ids=["SGD", "AdamW"])
def test_groups_of_parameters(tmp_path: Path, optimizer: dict[str, Any]) -> None:
    """Range by range, each with the hyper-parameters of its group."""
    run = record(tmp_path / "run", Grouped(hidden=4, activation="gelu", optimizer=optimizer).double())
    replay = Replay(run)
    assert [columns.stop - columns.start for columns, _ in replay.update.ranges()] == [20, 4, 12, 3]
    found, first = by_defect(run, EVERYONE), scored(run, "sgd-ie").values
    if optimizer is not ADAMW:  # affine
        np.testing.assert_allclose(found.scores.numpy(), first, rtol=0, atol=ROUND_OFF)
        return
    truth = scored(run, "loo").values
    assert np.linalg.norm(found.scores.numpy() - truth) < 0.5 * np.linalg.norm(first - truth)


@pytest.mark.parametrize("clipping", ["norm", "value", None])
@pytest.mark.parametrize(
    "options", [{}, {"amsgrad": True}, {"class": "Adam", "weight_decay": 0.1}, {"maximize": True}], ids=str
)
def test_an_update_in_one_pass_is_the_update(tmp_path: Path, options: dict[str, Any], clipping: str | None) -> None:
    clips = {"gradient_clip_val": 0.1, "gradient_clip_algorithm": clipping} if clipping else {}
    run = record(tmp_path / "run", make(hidden=4, optimizer={**ADAMW, **options}), max_epochs=1, **clips)
    replay, generator = Replay(run), torch.Generator().manual_seed(0)
    state = tuple(torch.rand(3, run.n_parameters, generator=generator, dtype=torch.float64) for _ in replay.initial)
    gradient = torch.randn(3, run.n_parameters, generator=generator, dtype=torch.float64)
    groups = run.steps[2].groups
    expected = replay.update(state, gradient, groups)
    given = gradient.clone()
    (rows,) = clipped([gradient], groups)
    for columns, parameter in replay.update.ranges():
        parts = tuple(part[:, columns].contiguous() for part in state)
        replay.update.in_one_pass(parts, rows[:, columns].contiguous(), replay.update.given(groups)[parameter])
        for part, new in zip(state, parts, strict=True):
            part[:, columns] = new
    assert torch.equal(gradient, given)
    for found, part in zip(state, expected, strict=True):
        torch.testing.assert_close(found, part, rtol=1e-14, atol=1e-15)
