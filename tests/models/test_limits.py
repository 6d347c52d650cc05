"""t* follows from bandwidth, arithmetic and what a step reads."""

import torch

from app.models.limits import (
    Hardware,
    ModelCost,
    cost_of,
    decode_step,
    decode_step_in_words,
    measure_hardware,
    model_cost,
    prefill,
)
from tests.tiny_models import tiny_model, tiny_seq2seq

COST = ModelCost(parameters=900, head_parameters=100)


def test_a_step_takes_as_long_as_reading_or_arithmetic() -> None:
    assert decode_step(Hardware(1.0, 1e9), COST, rows=4, cached_bytes=50) == 1000 * 2 + 50
    assert decode_step(Hardware(1e9, 1.0), COST, rows=4, cached_bytes=50) == 2 * 1000 * 4
    assert prefill(Hardware(1e9, 1.0), COST, rows=4, tokens=32) == 2 * (900 * 32 + 100 * 4)


def test_one_byte_a_weight_is_read_in_half_the_time() -> None:
    eight_bits = ModelCost(parameters=900, head_parameters=100, bytes_per_parameter=1)
    assert decode_step(Hardware(1.0, 1e9), eight_bits, rows=1, cached_bytes=0) == 1000


def test_embeddings_are_not_multiplied_and_a_head_may_share_theirs() -> None:
    for tied in (False, True):
        model = tiny_model("llama", tie_word_embeddings=tied)
        layers = sum(each.numel() for each in model.model.layers.parameters() if each.ndim == 2)
        expected = ModelCost(layers, model.lm_head.weight.numel(), bytes_per_parameter=4)
        assert model_cost(model) == cost_of(model.config, torch.float32) == expected


def test_experts_are_not_all_read() -> None:
    assert cost_of(tiny_model("mixtral").config, torch.float32) is None
    assert cost_of(tiny_seq2seq("t5").config, torch.float32) is None


def test_the_limit_is_said_in_words() -> None:
    assert decode_step_in_words(Hardware(1.0, 1e9), COST, 4, 50) == "reading weights"
    assert decode_step_in_words(Hardware(1.0, 1e9), COST, 4, 5000) == "reading keys and values"
    assert decode_step_in_words(Hardware(1e9, 1.0), COST, 4, 50) == "arithmetic"


def test_the_machine_is_measured() -> None:
    hardware = measure_hardware("cpu", torch.float32)
    assert hardware.bandwidth > 1e8
    assert hardware.throughput > 1e8
