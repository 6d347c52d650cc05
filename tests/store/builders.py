"""Prompts, files and geometries for the tests of the store."""

import functools
import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from app.errors import PromptRejected
from app.prompt import LayerGeometry, ModelGeometry, Prompt, PromptKind, TaskType, TaskVersion, VersionDraft
from app.sites import Embedding, Site
from app.store.importers import import_prompt
from app.store.prompt_file import make_prompt
from app.store.prompt_store import PromptStore
from app.store.safetensors_file import RawTensor
from app.store.source_files import CONFIG, PROMPT, Imported
from app.store.validation import validate_prompt

HIDDEN, LAYERS, HEADS, HEAD_DIM = 16, 2, 2, 4


def geometry(
    *,
    decoder: tuple[LayerGeometry, ...] = (LayerGeometry(HEADS, HEAD_DIM, HEAD_DIM),) * LAYERS,
    **changes: Any,
) -> ModelGeometry:
    fields: dict[str, Any] = {
        "architecture": "llama",
        "hidden_size": HIDDEN,
        "vocab_size": 100,
        "max_positions": 64,
        "layers": {Site.DECODER_SELF: decoder},
        "dtype": "float32",
        "fingerprint": "0" * 64,
    }
    return ModelGeometry(**{**fields, **changes})


def seq2seq_geometry(
    *,
    encoder: tuple[LayerGeometry, ...] = (LayerGeometry(HEADS, HEAD_DIM, HEAD_DIM),) * LAYERS,
    decoder: tuple[LayerGeometry, ...] = (LayerGeometry(HEADS, HEAD_DIM, HEAD_DIM),) * LAYERS,
    cross: tuple[LayerGeometry, ...] | None = None,
    **changes: Any,
) -> ModelGeometry:
    """An encoder-decoder's, whose cross-attention is like BART's unless given."""
    plain = tuple(replace(layer, has_position_bias=False) for layer in decoder)
    sites = {
        Site.ENCODER_SELF: encoder,
        Site.DECODER_SELF: decoder,
        Site.DECODER_CROSS: plain if cross is None else cross,
    }
    return geometry(**({"architecture": "bart", "layers": sites, "max_source_positions": 32} | changes))


def raw(shape: tuple[int, ...], seed: int = 0, dtype: str = "F32") -> RawTensor:
    numbers = np.random.default_rng(seed).standard_normal(shape).astype("<f4")
    if dtype == "BF16":
        return RawTensor(dtype, shape, (numbers.view("<u4") >> 16).astype("<u2").tobytes())
    return RawTensor(dtype, shape, numbers.astype({"F32": "<f4", "F16": "<f2"}[dtype]).tobytes())


def soft(p: int = 3, hidden: int = HIDDEN, seed: int = 0, dtype: str = "F32") -> Prompt:
    return make_prompt(PromptKind.SOFT, {"dec.embeds": raw((p, hidden), seed, dtype)})


def prefix_tensors(
    p: int = 3, layers: int = LAYERS, seed: int = 0, dtype: str = "F32"
) -> dict[str, RawTensor]:
    return {
        f"dec.self.{layer}.{side}": raw((HEADS, p, HEAD_DIM), seed + 2 * layer + (side == "v"), dtype)
        for layer in range(layers)
        for side in "kv"
    }


def prefix(p: int = 3, layers: int = LAYERS, seed: int = 0, dtype: str = "F32") -> Prompt:
    return make_prompt(PromptKind.PREFIX, prefix_tensors(p, layers, seed, dtype))


def seq2seq_soft(*, encoder: int = 0, decoder: int = 0, hidden: int = HIDDEN, seed: int = 0) -> Prompt:
    """A soft prompt of an encoder-decoder with so many rows at each place."""
    rows = {Embedding.ENCODER: encoder, Embedding.DECODER: decoder}
    tensors = {str(place): raw((p, hidden), seed + p) for place, p in rows.items() if p}
    return make_prompt(PromptKind.SOFT, tensors, task_type=TaskType.SEQ_2_SEQ_LM)


def seq2seq_prefix(
    lengths: Mapping[Site, int], *, layers: int = LAYERS, seed: int = 0, offset: int | None = None
) -> Prompt:
    """A prefix of an encoder-decoder with p slots at each site."""
    names = [(site, layer, side) for site in lengths for layer in range(layers) for side in "kv"]
    tensors = {
        site.tensor(layer, side): raw((HEADS, lengths[site], HEAD_DIM), seed + number)
        for number, (site, layer, side) in enumerate(names)
    }
    return make_prompt(PromptKind.PREFIX, tensors, task_type=TaskType.SEQ_2_SEQ_LM, position_offset=offset)


def file_bytes(header: Mapping[str, Any] | bytes, data: bytes = b"") -> bytes:
    """A safetensors file with any header at all."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


@functools.cache
def many_tensors(count: int = 300_000) -> bytes:
    """A file of empty tensors: all header, no data."""
    template = json.dumps(entry([0], 0, 0)).encode()
    return file_bytes(b"{" + b",".join(b'"t%d":%s' % (n, template) for n in range(count)) + b"}")


def entry(shape: list[Any], begin: int, end: int, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def peft_files(
    values: np.ndarray | None = None, name: str = "prompt_embeddings", **changes: Any
) -> tuple[bytes, bytes]:
    """(weights, config) of a hand-made PROMPT_TUNING adapter that fits `geometry()`."""
    values = np.ones((3, HIDDEN), dtype="<f4") if values is None else values
    header = {name: entry(list(values.shape), 0, values.nbytes), "__metadata__": {"format": "pt"}}
    return file_bytes(header, values.tobytes()), json.dumps(
        soft_adapter_config(HIDDEN, LAYERS) | changes
    ).encode()


def soft_adapter_config(hidden: int, num_layers: int) -> dict[str, Any]:
    """PEFT's config of a PROMPT_TUNING adapter with three virtual tokens."""
    return {
        "peft_type": "PROMPT_TUNING",
        "task_type": "CAUSAL_LM",
        "num_virtual_tokens": 3,
        "token_dim": hidden,
        "num_transformer_submodules": 1,
        "num_attention_heads": 4,
        "num_layers": num_layers,
        "base_model_name_or_path": None,
        "inference_mode": True,
    }


def upload(
    store: PromptStore,
    task_id: str,
    weights: bytes | None,
    config: bytes | None,
    base: ModelGeometry | None = None,
) -> TaskVersion:
    """What the server does with an upload, without the server."""
    imported = imported_from(weights, config)
    validate_prompt(imported.prompt, base or geometry())
    draft = VersionDraft(prompt=imported.prompt, provenance=imported.provenance)
    return store.publish(task_id, draft)[0]


def imported_from(weights: bytes | None, config: bytes | None) -> Imported:
    files = {PROMPT: weights, CONFIG: config}
    return import_prompt({name: data for name, data in files.items() if data is not None})


def tree(root: Path) -> dict[str, bytes]:
    """Every file below a directory."""
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def refusal_of(function: Callable[..., Any], *arguments: Any) -> PromptRejected | None:
    """The refusal, or None; any other exception passes."""
    try:
        function(*arguments)
    except PromptRejected as refused:
        return refused
    return None
