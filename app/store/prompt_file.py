"""The one canonical file of a prompt: equal prompts have equal bytes (docs/formats.md).

Legend: p virtual tokens, d hidden size, l layer, Hk key/value heads, Dk and Dv their widths.
"""

import hashlib
import math
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
    RawTensor,
    SafetensorsFile,
    encode_header,
    parse_safetensors,
)
from app.strict_json import canonical_json, excerpt

FORMAT = "promptplex.prompt"
FORMAT_VERSION = "1"
_KINDS = {kind.value: kind for kind in (PromptKind.SOFT, PromptKind.PREFIX)}


@dataclass(frozen=True, slots=True)
class _Shape:
    """What the tensors' names and shapes say."""

    num_virtual_tokens: int
    geometry: dict[str, object]  # goes into the metadata


@dataclass(frozen=True, slots=True)
class _Layout:
    """A prompt's canonical file, but for the tensors' bytes."""

    kind: PromptKind
    num_virtual_tokens: int
    position_offset: int
    tensors: dict[str, TensorInfo]  # in the order of their bytes
    metadata: dict[str, str]
    header: bytes

    def prompt(self, data: bytes, digest: str | None = None) -> Prompt:
        """Return the prompt of a whole file that begins with the header."""
        return Prompt(
            digest=digest or hashlib.sha256(data).hexdigest(),
            kind=self.kind,
            num_virtual_tokens=self.num_virtual_tokens,
            position_offset=self.position_offset,
            tensors=self.tensors,
            data_start=len(self.header),
            data=data,
        )

    def fill(self, tensors: Mapping[str, RawTensor]) -> Prompt:
        """Return the prompt of these tensors. Raise PromptRejected where bytes don't fill a shape."""
        for name, info in self.tensors.items():
            if len(tensors[name].data) != info.end - info.begin:
                raise PromptRejected("The bytes don't fill the shape", tensor=name)
        return self.prompt(b"".join([self.header, *(tensors[name].data for name in self.tensors)]))


def make_prompt(
    kind: PromptKind, tensors: Mapping[str, RawTensor], *, position_offset: int | None = None
) -> Prompt:
    """Return the prompt of these tensors; the same content always gives the same bytes.

    `position_offset` is the position of the first token after the prompt; p where not given.
    Raise PromptRejected where names, dtypes or shapes don't make a prompt of this kind.
    """
    return _lay_out(kind, tensors, position_offset).fill(tensors)


def read_prompt(data: bytes, digest: str | None = None) -> Prompt:
    """Read a canonical file and verify all of it but `digest`, its sha256 where the caller knows it.

    Bytes that mean a prompt but aren't the canonical encoding of it are refused: the digest is
    the prompt's identity, so there must be one encoding. Raise PromptRejected (UnsafeFile).
    """
    layout = _layout_of(parse_safetensors(data))
    if not data.startswith(layout.header):
        raise PromptRejected("The file is not in canonical form: import it again")
    return layout.prompt(data, digest)


def canonical_prompt(file: SafetensorsFile) -> Prompt:
    """Return the prompt of a file with canonical names and metadata, in whatever order.

    Its `data` is the file's own where that is canonical. Raise PromptRejected.
    """
    layout = _layout_of(file)
    if file.data.startswith(layout.header):
        return layout.prompt(file.data)
    return layout.fill({name: file.tensor(name) for name in file.tensors})


def prompt_geometry(prompt: Prompt) -> dict[str, object]:
    """Return the prompt's shape as its metadata has it: JSON-able, for manifests."""
    return _shape(prompt.kind, prompt.tensors).geometry


def _lay_out(
    kind: PromptKind, tensors: Mapping[str, RawTensor | TensorInfo], position_offset: int | None
) -> _Layout:
    infos = _in_name_order(tensors)
    shape = _shape(kind, infos)
    p = shape.num_virtual_tokens
    offset = p if position_offset is None else position_offset
    if offset not in ((p,) if kind is PromptKind.SOFT else (0, p)):
        expected = str(p) if kind is PromptKind.SOFT else f"0 or {p}"
        raise PromptRejected("The position offset is impossible", expected=expected, found=str(offset))
    metadata = {
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
    header = encode_header(infos, metadata)
    if len(header) > LENGTH_BYTES + MAX_HEADER_BYTES:
        raise PromptRejected("The prompt has too many layers for one file", found=f"{len(infos)} tensors")
    return _Layout(kind, p, offset, infos, metadata, header)


def _in_name_order(tensors: Mapping[str, RawTensor | TensorInfo]) -> dict[str, TensorInfo]:
    """Return byte ranges in the order of the names; of one dtype, so that every tensor is aligned."""
    infos: dict[str, TensorInfo] = {}
    position = 0
    dtypes = sorted({tensor.dtype for tensor in tensors.values()})
    if len(dtypes) > 1:
        raise PromptRejected("All tensors of a prompt share one dtype", found=", ".join(dtypes))
    for name, tensor in sorted(tensors.items()):
        size = math.prod(tensor.shape) * ITEM_BYTES[tensor.dtype]
        infos[name] = TensorInfo(tensor.dtype, tensor.shape, position, position + size)
        position += size
    return infos


def _layout_of(file: SafetensorsFile) -> _Layout:
    """Return the layout of a file with canonical names and metadata, which is compared key by key."""
    found = file.metadata
    if found.get("format") != FORMAT:
        raise PromptRejected("This is not a promptplex prompt", expected=f"metadata format {FORMAT!r}")
    kind = _KINDS.get(found.get("kind", ""))
    if kind is None:
        raise _metadata_error("kind", "soft or prefix", found.get("kind"))
    offset = found.get("position_offset.dec", "")
    if not re.fullmatch(r"0|[1-9][0-9]{0,8}", offset):
        raise _metadata_error("position_offset.dec", "a whole number", offset)
    layout = _lay_out(kind, file.tensors, int(offset))
    for key in sorted(layout.metadata.keys() | found.keys()):
        if layout.metadata.get(key) != found.get(key):
            raise _metadata_error(key, layout.metadata.get(key, "no such key"), found.get(key))
    return layout


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
    """Return `[Hk, Dk, Dv]` of one layer, from k `[Hk, p, Dk]` and v `[Hk, p, Dv]`."""
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
