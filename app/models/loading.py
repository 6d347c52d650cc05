"""From a local path or hub id to a probed, frozen base model."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.configuration_utils import PreTrainedConfig
from transformers.utils.hub import cached_file, get_checkpoint_shard_files

from app.errors import UnsupportedModel
from app.models.acceleration import accelerate
from app.models.attention.packed import IMPLEMENTATION, register
from app.models.decoder_only import DecoderOnly
from app.models.fingerprint import fingerprint
from app.models.geometry import model_geometry
from app.models.native.library import kernels_in_words
from app.models.probe import ProbeReport, own_logits, probe_architecture, probe_weights

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedBase:
    """A base model that may serve: it passed both probes."""

    name: str  # the served name: the last part of the path or hub id
    backbone: DecoderOnly
    tokenizer: PreTrainedTokenizerBase
    eos_ids: frozenset[int]
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
    model = _load_model(reference, choose_dtype(dtype, target), target)
    tokenizer = _load_tokenizer(reference)
    identity = fingerprint(_weight_files(reference), config, tokenizer, progress)
    if model.dtype == torch.bfloat16 and target.type == "cpu":
        progress(f"CPU kernels: {kernels_in_words()}")
    progress("checking the real weights against the model's own forward pass")
    backbone = DecoderOnly(model, model_geometry(model, identity, max_context))
    own = own_logits(model)
    accelerate(backbone)
    weights_figure = probe_weights(backbone, own)
    return LoadedBase(
        name=Path(reference).name,
        backbone=backbone,
        tokenizer=tokenizer,
        eos_ids=_eos_ids(model, tokenizer),
        report=ProbeReport(twin_figure, weights_figure, backbone.geometry),
    )


def _load_config(reference: str) -> PreTrainedConfig:
    is_directory = Path(reference).is_dir()
    if not is_directory and reference.startswith(("/", ".", "~")):
        raise UnsupportedModel(f"there is no directory '{reference}'")
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(reference, trust_remote_code=False)
    except (OSError, ValueError) as error:
        where = "" if is_directory else " (it is no directory here, so it was taken for a hub id)"
        raise UnsupportedModel(f"cannot read the configuration of '{reference}'{where}: {error}") from error
    if config.is_encoder_decoder:
        raise UnsupportedModel(
            f"'{config.model_type}' is an encoder-decoder; this release serves causal language models"
        )
    return config


def _load_tokenizer(reference: str) -> PreTrainedTokenizerBase:
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(reference, trust_remote_code=False)
    except Exception as error:  # transformers raises whatever its converters raise
        raise UnsupportedModel(
            f"cannot load a tokenizer of '{reference}'; it needs a tokenizer.json beside the weights: {error}"
        ) from error
    return tokenizer


def _load_model(reference: str, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    try:
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            reference,
            dtype=dtype,
            attn_implementation=IMPLEMENTATION,
            use_safetensors=True,
            trust_remote_code=False,
        )
    except (OSError, ValueError, SafetensorError) as error:
        raise UnsupportedModel(f"cannot load the weights of '{reference}': {error}") from error
    model.to(device)  # type: ignore[arg-type]  # transformers wraps torch's signature away
    model.eval()
    model.requires_grad_(False)
    return model


def _weight_files(reference: str) -> list[Path]:
    single = cached_file(reference, "model.safetensors", _raise_exceptions_for_missing_entries=False)
    if single is not None:
        return [Path(single)]
    index = cached_file(reference, "model.safetensors.index.json")
    shards, _ = get_checkpoint_shard_files(reference, index)
    return [Path(shard) for shard in shards]


def _eos_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """EOS ids: of all that the generation config offers, only these are taken."""
    for owner in (model.generation_config, model.config, tokenizer):
        ids = getattr(owner, "eos_token_id", None)
        if ids is not None:
            return frozenset(ids if isinstance(ids, list) else [ids])
    return frozenset()
