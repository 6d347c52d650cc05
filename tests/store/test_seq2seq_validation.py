"""Does a prompt fit an encoder-decoder? Each refusal names site, layer and shape."""

from typing import Any

import numpy as np
import pytest

from app.errors import PromptRejected
from app.prompt import LayerGeometry, ModelGeometry, Prompt, PromptKind, TaskType
from app.sites import Site
from app.store.prompt_file import make_prompt
from app.store.safetensors_file import RawTensor
from app.store.validation import validate_prompt
from tests.store.builders import (
    HEAD_DIM,
    HEADS,
    geometry,
    prefix,
    refusal_of,
    seq2seq_geometry,
    seq2seq_prefix,
    seq2seq_soft,
    soft,
)

ENCODER, SELF, CROSS = Site.ENCODER_SELF, Site.DECODER_SELF, Site.DECODER_CROSS
THREE = dict.fromkeys(Site, 3)
LAYER = LayerGeometry(HEADS, HEAD_DIM, HEAD_DIM)
T5 = LayerGeometry(HEADS, HEAD_DIM, HEAD_DIM, has_position_bias=True)


def t5_geometry() -> ModelGeometry:
    return seq2seq_geometry(encoder=(T5, T5), decoder=(T5, T5))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "prompt",
    [
        seq2seq_soft(encoder=3),
        seq2seq_soft(decoder=3),
        seq2seq_soft(encoder=30, decoder=62),
        seq2seq_prefix({SELF: 3}),
        seq2seq_prefix({CROSS: 500}),
        seq2seq_prefix({ENCODER: 500}),
        seq2seq_prefix({ENCODER: 1, SELF: 2, CROSS: 3}, offset=0),
    ],
)
def test_accepts_what_fits(prompt: Prompt, dtype: str) -> None:
    assert refusal_of(validate_prompt, prompt, seq2seq_geometry(dtype=dtype)) is None


def test_each_site_has_layers_of_its_own() -> None:
    """An encoder of three layers beside a decoder of two."""
    base = seq2seq_geometry(encoder=(LAYER,) * 3)
    assert refusal_of(validate_prompt, seq2seq_prefix({ENCODER: 2}, layers=3), base) is None
    assert refusal_of(validate_prompt, seq2seq_prefix({SELF: 2, CROSS: 1}), base) is None


@pytest.mark.parametrize(
    ("prompt", "base", "tensor", "reasons"),
    [
        (seq2seq_soft(encoder=3, hidden=8), {}, "enc.embeds", ["[p, 16]", "[3, 8]"]),
        (seq2seq_soft(decoder=3, hidden=8), {}, "dec.embeds", ["[p, 16]", "[3, 8]"]),
        (
            seq2seq_prefix(THREE, layers=1),
            {},
            "enc.self.1.k",
            ["encoder self-attention", "layers 0 to 1", "1 layers"],
        ),
        (
            seq2seq_prefix({CROSS: 3}, layers=3),
            {},
            "dec.cross.2.k",
            ["decoder cross-attention", "layers 0 to 1", "3 layers"],
        ),
        (
            seq2seq_prefix(THREE),
            {"encoder": (LAYER, LayerGeometry(4, 2, 2))},
            "enc.self.1.k",
            ["encoder self-attention in layer 1", "[4, 3, 2]", "[2, 3, 4]"],
        ),
        (
            seq2seq_prefix(THREE),
            {"cross": (LayerGeometry(2, 4, 8), LAYER)},
            "dec.cross.0.v",
            ["decoder cross-attention in layer 0", "[2, 3, 8]", "[2, 3, 4]"],
        ),
        (seq2seq_soft(decoder=63), {}, None, ["room for a request", "at most 62", "63 virtual tokens"]),
        (seq2seq_prefix({SELF: 63}), {}, None, ["room for a request", "at most 62", "63 virtual tokens"]),
        (seq2seq_soft(encoder=31), {}, None, ["room for a source", "at most 30", "32 positions in its enc"]),
        (soft(), {}, None, ["the base model has an encoder", "SEQ_2_SEQ_LM", "CAUSAL_LM"]),
        (prefix(), {}, None, ["the base model has an encoder", "SEQ_2_SEQ_LM", "CAUSAL_LM"]),
        (seq2seq_prefix({SELF: 3}), {"takes_prefixes": False}, None, ["train a soft prompt"]),
    ],
)
def test_refuses_what_does_not_fit(
    prompt: Prompt, base: dict[str, Any], tensor: str | None, reasons: list[str]
) -> None:
    with pytest.raises(PromptRejected) as caught:
        validate_prompt(prompt, seq2seq_geometry(**base))
    assert caught.value.tensor == tensor
    for reason in reasons:
        assert reason in caught.value.message


@pytest.mark.parametrize("prompt", [seq2seq_soft(decoder=3), seq2seq_prefix({SELF: 3})])
def test_a_decoder_alone_refuses_an_encoder_decoders_prompt(prompt: Prompt) -> None:
    """Names and shapes would fit."""
    with pytest.raises(PromptRejected, match=r"the base model is a decoder alone.*task_type CAUSAL_LM"):
        validate_prompt(prompt, geometry())


@pytest.mark.parametrize(
    ("prompt", "tensor"),
    [
        (seq2seq_prefix({ENCODER: 3}), "enc.self.0.k"),
        (seq2seq_prefix(THREE), "enc.self.0.k"),
        (seq2seq_prefix({SELF: 3}, offset=0), "dec.self.0.k"),
        (seq2seq_prefix({SELF: 3, CROSS: 1}, offset=0), "dec.self.0.k"),
    ],
)
def test_t5_refuses_keys_at_no_position(prompt: Prompt, tensor: str) -> None:
    with pytest.raises(PromptRejected, match="has no defined relative bias") as caught:
        validate_prompt(prompt, t5_geometry())
    assert caught.value.tensor == tensor
    assert refusal_of(validate_prompt, prompt, seq2seq_geometry()) is None  # as in BART


@pytest.mark.parametrize(
    "prompt", [seq2seq_prefix({SELF: 3}), seq2seq_prefix({CROSS: 3}), seq2seq_soft(encoder=3, decoder=2)]
)
def test_t5_takes_what_has_positions_or_needs_none(prompt: Prompt) -> None:
    assert refusal_of(validate_prompt, prompt, t5_geometry()) is None


@pytest.mark.parametrize(("value", "reason"), [(np.nan, "NaN or infinity"), (3.4e38, "overflows")])
@pytest.mark.parametrize("name", ["enc.self.1.v", "dec.self.0.k", "dec.cross.1.k"])
def test_numbers_are_finite_at_every_site(name: str, value: float, reason: str) -> None:
    prompt = seq2seq_prefix(THREE)
    tensors = {
        each: RawTensor(info.dtype, info.shape, prompt.tensor_bytes(each))
        for each, info in prompt.tensors.items()
    }
    bad = np.zeros((HEADS, 3, HEAD_DIM), dtype="<f4")
    bad[1, 2, 3] = value
    tensors[name] = RawTensor("F32", bad.shape, bad.tobytes())
    spoiled = make_prompt(PromptKind.PREFIX, tensors, task_type=TaskType.SEQ_2_SEQ_LM)
    with pytest.raises(PromptRejected, match=reason) as caught:
        validate_prompt(spoiled, seq2seq_geometry(dtype="bfloat16"))
    assert caught.value.tensor == name
    assert "at [1, 2, 3]" in caught.value.message
