"""What the hardware allows: t*, from the bandwidth and the matrix throughput measured in the same run.

    t*(step) = max((weight bytes + (T p + own tokens) kappa) / bandwidth, 2 parameters tokens / throughput)

T tasks of p virtual tokens each, whose keys and values are read once a step; kappa bytes of K and V a token.
"""

from dataclasses import dataclass

import torch
from torch import nn

from app.cli.limits import matmul_throughput, read_bandwidth
from benchmarks.work import Work


@dataclass(frozen=True, slots=True)
class Hardware:
    """Measured: bytes and floating-point operations per second."""

    bandwidth: float
    throughput: float


def measure_hardware() -> Hardware:
    """Takes a second."""
    return Hardware(read_bandwidth("cpu"), matmul_throughput("cpu", torch.bfloat16))


@dataclass(frozen=True, slots=True)
class ModelCost:
    """What a forward pass reads and multiplies."""

    parameters: int  # of the layers' matrices: every token goes through them
    head_parameters: int  # of the output matrix: only tokens whose logits are asked for
    bytes_per_parameter: int = 2


def model_cost(model: nn.Module) -> ModelCost:
    """Counts linear layers; embeddings are looked up, not multiplied."""
    sizes = {
        name: module.weight.numel() for name, module in model.named_modules() if isinstance(module, nn.Linear)
    }
    head = sizes.pop("lm_head")
    return ModelCost(sum(sizes.values()), head)


def decode_step(hardware: Hardware, cost: ModelCost, work: Work, own_tokens: float) -> float:
    """t* of a step in which every request takes one token, with `own_tokens` of its own cached."""
    kappa = work.shape.kv_bytes_per_token
    weights = (cost.parameters + cost.head_parameters) * cost.bytes_per_parameter
    cached = (work.tasks * work.virtual_tokens + work.requests * own_tokens) * kappa
    operations = 2 * (cost.parameters + cost.head_parameters) * work.requests
    return max((weights + cached) / hardware.bandwidth, operations / hardware.throughput)


def prefill(hardware: Hardware, cost: ModelCost, work: Work) -> float:
    """t* of all requests' own tokens; prompts are resident already."""
    weights = (cost.parameters + cost.head_parameters) * cost.bytes_per_parameter
    tokens = work.requests * work.prompt_tokens
    operations = 2 * (cost.parameters * tokens + cost.head_parameters * work.requests)
    return max(weights / hardware.bandwidth, operations / hardware.throughput)


def whole_work(hardware: Hardware, cost: ModelCost, work: Work) -> float:
    """t* of prefill and all decode steps, one after the other."""
    lengths = (work.prompt_tokens + number for number in range(1, work.new_tokens))
    return prefill(hardware, cost, work) + sum(decode_step(hardware, cost, work, own) for own in lengths)
