"""Updates that treat each number of a parameter by itself, after torch.optim's single-tensor functions.

Of torch's own these differ in what torch leaves undefined: where a root is taken of 0, as of the second moment of a gradient
that was always 0 (a dead unit, an unseen embedding), its derivative is 0 here and infinite there.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_acc.core.optimizers.rule import Hyperparameters, State


def sgd(state: State, gradient: Tensor, h: Hyperparameters) -> State:
    """``torch.optim.SGD``: ``b' = m b + (1 - d) (g + c theta)``; ``theta' = theta - lr (b' or g + m b')``."""
    theta, *buffers = state
    theta, gradient = _decayed(theta, gradient, h)
    if buffers:
        damped = 0 if h["step"] == 1 else h["dampening"]  # the first buffer is the gradient itself
        buffers = [buffers[0].mul(h["momentum"]).add(gradient, alpha=1 - damped)]
        gradient = gradient.add(buffers[0], alpha=h["momentum"]) if h["nesterov"] else buffers[0]
    return theta.add(gradient, alpha=-h["lr"]), *buffers


def adam(state: State, gradient: Tensor, h: Hyperparameters) -> State:
    """``torch.optim.Adam`` and ``AdamW``: ``theta' = theta - lr m^ / (sqrt(v^) + eps)``, with or without AMSGrad."""
    theta, mean, square, *largest = state
    beta1, beta2 = h["betas"]
    theta, gradient = _decayed(theta, gradient, h)
    mean, square = _moments(mean, square, gradient, h)
    if largest:
        largest = [torch.maximum(largest[0], square)]
    step_size = h["lr"] / (1 - beta1 ** h["step"])
    root = _square_root(largest[0] if largest else square) / (1 - beta2 ** h["step"]) ** 0.5
    return theta.addcdiv(mean, root.add(h["eps"]), value=-step_size), mean, square, *largest


def adam_in_one_pass(state: State, gradient: Tensor, h: Hyperparameters) -> None:
    """``adam``, by torch's own kernel: written over the state, contiguous tensors on the CPU."""
    theta, mean, square, *largest = state
    beta1, beta2 = h["betas"]
    kernel = torch._fused_adamw_ if h["decoupled_weight_decay"] else torch._fused_adam_
    kernel(
        [theta],
        [gradient],
        [mean],
        [square],
        largest,
        [torch.tensor(float(h["step"]))],
        lr=h["lr"],
        beta1=beta1,
        beta2=beta2,
        weight_decay=h["weight_decay"],
        eps=h["eps"],
        amsgrad=bool(largest),
        maximize=h["maximize"],
    )


def nadam(state: State, gradient: Tensor, h: Hyperparameters) -> State:
    """``torch.optim.NAdam``: Adam with Nesterov's momentum; ``mu_product`` is the product of the momenta so far."""
    theta, mean, square = state
    beta1, beta2 = h["betas"]
    theta, gradient = _decayed(theta, gradient, h)
    mean, square = _moments(mean, square, gradient, h)
    mu, mu_next = (_momentum(beta1, h["momentum_decay"], step) for step in (h["step"], h["step"] + 1))
    root = _square_root(square.div(1 - beta2 ** h["step"])).add(h["eps"])
    theta = theta.addcdiv(gradient, root, value=-h["lr"] * (1.0 - mu) / (1.0 - h["mu_product"]))
    theta = theta.addcdiv(mean, root, value=(-h["lr"] * mu_next) / (1.0 - h["mu_product"] * mu_next))
    return theta, mean, square


def _momentum(beta1: float, decay: float, step: int) -> float:
    momentum: float = beta1 * (1.0 - 0.5 * (0.96 ** (step * decay)))
    return momentum


def nadam_numbers(parameter: Tensor, kept: Mapping[str, Any], h: Hyperparameters) -> Hyperparameters:
    """The product of the momenta up to this step, rounded as torch rounds it."""
    before = kept["mu_product"] if kept else torch.ones(())
    return {"mu_product": (before * _momentum(h["betas"][0], h["momentum_decay"], h["step"])).item()}


def radam(state: State, gradient: Tensor, h: Hyperparameters) -> State:
    """``torch.optim.RAdam``: Adam whose step is rectified for the few gradients it has seen, and plain momentum at first."""
    theta, mean, square = state
    beta1, beta2 = h["betas"]
    theta, gradient = _decayed(theta, gradient, h)
    mean, square = _moments(mean, square, gradient, h)
    correction = 1 - beta2 ** h["step"]
    longest = 2 / (1 - beta2) - 1
    length = longest - 2 * h["step"] * (beta2 ** h["step"]) / correction
    move = mean / (1 - beta1 ** h["step"]) * h["lr"]
    if length > 5.0:
        move = move * ((correction**0.5) / _square_root(square).add(h["eps"]))
        move = move * ((length - 4) * (length - 2) * longest / ((longest - 4) * (longest - 2) * length)) ** 0.5
    return theta.add(move, alpha=-1.0), mean, square


def adamax(state: State, gradient: Tensor, h: Hyperparameters) -> State:
    """``torch.optim.Adamax``: ``u' = max(beta2 u, |g| + eps)``; ``theta' = theta - lr m^ / u'``."""
    theta, mean, largest = state
    beta1, beta2 = h["betas"]
    theta, gradient = _decayed(theta, gradient, h)
    mean = mean.lerp(gradient, 1 - beta1)
    largest = torch.maximum(largest.mul(beta2), gradient.abs().add(h["eps"]))
    return theta.addcdiv(mean, largest, value=-h["lr"] / (1 - beta1 ** h["step"])), mean, largest


def rmsprop(state: State, gradient: Tensor, h: Hyperparameters) -> State:
    """``torch.optim.RMSprop``: ``theta' = theta - lr g / (sqrt(v') + eps)``, centered or not, with or without momentum."""
    theta, square, *others = state
    theta, gradient = _decayed(theta, gradient, h)
    square = square.mul(h["alpha"]).addcmul(gradient, gradient, value=1 - h["alpha"])
    variance = square
    if h["centered"]:
        others[0] = others[0].lerp(gradient, 1 - h["alpha"])
        variance = square.addcmul(others[0], others[0], value=-1)
    root = _square_root(variance).add(h["eps"])
    if h["momentum"] > 0:
        others[-1] = others[-1].mul(h["momentum"]).addcdiv(gradient, root)
        return theta.add(others[-1], alpha=-h["lr"]), square, *others
    return theta.addcdiv(gradient, root, value=-h["lr"]), square, *others


def rmsprop_slots(h: Hyperparameters) -> tuple[str, ...]:
    """What RMSprop keeps."""
    return "square_avg", *(("grad_avg",) if h["centered"] else ()), *(("momentum_buffer",) if h["momentum"] > 0 else ())


def adagrad(state: State, gradient: Tensor, h: Hyperparameters) -> State:
    """``torch.optim.Adagrad``: ``theta' = theta - lr_t g / (sqrt(sum of g^2) + eps)``."""
    theta, total = state
    theta, gradient = _decayed(theta, gradient, h)
    if h["step"] == 1:
        total = torch.full_like(total, h["initial_accumulator_value"])
    total = total.addcmul(gradient, gradient, value=1)
    rate = h["lr"] / (1 + (h["step"] - 1) * h["lr_decay"])
    return theta.addcdiv(gradient, _square_root(total).add(h["eps"]), value=-rate), total


def adadelta(state: State, gradient: Tensor, h: Hyperparameters) -> State:
    """``torch.optim.Adadelta``: steps in the ratio of the sizes of former steps and gradients."""
    theta, square, moved = state
    theta, gradient = _decayed(theta, gradient, h)
    square = square.mul(h["rho"]).addcmul(gradient, gradient, value=1 - h["rho"])
    move = _square_root(moved.add(h["eps"])).div(_square_root(square.add(h["eps"]))).mul(gradient)
    moved = moved.mul(h["rho"]).addcmul(move, move, value=1 - h["rho"])
    return theta.add(move, alpha=-h["lr"]), square, moved


def asgd(state: State, gradient: Tensor, h: Hyperparameters) -> State:
    """``torch.optim.ASGD``: SGD at the rate ``eta`` of this step, and beside it the average of the parameters so far."""
    theta, average = state
    theta, gradient = _decayed(theta, gradient, h)
    theta = theta.mul(1 - h["lambd"] * h["eta"]).add(gradient, alpha=-h["eta"])
    return theta, theta if h["mu"] == 1 else average.add(theta.sub(average).mul(h["mu"]))


def asgd_numbers(parameter: Tensor, kept: Mapping[str, Any], h: Hyperparameters) -> Hyperparameters:
    """The rate of this step, which follows from the step before, and the weight of its parameters in the average."""
    return {"eta": kept["eta"].item() if kept else torch.tensor(h["lr"]).item(), "mu": kept["mu"].item() if kept else 1.0}


def rprop(state: State, gradient: Tensor, h: Hyperparameters) -> State:
    """``torch.optim.Rprop``: each number moves by a step size of its own against the sign of its gradient."""
    theta, before, sizes = state
    if h["maximize"]:
        gradient = -gradient
    if h["step"] == 1:
        sizes = torch.full_like(sizes, h["lr"])
    shrink, grow = (torch.full_like(sizes, factor) for factor in h["etas"])
    agree = gradient.mul(before)
    sizes = torch.where(agree > 0, sizes * grow, torch.where(agree < 0, sizes * shrink, sizes)).clamp(*h["step_sizes"])
    gradient = torch.where(agree < 0, 0.0, gradient)
    return theta.addcmul(gradient.sign(), sizes, value=-1), gradient, sizes


def lion(state: State, gradient: Tensor, h: Hyperparameters) -> State:
    """Lion (Chen et al. 2023, arXiv 2302.06675), as in the authors' code: ``theta' = (1 - lr c) theta - lr sign(average)``."""
    theta, mean = state
    beta1, beta2 = h["betas"]
    theta = theta.mul(1 - h["lr"] * h["weight_decay"])
    move = mean.mul(beta1).add(gradient, alpha=1 - beta1).sign()
    return theta.add(move, alpha=-h["lr"]), mean.mul(beta2).add(gradient, alpha=1 - beta2)


def _decayed(theta: Tensor, gradient: Tensor, h: Hyperparameters) -> tuple[Tensor, Tensor]:
    """Parameters and the gradient of what is minimised, with weight decay in the one or in the other."""
    if h["maximize"]:
        gradient = -gradient
    if h["weight_decay"] != 0:
        if h.get("decoupled_weight_decay"):
            theta = theta.mul(1 - h["lr"] * h["weight_decay"])
        else:
            gradient = gradient.add(theta, alpha=h["weight_decay"])
    return theta, gradient


def _moments(mean: Tensor, square: Tensor, gradient: Tensor, h: Hyperparameters) -> tuple[Tensor, Tensor]:
    """Adam's moving averages of the gradient and its square."""
    beta1, beta2 = h["betas"]
    return mean.lerp(gradient, 1 - beta1), square.mul(beta2).addcmul(gradient, gradient, value=1 - beta2)


def _square_root(x: Tensor) -> Tensor:
    """sqrt with the derivative 0 at 0, where torch's is infinite and gives NaN."""
    there = x != 0
    return torch.where(there, torch.where(there, x, 1.0).sqrt(), 0.0)
