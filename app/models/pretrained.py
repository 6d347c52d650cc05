"""A plain transformers model from a local path or hub id: whole, frozen, with its tokenizer.

Neither probed nor accelerated: serving adds both (`loading.py`), and training runs the model as it is.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.configuration_utils import PreTrainedConfig

from app.errors import UnsupportedModel
from app.models.adapter import Adapter, apply_adapter, find_adapter
from app.models.fingerprint import fingerprint
from app.models.weights import (
    check_unquantized,
    find_file,
    in_one_line,
    is_quantized,
    load_weights,
    weight_files,
)

_TOKENIZER = "tokenizer.json"


@dataclass(frozen=True, slots=True)
class Pretrained:
    """A frozen model, every weight of which came from files, and what goes with it."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    eos_ids: frozenset[int]  # they end a text, with or without a generation config
    fingerprint: str  # sha256 over weights, an adapter's included, config and tokenizer
    decoder_start_id: int | None  # with which an encoder-decoder's decoder begins


def load_pretrained(
    reference: str,
    config: PreTrainedConfig,
    *,
    dtype: torch.dtype,
    device: torch.device,
    attention: str | None = None,
    progress: Callable[[str], None],
) -> Pretrained:
    """Load a language model, with an adapter that lies beside its weights merged into them.

    `config` is what `read_config` returned; `attention` names an implementation that transformers knows,
    None takes its own choice.

    Raise UnsupportedModel: no safetensors, weights missing, or an adapter that can't be merged exactly.
    """
    files, adapter = weight_files(reference, config), find_adapter(reference, progress)
    model = load_weights(reference, config, dtype, device, attention, progress)
    check_unquantized(reference, config, files)
    if adapter is not None:
        model = _adapted(model, adapter, reference, progress)
        files.append(adapter.weights)
    tokenizer = _load_tokenizer(reference)
    start = _decoder_start_id(model)
    identity = fingerprint(
        files,
        config,
        tokenizer,
        progress,
        adapter=adapter.config if adapter else None,
        beginning=None if start is None else _beginning(model, start),
    )
    return Pretrained(model, tokenizer, _eos_ids(model, tokenizer), identity, start)


def read_config(reference: str) -> PreTrainedConfig:
    """Read config.json of a language model.

    Raise UnsupportedModel: it can't be read.
    """
    is_directory = Path(reference).is_dir()
    if not is_directory and reference.startswith(("/", ".", "~")):
        raise UnsupportedModel(f"there is no directory '{reference}'")
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(reference, trust_remote_code=False)
    except Exception as error:  # transformers raises whatever its classes raise
        where = "" if is_directory else " (it is no directory here, so it was taken for a hub id)"
        raise UnsupportedModel(
            f"cannot read the configuration of '{reference}'{where}: {in_one_line(error)}"
        ) from error
    return config


def _adapted(
    model: PreTrainedModel, adapter: Adapter, reference: str, progress: Callable[[str], None]
) -> PreTrainedModel:
    if is_quantized(model.config):
        raise UnsupportedModel(
            f"an adapter ({adapter.kind}) lies beside the quantized weights of '{reference}', into which "
            "it can't be merged exactly; merge it before quantizing, or move adapter_config.json away"
        )
    progress(
        f"an adapter ({adapter.kind}) lies beside the weights; it is part of this base, and of its identity"
    )
    return apply_adapter(model, adapter, reference)


def _load_tokenizer(reference: str) -> PreTrainedTokenizerBase:
    try:
        tokenizer = _fast_tokenizer(reference)
    except Exception as error:  # transformers raises whatever its converters raise
        raise UnsupportedModel(
            f"cannot load a tokenizer of '{reference}'; it needs a {_TOKENIZER} beside the weights: "
            f"{in_one_line(error)}"
        ) from error
    if not tokenizer.is_fast:
        raise UnsupportedModel(
            f"transformers has only a slow tokenizer for '{reference}' ({type(tokenizer).__name__}); put a "
            f"{_TOKENIZER} of the same vocabulary beside the weights, made with the package tokenizers"
        )
    return tokenizer


def _fast_tokenizer(reference: str) -> PreTrainedTokenizerBase:
    """Load the tokenizer, from its file where transformers knows no fast one of its kind (Marian's)."""
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(reference, trust_remote_code=False)
        if tokenizer.is_fast or find_file(reference, _TOKENIZER) is None:
            return tokenizer
    except ImportError:  # of what a slow one needs
        if find_file(reference, _TOKENIZER) is None:
            raise
    fast: PreTrainedTokenizerBase = PreTrainedTokenizerFast.from_pretrained(reference)
    return fast


def _decoder_start_id(model: PreTrainedModel) -> int | None:
    """Return the id as transformers chooses it; None: the model is causal.

    Raise UnsupportedModel: an encoder-decoder has none.
    """
    if not model.config.is_encoder_decoder:
        return None
    settings = model.generation_config
    for found in (settings.decoder_start_token_id, settings.bos_token_id):
        if isinstance(found, int):
            return found
    raise UnsupportedModel(
        f"this '{model.config.model_type}' doesn't say with which token its decoder begins; write "
        "decoder_start_token_id into its generation_config.json"
    )


def _beginning(model: PreTrainedModel, start: int) -> dict[str, Any]:
    """Return the ids of the generation config that an encoder-decoder's texts begin and end with."""
    forced = ("forced_bos_token_id", "forced_eos_token_id")
    return {"decoder_start_token_id": start} | {
        name: getattr(model.generation_config, name, None) for name in forced
    }


def _eos_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Return EOS ids, of the first place that has any."""
    for owner in (model.generation_config, model.config, tokenizer):
        ids = getattr(owner, "eos_token_id", None)
        if ids is not None:
            return frozenset(ids if isinstance(ids, list) else [ids])
    return frozenset()
