"""The encoder-decoder bases: a T5 and a BART of 3.4M and 3.7M parameters, on one corpus and tokenizer.

Both have three encoder and two decoder layers of width 256: PEFT's prefixes need an encoder at least as deep
as the decoder. The T5 has relative positions, the BART learned ones: only there a prefix at all three
attention sites is defined. Eager attention trains faster than SDPA here too: 11.6k tokens/s against 9.0k.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

from demo.recipes import batches
from demo.recipes.batches import Corpus
from demo.recipes.pairs import pairs
from demo.recipes.schedule import PretrainConfig
from demo.recipes.tokenizer import VOCABULARY, append_eos, train_tokenizer

_TOGETHER = 10_000  # pairs that are tokenized at once
START = {"decoder_start_token_id": batches.PAD_ID}
_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "d_model": 256,
    "tie_word_embeddings": True,
    "eos_token_id": batches.EOS_ID,
    "pad_token_id": batches.PAD_ID,
    **START,
}


def make_t5() -> PreTrainedModel:
    """Four heads of 64, ReLU, tied embeddings, relative positions up to 64."""
    return T5ForConditionalGeneration(
        T5Config(
            d_kv=64,
            num_heads=4,
            d_ff=512,
            num_layers=3,
            num_decoder_layers=2,
            dropout_rate=0.0,
            relative_attention_max_distance=64,
            **_COMMON,
        )
    )


def t5_rate_scale(name: str) -> float:
    """T5 starts its weights at very different sizes, and was made for updates in proportion to them.

    Its queries start eight times smaller than its keys, for want of a factor in attention; AdamW's steps of
    one size saturate the softmax then, and nothing is learned from the source. Its embeddings start at 1.
    """
    if name.endswith(".q.weight"):
        return 1 / 8
    return 4.0 if name == "shared.weight" else 1.0


def make_bart() -> PreTrainedModel:
    """The same shape with learned positions, 512 of them on each side."""
    return BartForConditionalGeneration(
        BartConfig(
            encoder_layers=3,
            decoder_layers=2,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=512,
            decoder_ffn_dim=512,
            max_position_embeddings=512,
            dropout=0.0,
            bos_token_id=None,
            forced_eos_token_id=None,
            **_COMMON,
        )
    )


def prepare(config: PretrainConfig, work: Path) -> Corpus:
    """The tokenized pairs; they and the tokenizer are made once and kept in ``work``."""
    file = work / "pairs.pt"
    if not file.exists():
        made = list(
            tqdm(pairs(config.num_documents, config.seed), "corpus", config.num_documents, mininterval=2)
        )
        texts = (pair.leading + pair.source + pair.target for pair in made[:60_000])
        tokenizer = append_eos(train_tokenizer(texts))
        tokenizer.save_pretrained(work / "tokenizer")
        parts = (made[start : start + _TOGETHER] for start in range(0, len(made), _TOGETHER))
        corpus = Corpus.of(pair for part in parts for pair in batches.encode(part, tokenizer))
        torch.save({"ids": corpus.ids, "ends": corpus.ends, "weights": corpus.weights}, file)
    return Corpus(**torch.load(file, weights_only=True))


def losses(model: PreTrainedModel, data: Corpus, chosen: torch.Tensor) -> Iterator[torch.Tensor]:
    """The loss of the ``chosen`` pairs in parts that add up to it."""
    return batches.losses(model, [data[index] for index in chosen.tolist()])
