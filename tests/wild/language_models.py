"""Language models from Hugging Face, whose loss is a mean over the tokens of a batch."""

from __future__ import annotations

from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from texts import TINY, WORDS, Reviews, tokenizer
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader
from wild import LeavesOut, Setup

transformers = pytest.importorskip("transformers")
SIZE = len(WORDS) + 5


class Texts(Reviews):
    """Tokenized texts of different lengths without labels."""

    def __init__(self, n: int = 14, seed: int = 0) -> None:
        super().__init__(n, seed)
        for sample in self.samples:
            sample.pop("label")


def texts(n: int = 14, seed: int = 0, batch_size: int = 5, shuffle: bool = True, masked: bool = False) -> DataLoader[Any]:
    """Hugging Face's own collator: pads, and labels the padding -100; or masks words at random, anew in each epoch."""
    collate = transformers.DataCollatorForLanguageModeling(tokenizer(), mlm=masked, mlm_probability=0.4)
    return DataLoader(Texts(n, seed), batch_size, shuffle=shuffle, collate_fn=collate)


def held_out() -> DataLoader[Any]:
    return texts(8, 1, 8, shuffle=False)


class LanguageModel(pl.LightningModule):
    """GPT-2 as in the language modelling example."""

    def __init__(self) -> None:
        super().__init__()
        self.model = self.make()
        self.model.train()

    def make(self) -> Any:
        config = transformers.GPT2Config(vocab_size=SIZE, n_embd=16, n_layer=2, n_head=2, n_positions=24)
        return transformers.GPT2LMHeadModel(config)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.model(**batch).loss
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.model(**batch).loss)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=2e-3, betas=(0.9, 0.95), weight_decay=0.1)
        schedule = transformers.get_cosine_schedule_with_warmup(optimizer, 2, 8)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


class NextTokenByHand(LeavesOut):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        logits = self.model(**batch).logits[:, :-1].float()  # as transformers does, whatever the model's precision
        labels = batch["labels"][:, 1:]
        return self.mean(F.cross_entropy(logits.transpose(1, 2), labels, reduction="none"), labels != -100)


class LanguageModelByHand(NextTokenByHand, LanguageModel):
    pass


class LanguageModelTold(LanguageModel):
    """The module says itself what its loss is made of: a mean over tokens for each sample, and how many of them it has."""

    def per_sample_loss(self, batch: Any) -> tuple[Tensor, Tensor]:
        logits = self.model(**{name: batch[name] for name in ("input_ids", "attention_mask")}).logits[:, :-1]
        labels = batch["labels"][:, 1:]
        tokens = (labels != -100).sum(1)
        losses = F.cross_entropy(logits.transpose(1, 2), labels, reduction="none", ignore_index=-100)
        return losses.sum(1) / tokens.clamp_min(1), tokens.to(losses.dtype)


class LanguageModelToldByHand(NextTokenByHand, LanguageModelTold):
    pass


class Llama(LanguageModel):
    """RMSNorm, rotary positions, grouped queries, and activations computed again in the backward pass."""

    def make(self) -> Any:
        config = transformers.LlamaConfig(
            vocab_size=SIZE,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=24,
            attention_dropout=0.1,
            use_cache=False,
            pad_token_id=0,
        )
        model = transformers.LlamaForCausalLM(config)
        model.gradient_checkpointing_enable()
        return model


class LlamaByHand(NextTokenByHand, Llama):
    pass


class NarrowBase(LanguageModel):
    """PEFT leaves the adapters in single precision where the frozen weights are in bfloat16."""

    def make(self) -> Any:
        peft = pytest.importorskip("peft")
        config = peft.LoraConfig(
            task_type="CAUSAL_LM", r=4, lora_alpha=8, lora_dropout=0.1, target_modules=["c_attn"], fan_in_fan_out=True
        )
        return peft.get_peft_model(super().make().to(torch.bfloat16), config)

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=5e-3)


class NarrowBaseByHand(NextTokenByHand, NarrowBase):
    pass


class Masked(LanguageModel):
    def make(self) -> Any:
        return transformers.BertForMaskedLM(transformers.BertConfig(**TINY))


class MaskedByHand(LeavesOut, Masked):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        logits, labels = self.model(**batch).logits, batch["labels"]
        return self.mean(F.cross_entropy(logits.transpose(1, 2), labels, reduction="none"), labels != -100)


class Translation(LanguageModel):
    """T5, which makes the decoder's input of the labels."""

    def make(self) -> Any:
        config = transformers.T5Config(
            vocab_size=SIZE, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, decoder_start_token_id=0
        )
        return transformers.T5ForConditionalGeneration(config)


class TranslationByHand(LeavesOut, Translation):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        logits, labels = self.model(**batch).logits, batch["labels"]
        return self.mean(F.cross_entropy(logits.transpose(1, 2), labels, reduction="none"), labels != -100)


class Bart(Translation):
    def make(self) -> Any:
        config = transformers.BartConfig(
            vocab_size=SIZE,
            d_model=16,
            encoder_layers=1,
            decoder_layers=1,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=24,
            decoder_ffn_dim=24,
            max_position_embeddings=24,
            pad_token_id=0,
            decoder_start_token_id=3,
            forced_eos_token_id=3,
        )
        return transformers.BartForConditionalGeneration(config)


class BartByHand(TranslationByHand, Bart):
    pass


class DroppedLayers(Bart):
    """Layers that a step leaves out, by chance, have no gradient in it."""

    def make(self) -> Any:
        model = super().make()
        config = model.config
        config.encoder_layers = config.decoder_layers = 3
        config.encoder_layerdrop = config.decoder_layerdrop = 0.4
        return transformers.BartForConditionalGeneration(config)


class DroppedLayersByHand(TranslationByHand, DroppedLayers):
    pass


class Pairs(Texts):
    """A text and the same text backwards."""

    def __init__(self, n: int = 14, seed: int = 0) -> None:
        super().__init__(n, seed)
        for sample in self.samples:
            sample["labels"] = sample["input_ids"][::-1][1:]


def pairs(n: int = 14, seed: int = 0, batch_size: int = 5, shuffle: bool = True) -> DataLoader[Any]:
    collate = transformers.DataCollatorForSeq2Seq(tokenizer())
    return DataLoader(Pairs(n, seed), batch_size, shuffle=shuffle, collate_fn=collate)


def held_out_pairs() -> DataLoader[Any]:
    return pairs(8, 1, 8, shuffle=False)


# transformers computes the loss of causal models in float32 in any training, so that nothing is exact in float64.
SETUPS: dict[str, Setup] = {
    "transformers: GPT-2": Setup(
        "next tokens, padding labelled -100, dropout, tied embeddings, AdamW, cosine with warm-up, clipping",
        LanguageModel,
        texts,
        LanguageModelByHand,
        held_out,
        trainer={"gradient_clip_val": 1.0},
        double=False,
    ),
    "transformers: GPT-2, accumulation": Setup(
        "each accumulated batch is a mean over its own tokens",
        LanguageModel,
        texts,
        LanguageModelByHand,
        held_out,
        trainer={"gradient_clip_val": 1.0, "accumulate_grad_batches": 3},
        double=False,
    ),
    "transformers: GPT-2, `per_sample_loss`": Setup(
        "a pair `(losses, weights)` beside `outputs.loss`: each sample's mean, and its tokens",
        LanguageModelTold,
        texts,
        LanguageModelToldByHand,
        held_out,
        double=False,
    ),
    "transformers: Llama": Setup(
        "RMSNorm, rotary positions, grouped queries, attention dropout, gradient checkpointing",
        Llama,
        texts,
        LlamaByHand,
        held_out,
        trainer={"gradient_clip_val": 1.0},
        double=False,
    ),
    "transformers: masked BERT": Setup(
        "words masked at random by the collator, anew in each epoch; a mean over the masked words",
        Masked,
        lambda: texts(masked=True),
        MaskedByHand,
    ),
    "transformers: GPT-2 in bf16-true": Setup(
        "the parameters themselves have bfloat16's 3 digits",
        LanguageModel,
        texts,
        LanguageModelByHand,
        held_out,
        trainer={"precision": "bf16-true"},
        double=False,
        tolerance=0.1,
    ),
    "peft: LoRA on GPT-2 in bfloat16": Setup(
        "frozen weights in bfloat16, adapters in float32, dropout; bfloat16 rounds activations to 3 digits",
        NarrowBase,
        texts,
        NarrowBaseByHand,
        held_out,
        double=False,
        tolerance=0.1,
    ),
    "transformers: T5": Setup(
        "`DataCollatorForSeq2Seq`, relative positions, dropout", Translation, pairs, TranslationByHand, held_out_pairs
    ),
    "transformers: BART": Setup("encoder and decoder, a bias buffer on the logits", Bart, pairs, BartByHand, held_out_pairs),
    "transformers: BART, LayerDrop": Setup(
        "`encoder_layerdrop`, `decoder_layerdrop`: a step leaves layers out, by chance; AdamW with weight decay",
        DroppedLayers,
        pairs,
        DroppedLayersByHand,
        held_out_pairs,
    ),
}
