"""t* follows from bandwidth, arithmetic and what a step reads."""

import torch
from torch import nn

from app.models.limits import Hardware, ModelCost, decode_step, measure_hardware, model_cost, prefill

COST = ModelCost(parameters=900, head_parameters=100)


def test_a_step_takes_as_long_as_reading_or_arithmetic() -> None:
    assert decode_step(Hardware(1.0, 1e9), COST, rows=4, cached_bytes=50) == 1000 * 2 + 50
    assert decode_step(Hardware(1e9, 1.0), COST, rows=4, cached_bytes=50) == 2 * 1000 * 4
    assert prefill(Hardware(1e9, 1.0), COST, rows=4, tokens=32) == 2 * (900 * 32 + 100 * 4)


def test_one_byte_a_weight_is_read_in_half_the_time() -> None:
    eight_bits = ModelCost(parameters=900, head_parameters=100, bytes_per_parameter=1)
    assert decode_step(Hardware(1.0, 1e9), eight_bits, rows=1, cached_bytes=0) == 1000


def test_embeddings_are_not_multiplied() -> None:
    model = nn.ModuleDict(
        {"embed": nn.Embedding(10, 4), "layer": nn.Linear(4, 6), "lm_head": nn.Linear(4, 10, bias=False)}
    )
    assert model_cost(model) == ModelCost(parameters=24, head_parameters=40)


def test_the_machine_is_measured() -> None:
    hardware = measure_hardware("cpu", torch.float32)
    assert hardware.bandwidth > 1e8
    assert hardware.throughput > 1e8
