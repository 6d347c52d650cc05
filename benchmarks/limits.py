"""t* of a work: what the hardware allows (app/models/limits.py), with its tasks and tokens.

T tasks of p virtual tokens each, whose keys and values are read once a step; kappa bytes of K and V a token.
"""

from app.models import limits
from app.models.limits import Hardware, ModelCost, cost_of, measure_hardware
from benchmarks.work import Work

__all__ = ["Hardware", "ModelCost", "cost_of", "decode_step", "measure_hardware", "prefill", "whole_work"]


def decode_step(hardware: Hardware, cost: ModelCost, work: Work, own_tokens: float) -> float:
    """t* of a step in which every request takes one token, with `own_tokens` of its own cached."""
    cached = work.tasks * work.virtual_tokens + work.requests * own_tokens
    return limits.decode_step(hardware, cost, work.requests, cached * work.shape.kv_bytes_per_token)


def prefill(hardware: Hardware, cost: ModelCost, work: Work) -> float:
    """t* of all requests' own tokens; prompts are resident already."""
    return limits.prefill(hardware, cost, work.requests, work.requests * work.prompt_tokens)


def whole_work(hardware: Hardware, cost: ModelCost, work: Work) -> float:
    """t* of prefill and all decode steps, one after the other."""
    lengths = (work.prompt_tokens + number for number in range(1, work.new_tokens))
    return prefill(hardware, cost, work) + sum(decode_step(hardware, cost, work, own) for own in lengths)
