"""What the hardware allows: t*, the least time of a forward pass, from what is measured on this machine.

    t*(step) = max((weight bytes + bytes of K/V read) / bandwidth, 2 parameters tokens / throughput)

Keys and values of a prefix that several rows share count once.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.configuration_utils import PreTrainedConfig
from transformers.pytorch_utils import Conv1D

from app.models.cpu.packed_linear import pack_linears
from app.models.weights import model_class

_BANDWIDTH_BYTES = 256 << 20  # far larger than most caches
_WIDTH = 8192  # of the matrix of these bytes that one row is multiplied by
_MATMUL_SIZE = 2048
_MIN_SECONDS = 0.3  # how long a figure is measured at least


@dataclass(frozen=True, slots=True)
class Hardware:
    """Measured: bytes and floating-point operations per second."""

    bandwidth: float
    throughput: float


@dataclass(frozen=True, slots=True)
class ModelCost:
    """What a forward pass reads and multiplies."""

    parameters: int  # of the layers' matrices: every token goes through them
    head_parameters: int  # of the output matrix: only tokens with logits go through it
    bytes_per_parameter: float = 2


def measure_hardware(device: str = "cpu", dtype: torch.dtype = torch.bfloat16) -> Hardware:
    """Measure for about a second."""
    return Hardware(read_bandwidth(device), matmul_throughput(device, dtype))


def read_bandwidth(device: str) -> float:
    """Return bytes per second of the fastest of several long reads.

    Which one that is differs by machine: some read faster in two places at a time than in one.
    """
    numbers = torch.ones(_BANDWIDTH_BYTES // 4, device=device)
    one_half, other_half = numbers.chunk(2)
    reads: list[Callable[[], Any]] = [numbers.sum, lambda: torch.dot(one_half, other_half)]
    if device == "cpu":
        reads.append(_product_of_one_row())
    return _BANDWIDTH_BYTES / min(_best_seconds(read, device) for read in reads)


def matmul_throughput(device: str, dtype: torch.dtype) -> float:
    """Return floating-point operations per second of square products in `dtype`."""
    square = torch.ones(_MATMUL_SIZE, _MATMUL_SIZE, device=device, dtype=dtype)
    return 2 * _MATMUL_SIZE**3 / _best_seconds(lambda: square @ square, device)


def model_cost(model: PreTrainedModel) -> ModelCost:
    """Count the matrices that each token is multiplied by; embeddings are looked up."""
    head = model.get_output_embeddings()
    sizes = [
        module.weight.numel()
        for module in model.modules()
        if isinstance(module, nn.Linear | Conv1D) and module is not head
    ]
    return ModelCost(sum(sizes), head.weight.numel(), model.dtype.itemsize)


def cost_of(config: PreTrainedConfig, dtype: torch.dtype) -> ModelCost | None:
    """Count them of a base that is not accelerated, and not loaded.

    Return None where not every token passes through all matrices: in encoder-decoders, and among experts.
    """
    if config.is_encoder_decoder:
        return None
    with torch.device("meta"):
        model = model_class(config).from_config(config, dtype=dtype)
    return None if any("expert" in name for name, _ in model.named_parameters()) else model_cost(model)


def decode_step(hardware: Hardware, cost: ModelCost, rows: int, cached_bytes: float) -> float:
    """Return t*, in seconds, of a step of one token for each row, which reads `cached_bytes` of K/V."""
    return _least(hardware, cost, rows, rows, cached_bytes)


def prefill(hardware: Hardware, cost: ModelCost, rows: int, tokens: int) -> float:
    """Return t*, in seconds, of `tokens` of `rows` prompts, each with logits for its last token."""
    return _least(hardware, cost, rows, tokens, 0)


def decode_step_in_words(hardware: Hardware, cost: ModelCost, rows: int, cached_bytes: float) -> str:
    """Return what such a step takes most of its time for."""
    parameters = cost.parameters + cost.head_parameters
    parts = {
        "reading weights": parameters * cost.bytes_per_parameter / hardware.bandwidth,
        "reading keys and values": cached_bytes / hardware.bandwidth,
        "arithmetic": 2 * parameters * rows / hardware.throughput,
    }
    return (
        "arithmetic"
        if parts.pop("arithmetic") > sum(parts.values())
        else max(parts, key=lambda each: parts[each])
    )


def _least(hardware: Hardware, cost: ModelCost, rows: int, tokens: int, cached_bytes: float) -> float:
    weights = (cost.parameters + cost.head_parameters) * cost.bytes_per_parameter
    operations = 2 * (cost.parameters * tokens + cost.head_parameters * rows)
    return max((weights + cached_bytes) / hardware.bandwidth, operations / hardware.throughput)


def _product_of_one_row() -> Callable[[], Any]:
    """Return the product of a row and a matrix, as layers on a CPU compute it in bf16."""
    num_rows = _BANDWIDTH_BYTES // (2 * _WIDTH)
    linear = nn.Linear(_WIDTH, num_rows, bias=False, dtype=torch.bfloat16, device="meta")
    layer = nn.Sequential(linear.to_empty(device="cpu").requires_grad_(False))
    nn.init.ones_(linear.weight)
    pack_linears(layer)
    row = torch.ones(1, _WIDTH, dtype=torch.bfloat16)
    return lambda: layer(row)


def _best_seconds(work: Callable[[], Any], device: str) -> float:
    """Return the best of several runs: what the machine can do when nothing disturbs it."""
    best, started = float("inf"), time.perf_counter()
    while time.perf_counter() - started < _MIN_SECONDS:
        begin = time.perf_counter()
        work()
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - begin)
    return best
