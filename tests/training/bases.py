"""Tiny random bases of real architectures to train on, and examples for them."""

import random
from collections.abc import Sequence
from functools import cache
from typing import Any

from transformers import PreTrainedModel

from app.training.base import TrainingBase, training_base
from app.training.examples import EncodedExample
from tests import seq2seq
from tests.text.tokenizer_zoo import tokenizer_of
from tests.tiny_models import tiny_model

CAUSAL = (
    "llama",
    "gpt2",
    "gemma2",
    "gemma3_text",
    "opt",
    "qwen2",
    "gpt_oss",
    "mixtral",
    "mistral",
    "gpt_neox",
)
KIND = "byte_level_bos"


@cache
def causal_base(architecture: str) -> TrainingBase:
    """Shared by tests, so none may change its weights."""
    tokenizer = tokenizer_of(KIND)
    model = tiny_model(architecture, vocab_size=len(tokenizer))
    return training_base("tiny", model, tokenizer, eos_ids=frozenset({1}), fingerprint="tiny")


@cache
def seq2seq_base(family: str) -> TrainingBase:
    """An encoder-decoder of tests/seq2seq.py."""
    return seq2seq_base_of(family, seq2seq.tiny_seq2seq(family))


def seq2seq_base_of(family: str, model: PreTrainedModel) -> TrainingBase:
    return training_base(
        "tiny",
        model,
        seq2seq.source_tokenizer("pegasus" if family == "mbart" else family),  # mbart's language is padding
        eos_ids=frozenset({seq2seq.EOS}),
        fingerprint="tiny",
        decoder_start_id=model.generation_config.decoder_start_token_id,
    )


def any_base(name: str) -> TrainingBase:
    return causal_base(name) if name in CAUSAL else seq2seq_base(name)


def examples(base: TrainingBase, count: int, seed: int = 0, **more: Any) -> list[EncodedExample]:
    """Sources and targets of different lengths, without special tokens but for EOS."""
    rng = random.Random(seed)

    def ids(longest: int) -> tuple[int, ...]:
        return tuple(rng.randrange(3, base.geometry.vocab_size) for _ in range(rng.randint(1, longest)))

    return [EncodedExample(ids(20), (*ids(7), 1), **more) for _ in range(count)]


def padded(rows: Sequence[Sequence[int]], fill: int) -> list[list[int]]:
    longest = max(map(len, rows))
    return [[*row, *[fill] * (longest - len(row))] for row in rows]
