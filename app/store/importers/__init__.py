"""Foreign checkpoints -> Prompt. Which importer reads what is decided here; importers don't know
each other. Nothing uploaded is imported, unpickled, executed or fetched.
"""

import hashlib
from collections.abc import Callable
from typing import Any

from app.errors import PromptRejected
from app.prompt import Prompt
from app.store.importers import native, peft
from app.store.safetensors_file import parse_safetensors
from app.store.saved_tensors import SavedTensor

__all__ = ["import_prompt"]


def import_prompt(
    weights: bytes | None,
    config_json: bytes | None,
    check_saved: Callable[[SavedTensor], None] | None = None,
) -> tuple[Prompt, dict[str, Any]]:
    """Import an upload: a PEFT adapter with its config, or a canonical file without one.

    `check_saved` raises PromptRejected for a tensor beside the prompt that isn't the base's own.
    Returns the prompt and its provenance (source format, sha256, what the file says of its base:
    recorded, never proof). Raises PromptRejected (UnsafeFile) and keeps nothing.
    """
    if not weights:
        raise PromptRejected("There is no prompt file: send adapter_model.safetensors with its config")
    provenance: dict[str, Any] = {"source_sha256": hashlib.sha256(weights).hexdigest()}
    if config_json is not None:
        return peft.import_peft(config_json, weights, check_saved), provenance | _peft_provenance(config_json)
    if native.is_native(weights):
        return native.import_native(weights), provenance | {"source_format": "promptplex"}
    raise _unknown(weights)


def _peft_provenance(config_json: bytes) -> dict[str, Any]:
    config = peft.parse_config(config_json)
    return {
        "source_format": "peft",
        "source_kind": config.peft_type,
        "source_version": config.peft_version,
        "source_base_name": config.base_name,
        "source_base_revision": config.revision,
        "config_sha256": hashlib.sha256(config_json).hexdigest(),
    }


def _unknown(weights: bytes) -> PromptRejected:
    if peft.prompt_name(parse_safetensors(weights)) is not None:
        return PromptRejected("This is a PEFT adapter: send its adapter_config.json along with it")
    return PromptRejected(
        "The file is neither a PEFT adapter with its adapter_config.json nor a promptplex prompt"
    )
