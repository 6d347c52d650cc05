"""The canonical file: one encoding per prompt, readable by the safetensors library."""

import dataclasses
import hashlib
import json
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from app.errors import PromptRejected
from app.prompt import PromptKind
from app.store.prompt_file import canonical_prompt, make_prompt, prompt_geometry, read_prompt
from app.store.safetensors_file import RawTensor, parse_safetensors
from tests.store.builders import file_bytes, prefix, prefix_tensors, raw, soft

SOFT, PREFIX = PromptKind.SOFT, PromptKind.PREFIX


@settings(max_examples=60, deadline=None)
@given(
    p=st.integers(1, 5),
    layers=st.integers(1, 12),
    heads=st.integers(1, 3),
    widths=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    dtype=st.sampled_from(["F32", "F16", "BF16"]),
    seed=st.integers(0, 99),
)
def test_prefix_round_trip(
    p: int, layers: int, heads: int, widths: tuple[int, int], dtype: str, seed: int
) -> None:
    tensors = {
        f"dec.self.{layer}.{'kv'[side]}": raw((heads, p, widths[side]), seed + 2 * layer + side, dtype)
        for layer in range(layers)
        for side in (0, 1)
    }
    prompt = make_prompt(PREFIX, tensors)
    data = prompt.data
    assert data == make_prompt(PREFIX, dict(reversed(tensors.items()))).data
    assert prompt == read_prompt(data) == canonical_prompt(parse_safetensors(data))
    assert (prompt.kind, prompt.num_virtual_tokens, prompt.position_offset) == (PREFIX, p, p)
    assert prompt.digest == hashlib.sha256(data).hexdigest()
    assert prompt.data_start % 8 == 0
    for name, source in tensors.items():
        assert prompt.tensors[name].shape == source.shape
        assert prompt.tensor_bytes(name) == source.data
    theirs = dict(safetensors.deserialize(data))
    assert {name: bytes(found["data"]) for name, found in theirs.items()} == {
        name: source.data for name, source in tensors.items()
    }


def test_the_library_reads_numbers_and_metadata(tmp_path: Any) -> None:
    prompt = soft(p=3, hidden=5)
    path = tmp_path / "soft.safetensors"
    path.write_bytes(prompt.data)
    with safetensors.safe_open(path, framework="numpy") as opened:
        assert opened.metadata() == {
            "format": "promptplex.prompt",
            "format_version": "1",
            "kind": "soft",
            "task_type": "CAUSAL_LM",
            "placement": "before_bos",
            "position_offset.dec": "3",
            "rotary_applied": "false",
            "embedding_scale_applied": "false",
            "geometry": '{"hidden_size":5,"num_virtual_tokens":3}',
        }
        numbers = opened.get_tensor("dec.embeds")
    assert np.array_equal(numbers.ravel(), np.frombuffer(raw((3, 5)).data, dtype="<f4"))


def test_bytes_are_pinned() -> None:
    """Digests name prompts for ever: an encoding that changes would orphan every stored one."""
    one = RawTensor("F32", (1, 2), np.array([1, -2], dtype="<f4").tobytes())
    digest = "5b33aa5fa220a6745240158afb8b8525c76e7353cfbac02f6eac90a54b567f5c"
    assert make_prompt(SOFT, {"dec.embeds": one}).digest == digest
    tensors = {
        f"dec.self.{layer}.{side}": RawTensor("BF16", (1, 2, 3), bytes([layer]) * 12)
        for layer in (0, 1)
        for side in "kv"
    }
    assert [make_prompt(PREFIX, tensors, position_offset=offset).digest for offset in (2, 0)] == [
        "ad7f2d55ea8538043498445910112a3ccb410057f6f77cd8e55bc693e52762a6",
        "1bfa2f360aae29a7ab52b3acd406819680dd850358d2c84966594919fba9f9dd",
    ]


def test_geometry() -> None:
    assert prompt_geometry(soft(p=3)) == {"hidden_size": 16, "num_virtual_tokens": 3}
    assert prompt_geometry(prefix(p=2)) == {
        "layers": {"0": [2, 4, 4], "1": [2, 4, 4]},
        "num_virtual_tokens": 2,
    }


def test_a_prefix_may_keep_positions_at_zero() -> None:
    prompt = read_prompt(make_prompt(PREFIX, prefix_tensors(p=3), position_offset=0).data)
    assert (prompt.num_virtual_tokens, prompt.position_offset) == (3, 0)
    assert prompt.digest != prefix(p=3).digest


def test_other_encodings_of_a_prompt_are_rewritten_to_the_same_digest() -> None:
    """The library orders the header otherwise; the prompt is the same."""
    prompt = prefix()
    start = prompt.data_start
    arrays = {
        name: np.frombuffer(prompt.tensor_bytes(name), dtype="<f4").reshape(info.shape)
        for name, info in prompt.tensors.items()
    }
    metadata = parse_safetensors(prompt.data).metadata
    foreign = safetensors.numpy.save(
        dict(reversed(arrays.items())), metadata=dict(reversed(metadata.items()))
    )
    assert canonical_prompt(parse_safetensors(foreign)) == prompt
    loose = file_bytes(json.dumps(json.loads(prompt.data[8:start])).encode(), prompt.data[start:])
    assert canonical_prompt(parse_safetensors(loose)) == prompt
    with pytest.raises(PromptRejected, match="not in canonical form"):
        read_prompt(loose)


K, V = raw((2, 3, 4), 1), raw((2, 3, 4), 2)
WRITE_REFUSED: dict[str, tuple[PromptKind, dict[str, RawTensor], int | None, str]] = {
    "soft: nothing": (SOFT, {}, None, "no tensors"),
    "soft: another name": (SOFT, {"../../x": raw((2, 2))}, None, "exactly dec.embeds"),
    "soft: one too many": (SOFT, {"dec.embeds": raw((2, 2)), "x": raw((1,))}, None, "exactly dec.embeds"),
    "soft: rank": (SOFT, {"dec.embeds": raw((2, 2, 2))}, None, "[p, hidden]"),
    "soft: no tokens": (SOFT, {"dec.embeds": raw((0, 2))}, None, "empty"),
    "soft: offset": (SOFT, {"dec.embeds": raw((2, 2))}, 0, "position offset"),
    "soft: bytes": (SOFT, {"dec.embeds": RawTensor("F32", (2, 2), b"1234")}, None, "fill the shape"),
    "prefix: nothing": (PREFIX, {}, None, "no tensors"),
    "prefix: encoder": (PREFIX, {"enc.self.0.k": K, "enc.self.0.v": V}, None, "enc.self.0.k"),
    "prefix: leading zero": (PREFIX, {"dec.self.00.k": K, "dec.self.00.v": V}, None, "Unexpected tensor"),
    "prefix: newline": (PREFIX, {"dec.self.0.k\n": K}, None, "Unexpected tensor"),
    "prefix: keys only": (PREFIX, {"dec.self.0.k": K}, None, "tensor: dec.self.0.v"),
    "prefix: values only": (PREFIX, {"dec.self.0.v": V}, None, "tensor: dec.self.0.k"),
    "prefix: heads": (PREFIX, {"dec.self.0.k": K, "dec.self.0.v": raw((1, 3, 4))}, None, "2 heads"),
    "prefix: tokens": (PREFIX, {"dec.self.0.k": K, "dec.self.0.v": raw((2, 2, 4))}, None, "[2, 3]"),
    "prefix: rank": (PREFIX, {"dec.self.0.k": raw((2, 12)), "dec.self.0.v": V}, None, "[heads, p, width]"),
    "prefix: dtypes": (
        PREFIX,
        {"dec.self.0.k": K, "dec.self.0.v": raw((2, 3, 4), 2, "F16")},
        None,
        "share one dtype",
    ),
    "prefix: offset": (PREFIX, {"dec.self.0.k": K, "dec.self.0.v": V}, 2, "0 or 3"),
    "prefix: header": (
        PREFIX,
        {f"dec.self.{n // 2}.{'kv'[n % 2]}": raw((1, 1, 1)) for n in range(1500)},
        None,
        "too many layers",
    ),
}


@pytest.mark.parametrize("name", WRITE_REFUSED)
def test_write_refuses(name: str) -> None:
    kind, tensors, offset, reason = WRITE_REFUSED[name]
    with pytest.raises(PromptRejected) as caught:
        make_prompt(kind, tensors, position_offset=offset)
    assert reason in caught.value.message


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("format", "pt", "not a promptplex prompt"),
        ("format", None, "not a promptplex prompt"),
        ("format_version", "2", "format_version"),
        ("kind", "text", "'kind'"),
        ("kind", "prefix", "Unexpected tensor"),
        ("task_type", "SEQ_CLS", "CAUSAL_LM or SEQ_2_SEQ_LM"),
        ("task_type", "SEQ_2_SEQ_LM", "geometry"),
        ("task_type", None, "task_type"),
        ("position_offset.enc", "0", "no such key"),
        ("placement", "suffix", "placement"),
        ("position_offset.dec", "03", "position_offset.dec"),
        ("position_offset.dec", "0", "position offset is impossible"),
        ("position_offset.dec", None, "position_offset.dec"),
        ("rotary_applied", "true", "rotary_applied"),
        ("embedding_scale_applied", None, "embedding_scale_applied"),
        ("geometry", '{"hidden_size": 16,"num_virtual_tokens":3}', "geometry"),
        ("author", "me", "no such key"),
    ],
)
def test_read_verifies_every_metadata_key(key: str, value: str | None, reason: str) -> None:
    prompt = soft()
    header = json.loads(prompt.data[8 : prompt.data_start])
    header["__metadata__"][key] = value
    if value is None:
        del header["__metadata__"][key]
    text = json.dumps(header, sort_keys=True, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with pytest.raises(PromptRejected) as caught:
        read_prompt(file_bytes(text, prompt.data[prompt.data_start :]))
    assert reason in caught.value.message


def test_prompts_are_immutable() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        soft().digest = "x"
