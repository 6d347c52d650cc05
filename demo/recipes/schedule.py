"""The figures of a pretraining run: how long, how fast, and which documents make up each step."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch


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


def learning_rate(config: PretrainConfig, step: int) -> float:
    """Linear warm-up, then a cosine down to ``final_share``."""
    if step < config.warmup:
        return config.learning_rate * (step + 1) / config.warmup
    progress = (step - config.warmup) / max(1, config.steps - config.warmup)
    return config.learning_rate * (
        config.final_share + (1 - config.final_share) * (1 + math.cos(math.pi * progress)) / 2
    )


def batches_of(num_rows: int, config: PretrainConfig) -> torch.Tensor:
    """Row numbers of every step ``[steps, rows_per_step]``: shuffled epochs one after the other."""
    generator = torch.Generator().manual_seed(config.seed)
    needed = config.steps * config.rows_per_step
    epochs = -(-needed // num_rows)
    order = torch.cat([torch.randperm(num_rows, generator=generator) for _ in range(epochs)])
    return order[:needed].view(config.steps, config.rows_per_step)
