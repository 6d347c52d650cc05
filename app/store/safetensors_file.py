"""A strict reader of safetensors headers; nothing is allocated for what a header merely claims.

The safetensors library accepts duplicate names (the last wins), headers of 100 MB, unknown fields
and any name. We parse the header ourselves and refuse all of that. Layout of the file:

    8 bytes   n, the length of the header, little-endian
    n bytes   JSON: name -> {dtype, shape, data_offsets}, `__metadata__` -> {text: text}; padded with spaces
    the rest  the tensors' bytes, contiguous and without gaps
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from app.errors import PromptRejected, UnsafeFile
from app.prompt import TensorInfo
from app.strict_json import JsonError, canonical_json, excerpt, parse_json

MAX_HEADER_BYTES = 64 * 1024
MAX_TENSORS = 1024
MAX_RANK = 8
MAX_ELEMENTS = 2**40
LENGTH_BYTES = 8
METADATA = "__metadata__"
ITEM_BYTES = {"F32": 4, "F16": 2, "BF16": 2}

_PICKLE_ADVICE = (
    "Such files can run code when they are opened, so they are never loaded here. Save the adapter with "
    "save_pretrained(..., safe_serialization=True) and send adapter_model.safetensors, or convert other "
    "formats with `promptplex convert`"
)
_FOREIGN = (
    (b"PK\x03\x04", f"This is a zip archive or a PyTorch file (.bin, .pt, .nemo). {_PICKLE_ADVICE}"),
    *((bytes((0x80, n)), f"This is a Python pickle (.bin, .pt). {_PICKLE_ADVICE}") for n in range(1, 6)),
    (b"\x93NUMPY", f"This is a NumPy file (.npy). {_PICKLE_ADVICE}"),
    (b"GGUF", "This is a GGUF file. Send a safetensors file"),
    (
        b"version https://git-lfs",
        "This is a Git LFS pointer, not the file. Fetch it with `git lfs pull`",
    ),
    (b"{", "This is JSON, not a safetensors file. Were the config and the weights exchanged?"),
)


@dataclass(frozen=True, slots=True)
class RawTensor:
    """A tensor's little-endian, contiguous bytes; numbers are moved, never converted."""

    dtype: str  # safetensors' name
    shape: tuple[int, ...]
    data: bytes | memoryview


@dataclass(frozen=True, slots=True)
class SafetensorsFile:
    """A file with a checked header. `tensors` come in the order of their bytes."""

    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]
    data_start: int
    data: bytes  # the whole file

    def tensor(self, name: str) -> RawTensor:
        """Return a tensor as a view of the file. Raise KeyError."""
        info = self.tensors[name]
        begin, end = self.data_start + info.begin, self.data_start + info.end
        return RawTensor(info.dtype, info.shape, memoryview(self.data)[begin:end])


def parse_safetensors(data: bytes) -> SafetensorsFile:
    """Parse and check the header of a whole file.

    Raise UnsafeFile where the bytes are not strict safetensors, PromptRejected where they are
    but hold a dtype that no prompt has.
    """
    header = _header_bytes(data)
    try:
        entries = parse_json(header, max_depth=4, naturals_only=True)
    except JsonError as error:
        raise UnsafeFile(f"The safetensors header is refused: {error}") from None
    assert isinstance(entries, dict)  # it starts with a brace
    metadata = _metadata(entries.pop(METADATA, {}))
    if len(entries) > MAX_TENSORS:
        raise UnsafeFile("Too many tensors", expected=f"at most {MAX_TENSORS}", found=str(len(entries)))
    tensors = {name: _tensor(name, entry) for name, entry in entries.items()}
    data_start = LENGTH_BYTES + int.from_bytes(data[:LENGTH_BYTES], "little")
    return SafetensorsFile(_in_byte_order(tensors, len(data) - data_start), metadata, data_start, data)


def encode_header(tensors: Mapping[str, TensorInfo], metadata: Mapping[str, str]) -> bytes:
    """Return length and JSON of a header, padded with spaces to 8 bytes as the safetensors library does."""
    entries: dict[str, object] = {
        name: {"dtype": info.dtype, "shape": info.shape, "data_offsets": [info.begin, info.end]}
        for name, info in tensors.items()
    }
    body = canonical_json({METADATA: metadata, **entries})
    body += b" " * (-len(body) % 8)
    return len(body).to_bytes(LENGTH_BYTES, "little") + body


def _header_bytes(data: bytes) -> bytes:
    if len(data) < LENGTH_BYTES + 2:
        raise UnsafeFile("The file is too short to be safetensors", found=f"{len(data)} bytes")
    length = int.from_bytes(data[:LENGTH_BYTES], "little")
    if length > MAX_HEADER_BYTES:
        _refuse_foreign(data)
        raise UnsafeFile(
            "This is not a safetensors file, or its header is too long",
            expected=f"at most {MAX_HEADER_BYTES} bytes",
            found=f"{length} bytes",
        )
    if length > len(data) - LENGTH_BYTES:
        _refuse_foreign(data)
        raise UnsafeFile(
            "The file is truncated inside its header",
            expected=f"a header of {length} bytes",
            found=f"{len(data) - LENGTH_BYTES} bytes",
        )
    header = data[LENGTH_BYTES : LENGTH_BYTES + length]
    if not header.startswith(b"{"):
        _refuse_foreign(data)
        raise UnsafeFile("This is not a safetensors file: its header does not start with '{'")
    header = header.rstrip(b" ")
    if not header.endswith(b"}"):
        raise UnsafeFile("The safetensors header does not end with '}' and spaces")
    return header


def _refuse_foreign(data: bytes) -> None:
    """Raise UnsafeFile that names a well-known format.

    Call it only where the bytes can't be safetensors: a header of 640 bytes starts like a pickle.
    """
    for magic, message in _FOREIGN:
        if data.startswith(magic):
            raise UnsafeFile(message)


def _metadata(value: Any) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        raise UnsafeFile(f"{METADATA} of the safetensors header must map text to text")
    return value


def _tensor(name: str, entry: Any) -> TensorInfo:
    shown = excerpt(name)
    fields = "exactly dtype, shape and data_offsets"
    if not isinstance(entry, dict):
        raise UnsafeFile("A header entry is not an object", tensor=shown, expected=fields)
    if entry.keys() != {"dtype", "shape", "data_offsets"}:
        found = ", ".join(excerpt(field) for field in list(entry)[:8]) or "none"
        raise UnsafeFile("A header entry has the wrong fields", tensor=shown, expected=fields, found=found)
    item_bytes = _item_bytes(shown, entry["dtype"])
    shape = _naturals(shown, "shape", entry["shape"])
    offsets = _naturals(shown, "data_offsets", entry["data_offsets"])
    if len(offsets) != 2 or offsets[0] > offsets[1]:
        raise UnsafeFile("data_offsets must be [begin, end]", tensor=shown, found=str(list(offsets)))
    begin, end = offsets
    size = _num_elements(shown, shape) * item_bytes
    if size != end - begin:
        raise UnsafeFile(
            "The shape and the byte range disagree",
            tensor=shown,
            expected=f"{size} bytes for {entry['dtype']} {list(shape)}",
            found=f"{end - begin} bytes",
        )
    return TensorInfo(entry["dtype"], shape, begin, end)


def _item_bytes(shown: str, dtype: Any) -> int:
    if not isinstance(dtype, str):
        raise UnsafeFile("dtype must be text", tensor=shown)
    if dtype not in ITEM_BYTES:
        raise PromptRejected(
            "Prompts hold floating-point numbers only, of 16 or 32 bits: cast others before they are saved",
            tensor=shown,
            expected="dtype F32, F16 or BF16",
            found=excerpt(dtype),
        )
    return ITEM_BYTES[dtype]


def _naturals(shown: str, field: str, value: Any) -> tuple[int, ...]:
    if not isinstance(value, list) or not all(type(item) is int for item in value):
        raise UnsafeFile(f"{field} must be a list of non-negative integers", tensor=shown)
    if len(value) > MAX_RANK:
        raise UnsafeFile(f"{field} is too long", tensor=shown, expected=f"at most {MAX_RANK} numbers")
    return tuple(value)


def _num_elements(shown: str, shape: tuple[int, ...]) -> int:
    bound, product = 1, 1
    for dim in shape:
        bound *= max(dim, 1)  # a zero must not hide a product that other readers overflow on
        product *= dim
    if bound > MAX_ELEMENTS:
        raise UnsafeFile("The declared shape is too large", tensor=shown, found=str(list(shape)))
    return product


def _in_byte_order(tensors: dict[str, TensorInfo], data_bytes: int) -> dict[str, TensorInfo]:
    """Return the tensors in the order of their bytes. Raise UnsafeFile unless each byte belongs to one."""
    ordered = sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end))
    position = 0
    for name, info in ordered:
        if info.begin != position:
            raise UnsafeFile(
                "Tensors overlap or leave a gap",
                tensor=excerpt(name),
                expected=f"data from byte {position}",
                found=f"from byte {info.begin}",
            )
        position = info.end
    if position > data_bytes:
        raise UnsafeFile(
            "The file is truncated", expected=f"{position} bytes of tensors", found=f"{data_bytes} bytes"
        )
    if position < data_bytes:
        raise UnsafeFile(
            "The file has trailing bytes",
            expected=f"{position} bytes of tensors",
            found=f"{data_bytes} bytes",
        )
    return dict(ordered)
