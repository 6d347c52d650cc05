"""The nouns that the store, the engine and the edge share. No torch, no I/O.

A Prompt is learned tensors, named by the sha256 of its canonical bytes. A TaskVersion is an
immutable manifest: which prompt (or none), which template, which defaults. What a base model
offers is a ModelGeometry; whether a prompt fits it is decided in `app/store/validation.py`.
"""

from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Protocol

from app.sites import Embedding, Site, parse_prefix_tensor


class PromptKind(StrEnum):
    """The kind of a task's learned part."""

    SOFT = "soft"  # embeddings before the input (prompt tuning, p-tuning)
    PREFIX = "prefix"  # keys and values per layer (prefix tuning, cartridge)
    TEXT = "text"  # nothing learned: a template alone


class TaskType(StrEnum):
    """The kind of base that a prompt was trained for, as PEFT names it."""

    CAUSAL_LM = "CAUSAL_LM"  # a decoder alone
    SEQ_2_SEQ_LM = "SEQ_2_SEQ_LM"  # an encoder-decoder


@dataclass(frozen=True, slots=True)
class LayerGeometry:
    """One attention layer: heads and widths of its keys and values, and how its queries attend to them."""

    num_kv_heads: int
    key_dim: int
    value_dim: int
    window: int | None = None  # tokens that a query sees, itself included; None: all
    queries_per_kv: int = 1  # query heads that share a kv head
    softcap: float | None = None  # bounds the attention scores; None: they are unbounded
    has_sinks: bool = False  # learned scores that take weight from all keys
    is_causal: bool = True  # False: every key is seen, as in an encoder and in cross-attention
    has_position_bias: bool = False  # scores get a learned number by the distance of key and query (T5)

    @property
    def kv_width(self) -> int:
        """Numbers that the keys and values of one token take."""
        return self.num_kv_heads * (self.key_dim + self.value_dim)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelGeometry:
    """What a base model expects of a prompt."""

    architecture: str  # config.model_type
    hidden_size: int  # width of one input embedding
    vocab_size: int
    max_positions: int  # virtual + prompt + generated tokens
    layers: Mapping[Site, tuple[LayerGeometry, ...]]  # per attention site, in order
    dtype: str  # the dtype that the base runs in: "float32", "bfloat16", "float16"
    fingerprint: str  # sha256 over weights, config and tokenizer
    takes_prefixes: bool = True  # its own cache holds keys and values as attention gets them
    max_source_positions: int = 0  # encoder rows and tokens of one source; 0: there is no encoder

    @property
    def has_encoder(self) -> bool:
        """Whether an encoder reads the input, and a decoder attends to what came of it."""
        return self.max_source_positions > 0

    def prefix_bytes(self, num_tokens: int, item_bytes: int = 4) -> int:
        """Return the bytes of keys and values of `num_tokens` at all sites, in float32 unless given."""
        width = sum(layer.kv_width for layers in self.layers.values() for layer in layers)
        return num_tokens * item_bytes * width


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One entry of a safetensors header."""

    dtype: str  # safetensors' names: "F32", "BF16", "F16", ...
    shape: tuple[int, ...]
    begin: int  # byte offsets into the data section
    end: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """Immutable learned tensors in canonical form (see docs/formats.md).

    Tensors: `[p, d]` of an embedding for a soft prompt; keys `[Hk, p, Dk]` and values `[Hk, p, Dv]` of
    each layer for a prefix, named by `app/sites.py`. `tensor_bytes(name)` is little-endian and contiguous.
    An encoder-decoder's may be at several places, each with a p of its own.
    """

    digest: str  # sha256 (hex) of `data`
    kind: PromptKind
    num_virtual_tokens: int  # p, the most of any place
    position_offset: int  # the position of the decoder's first token after it; p for PEFT prompts
    tensors: Mapping[str, TensorInfo]
    data_start: int  # where the data section begins in `data`
    data: bytes  # the whole canonical file
    task_type: TaskType = TaskType.CAUSAL_LM

    def length(self, place: Embedding | Site) -> int:
        """Return the virtual tokens p that it has at one place: rows of embeddings, or slots."""
        if isinstance(place, Embedding):
            return self.tensors[place].shape[0] if place in self.tensors else 0
        parsed = ((parse_prefix_tensor(name), info) for name, info in self.tensors.items())
        return next((info.shape[1] for parts, info in parsed if parts and parts.site is place), 0)

    def tensor_bytes(self, name: str) -> memoryview:
        info = self.tensors[name]
        return memoryview(self.data)[self.data_start + info.begin : self.data_start + info.end]


class PromptSource(Protocol):
    """Where the engine gets prompts from; wired to the store in `app/main.py`."""

    def load(self, digest: str) -> "Future[Prompt]":
        """Return at once; the future holds the Prompt or a PromptplexError."""
        ...


# Where the prompt of a decoder alone is.
_CAUSAL_PLACES = {PromptKind.SOFT: Embedding.DECODER, PromptKind.PREFIX: Site.DECODER_SELF}


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskVersion:
    """An immutable manifest. Its identity, `digest`, is the sha256 of its canonical JSON."""

    task_id: str
    version: int
    digest: str
    kind: PromptKind
    prompt_digest: str | None
    num_virtual_tokens: int
    position_offset: int
    template: str | None
    defaults: Mapping[str, Any]  # generation defaults, the names of API.md's `parameters`
    choices: tuple[Any, ...]
    examples: tuple[Mapping[str, Any], ...]  # {"inputs": ..., "expected": ...}
    notes: str
    base: Mapping[str, Any]  # {"name", "revision"} that the uploader vouches for
    provenance: Mapping[str, Any]  # source format and sha256, base fingerprint, uploader, time
    geometry: Mapping[str, Any] | None = None  # the prompt's shape, as in its metadata; None: text
    program: Mapping[str, Any] = field(default_factory=dict)  # app/serving/program_settings.py, as JSON

    def length(self, place: Embedding | Site) -> int:
        """Return the virtual tokens p that its prompt has at one place: rows of embeddings, or slots."""
        lengths = (self.geometry or {}).get("num_virtual_tokens", self.num_virtual_tokens)
        if isinstance(lengths, Mapping):
            return int(lengths.get(place, 0))
        return int(lengths) if place is _CAUSAL_PLACES.get(self.kind) else 0


@dataclass(frozen=True, slots=True, kw_only=True)
class VersionDraft:
    """A TaskVersion to be, without task and number."""

    prompt: Prompt | None
    template: str | None = None
    defaults: Mapping[str, Any] = field(default_factory=dict)
    choices: tuple[Any, ...] = ()
    examples: tuple[Mapping[str, Any], ...] = ()
    notes: str = ""
    base: Mapping[str, Any] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)
    program: Mapping[str, Any] = field(default_factory=dict)
