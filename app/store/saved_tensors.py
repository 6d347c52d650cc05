"""Tensors in a PEFT file beside its prompt: the base's own embeddings, compared by digests of their rows.

PEFT saves them where tokens were added (`save_embedding_layers`), and of a large base they are far
larger than any prompt. Nothing of them is kept: they only have to be the base's. So a client may leave
them out and describe them in the file's metadata (`without_others`).
"""

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from app.errors import PromptRejected
from app.prompt import TensorInfo
from app.store.numbers import DTYPES, as_bytes, as_float32
from app.store.safetensors_file import ITEM_BYTES, SafetensorsFile, encode_header
from app.strict_json import JsonError, excerpt, parse_json

LEFT_OUT = "promptplex.left_out"
ADVICE = "save the adapter again with save_pretrained(..., save_embedding_layers=False)"
_MAX_LEFT_OUT = 16
_LARGEST = (1 << 31) - 1  # of a dimension
_CHUNK = 1 << 22  # numbers that are hashed at a time


@dataclass(frozen=True, slots=True, kw_only=True)
class SavedTensor:
    """A tensor `[rows, ...]` of the base that a file holds, or held."""

    name: str
    shape: tuple[int, ...]
    dtype: str  # safetensors' name
    digest: Callable[[int, str], str | None]  # of so many rows in a safetensors dtype; None: not known

    def compared_in(self, base_dtype: str) -> str:
        """Return the safetensors dtype in which its rows and the base's are compared: the model's own."""
        return self.dtype if base_dtype == "float32" else DTYPES[base_dtype]


def saved_tensors(file: SafetensorsFile, prompt: str) -> tuple[SavedTensor, ...]:
    """Return all but the tensor `prompt`, and what the metadata says was left out. Raise PromptRejected."""
    beside = [_in_file(file, name) for name in sorted(file.tensors.keys() - {prompt})]
    return (*beside, *_left_out(file.metadata.get(LEFT_OUT)))


def holds_others(file: SafetensorsFile, prompt: str) -> bool:
    """Return whether a file holds the tensor `prompt` and a few others."""
    return prompt in file.tensors and 1 < len(file.tensors) <= 1 + _MAX_LEFT_OUT


def without_others(file: SafetensorsFile, prompt: str, *, rows: int, base_dtype: str) -> bytes:
    """Return a file that `holds_others` with the tensor `prompt` alone; its metadata describes the others.

    `rows` and `base_dtype` (torch's name) are the base's. Raise PromptRejected.
    """
    described = [_described(saved, rows, base_dtype) for saved in saved_tensors(file, prompt)]
    kept = file.tensor(prompt)
    info = TensorInfo(kept.dtype, kept.shape, 0, len(kept.data))
    return encode_header({prompt: info}, file.metadata | {LEFT_OUT: json.dumps(described)}) + kept.data


def _in_file(file: SafetensorsFile, name: str) -> SavedTensor:
    held = file.tensor(name)
    if not held.shape or 0 in held.shape:
        raise PromptRejected("Unexpected tensor", tensor=excerpt(name), found=str(list(held.shape)))
    row = math.prod(held.shape[1:]) * ITEM_BYTES[held.dtype]

    def digest(rows: int, dtype: str) -> str:
        return _digest(memoryview(held.data)[: rows * row], held.dtype, dtype)

    return SavedTensor(name=name, shape=held.shape, dtype=held.dtype, digest=digest)


def _digest(data: memoryview, dtype: str, wanted: str) -> str:
    if dtype == wanted:
        return hashlib.sha256(data).hexdigest()
    found, step = hashlib.sha256(), _CHUNK * ITEM_BYTES[dtype]
    for begin in range(0, len(data), step):
        found.update(as_bytes(as_float32(data[begin : begin + step], dtype), wanted))
    return found.hexdigest()


def _described(saved: SavedTensor, rows: int, base_dtype: str) -> dict[str, Any]:
    count, dtype = min(rows, saved.shape[0]), saved.compared_in(base_dtype)
    return {
        "name": saved.name,
        "shape": list(saved.shape),
        "dtype": saved.dtype,
        "rows": count,
        "compared_in": dtype,
        "sha256": saved.digest(count, dtype),
    }


def _left_out(text: str | None) -> list[SavedTensor]:
    if text is None:
        return []
    try:
        described = parse_json(text.encode())
        return [_from_description(entry) for entry in described[:_MAX_LEFT_OUT]]
    except (JsonError, UnicodeEncodeError, TypeError, KeyError, ValueError):
        raise PromptRejected(f"The metadata {LEFT_OUT} is malformed: push the adapter again") from None


def _from_description(entry: Mapping[str, Any]) -> SavedTensor:
    shape, known = tuple(entry["shape"]), (entry["rows"], entry["compared_in"])
    is_shape = shape and all(type(size) is int and 0 < size <= _LARGEST for size in shape)
    if not is_shape or entry["dtype"] not in ITEM_BYTES:
        raise ValueError("no tensor that a file could have held")
    sha256 = str(entry["sha256"])
    return SavedTensor(
        name=str(entry["name"]),
        shape=shape,
        dtype=entry["dtype"],
        digest=lambda rows, dtype: sha256 if (rows, dtype) == known else None,
    )
