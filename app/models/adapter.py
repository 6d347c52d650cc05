"""An adapter of PEFT that lies beside a base's weights, where transformers would apply it."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from app.errors import UnsupportedModel
from app.models.weights import find_file, in_one_line, some_of

_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# These are what tasks are made of: `promptplex push` serves them.
_PROMPTS = frozenset(
    {"PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "CPT", "CARTRIDGE"}
)
_ELSEWHERE = "base_model_name_or_path"  # where the base was found when the adapter was trained


@dataclass(frozen=True, slots=True)
class Adapter:
    """What changes the weights of a base, such as a LoRA."""

    kind: str
    config: dict[str, Any]
    weights: Path


def find_adapter(reference: str, progress: Callable[[str], None]) -> Adapter | None:
    """Return the adapter beside the weights; a prompt there is left alone, and `progress` reports it.

    Raise UnsupportedModel: it can't be read, or its weights aren't safetensors.
    """
    file = find_file(reference, _CONFIG)
    if file is None:
        return None
    config = _read(file)
    kind = str(config.get("peft_type"))
    if kind in _PROMPTS:
        progress(f"a {kind} prompt lies beside the weights; it is no part of the base: push it to serve it")
        return None
    weights = find_file(reference, _WEIGHTS)
    if weights is None:
        raise UnsupportedModel(
            f"{_CONFIG} lies beside the weights of '{reference}', but no {_WEIGHTS}; save the adapter as "
            f"safetensors, or move {_CONFIG} away to serve the base alone"
        )
    config.pop(_ELSEWHERE, None)
    return Adapter(kind, config, weights)


def _read(file: Path) -> dict[str, Any]:
    try:
        config = json.loads(file.read_bytes())
    except ValueError:
        config = None
    if not isinstance(config, dict) or not isinstance(config.get("peft_type"), str):
        raise UnsupportedModel(
            f"{_CONFIG} beside the weights is not a PEFT configuration with a peft_type; correct it, "
            "or move it away to serve the base alone"
        )
    return config


def apply_adapter(model: PreTrainedModel, adapter: Adapter, reference: str) -> PreTrainedModel:
    """Return the model with the adapter merged into its weights.

    Raise UnsupportedModel: PEFT isn't there, or can't apply or merge it.
    """
    try:
        from peft import PeftConfig, get_peft_model
    except ImportError as error:
        raise UnsupportedModel(
            f"an adapter ({adapter.kind}) lies beside the weights of '{reference}'; applying it takes "
            f"the package peft (pip install peft); move {_CONFIG} away to serve the base alone"
        ) from error
    try:
        tuned = get_peft_model(model, PeftConfig.from_pretrained(reference), autocast_adapter_dtype=False)
        missing = tuned.load_adapter(reference, "default", autocast_adapter_dtype=False).missing_keys
        merged: PreTrainedModel = tuned.merge_and_unload(safe_merge=True)
    except Exception as error:  # PEFT raises whatever it likes
        raise UnsupportedModel(
            f"the adapter ({adapter.kind}) beside the weights of '{reference}' can't be applied: "
            f"{in_one_line(error)}"
        ) from error
    if missing:
        raise UnsupportedModel(
            f"the adapter ({adapter.kind}) beside the weights of '{reference}' is not complete: "
            f"{some_of(missing)} not there"
        )
    merged.eval()
    merged.requires_grad_(False)
    return merged
