"""Pretrain a demo base on two CPU cores: ``python -m demo.recipes.pretrain [name of the base]``."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from shutil import copyfile

import torch
from tqdm import tqdm
from transformers import GenerationConfig, PreTrainedModel

from demo.recipes.bases import BASES, Base
from demo.recipes.schedule import PretrainConfig, batches_of, learning_rate
from demo.recipes.tokenizer import TOKENIZER_CONFIG

SIZE_LIMIT = 12_000_000  # bytes of a base in the tree
WORK = Path("build/demo")


def pretrain(base: Base, config: PretrainConfig, work: Path) -> PreTrainedModel:
    """Train from nothing, or from the newest checkpoint in ``work``."""
    torch.manual_seed(config.seed)
    data = base.prepare(config, work)
    model = base.make_model()
    model.set_attn_implementation("eager")
    groups = [
        {"params": [parameter], "scale": base.rate_scale(name)}
        for name, parameter in model.named_parameters()
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=config.weight_decay, fused=True)
    start = _resume(work, model, optimizer)
    order = batches_of(len(data), config)
    _train(config, work, model, optimizer, start, lambda step: base.losses(model, data, order[step]))
    return model


def _train(
    config: PretrainConfig,
    work: Path,
    model: PreTrainedModel,
    optimizer: torch.optim.Optimizer,
    start: int,
    losses_of: Callable[[int], Iterable[torch.Tensor]],
) -> None:
    model.train()
    recent, began = 0.0, time.monotonic()
    bar = tqdm(range(start, config.steps), "pretrain", initial=start, total=config.steps, mininterval=10)
    for step in bar:
        for group in optimizer.param_groups:
            group["lr"] = group["scale"] * learning_rate(config, step)
        loss = _step(model, optimizer, losses_of(step))
        recent = loss if step == start else 0.95 * recent + 0.05 * loss
        if (step + 1) % 50 == 0:
            bar.set_postfix(loss=f"{recent:.3f}")
            _log(work, step=step + 1, loss=round(recent, 4), seconds=round(time.monotonic() - began))
        if (step + 1) % config.checkpoint_every == 0 or step + 1 == config.steps:
            _checkpoint(work, model, optimizer, step + 1)


def _step(model: PreTrainedModel, optimizer: torch.optim.Optimizer, losses: Iterable[torch.Tensor]) -> float:
    total = 0.0
    for loss in losses:
        loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it without annotations
        total += loss.item()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return total


def _log(work: Path, **figures: float) -> None:
    with (work / "pretrain.jsonl").open("a") as log:
        print(json.dumps(figures), file=log)


def _checkpoint(work: Path, model: PreTrainedModel, optimizer: torch.optim.Optimizer, step: int) -> None:
    partial = work / "checkpoint.partial"
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step}, partial)
    partial.replace(work / "checkpoint.pt")


def _resume(work: Path, model: PreTrainedModel, optimizer: torch.optim.Optimizer) -> int:
    file = work / "checkpoint.pt"
    if not file.exists():
        return 0
    saved = torch.load(file, weights_only=True)
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    return int(saved["step"])


def export(base: Base, work: Path, target: Path) -> None:
    """Write the newest checkpoint as a transformers directory in bf16."""
    model = base.make_model()
    model.load_state_dict(torch.load(work / "checkpoint.pt", weights_only=True)["model"])
    model.bfloat16()
    model.generation_config = GenerationConfig(**base.generation)
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
    parser.add_argument("--work", type=Path, default=WORK)
    parser.add_argument("--steps", type=int, help="default: the base's own")
    parser.add_argument("base", choices=BASES)
    arguments = parser.parse_args()
    base, work = BASES[arguments.base], arguments.work / arguments.base
    work.mkdir(parents=True, exist_ok=True)
    config = base.pretraining if arguments.steps is None else replace(base.pretraining, steps=arguments.steps)
    pretrain(base, config, work)
    export(base, work, base.path)
    print(f"{base.path}: {check_size(base.path):,} bytes", flush=True)


if __name__ == "__main__":
    main()
