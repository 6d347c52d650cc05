"""Pretrain the demo base: a Llama of 3.4M parameters on two CPU cores.

bf16 autocast and eager attention were the fastest of four combinations on a 2-core Zen 4 with avx512_bf16
(8.5k tokens/s; SDPA bf16 6.6k, SDPA fp32 3.4k, eager fp32 2.2k), with the allocator told to keep its pages
(see ``build``).
"""

from __future__ import annotations

import argparse
import json
import math
import time
from dataclasses import dataclass
from pathlib import Path
from shutil import copyfile

import torch
from torch.nn import functional
from tqdm import tqdm
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
)

from demo.recipes.corpus import documents
from demo.recipes.rows import Rows, encode, pack
from demo.recipes.tasks import BASE_NAME
from demo.recipes.tokenizer import TOKENIZER_CONFIG, VOCABULARY, train_tokenizer

SIZE_LIMIT = 12_000_000  # bytes of the base in the tree


@dataclass(frozen=True, slots=True, kw_only=True)
class PretrainConfig:
    """What a pretraining run depends on, beside the code."""

    steps: int = 3000
    rows_per_step: int = 32
    learning_rate: float = 2e-3
    final_share: float = 0.03  # of the learning rate, at the end of the cosine
    warmup: int = 100
    weight_decay: float = 0.05
    num_documents: int = 280_000
    seed: int = 20260
    checkpoint_every: int = 200


def model_config() -> LlamaConfig:
    """Hidden 256, 4 layers, 4 heads, tied embeddings, no BOS."""
    return LlamaConfig(
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


def prepare(config: PretrainConfig, work: Path) -> Rows:
    """The packed rows; they and the tokenizer are made once and kept in ``work``."""
    tokenizer_dir, rows_file = work / "tokenizer", work / "rows.pt"
    if rows_file.exists():
        saved = torch.load(rows_file, weights_only=True)
        return Rows(saved["ids"], saved["weights"])
    made = list(
        tqdm(documents(config.num_documents, config.seed), "corpus", config.num_documents, mininterval=2)
    )
    tokenizer = train_tokenizer(document.text for document in made[:60_000])
    tokenizer.save_pretrained(tokenizer_dir)
    rows = pack(encode(made, tokenizer), int(tokenizer.pad_token_id))
    torch.save({"ids": rows.ids, "weights": rows.weights}, rows_file)
    return rows


def learning_rate(config: PretrainConfig, step: int) -> float:
    """Linear warm-up, then a cosine down to ``final_share``."""
    if step < config.warmup:
        return config.learning_rate * (step + 1) / config.warmup
    progress = (step - config.warmup) / max(1, config.steps - config.warmup)
    return config.learning_rate * (
        config.final_share + (1 - config.final_share) * (1 + math.cos(math.pi * progress)) / 2
    )


def weighted_loss(model: LlamaForCausalLM, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of the next token, averaged by ``weights``. Both ``[rows, length]``."""
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(input_ids=ids[:, :-1], use_cache=False).logits
    targets, importance = ids[:, 1:].flatten(), weights[:, 1:].flatten()
    losses = functional.cross_entropy(logits.flatten(0, 1).float(), targets, reduction="none")
    return (losses * importance).sum() / importance.sum()


def batches_of(rows: Rows, config: PretrainConfig) -> torch.Tensor:
    """Row numbers of every step ``[steps, rows_per_step]``: shuffled epochs one after the other."""
    generator = torch.Generator().manual_seed(config.seed)
    needed = config.steps * config.rows_per_step
    epochs = -(-needed // len(rows.ids))
    order = torch.cat([torch.randperm(len(rows.ids), generator=generator) for _ in range(epochs)])
    return order[:needed].view(config.steps, config.rows_per_step)


def pretrain(config: PretrainConfig, work: Path) -> LlamaForCausalLM:
    """Train from nothing, or from the newest checkpoint in ``work``."""
    torch.manual_seed(config.seed)
    rows = prepare(config, work)
    model = LlamaForCausalLM(model_config())
    model.set_attn_implementation("eager")
    optimizer = torch.optim.AdamW(
        model.parameters(), betas=(0.9, 0.95), weight_decay=config.weight_decay, fused=True
    )
    start = _resume(work, model, optimizer)
    _train(config, work, model, optimizer, rows, start)
    return model


def _train(
    config: PretrainConfig,
    work: Path,
    model: LlamaForCausalLM,
    optimizer: torch.optim.Optimizer,
    rows: Rows,
    start: int,
) -> None:
    model.train()
    order = batches_of(rows, config)
    recent, began = 0.0, time.monotonic()
    bar = tqdm(range(start, config.steps), "pretrain", initial=start, total=config.steps, mininterval=10)
    for step in bar:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config, step)
        loss = _step(model, optimizer, rows, order[step])
        recent = loss if step == start else 0.95 * recent + 0.05 * loss
        if (step + 1) % 50 == 0:
            bar.set_postfix(loss=f"{recent:.3f}")
            _log(work, step=step + 1, loss=round(recent, 4), seconds=round(time.monotonic() - began))
        if (step + 1) % config.checkpoint_every == 0 or step + 1 == config.steps:
            _checkpoint(work, model, optimizer, step + 1)


def _step(
    model: LlamaForCausalLM, optimizer: torch.optim.Optimizer, rows: Rows, chosen: torch.Tensor
) -> float:
    loss = weighted_loss(model, rows.ids[chosen].long(), rows.weights[chosen].float())
    loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it without annotations
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def _log(work: Path, **figures: float) -> None:
    with (work / "pretrain.jsonl").open("a") as log:
        print(json.dumps(figures), file=log)


def _checkpoint(work: Path, model: LlamaForCausalLM, optimizer: torch.optim.Optimizer, step: int) -> None:
    partial = work / "checkpoint.partial"
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step}, partial)
    partial.replace(work / "checkpoint.pt")


def _resume(work: Path, model: LlamaForCausalLM, optimizer: torch.optim.Optimizer) -> int:
    file = work / "checkpoint.pt"
    if not file.exists():
        return 0
    saved = torch.load(file, weights_only=True)
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    return int(saved["step"])


def export(work: Path, target: Path) -> None:
    """Write the newest checkpoint as a transformers directory in bf16."""
    model = LlamaForCausalLM(model_config())
    model.load_state_dict(torch.load(work / "checkpoint.pt", weights_only=True)["model"])
    model.bfloat16()
    model.generation_config = GenerationConfig(eos_token_id=0, pad_token_id=1)
    model.save_pretrained(target)
    copyfile(work / "tokenizer" / "tokenizer.json", target / "tokenizer.json")
    (target / "tokenizer_config.json").write_text(json.dumps(TOKENIZER_CONFIG, indent=2) + "\n")


def check_size(base_path: Path) -> int:
    """Bytes of the base; ValueError above the limit."""
    size = sum(file.stat().st_size for file in base_path.iterdir())
    if size > SIZE_LIMIT:
        raise ValueError(f"{base_path} takes {size} bytes, at most {SIZE_LIMIT} are allowed")
    return size


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("build/demo"))
    parser.add_argument("--base", type=Path, default=Path(BASE_NAME))
    parser.add_argument("--steps", type=int, default=PretrainConfig().steps)
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    pretrain(PretrainConfig(steps=arguments.steps), arguments.work)
    export(arguments.work, arguments.base)
    print(f"{arguments.base}: {check_size(arguments.base):,} bytes", flush=True)


if __name__ == "__main__":
    main()
