"""Bring your own module: a small transformer on text (20 Newsgroups), trained with AdamW; which posts helped, which harmed?

    python scripts/text_classifier.py [--data PATH]     # or with LIGHTNING_ACC_DATA set; about two minutes

It prints how well each method's scores of 64 posts agree with leave-one-out retraining. Among them is SGD-IE's formula for
plain SGD, applied although the run was made with AdamW: what ignoring the optimizer costs.
"""

from __future__ import annotations

import argparse
import collections
import math
import os
import re
import tempfile
from typing import Any

import pytorch_lightning as pl
import torch
from scipy import stats
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import lightning_acc as la

GROUPS = (3, 4)  # comp.sys.ibm.pc.hardware and comp.sys.mac.hardware
WORDS, LENGTH = 400, 32


class Posts(Dataset[Any]):
    """The first words of posts as numbers, with a mask, and the group they were posted to.

    The vocabulary is that of the training split; blank posts are left out.
    """

    def __init__(self, path: str, split: str, n: int) -> None:
        import datasets

        known = datasets.load_dataset(path, split="train")
        counts = collections.Counter(
            word for text, label in zip(known["text"], known["label"], strict=True) if label in GROUPS for word in words(text)
        )
        number = {word: i for i, (word, _) in enumerate(counts.most_common(WORDS - 1), start=1)}
        self.ids, self.labels = [], []
        for row in datasets.load_dataset(path, split=split):
            tokens = [number[word] for word in words(row["text"]) if word in number][:LENGTH]
            if row["label"] in GROUPS and len(tokens) > 3:
                self.ids.append(torch.tensor(tokens + [0] * (LENGTH - len(tokens))))
                self.labels.append(torch.tensor(GROUPS.index(row["label"])))
        self.ids, self.labels = self.ids[:n], self.labels[:n]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> Any:
        return {"text": {"ids": self.ids[i], "mask": self.ids[i] > 0}, "label": self.labels[i]}


def words(text: str) -> list[str]:
    """The words of a text, in lower case."""
    return re.findall(r"[a-z]{3,}", text.lower())


class TextClassifier(pl.LightningModule):
    """Embedding, one layer of attention, the mean over the words; AdamW with warm-up and a cosine."""

    def __init__(self, steps: int = 80, dropout: float = 0.1, words: int = WORDS, length: int = LENGTH) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.steps = steps
        self.embedding = nn.Embedding(words, 16, padding_idx=0)
        self.position = nn.Parameter(0.1 * torch.randn(length, 16))
        layer = nn.TransformerEncoderLayer(16, 2, 32, dropout, "gelu", batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.head = nn.Linear(16, 2)

    def forward(self, text: Any) -> Tensor:
        hidden = self.encoder(self.embedding(text["ids"]) + self.position, src_key_padding_mask=~text["mask"])
        kept = text["mask"][..., None].to(hidden.dtype)
        out: Tensor = self.head((hidden * kept).sum(1) / kept.sum(1))
        return out

    # The one method to add to a module, so that its losses can be told apart in one forward pass.
    def per_sample_loss(self, batch: Any) -> Tensor:
        return nn.functional.cross_entropy(self(batch["text"]), batch["label"], reduction="none")

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.per_sample_loss(batch).mean()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.per_sample_loss(batch).mean())

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=3e-3, weight_decay=0.05)

        def rate(step: int) -> float:
            return min(1.0, (step + 1) / 5) * 0.5 * (1 + math.cos(math.pi * step / self.steps))

        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def train(directory: str, train: Dataset[Any], val: Dataset[Any], epochs: int = 10, batch_size: int = 32) -> la.Run:
    """Train as one always does, with the recorder among the callbacks."""
    pl.seed_everything(1, verbose=False)
    steps = epochs * -(-len(train) // batch_size)  # type: ignore[arg-type]
    trainer = pl.Trainer(
        callbacks=[la.TrajectoryRecorder(directory)],
        max_epochs=epochs,
        gradient_clip_val=1.0,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(TextClassifier(steps), DataLoader(train, batch_size, shuffle=True), DataLoader(val, 200))
    return la.Run(directory)


def scores_for_plain_sgd(run: la.Run) -> Any:
    """SGD-IE as if the run had been made by SGD at the recorded learning rates: the optimizer ignored."""
    from lightning_acc.core.optimizers import Update
    from lightning_acc.core.queries import moments
    from lightning_acc.core.replay import Replay
    from lightning_acc.core.step import Step
    from lightning_acc.methods.method import Question
    from lightning_acc.methods.rules import AdjointSgdIe
    from lightning_acc.methods.sweeps import reverse

    replay = Replay(run, "float64")
    update = Update("SGD", replay.layout, replay.update.group_of, 0)
    plain = {"momentum": 0, "weight_decay": 0, "nesterov": False, "dampening": 0, "maximize": False, "gradient_clip_val": None}

    class PlainSgd(AdjointSgdIe):
        def init(self, query_gradient: Tensor, state: Any, n_samples: int) -> Any:
            return super().init(query_gradient, state[:1], n_samples)

        def advance(self, point: Any, carry: Any) -> Any:
            step = point.step
            groups = [{**plain, "lr": group["lr"], "step": group["step"]} for group in step.groups]
            as_sgd = Step(step.objective, update, step.accumulated, step.sample_ids, step.weights, groups)
            return super().advance(as_sgd.at(point.state[:1]), carry)

    question = Question(run.query("val"), moments.find(run, "end"), "linear", keep_shifts=False, memory=2**30)
    return reverse(replay, PlainSgd(), question).numpy()


def agreement(run: la.Run, samples: list[int], ray_address: str | None = "local") -> dict[str, float]:
    """Spearman correlation of each method's scores of ``samples`` with the truth."""

    def scores(method: str) -> Any:
        return la.score(run, method, samples, dtype="float64", ray_address=ray_address, check=0).values

    truth = scores("loo")
    methods = {
        **{method: scores(method) for method in ("acc-sgd-ie", "sgd-ie", "tracin")},
        "sgd-ie, optimizer ignored": scores_for_plain_sgd(run)[samples],
    }
    return {method: float(stats.spearmanr(values, truth).statistic) for method, values in methods.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    folder = os.environ.get("LIGHTNING_ACC_DATA")
    parser.add_argument("--data", default=f"{folder}/SetFit/20_newsgroups" if folder else "SetFit/20_newsgroups")
    parser.add_argument("--samples", type=int, default=256, help="training posts")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        run = train(f"{directory}/run", Posts(options.data, "train", options.samples), Posts(options.data, "test", 200))
        print(run)
        print(run.audit())
        for method, correlation in agreement(run, list(range(64))).items():
            print(f"{method:28} Spearman with loo of 64 posts {correlation:6.3f}")


if __name__ == "__main__":
    main()
