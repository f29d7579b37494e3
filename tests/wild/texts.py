"""Hugging Face transformers from their configurations: classifiers and taggers of texts, fine-tuned as in their courses."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from wild import LeavesOut, Setup

transformers = pytest.importorskip("transformers")
WORDS = [f"w{i}" for i in range(40)]
TINY: dict[str, Any] = {
    "vocab_size": 45,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 24,
}


def tokenizer() -> Any:
    """A tokenizer of 40 words, made without a download."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(special + WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    names = {name: f"[{name[:-6].upper()}]" for name in ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token")}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=words, **names)


class Reviews(Dataset[Any]):
    """Tokenized texts of 3 to 10 words with a label, as lists of token ids."""

    def __init__(self, n: int = 14, seed: int = 0, several_labels: bool = False) -> None:
        generator = torch.Generator().manual_seed(seed)
        lengths = torch.randint(3, 11, (n,), generator=generator).tolist()
        texts = [" ".join(WORDS[i] for i in torch.randint(0, 40, (length,), generator=generator)) for length in lengths]
        encode = tokenizer()
        self.samples = [dict(encode(text, return_token_type_ids=False)) for text in texts]
        for sample in self.samples:
            label = torch.randint(0, 3, (1,), generator=generator).item()
            sample["label"] = [float(label != i) for i in range(3)] if several_labels else label

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, i: int) -> Any:
        return self.samples[i]


def reviews(n: int = 14, seed: int = 0, batch_size: int = 5, shuffle: bool = True, **options: Any) -> DataLoader[Any]:
    """Batches padded to their longest text by Hugging Face's own collator, which gives a ``BatchEncoding``."""
    collate = transformers.DataCollatorWithPadding(tokenizer())
    return DataLoader(Reviews(n, seed, **options), batch_size, shuffle=shuffle, collate_fn=collate)


def held_out(**options: Any) -> DataLoader[Any]:
    return reviews(n=8, seed=1, batch_size=8, shuffle=False, **options)


class Classifier(pl.LightningModule):
    """The module of every fine-tuning tutorial: ``outputs.loss``, AdamW with groups, a linear schedule with warm-up."""

    kind = "Bert"
    config: ClassVar[dict[str, Any]] = {**TINY, "num_labels": 3}

    def __init__(self) -> None:
        super().__init__()
        config = getattr(transformers, f"{self.kind}Config")(**self.config)
        self.model = getattr(transformers, f"{self.kind}ForSequenceClassification")(config)
        self.model.train()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        outputs = self.model(**batch)
        self.log("train_loss", outputs.loss)
        return outputs.loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.model(**batch).loss)

    def configure_optimizers(self) -> Any:
        plain = ("bias", "LayerNorm.weight")
        decayed = [p for name, p in self.named_parameters() if not name.endswith(plain)]
        others = [p for name, p in self.named_parameters() if name.endswith(plain)]
        groups = [{"params": decayed, "weight_decay": 0.01}, {"params": others, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, lr=2e-3)
        schedule = transformers.get_linear_schedule_with_warmup(optimizer, 2, 8)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class ClassifierByHand(LeavesOut, Classifier):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        logits = self.model(**batch).logits
        return self.mean(F.cross_entropy(logits, batch["labels"], reduction="none"))


class SeveralLabels(Classifier):
    config: ClassVar[dict[str, Any]] = {**TINY, "num_labels": 3, "problem_type": "multi_label_classification"}


class SeveralLabelsByHand(LeavesOut, SeveralLabels):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        logits = self.model(**batch).logits
        return self.mean(F.binary_cross_entropy_with_logits(logits, batch["labels"], reduction="none"))


class Roberta(Classifier):
    kind = "Roberta"
    config: ClassVar[dict[str, Any]] = {**TINY, "num_labels": 3, "pad_token_id": 0}


class RobertaByHand(ClassifierByHand, Roberta):
    pass


class Tags(Reviews):
    """A tag for every word, -100 for the special tokens, as lists."""

    def __init__(self, n: int = 14, seed: int = 0) -> None:
        super().__init__(n, seed)
        generator = torch.Generator().manual_seed(seed + 10)
        for sample in self.samples:
            length = len(sample["input_ids"])
            sample.pop("label")
            sample["labels"] = [-100, *torch.randint(0, 4, (length - 2,), generator=generator).tolist(), -100]


def tags(n: int = 14, seed: int = 0, batch_size: int = 5, shuffle: bool = True) -> DataLoader[Any]:
    collate = transformers.DataCollatorForTokenClassification(tokenizer())
    return DataLoader(Tags(n, seed), batch_size, shuffle=shuffle, collate_fn=collate)


class Tagger(Classifier):
    """DistilBERT: the loss is a mean over the words of the whole batch."""

    def __init__(self) -> None:
        pl.LightningModule.__init__(self)
        config = transformers.DistilBertConfig(
            vocab_size=45, dim=16, n_layers=2, n_heads=2, hidden_dim=24, max_position_embeddings=24, num_labels=4
        )
        self.model = transformers.DistilBertForTokenClassification(config)


class TaggerByHand(LeavesOut, Tagger):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        logits, labels = self.model(**batch).logits, batch["labels"]
        losses = F.cross_entropy(logits.transpose(1, 2), labels, reduction="none", ignore_index=-100)
        return self.mean(losses, labels != -100)


class Lora(Classifier):
    """PEFT: adapters with dropout in the attention of a frozen BERT, beside a new head."""

    def __init__(self) -> None:
        super().__init__()
        peft = pytest.importorskip("peft")
        config = peft.LoraConfig(task_type="SEQ_CLS", r=4, lora_alpha=8, lora_dropout=0.2, target_modules=["query", "value"])
        self.model = peft.get_peft_model(self.model, config)

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=5e-3)


class LoraByHand(ClassifierByHand, Lora):
    pass


SETUPS: dict[str, Setup] = {
    "transformers: BERT classifier": Setup(
        "`outputs.loss`, dropout, `BatchEncoding` padded by batch, AdamW with groups, linear warm-up, clipping, accumulation",
        Classifier,
        reviews,
        ClassifierByHand,
        held_out,
        trainer={"gradient_clip_val": 1.0, "accumulate_grad_batches": 2, "max_epochs": 4},
    ),
    "transformers: BERT, several labels": Setup(
        '`problem_type="multi_label_classification"`, dropout',
        SeveralLabels,
        lambda: reviews(several_labels=True),
        SeveralLabelsByHand,
        lambda: held_out(several_labels=True),
    ),
    "transformers: RoBERTa": Setup(
        "`DataCollatorWithPadding`, positions counted from the padding, dropout", Roberta, reviews, RobertaByHand, held_out
    ),
    "transformers: DistilBERT tagger": Setup(
        "a mean over the words of a batch, labels -100, dropout",
        Tagger,
        tags,
        TaggerByHand,
        lambda: tags(8, 1, 8, shuffle=False),
    ),
    "transformers: BERT in bf16-mixed": Setup(
        "mixed precision, clipping; bfloat16 rounds the loss of a sample, and its effect, to 3 digits",
        Classifier,
        reviews,
        ClassifierByHand,
        held_out,
        trainer={"precision": "bf16-mixed", "gradient_clip_val": 1.0},
        double=False,
        tolerance=0.05,
    ),
    "peft: LoRA on BERT": Setup("`lora_dropout`, frozen weights, `outputs.loss`", Lora, reviews, LoraByHand, held_out),
}
