"""The header parser: strict, cheap, and never more lenient than the safetensors library."""

import json
import pickle
import time
from typing import Any

import pytest
import safetensors
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save

from app.errors import PromptRejected, UnsafeFile
from app.store.prompt_file import read_prompt
from app.store.safetensors_file import parse_safetensors
from tests.store.builders import entry, file_bytes, many_tensors, raw, refusal_of, soft

ONE = entry([2, 2], 0, 16)
DATA = bytes(16)


@pytest.mark.parametrize("padding", [b"", b" ", b" " * 7])
def test_reads_what_the_library_writes(padding: bytes) -> None:
    parsed = parse_safetensors(file_bytes(json.dumps({"a": ONE}).encode() + padding, DATA))
    assert parsed.tensors["a"].shape == (2, 2)
    numbers = {name: raw_array(name) for name in ("b", "a")}
    parsed = parse_safetensors(save(numbers, metadata={"format": "pt"}))
    assert parsed.metadata == {"format": "pt"}
    assert sorted(parsed.tensors) == ["a", "b"]


def raw_array(name: str) -> Any:
    import numpy as np

    return np.frombuffer(raw((3, 2), ord(name)).data, dtype="<f4").reshape(3, 2)


REFUSED: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "too short"),
    "short": (b"1234567", "too short"),
    "header missing": (file_bytes({"a": ONE})[:20], "truncated inside its header"),
    "data truncated": (file_bytes({"a": ONE}, DATA[:-1]), "truncated"),
    "data missing": (file_bytes({"a": ONE}), "truncated"),
    "trailing byte": (file_bytes({"a": ONE}, DATA + b"x"), "trailing bytes"),
    "trailing without tensors": (file_bytes({}, b"x"), "trailing bytes"),
    "duplicate tensor": (
        file_bytes(b'{"a":%s,"a":%s}' % ((json.dumps(ONE).encode(),) * 2), DATA),
        "'a' appears twice",
    ),
    "duplicate field": (
        file_bytes(b'{"a":{"dtype":"F32","dtype":"F16","shape":[4],"data_offsets":[0,16]}}', DATA),
        "'dtype' appears twice",
    ),
    "duplicate metadata": (file_bytes(b'{"__metadata__":{"a":"","a":""}}'), "appears twice"),
    "unknown field": (file_bytes({"a": ONE | {"x": 1}}, DATA), "wrong fields"),
    "missing field": (file_bytes({"a": {"dtype": "F32", "shape": [4]}}, DATA), "wrong fields"),
    "entry is a list": (file_bytes({"a": []}), "not an object"),
    "metadata numbers": (file_bytes({"__metadata__": {"a": 1}}), "text to text"),
    "metadata null": (file_bytes({"__metadata__": None}), "text to text"),
    "nan": (file_bytes(b'{"a":NaN}'), "NaN"),
    "infinity": (file_bytes(b'{"a":-Infinity}'), "Infinity"),
    "float shape": (file_bytes({"a": entry([4.0], 0, 16)}, DATA), "whole numbers"),
    "minus zero": (file_bytes(b'{"a":{"dtype":"F32","shape":[4],"data_offsets":[-0,16]}}', DATA), "'-0'"),
    "negative": (file_bytes({"a": entry([-4], 0, 16)}, DATA), "non-negative"),
    "boolean dim": (file_bytes({"a": entry([True, 4], 0, 16)}, DATA), "non-negative integers"),
    "text dim": (file_bytes({"a": entry(["4"], 0, 16)}, DATA), "non-negative integers"),
    "huge number": (file_bytes({"a": entry([10**30], 0, 16)}, DATA), "64-bit"),
    "endless number": (file_bytes(b'{"a":' + b"9" * 5000 + b"}"), "64-bit"),
    "product overflow": (file_bytes({"a": entry([2**20] * 4, 0, 16)}, DATA), "too large"),
    "overflow beside a zero": (file_bytes({"a": entry([2**40, 2**40, 0], 0, 0)}), "too large"),
    "2 GB declared": (file_bytes({"a": entry([1 << 29], 0, 1 << 31)}, DATA), "truncated"),
    "shape and range disagree": (file_bytes({"a": entry([1 << 29], 0, 16)}, DATA), "disagree"),
    "rank": (file_bytes({"a": entry([1] * 9, 0, 4)}, DATA[:4]), "too long"),
    "reversed range": (file_bytes({"a": entry([4], 16, 0)}, DATA), "[begin, end]"),
    "three offsets": (
        file_bytes({"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 8, 16]}}, DATA),
        "[begin, end]",
    ),
    "gap": (file_bytes({"a": entry([1], 0, 4), "b": entry([1], 8, 12)}, DATA[:12]), "overlap or leave a gap"),
    "overlap": (file_bytes({"a": entry([2], 0, 8), "b": entry([2], 4, 12)}, DATA[:12]), "overlap"),
    "same bytes twice": (file_bytes({"a": entry([2], 0, 8), "b": entry([2], 0, 8)}, DATA[:8]), "overlap"),
    "does not start at 0": (file_bytes({"a": entry([2], 4, 12)}, DATA[:12]), "gap"),
    "deep nesting": (file_bytes(b'{"a":' + b"[" * 60000 + b"]" * 5000 + b"}"), "refused"),
    "deeper than a header": (file_bytes(b'{"a":[[[[[]]]]]}'), "nests deeper"),
    "header is a list": (file_bytes(b"[]      "), "does not start with"),
    "leading space": (file_bytes(b" {}"), "does not start with"),
    "padding is not spaces": (file_bytes(b"{}\n"), "does not end with"),
    "two objects": (file_bytes(b"{}{}"), "not JSON"),
    "not UTF-8": (file_bytes(b'{"\xff":1}'), "UTF-8"),
    "surrogate": (file_bytes(b'{"\\ud800":1}'), "surrogate"),
    "byte order mark": (file_bytes(b"\xef\xbb\xbf{}"), "does not start with"),
    "single quotes": (file_bytes(b"{'a':1}"), "not JSON"),
    "too many tensors": (
        file_bytes(b"{" + b",".join(b'"%d":{"":0}' % n for n in range(2000)) + b"}"),
        "Too many tensors",
    ),
    "pickle": (pickle.dumps({"a": [1.0] * 100}, protocol=2), "pickle"),
    "pickle 5": (pickle.dumps({"a": [1.0] * 100}, protocol=5), "pickle"),
    "torch zip": (b"PK\x03\x04" + bytes(100), "safe_serialization=True"),
    "npy": (b"\x93NUMPY\x01\x00" + bytes(100), "NumPy"),
    "gguf": (b"GGUF" + bytes(100), "GGUF"),
    "lfs pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "git lfs pull"),
    "config in place of weights": (json.dumps({"peft_type": "PROMPT_TUNING"}).encode(), "exchanged"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refuses(name: str) -> None:
    data, reason = REFUSED[name]
    with pytest.raises(UnsafeFile) as caught:
        parse_safetensors(data)
    assert reason in caught.value.message
    assert len(caught.value.message) < 500


@pytest.mark.parametrize("dtype", ["F64", "I64", "U8", "BOOL", "F8_E4M3", "f32", "<f4", "x" * 5000])
def test_refuses_dtype_with_reason(dtype: str) -> None:
    with pytest.raises(PromptRejected, match="F32, F16 or BF16") as caught:
        parse_safetensors(file_bytes({"a": entry([2], 0, 8, dtype)}, DATA[:8]))
    assert not isinstance(caught.value, UnsafeFile)
    assert len(caught.value.message) < 300


def test_header_of_300k_tensors_is_refused_before_it_is_parsed() -> None:
    data = many_tensors()
    started = time.process_time()
    with pytest.raises(UnsafeFile, match=f"at most 65536 bytes; found: {len(data) - 8} bytes"):
        parse_safetensors(data)
    assert time.process_time() - started < 0.05


def test_a_header_that_starts_like_a_pickle_is_read() -> None:
    header = json.dumps({"a": ONE}).encode().ljust(0x280)
    data = file_bytes(header, DATA)
    assert data.startswith(b"\x80\x02")
    assert parse_safetensors(data).tensors["a"].shape == (2, 2)


numbers = st.one_of(
    st.integers(-2, 40), st.sampled_from([2**31, 2**63, 2**64, 2**70]), st.floats(), st.text(max_size=2)
)
entries = st.fixed_dictionaries(
    {
        "dtype": st.one_of(st.sampled_from(["F32", "F16", "BF16"]), st.text(max_size=3)),
        "shape": st.lists(numbers, max_size=3),
        "data_offsets": st.lists(numbers, min_size=1, max_size=3),
    },
    optional={"extra": st.none()},
)
odd_headers = st.dictionaries(
    st.one_of(st.text(max_size=3), st.just("__metadata__")),
    st.one_of(entries, st.none(), st.dictionaries(st.text(max_size=2), st.text(max_size=2))),
    max_size=3,
).map(lambda header: json.dumps(header).encode())


@st.composite
def consistent_files(draw: st.DrawFn) -> bytes:
    """Correct files, in every order of the header."""
    header: dict[str, Any] = {}
    position = 0
    for name in draw(st.lists(st.text(max_size=4), max_size=4, unique=True)):
        dtype = draw(st.sampled_from(["F32", "F16", "BF16"]))
        shape = draw(st.lists(st.integers(0, 3), max_size=3))
        size = 4 if dtype == "F32" else 2
        for dim in shape:
            size *= dim
        header[name] = entry(shape, position, position + size, dtype)
        position += size
    shuffled = dict(draw(st.permutations(list(header.items()))))
    return file_bytes(shuffled | draw(st.sampled_from([{}, {"__metadata__": {"a": "b"}}])), bytes(position))


@st.composite
def damaged_files(draw: st.DrawFn) -> bytes:
    """Correct files with a few bytes changed, removed or put in."""
    data = bytearray(draw(consistent_files()))
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(data)))
        cut = draw(st.integers(0, 2))
        data[at : at + cut] = draw(
            st.one_of(st.binary(max_size=2), st.sampled_from([b"0", b"-", b"e1", b'"', b",", b"}"]))
        )
    return bytes(data)


files = st.one_of(
    st.binary(max_size=200),
    st.builds(file_bytes, odd_headers, st.binary(max_size=64)),
    consistent_files(),
    damaged_files(),
)


@settings(max_examples=600, deadline=None)
@given(files)
@example(b"\x02\0\0\0\0\0\0\0{}")
def test_accepts_only_what_the_library_accepts(data: bytes) -> None:
    refusal = refusal_of(parse_safetensors, data)
    if refusal is not None:
        assert refusal.message.isprintable()
        return
    parsed = parse_safetensors(data)
    theirs = dict(safetensors.deserialize(data))
    assert theirs.keys() == parsed.tensors.keys()
    for name, info in parsed.tensors.items():
        begin = parsed.data_start
        assert theirs[name]["shape"] == list(info.shape)
        assert bytes(theirs[name]["data"]) == data[begin + info.begin : begin + info.end]


@settings(max_examples=200, deadline=None)
@given(consistent_files())
def test_accepts_every_plain_file(data: bytes) -> None:
    assert refusal_of(parse_safetensors, data) is None


@settings(max_examples=200, deadline=None)
@given(files)
def test_no_file_makes_read_prompt_raise_anything_else(data: bytes) -> None:
    assert refusal_of(read_prompt, data) is not None


SOFT = soft(p=1, hidden=2).data


@settings(max_examples=400, deadline=None)
@given(st.integers(0, len(SOFT)), st.integers(0, 2), st.binary(max_size=2))
def test_a_damaged_prompt_is_refused_or_another_prompt(at: int, cut: int, put: bytes) -> None:
    """Canonical bytes have no slack: whatever still reads differs in its numbers, and so in its digest."""
    data = SOFT[:at] + put + SOFT[at + cut :]
    if refusal_of(read_prompt, data) is None and data != SOFT:
        assert read_prompt(data).tensor_bytes("dec.embeds") != read_prompt(SOFT).tensor_bytes("dec.embeds")
