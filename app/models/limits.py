"""What the hardware allows: t*, the least time of a forward pass, from what is measured on this machine.

    t*(step) = max((weight bytes + bytes of K/V read) / bandwidth, 2 parameters tokens / throughput)

Keys and values of a prefix that several rows share count once.

A CPU's figures are the best of several runs, by its clock. A GPU's are medians, by events on the device: of
copies and reads of more bytes than its cache could hold a noticeable part of, and of products of random
numbers (products of equal ones run faster, since fewer bits change).
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.configuration_utils import PreTrainedConfig
from transformers.pytorch_utils import Conv1D

from app.models.cpu.packed_linear import Weights, pack_linears
from app.models.weights import is_quantized, model_class

_CPU_BYTES = 256 << 20  # far larger than most caches
_GPU_BYTES = 4 << 30  # a cache of 50 to 130 MB holds 3% of it
_WIDTH = 8192  # of the matrix of these bytes that one row is multiplied by
_CPU_MATMUL_SIZE, _GPU_MATMUL_SIZE = 2048, 8192
_MIN_SECONDS = 0.3  # how long a figure is measured at least
_WARM_UPS, _MIN_RUNS = 3, 10  # on a GPU


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
    bytes_per_head_parameter: float = 2

    @property
    def weight_bytes(self) -> float:
        """Bytes of weights that a pass reads, whatever it takes."""
        return (
            self.parameters * self.bytes_per_parameter + self.head_parameters * self.bytes_per_head_parameter
        )


def measure_hardware(device: str = "cpu", dtype: torch.dtype = torch.bfloat16) -> Hardware:
    """Measure for about a second."""
    return Hardware(read_bandwidth(device), matmul_throughput(device, dtype))


def read_bandwidth(device: str) -> float:
    """Return bytes per second of the fastest of several long reads; a copy reads and writes.

    Which one that is differs by machine: some read faster in two places at a time than in one.
    """
    if device.startswith("cuda"):
        return _gpu_bandwidth(torch.device(device))
    numbers = torch.ones(_CPU_BYTES // 4)
    one_half, other_half = numbers.chunk(2)
    reads: list[Callable[[], Any]] = [
        numbers.sum,
        lambda: torch.dot(one_half, other_half),
        _product_of_one_row(),
    ]
    return _CPU_BYTES / min(_best_seconds(read) for read in reads)


def matmul_throughput(device: str, dtype: torch.dtype) -> float:
    """Return floating-point operations per second of square products in `dtype`."""
    if device.startswith("cuda"):
        size = _GPU_MATMUL_SIZE
        one, other = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
        result = torch.empty_like(one)
        seconds = _median_seconds(lambda: torch.mm(one, other, out=result), torch.device(device))
    else:
        size = _CPU_MATMUL_SIZE
        square = torch.ones(size, size, dtype=dtype)
        seconds = _best_seconds(lambda: square @ square)
    return 2 * size**3 / seconds


def model_cost(model: PreTrainedModel) -> ModelCost:
    """Count the matrices that each token is multiplied by; embeddings are looked up."""
    head = model.get_output_embeddings()
    sizes = [
        module.weight.numel()
        for module in model.modules()
        if isinstance(module, nn.Linear | Conv1D) and module is not head
    ]
    item_bytes = model.dtype.itemsize
    return ModelCost(sum(sizes), head.weight.numel(), item_bytes, item_bytes)


def cost_of(config: PreTrainedConfig, dtype: torch.dtype, weights: Weights = "auto") -> ModelCost | None:
    """Count them of a base that is not loaded, as `load_base` would load it.

    Return None where not every token passes through all matrices (in encoder-decoders, and among experts),
    and for quantized weights, since each method has a size of its own.
    """
    if config.is_encoder_decoder or is_quantized(config):
        return None
    with torch.device("meta"):
        model = model_class(config).from_config(config, dtype=dtype)
    if any("expert" in name for name, _ in model.named_parameters()):
        return None
    cost = model_cost(model)
    return replace(cost, bytes_per_parameter=1) if weights == "int8" else cost


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
        "reading weights": cost.weight_bytes / hardware.bandwidth,
        "reading keys and values": cached_bytes / hardware.bandwidth,
        "arithmetic": 2 * parameters * rows / hardware.throughput,
    }
    return (
        "arithmetic"
        if parts.pop("arithmetic") > sum(parts.values())
        else max(parts, key=lambda each: parts[each])
    )


def _least(hardware: Hardware, cost: ModelCost, rows: int, tokens: int, cached_bytes: float) -> float:
    operations = 2 * (cost.parameters * tokens + cost.head_parameters * rows)
    return max((cost.weight_bytes + cached_bytes) / hardware.bandwidth, operations / hardware.throughput)


def _product_of_one_row() -> Callable[[], Any]:
    """Return the product of a row and a matrix, as layers on a CPU compute it in bf16."""
    num_rows = _CPU_BYTES // (2 * _WIDTH)
    linear = nn.Linear(_WIDTH, num_rows, bias=False, dtype=torch.bfloat16, device="meta")
    layer = nn.Sequential(linear.to_empty(device="cpu").requires_grad_(False))
    nn.init.ones_(linear.weight)
    pack_linears(layer)
    row = torch.ones(1, _WIDTH, dtype=torch.bfloat16)
    return lambda: layer(row)


def _gpu_bandwidth(device: torch.device) -> float:
    """Measure a read of a large tensor, and a copy within it, where as much memory is free."""
    free, _ = torch.cuda.mem_get_info(device)
    half = min(_GPU_BYTES, free // 2) // 8
    numbers = torch.randn(2 * half, device=device)
    source, target = numbers.chunk(2)
    rates = [
        numbers.nbytes / _median_seconds(numbers.sum, device),
        numbers.nbytes / _median_seconds(lambda: target.copy_(source), device),
    ]
    return max(rates)


def _best_seconds(work: Callable[[], Any]) -> float:
    """Return the best of several runs on a CPU: what it can do when nothing disturbs it."""
    best, started = float("inf"), time.perf_counter()
    while time.perf_counter() - started < _MIN_SECONDS:
        begin = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - begin)
    return best


def _median_seconds(work: Callable[[], Any], device: torch.device) -> float:
    """Return the median of several runs, between events on the device's stream."""
    for _ in range(_WARM_UPS):
        work()
    seconds: list[float] = []
    while sum(seconds) < _MIN_SECONDS or len(seconds) < _MIN_RUNS:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begin.record(torch.cuda.current_stream(device))
        work()
        end.record(torch.cuda.current_stream(device))
        end.synchronize()
        seconds.append(begin.elapsed_time(end) / 1e3)
    return median(seconds)
