"""The causal base: a Llama of 3.4M parameters, and its packed rows.

bf16 autocast and eager attention were the fastest of four combinations on a 2-core Zen 4 with avx512_bf16
(8.5k tokens/s; SDPA bf16 6.6k, SDPA fp32 3.4k, eager fp32 2.2k), with the allocator told to keep its pages
(see ``build``).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch.nn import functional
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from demo.recipes.corpus import documents
from demo.recipes.rows import Rows, encode, pack
from demo.recipes.schedule import PretrainConfig
from demo.recipes.tokenizer import VOCABULARY, train_tokenizer


def make_model() -> PreTrainedModel:
    """Hidden 256, 4 layers, 4 heads, tied embeddings, no BOS."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=256,
            intermediate_size=688,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=0,
            pad_token_id=1,
        )
    )


def prepare(config: PretrainConfig, work: Path) -> Rows:
    """The packed rows; they and the tokenizer are made once and kept in ``work``."""
    rows_file = work / "rows.pt"
    if rows_file.exists():
        saved = torch.load(rows_file, weights_only=True)
        return Rows(saved["ids"], saved["weights"])
    made = list(
        tqdm(documents(config.num_documents, config.seed), "corpus", config.num_documents, mininterval=2)
    )
    tokenizer = train_tokenizer(document.text for document in made[:60_000])
    tokenizer.save_pretrained(work / "tokenizer")
    rows = pack(encode(made, tokenizer), int(tokenizer.pad_token_id))
    torch.save({"ids": rows.ids, "weights": rows.weights}, rows_file)
    return rows


def losses(model: PreTrainedModel, rows: Rows, chosen: torch.Tensor) -> Iterator[torch.Tensor]:
    """Cross-entropy of the next token, averaged by the weights of the ``chosen`` rows: one part."""
    ids, weights = rows.ids[chosen].long(), rows.weights[chosen].float()
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(input_ids=ids[:, :-1], use_cache=False).logits
    targets, importance = ids[:, 1:].flatten(), weights[:, 1:].flatten()
    each = functional.cross_entropy(logits.flatten(0, 1).float(), targets, reduction="none")
    yield (each * importance).sum() / importance.sum()
