"""The one canonical file of a prompt: equal prompts have equal bytes (docs/formats.md)."""

import hashlib
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

from app.errors import PromptRejected
from app.prompt import Prompt, PromptKind, TaskType, TensorInfo
from app.store.prompt_shape import PromptShape, prompt_shape
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
_TASK_TYPES = {task_type.value: task_type for task_type in TaskType}


@dataclass(frozen=True, slots=True)
class _Layout:
    """A prompt's canonical file, but for the tensors' bytes."""

    kind: PromptKind
    task_type: TaskType
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
            task_type=self.task_type,
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
    kind: PromptKind,
    tensors: Mapping[str, RawTensor],
    *,
    task_type: TaskType = TaskType.CAUSAL_LM,
    position_offset: int | None = None,
) -> Prompt:
    """Return the prompt of these tensors; the same content always gives the same bytes.

    `position_offset` is the position of the decoder's first token after the prompt; where not given, the
    p of its place in the decoder. Raise PromptRejected where names, dtypes or shapes don't make a prompt of
    this kind.
    """
    return _lay_out(kind, task_type, tensors, position_offset).fill(tensors)


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
    return prompt_shape(prompt.kind, prompt.task_type, prompt.tensors).geometry


def _lay_out(
    kind: PromptKind,
    task_type: TaskType,
    tensors: Mapping[str, RawTensor | TensorInfo],
    position_offset: int | None,
) -> _Layout:
    infos = _in_name_order(tensors)
    shape = prompt_shape(kind, task_type, infos)
    offset = shape.offsets[-1] if position_offset is None else position_offset
    if offset not in shape.offsets:
        expected = " or ".join(str(possible) for possible in sorted({*shape.offsets}))
        raise PromptRejected("The position offset is impossible", expected=expected, found=str(offset))
    metadata = _metadata(kind, task_type, shape, offset)
    header = encode_header(infos, metadata)
    if len(header) > LENGTH_BYTES + MAX_HEADER_BYTES:
        raise PromptRejected("The prompt has too many layers for one file", found=f"{len(infos)} tensors")
    return _Layout(kind, task_type, shape.num_virtual_tokens, offset, infos, metadata, header)


def _metadata(kind: PromptKind, task_type: TaskType, shape: PromptShape, offset: int) -> dict[str, str]:
    metadata = {
        "embedding_scale_applied": "false",
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "geometry": canonical_json(shape.geometry).decode(),
        "kind": kind.value,
        "placement": "before_bos",
        "position_offset.dec": str(offset),
        "rotary_applied": "false",
        "task_type": task_type.value,
    }
    if task_type is TaskType.SEQ_2_SEQ_LM:
        metadata |= {"placement": "before_tokens", "position_offset.enc": str(shape.encoder_offset)}
    return metadata


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
    task_type = _TASK_TYPES.get(found.get("task_type", ""))
    if task_type is None:
        raise _metadata_error("task_type", " or ".join(TaskType), found.get("task_type"))
    offset = found.get("position_offset.dec", "")
    if not re.fullmatch(r"0|[1-9][0-9]{0,8}", offset):
        raise _metadata_error("position_offset.dec", "a whole number", offset)
    layout = _lay_out(kind, task_type, file.tensors, int(offset))
    for key in sorted(layout.metadata.keys() | found.keys()):
        if layout.metadata.get(key) != found.get(key):
            raise _metadata_error(key, layout.metadata.get(key, "no such key"), found.get(key))
    return layout


def _metadata_error(key: str, expected: str, found: str | None) -> PromptRejected:
    shown = "nothing" if found is None else excerpt(found)
    return PromptRejected(f"Metadata {excerpt(key)} is wrong", expected=expected, found=shown)
