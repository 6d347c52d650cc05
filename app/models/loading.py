"""From a local path or hub id to a probed, frozen base model."""

import gc
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.configuration_utils import PreTrainedConfig

from app.errors import UnsupportedModel
from app.models.adapter import Adapter, apply_adapter, find_adapter
from app.models.attention.packed import register
from app.models.cpu.acceleration import accelerate
from app.models.cpu.library import kernels_in_words
from app.models.decoder_only import DecoderOnly
from app.models.fingerprint import fingerprint
from app.models.geometry import model_geometry
from app.models.naming import base_name
from app.models.probe import ProbeReport, own_logits, probe_architecture, probe_weights
from app.models.weights import check_unquantized, in_one_line, is_quantized, load_weights, weight_files

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedBase:
    """A base model that may serve: it passed both probes."""

    name: str  # what it is called where its operator gives it no name
    backbone: DecoderOnly
    tokenizer: PreTrainedTokenizerBase
    eos_ids: frozenset[int]
    generation: Mapping[str, Any]  # fields of its generation config, as transformers read them
    report: ProbeReport


def choose_device(device: str) -> torch.device:
    """The device for `--device`; `auto` takes CUDA where there is one."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(
            f"device {device!r} was asked for, but this torch finds no CUDA GPU; take --device cpu, or "
            "install a CUDA build of torch"
        )
    return torch.device(device)


def cpu_has_native_bfloat16() -> bool:
    """Whether bf16 products run in hardware here (AVX512-BF16, AMX or ARM's)."""
    capabilities = torch.backends.cpu.get_cpu_capability()
    return capabilities.startswith("SVE") or bool(
        torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    )


def choose_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """The dtype for `--dtype`; `auto` is bf16 where the hardware has it, else float32."""
    if dtype != "auto":
        if dtype not in _DTYPES:
            raise ValueError(f"unknown dtype {dtype!r}; choose auto, {', '.join(_DTYPES)}")
        return _DTYPES[dtype]
    native = torch.cuda.is_bf16_supported() if device.type == "cuda" else cpu_has_native_bfloat16()
    return torch.bfloat16 if native else torch.float32


def load_base(
    reference: str,
    *,
    dtype: str = "auto",
    device: str = "auto",
    max_context: int | None = None,
    progress: Callable[[str], None] = print,
) -> LoadedBase:
    """Load, fingerprint and probe a causal language model.

    Raises:
        UnsupportedModel: not a causal model, no safetensors, or a probe out of tolerance.
    """
    register()
    target = choose_device(device)
    config = _load_config(reference)
    progress(f"probing the architecture '{config.model_type}' on a tiny twin")
    twin_figure = probe_architecture(config)
    progress(f"loading {reference}")
    files, adapter = weight_files(reference, config), find_adapter(reference, progress)
    model = load_weights(reference, config, choose_dtype(dtype, target), target, progress)
    check_unquantized(reference, config, files)
    if adapter is not None:
        model = _adapted(model, adapter, reference, progress)
        files.append(adapter.weights)
    tokenizer = _load_tokenizer(reference)
    identity = fingerprint(files, config, tokenizer, progress, adapter=adapter.config if adapter else None)
    if model.dtype == torch.bfloat16 and target.type == "cpu":
        progress(f"CPU kernels: {kernels_in_words()}")
    progress("checking the real weights against the model's own forward pass")
    backbone = DecoderOnly(model, model_geometry(model, identity, max_context))
    own = own_logits(model)
    accelerate(model)
    weights_figure = probe_weights(backbone, own)
    gc.collect()
    gc.freeze()  # what stays; looking through all of it would stop every thread for 0.3 s at times
    return LoadedBase(
        name=base_name(reference),
        backbone=backbone,
        tokenizer=tokenizer,
        eos_ids=_eos_ids(model, tokenizer),
        generation=model.generation_config.to_dict(),
        report=ProbeReport(twin_figure, weights_figure, backbone.geometry),
    )


def _load_config(reference: str) -> PreTrainedConfig:
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
    if config.is_encoder_decoder:
        raise UnsupportedModel(
            f"'{config.model_type}' is an encoder-decoder; this release serves causal language models"
        )
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
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(reference, trust_remote_code=False)
    except Exception as error:  # transformers raises whatever its converters raise
        raise UnsupportedModel(
            f"cannot load a tokenizer of '{reference}'; it needs a tokenizer.json beside the weights: "
            f"{in_one_line(error)}"
        ) from error
    return tokenizer


def _eos_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """EOS ids, which count whatever else of the generation config does."""
    for owner in (model.generation_config, model.config, tokenizer):
        ids = getattr(owner, "eos_token_id", None)
        if ids is not None:
            return frozenset(ids if isinstance(ids, list) else [ids])
    return frozenset()
