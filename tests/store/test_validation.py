"""Does it fit the base? Each refusal names the tensor, what was expected and what came."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from app.errors import PromptRejected
from app.prompt import LayerGeometry, Prompt, PromptKind
from app.store.prompt_file import make_prompt
from app.store.safetensors_file import RawTensor
from app.store.validation import validate_prompt
from tests.store.builders import HEAD_DIM, HEADS, geometry, prefix, prefix_tensors, raw, refusal_of, soft

LAYER = LayerGeometry(HEADS, HEAD_DIM, HEAD_DIM)
_NUMPY = {"F32": "<u4", "F16": "<u2", "BF16": "<u2"}
_TORCH = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("source", ["F32", "BF16", "F16"])
def test_accepts_what_fits(dtype: str, source: str) -> None:
    assert refusal_of(validate_prompt, soft(dtype=source), geometry(dtype=dtype)) is None
    assert refusal_of(validate_prompt, prefix(dtype=source), geometry(dtype=dtype)) is None


@pytest.mark.parametrize(
    ("prompt", "base", "tensor", "expected", "found"),
    [
        (soft(hidden=8), {}, "dec.embeds", "[p, 16]", "[3, 8]"),
        (prefix(layers=1), {}, "dec.self.1.k", "layers 0 to 1", "1 layers, 0 to 0"),
        (prefix(layers=3), {}, "dec.self.2.k", "layers 0 to 1", "3 layers, 0 to 2"),
        (prefix(), {"decoder": (LAYER, LayerGeometry(4, 4, 4))}, "dec.self.1.k", "[4, 3, 4]", "[2, 3, 4]"),
        (prefix(), {"decoder": (LayerGeometry(2, 8, 4), LAYER)}, "dec.self.0.k", "[2, 3, 8]", "[2, 3, 4]"),
        (prefix(), {"decoder": (LAYER, LayerGeometry(2, 4, 8))}, "dec.self.1.v", "[2, 3, 8]", "[2, 3, 4]"),
        (soft(p=63), {}, None, "at most 62 virtual tokens", "63 virtual tokens"),
        (prefix(p=63), {}, None, "at most 62 virtual tokens", "63 virtual tokens"),
    ],
)
def test_refuses_what_does_not_fit(
    prompt: Prompt, base: dict[str, Any], tensor: str | None, expected: str, found: str
) -> None:
    with pytest.raises(PromptRejected) as caught:
        validate_prompt(prompt, geometry(**base))
    assert caught.value.tensor == tensor
    assert expected in str(caught.value.expected)
    assert found in str(caught.value.found)
    assert expected in caught.value.message


def test_room_for_one_token_and_one_new_one() -> None:
    assert refusal_of(validate_prompt, soft(p=62), geometry()) is None


def test_keys_and_values_of_different_widths() -> None:
    tensors = {
        "dec.self.0.k": raw((2, 3, 4), 0),
        "dec.self.0.v": raw((2, 3, 6), 1),
    }
    prompt = make_prompt(PromptKind.PREFIX, tensors)
    assert refusal_of(validate_prompt, prompt, geometry(decoder=(LayerGeometry(2, 4, 6),))) is None


def with_bits(source: str, bits: int) -> Prompt:
    words = np.zeros((3, 16), dtype=_NUMPY[source])
    words[1, 2] = bits
    return make_prompt(PromptKind.SOFT, {"dec.embeds": RawTensor(source, (3, 16), words.tobytes())})


@settings(max_examples=300, deadline=None)
@given(
    source_bits=st.one_of(
        st.tuples(st.just("F32"), st.integers(0, 2**32 - 1)),
        st.tuples(st.just("F32"), st.integers(0x7F7F7F00, 0x7F800001)),  # around bfloat16's largest
        st.tuples(st.just("F32"), st.integers(0x477FE000, 0x47800001)),  # around float16's largest
        st.tuples(st.sampled_from(["F16", "BF16"]), st.integers(0, 2**16 - 1)),
    ),
    dtype=st.sampled_from(["float32", "bfloat16", "float16"]),
)
@example(("F32", 0x7F7F7FFF), "bfloat16")  # rounds down to the largest bfloat16
@example(("F32", 0x7F7F8000), "bfloat16")  # a tie: to even, which is infinity
@example(("F32", 0xFF7F8000), "bfloat16")
@example(("F32", 0x477FEFFF), "float16")
@example(("F32", 0x477FF000), "float16")  # 65520
@example(("F16", 0x7D00), "float32")  # a signalling NaN
@example(("BF16", 0x7F80), "float32")
def test_finite_before_and_after_the_cast_as_torch_casts(source_bits: tuple[str, int], dtype: str) -> None:
    source, bits = source_bits
    prompt = with_bits(source, bits)
    value = torch.from_numpy(np.array([bits], dtype=_NUMPY[source]).view(np.uint8)).view(_TORCH[source])
    is_fine = bool(torch.isfinite(value.to(getattr(torch, dtype))).all())
    refusal = refusal_of(lambda: validate_prompt(prompt, geometry(dtype=dtype)))
    assert (refusal is None) == is_fine
    if refusal is not None:
        assert refusal.tensor == "dec.embeds"
        assert "at [1, 2]" in str(refusal.found)
        before = bool(torch.isfinite(value).all())
        assert ("overflows" if before else "NaN or infinity") in refusal.message


def test_every_layer_is_looked_at() -> None:
    tensors = prefix_tensors()
    bad = np.full((HEADS, 3, HEAD_DIM), np.nan, dtype="<f4")
    tensors["dec.self.1.v"] = RawTensor("F32", bad.shape, bad.tobytes())
    with pytest.raises(PromptRejected, match=r"tensor: dec\.self\.1\.v"):
        validate_prompt(make_prompt(PromptKind.PREFIX, tensors), geometry())
