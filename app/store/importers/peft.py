"""PEFT adapters of language models -> canonical bytes; numbers are moved, never converted.

PEFT saves one baked tensor `prompt_embeddings`, whatever network made it in training. Of causal models:

    PROMPT_TUNING, P_TUNING     [p, d]           -> decoder embeddings [p, d]
    PREFIX_TUNING, CARTRIDGE    [p, 2L * Hk * D] -> view [p, 2L, Hk, D]; layer l: K row 2l, V row 2l + 1

Of encoder-decoders, where S is num_transformer_submodules, 1 or 2:

    PROMPT_TUNING, P_TUNING     [S * p, d]       -> encoder embeddings: the first p rows; the rest is unused
    PREFIX_TUNING, CARTRIDGE    [p, 2L * Hk * D] -> the same view, L the encoder's layers, but into decoder
        self-attention alone: layer l of the decoder has K row 4l mod 2L, V row (4l + 1) mod 2L

In a prefix's config `num_attention_heads` means Hk and `token_dim` means Hk * D (peft >= 0.12 adjusts
both for grouped-query attention before it saves them). What a config of a soft prompt leaves out, as
converters to PEFT's layout do, is taken from the tensor. Legend: docs/formats.md.
"""

import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from app.errors import PromptRejected
from app.prompt import ModelGeometry, Prompt, PromptKind, TaskType
from app.sites import SIDES, Embedding, Site
from app.store.prompt_file import make_prompt
from app.store.safetensors_file import ITEM_BYTES, MAX_TENSORS, RawTensor, SafetensorsFile
from app.store.saved_tensors import SavedTensor, saved_tensors
from app.store.source_files import CONFIG, PROMPT, Imported, SourceFile, SourceFiles
from app.strict_json import JsonError, excerpt

DESCRIPTION = "a PEFT adapter with its adapter_config.json"
MAX_CONFIG_BYTES = 64 * 1024
MAX_SIZE = 1 << 20
MAX_LAYERS = MAX_TENSORS // 2
TENSOR = "prompt_embeddings"
SOFT_TYPES = frozenset({"PROMPT_TUNING", "P_TUNING"})
PREFIX_TYPES = frozenset({"PREFIX_TUNING", "CARTRIDGE"})
_ACCEPTED = "PROMPT_TUNING, P_TUNING, PREFIX_TUNING or CARTRIDGE"
_LATER = "is not supported yet"
_REASONS = {
    "CPT": _LATER,
    "MULTITASK_PROMPT_TUNING": _LATER,
    "ADAPTION_PROMPT": "adds gated attention to the model, which no prompt can express",
}
_UNALIKE = "is used in two ways on encoder-decoders by PEFT itself: its forward and generate disagree"
_MIXED = (
    "with one submodule PEFT puts the prefix into cross-attention too, beside the decoder's own keys, which "
    "no prompt can express"
)
# Names in a state dict; of p-tuning it may also be the input from which its encoder makes the prompt.
_UNBAKED = re.compile(r"(base_model\.)?prompt_encoder\.([^.]+\.)?embedding\.weight")


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterConfig:
    """The fields of adapter_config.json that matter, checked."""

    peft_type: str
    task_type: TaskType
    num_submodules: int  # S: a soft prompt has S * p rows
    num_virtual_tokens: int | None  # None: as many as the tensor has
    token_dim: int | None  # soft: the hidden size, None: as the tensor has; prefix: num_kv_heads * head_dim
    num_layers: int  # 0 for soft prompts
    num_kv_heads: int  # 0 for soft prompts
    base_name: str | None
    revision: str | None
    peft_version: str | None
    modules_to_save: tuple[str, ...]  # modules of the base that were trained too


def recognises(files: SourceFiles) -> bool:
    """Return whether there is a config, or a tensor with a prompt's name."""
    file = files[PROMPT].safetensors_or_none
    return CONFIG in files or (file is not None and _prompt_name(file) is not None)


def read(files: SourceFiles, base: ModelGeometry | None) -> Imported:
    """Import adapter_config.json + adapter_model.safetensors. Raise PromptRejected (UnsafeFile).

    PEFT doesn't save how many layers the decoder of an encoder-decoder has; without `base` it is taken to
    have as many as the encoder.
    """
    if CONFIG not in files:
        raise PromptRejected("This is a PEFT adapter: send its adapter_config.json along with it")
    config = parse_config(files[CONFIG])
    file = files[PROMPT].safetensors
    name = _check_prompt_name(config, file)
    beside = saved_tensors(file, name)
    _check_modules(config, beside)
    raw = file.tensor(name)
    _check_shape(config, raw.shape)
    prompt = _soft(config, raw) if config.peft_type in SOFT_TYPES else _prefix(config, raw, base)
    return Imported(prompt=prompt, provenance=_provenance(config, files[CONFIG].data), beside=beside)


def _soft(config: AdapterConfig, raw: RawTensor) -> Prompt:
    if config.task_type is TaskType.CAUSAL_LM:
        return make_prompt(PromptKind.SOFT, {Embedding.DECODER: raw})
    p = raw.shape[0] // config.num_submodules
    used = RawTensor(raw.dtype, (p, raw.shape[1]), raw.data[: len(raw.data) // config.num_submodules])
    return make_prompt(PromptKind.SOFT, {Embedding.ENCODER: used}, task_type=config.task_type)


def _prefix(config: AdapterConfig, raw: RawTensor, base: ModelGeometry | None) -> Prompt:
    tensors = _split_layers(config, raw, _num_decoder_layers(config, base))
    return make_prompt(PromptKind.PREFIX, tensors, task_type=config.task_type)


def _num_decoder_layers(config: AdapterConfig, base: ModelGeometry | None) -> int:
    """Return how many layers get keys and values. Raise PromptRejected where PEFT has none for some."""
    if config.task_type is TaskType.CAUSAL_LM or base is None or not base.has_encoder:
        return config.num_layers  # a prompt for another kind of base is refused when it is validated
    encoder, decoder = (len(base.layers[site]) for site in (Site.ENCODER_SELF, Site.DECODER_SELF))
    if config.num_layers < decoder and config.num_layers == encoder:
        raise PromptRejected(
            f"The base model's encoder has {encoder} layers and its decoder {decoder}: PEFT makes a prefix "
            f"for as many as the encoder has, and fails at the others; train with num_layers={decoder}",
            expected=f"num_layers {decoder}",
            found=str(encoder),
        )
    if config.num_layers not in {encoder, max(encoder, decoder)}:
        raise _wrong("num_layers", f"{encoder}, the layers of the base model's encoder", config.num_layers)
    return decoder


def _provenance(config: AdapterConfig, config_json: bytes) -> dict[str, Any]:
    return {
        "source_format": "peft",
        "source_kind": config.peft_type,
        "source_version": config.peft_version,
        "source_base_name": config.base_name,
        "source_base_revision": config.revision,
        "config_sha256": hashlib.sha256(config_json).hexdigest(),
    }


def parse_config(file: SourceFile) -> AdapterConfig:
    """Parse adapter_config.json strictly. Fields that later versions of PEFT add are ignored."""
    fields = _parse_fields(file)
    peft_type = _check_peft_type(fields)
    task_type = _check_task(fields)
    is_prefix = peft_type in PREFIX_TYPES
    is_said = is_prefix or fields.get("token_dim") is not None
    config = AdapterConfig(
        peft_type=peft_type,
        task_type=task_type,
        num_submodules=_num_submodules(fields, peft_type, task_type),
        num_virtual_tokens=_positive(fields, "num_virtual_tokens")
        if "num_virtual_tokens" in fields
        else None,
        token_dim=_positive(fields, "token_dim") if is_said else None,
        num_layers=_positive(fields, "num_layers", MAX_LAYERS) if is_prefix else 0,
        num_kv_heads=_positive(fields, "num_attention_heads") if is_prefix else 0,
        base_name=_optional_text(fields, "base_model_name_or_path"),
        revision=_optional_text(fields, "revision"),
        peft_version=_optional_text(fields, "peft_version"),
        modules_to_save=_modules_to_save(fields, task_type),
    )
    if config.num_kv_heads and config.token_dim and config.token_dim % config.num_kv_heads:
        expected = f"a multiple of num_attention_heads ({config.num_kv_heads})"
        raise _wrong("token_dim", expected, config.token_dim)
    _check_frozen_tokens(fields, config)
    return config


def _parse_fields(file: SourceFile) -> dict[str, Any]:
    if len(file.data) > MAX_CONFIG_BYTES:
        found = f"{len(file.data)} bytes"
        raise PromptRejected("adapter_config.json is too long", expected="at most 64 KiB", found=found)
    try:
        fields = file.json
    except JsonError as error:
        raise PromptRejected(f"adapter_config.json is refused: {error}") from None
    if not isinstance(fields, dict):
        raise PromptRejected("adapter_config.json must be a JSON object")
    return fields


def _check_peft_type(fields: dict[str, Any]) -> str:
    peft_type = fields.get("peft_type")
    if not isinstance(peft_type, str):
        raise _wrong("peft_type", _ACCEPTED, peft_type)
    if peft_type not in SOFT_TYPES | PREFIX_TYPES:
        reason = _REASONS.get(peft_type, "is not a prompt-learning kind that this server knows")
        if peft_type == "MULTITASK_PROMPT_TUNING" and fields.get("task_type") == TaskType.SEQ_2_SEQ_LM:
            reason = _UNALIKE
        raise PromptRejected(f"The PEFT kind {excerpt(peft_type)} {reason}", expected=_ACCEPTED)
    return peft_type


def _check_task(fields: dict[str, Any]) -> TaskType:
    found = fields.get("task_type", TaskType.CAUSAL_LM)  # PEFT always says it; converters may not
    if found not in tuple(TaskType):
        why = " (without a task type PEFT feeds the model no prompt)" if found is None else ""
        raise _wrong("task_type", " or ".join(TaskType) + why, found)
    return TaskType(found)


def _num_submodules(fields: dict[str, Any], peft_type: str, task_type: TaskType) -> int:
    """Return S, as PEFT takes it where the config leaves it out."""
    found = fields.get("num_transformer_submodules")
    possible = (1, 2) if task_type is TaskType.SEQ_2_SEQ_LM else (1,)
    if found is None:
        return possible[-1]
    if type(found) is not int or found not in possible:
        raise _wrong("num_transformer_submodules", " or ".join(map(str, possible)), found)
    if task_type is TaskType.SEQ_2_SEQ_LM and peft_type in PREFIX_TYPES and found == 1:
        raise _wrong("num_transformer_submodules", f"2, as {_MIXED}", found)
    return found


def _modules_to_save(fields: dict[str, Any], task_type: TaskType) -> tuple[str, ...]:
    names = fields.get("modules_to_save") or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise _wrong("modules_to_save", "null or a list of names", names)
    if names and task_type is TaskType.SEQ_2_SEQ_LM:
        raise PromptRejected(f"An adapter with modules_to_save {_UNALIKE}", found=excerpt(names[0]))
    return tuple(names)


def _check_frozen_tokens(fields: dict[str, Any], config: AdapterConfig) -> None:
    """Refuse what PEFT itself would refuse, though it matters in training alone."""
    frozen = fields.get("num_frozen_tokens", 0)
    if config.peft_type == "CARTRIDGE" and not (
        type(frozen) is int and 0 <= frozen <= (config.num_virtual_tokens or MAX_SIZE)
    ):
        raise _wrong("num_frozen_tokens", f"0 to {config.num_virtual_tokens or MAX_SIZE}", frozen)


def _positive(fields: dict[str, Any], name: str, limit: int = MAX_SIZE) -> int:
    value = fields.get(name)
    if type(value) is not int or not 0 < value <= limit:
        raise _wrong(name, f"a whole number from 1 to {limit}", value)
    return value


def _optional_text(fields: dict[str, Any], name: str) -> str | None:
    value = fields.get(name)
    if value is not None and not (isinstance(value, str) and len(value) <= 1024):
        raise _wrong(name, "null or text of at most 1024 characters", value)
    return value


def _wrong(field: str, expected: str, found: object) -> PromptRejected:
    shown = "nothing" if found is None else excerpt(str(found))
    return PromptRejected(f"adapter_config.json: {field} is wrong", expected=expected, found=shown)


def _prompt_name(file: SafetensorsFile) -> str | None:
    """Return the name of the prompt's tensor: PEFT's, or a state dict's. None: there is no such tensor."""
    names = [TENSOR, *filter(_UNBAKED.fullmatch, file.tensors)]
    return next((name for name in names if name in file.tensors), None)


def _check_prompt_name(config: AdapterConfig, file: SafetensorsFile) -> str:
    name = _prompt_name(file)
    if name is None:
        if not file.tensors:
            raise PromptRejected("The file holds no tensors", tensor=TENSOR)
        raise PromptRejected("Unexpected tensor", tensor=excerpt(min(file.tensors)), expected=TENSOR)
    if name != TENSOR and config.peft_type == "P_TUNING":
        raise PromptRejected(
            "This is what p-tuning makes its prompt from, not the prompt: save with PEFT's save_pretrained",
            tensor=excerpt(name),
            expected=TENSOR,
        )
    return name


def _check_modules(config: AdapterConfig, beside: Iterable[SavedTensor]) -> None:
    """Raise PromptRejected unless modules that were trained too are in the file, to be compared."""
    for module in config.modules_to_save:
        if not any(module in tensor.name.split(".") for tensor in beside):
            raise PromptRejected(
                "The adapter also trained modules of the base model (modules_to_save); the base stays frozen "
                "here",
                found=excerpt(module),
            )


def _check_shape(config: AdapterConfig, shape: tuple[int, ...]) -> None:
    if len(shape) != 2:
        raise _mismatch(shape, "[num_virtual_tokens, width]")
    if config.peft_type in PREFIX_TYPES:
        _check_prefix_shape(config, shape)
        return
    submodules = config.num_submodules
    p, d = config.num_virtual_tokens or shape[0] // submodules, config.token_dim or shape[1]
    if shape != (submodules * p, d):
        rows = "num_virtual_tokens" if submodules == 1 else f"{submodules} * num_virtual_tokens"
        raise _mismatch(shape, f"[{rows}, token_dim] = {[submodules * p, d]}")


def _check_prefix_shape(config: AdapterConfig, shape: tuple[int, ...]) -> None:
    assert config.token_dim is not None
    expected = config.num_virtual_tokens or shape[0], 2 * config.num_layers * config.token_dim
    if shape != expected:
        raise _mismatch(shape, f"[num_virtual_tokens, 2 * num_layers * token_dim] = {list(expected)}")


def _mismatch(shape: tuple[int, ...], expected: str) -> PromptRejected:
    return PromptRejected(
        "The tensor does not match adapter_config.json",
        tensor=TENSOR,
        expected=expected,
        found=str(list(shape)),
    )


def _split_layers(config: AdapterConfig, raw: RawTensor, num_layers: int) -> dict[str, RawTensor]:
    """Return K and V `[Hk, p, D]` of each layer of the decoder, from `raw [p, 2L * Hk * D]`."""
    p, num_heads, num_rows = raw.shape[0], config.num_kv_heads, 2 * config.num_layers
    head_dim = raw.shape[1] // (num_rows * num_heads)
    whole = np.frombuffer(raw.data, dtype=f"<u{ITEM_BYTES[raw.dtype]}")  # bits are moved as they are
    rows = whole.reshape(p, num_rows, num_heads, head_dim).transpose(1, 2, 0, 3)
    # PEFT deals out two rows a layer and submodule; of an encoder-decoder it uses the first submodule's.
    stride = 2 * config.num_submodules
    return {
        Site.DECODER_SELF.tensor(layer, side): RawTensor(
            raw.dtype, (num_heads, p, head_dim), rows[(stride * layer + number) % num_rows].tobytes()
        )
        for layer in range(num_layers)
        for number, side in enumerate(SIDES)
    }
