"""Strongly convex training forgets errors: the paper's contraction, measured. Writes scripts/study/contraction.svg.

    python scripts/study_contraction.py        # Adult, logistic regression with weight decay; half a minute

Left: an error of norm 1 put into the shifts of acc-sgd-ie at some step, and what is left of it later. Right: the median
relative error of the shifts along the training, for acc-sgd-ie and sgd-ie, against leave-one-out retraining.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
import pytorch_lightning as pl
import torch
from torch import Tensor

import lightning_acc as la
from lightning_acc.core.removals import Removals
from lightning_acc.core.replay import Replay
from lightning_acc.methods.registry import METHODS
from lightning_acc.methods.swept import Swept
from lightning_acc.studies.data import AdultDataModule
from lightning_acc.studies.models import Classifier

plt.switch_backend("Agg")
mpl.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "lightning_acc"})
N, EPOCHS, DECAY = 200, 60, 0.05
PUT_IN = (0, 20, 60)


def record(directory: str) -> la.Run:
    data = AdultDataModule(n_train=N, label_noise=0.2)
    data.setup()
    pl.seed_everything(0, verbose=False)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = pl.Trainer(max_epochs=EPOCHS, accelerator="cpu", callbacks=[la.TrajectoryRecorder(directory)], **quiet)
    trainer.fit(Classifier(data.n_features, 2, lr=0.1, weight_decay=DECAY), datamodule=data)
    return la.Run(directory)


def shifts(replay: Replay, method: str, disturb: tuple[int, Tensor] | None = None) -> list[Tensor]:
    """Shifts (n, p) after every step; an error is added to them before one of the steps."""
    removals = Removals([(i,) for i in range(N)])
    entry = METHODS[method]
    assert isinstance(entry, Swept)
    rule = entry.forward()
    carry = rule.init(replay.initial, removals)
    found = []
    for t in range(len(replay)):
        if disturb is not None and disturb[0] == t:
            run, (moved, *slots) = carry  # of ACC-SGD-IE: the run, and beside it the run without each sample
            carry = run, (moved + disturb[1], *slots)
        carry = rule.advance(replay.step(t), carry, removals)
        found.append(rule.finish(carry)[1])
    return found


def main() -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as directory:
        replay = Replay(record(directory), "float64")
        plain = {method: shifts(replay, method) for method in ("loo", "acc-sgd-ie", "sgd-ie")}
        noise = torch.nn.functional.normalize(torch.randn(N, replay.run.n_parameters, dtype=torch.float64), dim=1)
        left = {t: shifts(replay, "acc-sgd-ie", (t, noise)) for t in PUT_IN}
    figure, (one, two) = plt.subplots(1, 2, figsize=(7.5, 2.9))
    for t, disturbed in left.items():
        norms = [float((a - b).norm(dim=1).median()) for a, b in zip(disturbed[t:], plain["acc-sgd-ie"][t:], strict=True)]
        one.plot(range(t, t + len(norms)), norms, lw=1.5, label=f"put in at step {t}")
        rate = (norms[-1] / norms[0]) ** (1 / (len(norms) - 1))
        print(f"error put in at step {t}: {norms[-1]:.3g} of it is left after {len(norms)} steps, {rate:.4f} a step")
    one.set(yscale="log", xlabel="step", ylabel="norm of what is left")
    one.legend(fontsize=7, frameon=False)
    for method, colour in (("acc-sgd-ie", "#0b6e99"), ("sgd-ie", "#d9730d")):
        pairs = zip(plain[method][2::2], plain["loo"][2::2], strict=True)
        errors = [float(((a - b).norm(dim=1) / b.norm(dim=1).clamp_min(1e-12)).median()) for a, b in pairs]
        two.plot(range(1, 1 + len(errors)), errors, color=colour, label=method, lw=1.5)
        print(f"{method}: median relative error of the shifts {errors[0]:.2g} at first, {errors[-1]:.2g} at the end")
    two.set(yscale="log", xlabel="epoch", ylabel="relative error of the shift")
    two.legend(fontsize=7, frameon=False)
    for axis in (one, two):
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    place = Path(__file__).parent / "study" / "contraction.svg"
    place.parent.mkdir(exist_ok=True)
    figure.savefig(place, metadata={"Date": None})


if __name__ == "__main__":
    main()
