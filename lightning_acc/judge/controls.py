"""The rankings that stand beside a method's when data is cleaned, and how a classifier is read."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_acc.contract import HasPerSampleAccuracy
from lightning_acc.core import queries
from lightning_acc.core.devices import CPU
from lightning_acc.core.queries.moments import END, file_part
from lightning_acc.core.replay import Replay, parameters_at
from lightning_acc.judge.agreement import stored_scores
from lightning_acc.judge.fresh_training import Retraining, contents, own_samples, retrain, visited_samples
from lightning_acc.judge.self_influence import NoLearningRate, self_influence
from lightning_acc.judge.validation import Untrainable, losses_at, validation_losses
from lightning_acc.methods.registry import METHODS, TRUTH
from lightning_acc.record import batches
from lightning_acc.record.record import Record

FOLDS = 5
"""Of the cross-validation that predicts every sample by a model that has not seen it."""


def rankings(
    run: Record,
    names: list[str],
    memory: int,
    missing: dict[str, str] | None = None,
    at: str = END,
    device: torch.device = CPU,
) -> dict[str, np.ndarray]:
    """The samples in the order each of the controls would drop them, as far as what it needs is there.

    Args:
        run: a recorded run.
        names: of loss, self-influence, cleanlab, validation, loo and oracle. Validation, as influence, takes the validation
            examples at their word, which may itself be wrong.
        memory: bytes to compute with.
        missing: gets, for each that cannot be had, why.
        at: the name of the steps at which loo reads its query.
        device: where to train.
    """
    missing = {} if missing is None else missing
    orders = {}
    if "loss" in names:
        theta = parameters_at(run, run.n_steps)
        replay = Replay(run)
        orders["loss"] = _highest_first(losses_at(replay.objective, theta.to(replay.dtype), own_samples(run)))
    if "self-influence" in names:
        try:
            orders["self-influence"] = _highest_first(self_influence(run, memory, device))
        except NoLearningRate:
            missing["self-influence"] = "its optimizer has no learning rate"
    if "validation" in names:
        try:
            orders["validation"] = _highest_first(validation_losses(run, memory, device))
        except Untrainable as why:
            missing["validation"] = str(why)
    if "cleanlab" in names:
        try:
            orders["cleanlab"] = np.argsort(_label_quality(run, memory, device), kind="stable")
        except ModuleNotFoundError:
            missing["cleanlab"] = "the package cleanlab is not installed (pip install cleanlab)"
        except NotAClassifier as error:
            missing["cleanlab"] = f"it needs class probabilities, and {error}"
    if TRUTH in names:
        values = stored_values(run, TRUTH, at)
        if values is not None:
            orders[TRUTH] = np.argsort(values, kind="stable")
        else:
            asked = "" if at == END else f" and at={at!r}"
            missing[TRUTH] = f"not all samples were retrained without (score with method='loo'{asked} first)"
    info = run.sample_info()
    if "oracle" in names:
        if info is not None and "corrupted" in info.column_names:
            orders["oracle"] = np.flatnonzero(info["corrupted"].to_numpy(zero_copy_only=False))
        else:
            missing["oracle"] = "it is not known which samples are corrupted (describe_samples has no column 'corrupted')"
    return orders


def _highest_first(values: np.ndarray) -> np.ndarray:
    """The samples in the order of falling ``values`` (n,)."""
    return np.argsort(-values, kind="stable")


def stored_values(run: Record, method: str, at: str = END) -> np.ndarray | None:
    """Stored scores (n_samples,) of every single sample under the recorded query ``val``; None where they are not complete.

    Of a method's tables this is the one with the usual readout and options, in the dtype of the run and of it alone.
    """
    table = stored_scores(run).get(method if at == END else f"{method}.{file_part(at)}")
    if table is None or "val" not in run.query_names():
        return None
    usual = {"method": method, "readout": METHODS[method].readout, "dtype": run.scored_in, "query": "val"}
    usual["at"] = at
    usual["query_fingerprint"] = queries.find(run, "val").fingerprint
    single = {removal[0]: value for removal, value in table.by_removal().items() if len(removal) == 1}
    if any(table.conditions.get(key) != value for key, value in {**usual, "runs": None}.items()) or len(single) < run.n_samples:
        return None
    return np.array([single[i] for i in range(run.n_samples)])


class NotAClassifier(Exception):
    """A module or batch that class probabilities cannot be read from."""


def logits_of(module: torch.nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
    """Logits (B, classes) and labels (B,) of a batch ``(inputs, labels)``.

    Raises:
        NotAClassifier: the batch is not of that kind, or ``module(inputs)`` gives something else.
    """
    if not (isinstance(batch, (tuple, list)) and len(batch) == 2 and isinstance(batch[1], Tensor)):
        raise NotAClassifier("its batches are no pairs (inputs, labels)")
    inputs, labels = batch
    try:
        logits = module(inputs)
    except NotImplementedError:  # Lightning's own forward
        raise NotAClassifier("the module has no forward") from None
    if not isinstance(logits, Tensor) or logits.ndim != 2 or labels.ndim != 1 or labels.is_floating_point():
        raise NotAClassifier("module(inputs) gives no logits (B, classes) for labels (B,)")
    return logits, labels


def correct(module: torch.nn.Module, batch: Any) -> Tensor:
    """Whether each sample is classified as labelled, (B,) of 0 and 1: the module's ``per_sample_accuracy``, or arg max."""
    if isinstance(module, HasPerSampleAccuracy):
        return module.per_sample_accuracy(batch)
    logits, labels = logits_of(module, batch)
    return (logits.argmax(-1) == labels).to(logits.dtype)


def _label_quality(run: Record, memory: int, device: torch.device) -> np.ndarray:
    """cleanlab's label quality (n_samples,) from out-of-sample predicted probabilities; 1 for samples never trained on.

    Of cleanlab's rankings it is the normalized margin, of probabilities adjusted by each class's average confidence.

    Raises:
        ModuleNotFoundError: cleanlab is not installed.
        NotAClassifier: there are no class probabilities to be had.
    """
    from cleanlab.rank import get_label_quality_scores  # type: ignore[import-untyped]

    visited = visited_samples(run).numpy()
    fold_of = np.random.default_rng(0).permutation(len(visited)) % FOLDS
    folds = [frozenset(visited[fold_of == fold].tolist()) for fold in range(FOLDS)]
    thetas = retrain(run, Retraining(0, folds), memory, device=device)
    replay = Replay(run)
    samples = contents(run)
    probabilities: np.ndarray | None = None
    for theta, fold in zip(thetas, folds, strict=True):
        rows = sorted(fold)
        batch = batches.unflatten(run.structure(), batches.cast(batches.rows(samples, torch.tensor(rows)), replay.dtype))
        with torch.no_grad(), replay.objective.evaluating():
            logits = replay.objective.call(theta, lambda module, batch: logits_of(module, batch)[0], batch)
        if probabilities is None:
            probabilities = np.zeros((run.n_samples, logits.shape[1]))
            labels = np.zeros(run.n_samples, dtype=int)
        probabilities[rows] = logits.double().softmax(-1).numpy()
        labels[rows] = batch[1].numpy()
    assert probabilities is not None
    quality = np.ones(run.n_samples)
    # MNIST, n = 1000, MLP, 20 % wrong labels, 3 seeds: precision at 20 % for uniform / class-dependent noise .78 / .54; plain
    # self-confidence .80 / .39, adjusted .75 / .53, find_label_issues by prune_by_noise_rate .79 / .45, by both .79 / .46,
    # by confident_learning .74 / .50.
    quality[visited] = get_label_quality_scores(
        labels[visited], probabilities[visited], method="normalized_margin", adjust_pred_probs=True
    )
    return quality
