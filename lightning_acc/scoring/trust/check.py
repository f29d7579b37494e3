"""The check: some removals of every table of estimates are retrained without, before anyone acts on it.

Which ones, how many can be afforded, and what becomes of removals that no line can follow.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from torch import nn

from lightning_acc import arguments
from lightning_acc.core.devices import wait_for
from lightning_acc.core.process import as_scored
from lightning_acc.core.queries import moments
from lightning_acc.core.removals import Removal, Removals
from lightning_acc.core.replay import Replay
from lightning_acc.errors import InfluenceError, RequestError
from lightning_acc.methods.memory import chunk_size
from lightning_acc.methods.registry import TRUTH
from lightning_acc.methods.rules import LeaveOneOut
from lightning_acc.methods.swept import RETRAINING
from lightning_acc.progress import duration
from lightning_acc.scoring.scores import Scores
from lightning_acc.scoring.trust.verdict import FAITHFUL, FEWEST, Verdict, judge, judge_each, unchecked

Check = str | int
"""``"auto"``, or how many removals to retrain without."""
Retrain = Callable[[list[Removal]], Scores]
"""Retrains without each of these removals."""
SIZES = ((32, 16), (12, 6))
"""Random and extreme removals that are checked: where that is affordable, and at least."""
LEAST_SECONDS = 60.0
"""The check may take as long as the scoring itself, or so long, whichever is more."""
LARGE, SEVERAL = 0.02, 4
"""Groups of more than this share of the samples, and of at least so many, are too large for a line: the estimate of a whole
class is 10 to 1000 times off."""
PATIENCE = 3600.0
"""Seconds that retraining without large groups may take; what takes longer is asked for."""
KINKED = (nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.Hardtanh, nn.Hardswish, nn.MaxPool1d, nn.MaxPool2d)
"""Layers whose kinks no linearisation sees."""


def parse(check: object) -> Check:
    """``check`` as the user gave it, where it is one.

    Raises:
        RequestError: it is none.
    """
    if isinstance(check, str) and check == "auto":
        return check
    number = arguments.index(check)
    if number is None or number < 0:
        raise RequestError(
            f'check={arguments.shown(check)} is no number of removals to retrain without: give "auto", or 0 or more.'
        )
    return number


@dataclass(frozen=True)
class Price:
    """What retraining costs here, from a few timed steps.

    Attributes:
        shared: seconds of what the retrainings of a chunk share.
        each: seconds of each besides.
        size: how many are a chunk.
    """

    shared: float
    each: float
    size: int

    def seconds(self, n: int) -> float:
        """Seconds of n retrainings."""
        return self.shared * math.ceil(n / self.size) + self.each * n


SHARED = 0.3
"""What of a chunk of trainings that are taken together they share."""


def price(replay: Replay, memory: int, n: int) -> Price:
    """The price of n retrainings in this process, from the largest step and one in the middle, timed once each."""
    copies = RETRAINING.copies_for(replay, moments.find(replay.run, len(replay)))
    size = max(1, min(n, sum(SIZES[0]), chunk_size(replay, TRUTH, copies, memory)))
    together = 0 if copies.in_turn else size  # beside the run itself
    total, rule, chunk = len(replay), LeaveOneOut(), Removals([(i % replay.run.n_samples,) for i in range(together)])
    sizes = [len(step.sample_ids) for step in replay.records]
    with as_scored(replay.threads):
        carry = rule.init(replay.initial, chunk)
        steps = [replay.step(t) for t in {int(np.argmax(sizes)), total // 2}]
        rule.advance(steps[0], carry, chunk)  # warms up
        wait_for(replay.device)
        started = time.perf_counter()
        for step in steps:
            rule.advance(step, carry, chunk)
        wait_for(replay.device)
        each = (time.perf_counter() - started) / sum(len(step.sample_ids) for step in steps)
    seconds = each * sum(sizes)
    if copies.in_turn:
        return Price(seconds, seconds, size)
    return Price(SHARED * seconds, (1 - SHARED) * seconds / size, size)


def large(removals: Sequence[Removal], n_samples: int) -> list[Removal]:
    """Those of the removals that are too large for a line."""
    return [removal for removal in removals if len(removal) >= max(SEVERAL, LARGE * n_samples)]


def refuse_too_dear(replay: Replay, memory: int, removals: Sequence[Removal]) -> None:
    """Refuse large groups whose estimates would be wrong, and whose truth takes too long to be computed unasked.

    Raises:
        RequestError: gives the price, and the way past.
    """
    groups = large(removals, replay.run.n_samples)
    if not groups:
        return
    try:
        seconds = price(replay, memory, len(groups)).seconds(len(groups))
    except InfluenceError:
        return  # the check will say why there is no truth
    if seconds > PATIENCE:
        raise RequestError(
            f"{len(groups)} of the {len(removals)} removals are groups of {min(map(len, groups))} samples or more, too large "
            f"for an estimate, which may be 10 to 1000 times off; to retrain without them takes about {duration(seconds)}: "
            f"ask for it with method={TRUTH!r}, or take the estimates as they are with check=0."
        )


def draw(scores: Scores, count: tuple[int, int], seed: int = 0) -> tuple[list[Removal], list[Removal]]:
    """Removals at random, and those of the most extreme estimates that are not among them, from both ends in turn."""
    removals, estimates = scores.removals, scores.estimates
    n_random, n_extreme = count
    chosen = np.random.default_rng(seed).permutation(len(removals))[:n_random].tolist()
    random = [removals[i] for i in sorted(chosen)]
    finite = np.flatnonzero(np.isfinite(estimates))
    taken = set(chosen)
    order = [i for i in finite[np.argsort(estimates[finite], kind="stable")].tolist() if i not in taken]
    ends = [order[i // 2] if i % 2 == 0 else order[-1 - i // 2] for i in range(len(order))]
    extremes = [removals[i] for i in ends[:n_extreme]]
    return random, extremes


def check_scores(
    scores: Scores, replay: Replay, memory: int, check: Check, seconds: float, retrain: Retrain, confirm: int = 0
) -> Scores:
    """The same table, checked: retrained removals have their true scores, and there is a verdict.

    Args:
        scores: estimates of distinct removals.
        replay: of the run.
        memory: bytes to compute with.
        check: as for ``score``.
        seconds: that the scoring took.
        retrain: retrains without removals.
        confirm: so many of the most harmful are retrained without besides.
    """
    removals, n = scores.removals, len(scores)
    most_harmful = scores.most_harmful(confirm)
    if check == 0 or not n:
        verdict = unchecked("nothing was retrained without, as check=0" if n else "there are no removals")
        return scores.checked(retrain(most_harmful).by_removal() if most_harmful else {}, verdict)
    groups = large(removals, replay.run.n_samples)
    try:
        cost = price(replay, memory, n)
    except InfluenceError as error:  # what was scored is not lost to a check that cannot be
        return scores.checked({}, unchecked(f"nothing can be retrained without here ({_first(error)})"))
    budget = max(LEAST_SECONDS, seconds)
    few = n < FEWEST
    count = (0, 0) if few and check == "auto" else _affordable(check, n, cost, budget)
    random, extremes = draw(scores, count)
    wanted = list(dict.fromkeys([*random, *extremes, *groups, *most_harmful]))
    left = int((budget - cost.seconds(len(wanted))) / max(cost.each, 1e-9))
    diverged = _diverged(scores)
    wanted += [removal for removal in diverged if removal not in set(wanted)][: max(0, left)]
    try:
        truths = retrain(wanted).by_removal() if wanted else {}
    except InfluenceError as error:
        return scores.checked({}, unchecked(f"retraining without some failed ({_first(error)})"))
    estimates = scores.by_removal("estimate")
    if few and len(truths) == n:
        verdict = Verdict(FAITHFUL, reason=f"all {n} removals were retrained without: these are true scores")
    elif few:
        verdict = unchecked(f"{n} removals are too few for a verdict: method={TRUTH!r} has the truth of them all")
    elif count == (0, 0):
        least = sum(SIZES[-1])
        why = (
            f"to retrain without {least} removals takes about {duration(cost.seconds(least))}, longer than the scoring; ask "
            f"for it with check={least}"
        )
        verdict = unchecked(why)
    else:
        verdict = judge(estimates, truths, random, extremes)
    verdict = replace(verdict, n_diverged=len(diverged))
    if verdict.spearman is not None and verdict.word != FAITHFUL:
        verdict = verdict.because(_what_would_help(replay, n, cost))
    return scores.checked(truths, verdict)


def check_matrix(
    removals: Sequence[Removal],
    values: np.ndarray,
    replay: Replay,
    memory: int,
    check: Check,
    seconds: float,
    retrain: Callable[[list[Removal]], np.ndarray],
) -> Verdict:
    """The verdict on estimates (n, examples), after retraining without some of the removals.

    Args:
        removals: n distinct ones.
        values: what was estimated.
        replay: of the run.
        memory: bytes to compute with.
        check: as for ``score``; all removals that are checked are drawn at random.
        seconds: that the scoring took.
        retrain: gives the true scores (m, examples) of m removals.
    """
    n = len(removals)
    if check == 0 or not n:
        return unchecked("nothing was retrained without, as check=0" if n else "there are no removals")
    try:
        cost = price(replay, memory, n)
        count = check if isinstance(check, int) else sum(_affordable(check, n, cost, max(LEAST_SECONDS, seconds))[:1])
        if min(n, count) < FEWEST:
            least = SIZES[-1][0]
            few = f"{n} removals are too few for a verdict"
            if n >= FEWEST:
                time = duration(cost.seconds(least))
                few = f"to retrain without {least} takes about {time}, longer than the scoring; ask for it with check={least}"
            return unchecked(few)
        rows = sorted(np.random.default_rng(0).permutation(n)[:count].tolist())
        truths = retrain([removals[i] for i in rows])
    except InfluenceError as error:  # what was scored is not lost to a check that cannot be
        return unchecked(f"retraining without some failed ({_first(error)})")
    return judge_each(values[rows], truths, [removals[i] for i in rows])


def _affordable(check: Check, n: int, cost: Price, budget: float) -> tuple[int, int]:
    """How many random and how many extreme removals are checked."""
    if isinstance(check, int):  # as many at random as a verdict needs, before any extreme one
        n_random = min(n, max(math.ceil(2 * check / 3), min(check, FEWEST)))
        return n_random, min(check - n_random, n - n_random)
    for n_random, n_extreme in SIZES:
        count = min(n, n_random), min(n_extreme, max(0, n - n_random))
        if cost.seconds(sum(count)) <= budget:
            return count
    return 0, 0


def _first(error: Exception) -> str:
    return str(error).splitlines()[0].rstrip(".")


def _diverged(scores: Scores) -> list[Removal]:
    """Removals whose estimate is not finite, or left the region in which a line can be true."""
    marked = scores.more.get("diverged", np.zeros(len(scores), dtype=bool))
    bad = ~np.isfinite(scores.estimates) | (marked == True)  # noqa: E712 (the column may hold None)
    return [removal for removal, one in zip(scores.removals, bad.tolist(), strict=True) if one]


def _what_would_help(replay: Replay, n: int, cost: Price) -> str:
    """What to do about estimates that are not faithful."""
    advice = [
        f"what would help: method={TRUTH!r} for all {n} removals, about {duration(cost.seconds(n))}, or for the top alone "
        f"(--removals top:50@METHOD --method {TRUTH})"
    ]
    kinks = sorted({type(part).__name__ for part in replay.objective.submodule("").modules() if isinstance(part, KINKED)})
    if kinks:
        advice.append(f"a smooth activation (GELU, tanh) in place of {', '.join(kinks)}, whose kinks no line follows")
    return "; ".join(advice)
