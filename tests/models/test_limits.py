"""t* follows from bandwidth, arithmetic and what a step reads."""

from collections.abc import Callable

import pytest
import torch

from app.models import limits
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
    assert decode_step(Hardware(1.0, 1e9), eight_bits, rows=1, cached_bytes=0) == 900 + 2 * 100


def test_weights_count_as_they_are_loaded() -> None:
    """With --weights int8 the head stays in bf16; what another quantized base takes can't be said."""
    config = tiny_model("llama").config
    plain, eight_bits = (cost_of(config, torch.bfloat16, weights) for weights in ("auto", "int8"))
    assert plain is not None
    assert eight_bits is not None
    assert plain.weight_bytes == 2 * (plain.parameters + plain.head_parameters)
    assert eight_bits.weight_bytes == plain.parameters + 2 * plain.head_parameters
    config.quantization_config = {"quant_method": "fp8"}
    assert cost_of(config, torch.bfloat16) is None


def test_embeddings_are_not_multiplied_and_a_head_may_share_theirs() -> None:
    for tied in (False, True):
        model = tiny_model("llama", tie_word_embeddings=tied)
        layers = sum(each.numel() for each in model.model.layers.parameters() if each.ndim == 2)
        expected = ModelCost(
            layers, model.lm_head.weight.numel(), bytes_per_parameter=4, bytes_per_head_parameter=4
        )
        assert model_cost(model) == cost_of(model.config, torch.float32) == expected


def test_experts_are_not_all_read() -> None:
    assert cost_of(tiny_model("mixtral").config, torch.float32) is None
    assert cost_of(tiny_seq2seq("t5").config, torch.float32) is None


def test_the_limit_is_said_in_words() -> None:
    assert decode_step_in_words(Hardware(1.0, 1e9), COST, 4, 50) == "reading weights"
    assert decode_step_in_words(Hardware(1.0, 1e9), COST, 4, 5000) == "reading keys and values"
    assert decode_step_in_words(Hardware(1e9, 1.0), COST, 4, 50) == "arithmetic"


def test_a_gpus_reads_and_copies_count_all_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of as much memory as half of what is free; here in a CPU's, with given seconds."""

    durations = [0.5, 0.25, 0.125, 0.25]  # of a read and a copy, twice

    def seconds(work: Callable[[], object], device: torch.device) -> float:
        work()
        return durations.pop(0)

    monkeypatch.setattr(limits, "_median_seconds", seconds)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1 << 20, 1 << 30))
    assert limits._gpu_bandwidth(torch.device("cpu")) == (1 << 19) / 0.25
    assert limits._gpu_bandwidth(torch.device("cpu")) == (1 << 19) / 0.125


def test_the_machine_is_measured() -> None:
    hardware = measure_hardware("cpu", torch.float32)
    assert hardware.bandwidth > 1e8
    assert hardware.throughput > 1e8
