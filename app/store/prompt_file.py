"""The one canonical file of a prompt: equal prompts have equal bytes (docs/formats.md).

Legend: p virtual tokens, d hidden size, l layer, Hk key/value heads, Dk and Dv their widths.
"""

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass

from app.errors import PromptRejected
from app.prompt import Prompt, PromptKind, TensorInfo
from app.sites import SIDES, Embedding, Site, parse_prefix_tensor
from app.store.safetensors_file import (
    ITEM_BYTES,
    LENGTH_BYTES,
    MAX_HEADER_BYTES,
    METADATA,
    ParsedFile,
    parse_safetensors,
)
from app.strict_json import canonical_json, excerpt

__all__ = [
    "FORMAT",
    "ParsedFile",
    "RawTensor",
    "parse_safetensors",
    "prompt_geometry",
    "read_prompt",
    "rewrite_prompt",
    "write_prompt",
]

FORMAT = "promptplex.prompt"
FORMAT_VERSION = "1"
_KINDS = {kind.value: kind for kind in (PromptKind.SOFT, PromptKind.PREFIX)}


@dataclass(frozen=True, slots=True)
class RawTensor:
    """A tensor's little-endian, contiguous bytes; numbers are moved, never converted."""

    dtype: str  # safetensors' name
    shape: tuple[int, ...]
    data: bytes | memoryview


@dataclass(frozen=True, slots=True)
class _Shape:
    """What the tensors' names and shapes say."""

    num_virtual_tokens: int
    geometry: dict[str, object]  # goes into the metadata


def write_prompt(
    kind: PromptKind, tensors: Mapping[str, RawTensor], *, position_offset: int | None = None
) -> bytes:
    """Encode a prompt; the same content always gives the same bytes.

    `position_offset` is the position of the first token after the prompt; p where not given.
    Raises PromptRejected where names, dtypes or shapes don't make a prompt of this kind.
    """
    infos = _lay_out({name: (raw.dtype, raw.shape) for name, raw in tensors.items()})
    metadata = _describe(kind, infos, position_offset)
    header = _header(infos, metadata)
    if len(header) > LENGTH_BYTES + MAX_HEADER_BYTES:
        raise PromptRejected("The prompt has too many layers for one file", found=f"{len(infos)} tensors")
    for name, info in infos.items():
        if len(tensors[name].data) != info.end - info.begin:
            raise PromptRejected("The bytes don't fill the shape", tensor=name)
    return b"".join([header, *(tensors[name].data for name in infos)])


def read_prompt(data: bytes) -> Prompt:
    """Read a canonical file and verify all of it. Raises PromptRejected (UnsafeFile).

    Bytes that mean a prompt but aren't the canonical encoding of it are refused: the digest is
    the prompt's identity, so there must be one encoding. `rewrite_prompt` makes it.
    """
    parsed = parse_safetensors(data)
    kind, offset = _kind_and_offset(parsed)
    infos = _lay_out({name: (info.dtype, info.shape) for name, info in parsed.tensors.items()})
    if data[: parsed.data_start] != _header(infos, parsed.metadata):
        raise PromptRejected("The file is not in canonical form: import it again")
    return Prompt(
        digest=hashlib.sha256(data).hexdigest(),
        kind=kind,
        num_virtual_tokens=_shape(kind, infos).num_virtual_tokens,
        position_offset=offset,
        tensors=infos,
        data_start=parsed.data_start,
        data=data,
    )


def rewrite_prompt(data: bytes) -> bytes:
    """Bring a file with canonical names and metadata, in whatever order, to the canonical bytes."""
    parsed = parse_safetensors(data)
    kind, offset = _kind_and_offset(parsed)
    start = parsed.data_start
    view = memoryview(data)
    tensors = {
        name: RawTensor(info.dtype, info.shape, view[start + info.begin : start + info.end])
        for name, info in parsed.tensors.items()
    }
    return write_prompt(kind, tensors, position_offset=offset)


def prompt_geometry(prompt: Prompt) -> dict[str, object]:
    """The prompt's shape as its metadata has it: JSON-able, for manifests."""
    return _shape(prompt.kind, prompt.tensors).geometry


def _lay_out(shapes: Mapping[str, tuple[str, tuple[int, ...]]]) -> dict[str, TensorInfo]:
    """Byte ranges in the order of the names. One dtype, so that every tensor is aligned to it."""
    infos: dict[str, TensorInfo] = {}
    position = 0
    dtypes = sorted({dtype for dtype, _ in shapes.values()})
    if len(dtypes) > 1:
        raise PromptRejected("All tensors of a prompt share one dtype", found=", ".join(dtypes))
    for name in sorted(shapes):
        dtype, shape = shapes[name]
        size = ITEM_BYTES[dtype]
        for dim in shape:
            size *= dim
        infos[name] = TensorInfo(dtype, shape, position, position + size)
        position += size
    return infos


def _header(infos: Mapping[str, TensorInfo], metadata: Mapping[str, str]) -> bytes:
    """Length and JSON, padded with spaces to 8 bytes as the safetensors library does."""
    entries: dict[str, object] = {
        name: {"dtype": info.dtype, "shape": info.shape, "data_offsets": [info.begin, info.end]}
        for name, info in infos.items()
    }
    body = canonical_json({METADATA: metadata, **entries})
    body += b" " * (-len(body) % 8)
    return len(body).to_bytes(LENGTH_BYTES, "little") + body


def _describe(
    kind: PromptKind, infos: Mapping[str, TensorInfo], position_offset: int | None
) -> dict[str, str]:
    shape = _shape(kind, infos)
    offset = shape.num_virtual_tokens if position_offset is None else position_offset
    allowed = {shape.num_virtual_tokens} if kind is PromptKind.SOFT else {0, shape.num_virtual_tokens}
    if offset not in allowed:
        expected = " or ".join(str(number) for number in sorted(allowed))
        raise PromptRejected("The position offset is impossible", expected=expected, found=str(offset))
    return {
        "embedding_scale_applied": "false",
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "geometry": canonical_json(shape.geometry).decode(),
        "kind": kind.value,
        "placement": "before_bos",
        "position_offset.dec": str(offset),
        "rotary_applied": "false",
        "task_type": "CAUSAL_LM",
    }


def _kind_and_offset(parsed: ParsedFile) -> tuple[PromptKind, int]:
    """Compare the metadata with what the tensors say, key by key."""
    found = parsed.metadata
    if found.get("format") != FORMAT:
        raise PromptRejected("This is not a promptplex prompt", expected=f"metadata format {FORMAT!r}")
    kind = _KINDS.get(found.get("kind", ""))
    if kind is None:
        raise _metadata_error("kind", "soft or prefix", found.get("kind"))
    text = found.get("position_offset.dec", "")
    if not re.fullmatch(r"0|[1-9][0-9]{0,8}", text):
        raise _metadata_error("position_offset.dec", "a whole number", text)
    expected = _describe(kind, parsed.tensors, int(text))
    for key in sorted(expected.keys() | found.keys()):
        if expected.get(key) != found.get(key):
            raise _metadata_error(key, expected.get(key, "no such key"), found.get(key))
    return kind, int(text)


def _metadata_error(key: str, expected: str, found: str | None) -> PromptRejected:
    shown = "nothing" if found is None else excerpt(found)
    return PromptRejected(f"Metadata {excerpt(key)} is wrong", expected=expected, found=shown)


def _shape(kind: PromptKind, infos: Mapping[str, TensorInfo]) -> _Shape:
    for name, info in infos.items():
        if 0 in info.shape:
            raise PromptRejected("A tensor is empty", tensor=excerpt(name), found=str(list(info.shape)))
    return _soft_shape(infos) if kind is PromptKind.SOFT else _prefix_shape(infos)


def _soft_shape(infos: Mapping[str, TensorInfo]) -> _Shape:
    if infos.keys() != {Embedding.DECODER}:
        raise _names_error(f"exactly {Embedding.DECODER}", infos)
    shape = infos[Embedding.DECODER].shape  # [p, d]
    if len(shape) != 2:
        raise PromptRejected("A soft prompt is [p, hidden]", tensor=Embedding.DECODER, found=str(list(shape)))
    return _Shape(shape[0], {"hidden_size": shape[1], "num_virtual_tokens": shape[0]})


def _prefix_shape(infos: Mapping[str, TensorInfo]) -> _Shape:
    layers: dict[int, dict[str, tuple[int, ...]]] = {}
    for name, info in infos.items():
        parts = parse_prefix_tensor(name)
        if parts is None or parts.site is not Site.DECODER_SELF:
            expected = f"{Site.DECODER_SELF.tensor('{layer}', 'k')} or .v"
            raise PromptRejected("Unexpected tensor", tensor=excerpt(name), expected=expected)
        if len(info.shape) != 3:
            raise PromptRejected("A prefix is [heads, p, width]", tensor=name, found=str(list(info.shape)))
        layers.setdefault(parts.layer, {})[parts.side] = info.shape
    if not layers:
        expected = f"{Site.DECODER_SELF.tensor('{layer}', 'k')} and .v"
        raise PromptRejected("The file holds no tensors", expected=expected)
    num_tokens = {shape[1] for sides in layers.values() for shape in sides.values()}
    if len(num_tokens) > 1:
        found = str(sorted(num_tokens)[:8])
        raise PromptRejected("Layers differ in their number of virtual tokens", found=found)
    geometry = {str(layer): _layer_shape(layer, sides) for layer, sides in layers.items()}
    (p,) = num_tokens
    return _Shape(p, {"layers": geometry, "num_virtual_tokens": p})


def _layer_shape(layer: int, sides: Mapping[str, tuple[int, ...]]) -> list[int]:
    """[Hk, Dk, Dv] of one layer, from k [Hk, p, Dk] and v [Hk, p, Dv]."""
    key_name, value_name = (Site.DECODER_SELF.tensor(layer, side) for side in SIDES)
    if sides.keys() != {"k", "v"}:
        missing = value_name if "k" in sides else key_name
        raise PromptRejected("A layer needs both keys and values", tensor=missing, found="no such tensor")
    key, value = sides["k"], sides["v"]
    if key[0] != value[0]:
        expected, found = f"{key[0]} heads, as the keys have", str(value[0])
        raise PromptRejected("Values differ in heads", tensor=value_name, expected=expected, found=found)
    return [key[0], key[2], value[2]]


def _names_error(expected: str, infos: Mapping[str, TensorInfo]) -> PromptRejected:
    found = ", ".join(excerpt(name) for name in list(infos)[:4]) or "no tensors"
    return PromptRejected("The file holds other tensors than it must", expected=expected, found=found)
