"""From a local path or hub id to a probed, accelerated base model."""

import gc
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from app.models.attention.packed import IMPLEMENTATION, register
from app.models.backbones import AnyBackbone, backbone_of
from app.models.base_name import base_name
from app.models.cpu.acceleration import accelerate
from app.models.cpu.packed_linear import Weights
from app.models.cpu.summary import kernels_in_words
from app.models.geometry import model_geometry
from app.models.placement import check_dtype, check_int8, choose_device, choose_dtype
from app.models.pretrained import load_pretrained, read_config
from app.models.probe import ProbeReport, own_logits, probe_architecture, probe_weights
from app.models.probe_rounding import OwnTexts, compare_rounded, own_texts

# Requests under way are more than Python's 700, so that it would look through them again and again.
_YOUNG_OBJECTS = 10_000


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedBase:
    """A base model that may serve: it passed both probes."""

    name: str  # what it is called where its operator gives it no name
    backbone: AnyBackbone
    tokenizer: PreTrainedTokenizerBase
    eos_ids: frozenset[int]
    generation: Mapping[str, Any]  # fields of its generation config, as transformers read them
    report: ProbeReport
    decoder_start_id: int | None = None  # with which an encoder-decoder's decoder begins


def load_base(
    reference: str,
    *,
    dtype: str = "auto",
    weights: Weights = "auto",
    device: str = "auto",
    max_context: int | None = None,
    progress: Callable[[str], None] = print,
) -> LoadedBase:
    """Load and probe a language model, and make it fast.

    With "int8" weights its linear layers but the head compute in integers of 8 bits, compared with bf16.

    Raise UnsupportedModel: not a language model, no safetensors, a dtype in which it can't be exact, or a
    probe out of tolerance. Raise ValueError: `dtype` or `device` name nothing that this machine has.
    """
    register()
    target = choose_device(device)
    load_dtype = choose_dtype(dtype, target)
    config = read_config(reference)
    check_dtype(config, load_dtype)
    progress(f"probing the architecture '{config.model_type}' on a tiny twin")
    if weights == "int8":
        check_int8(config, load_dtype, target)
    twin_figure = probe_architecture(config)
    progress(f"loading {reference}")
    loaded = load_pretrained(
        reference,
        config,
        dtype=load_dtype,
        device=target,
        attention=IMPLEMENTATION,
        progress=progress,
    )
    model = loaded.model
    has_kernels = model.dtype == torch.bfloat16 and target.type == "cpu"
    if has_kernels:
        progress(f"CPU kernels: {kernels_in_words()}")
    progress("checking the real weights against the model's own forward pass")
    own = own_logits(model)  # before anything in the model is replaced
    texts = own_texts(model, loaded.tokenizer) if weights == "int8" else None
    backbone = backbone_of(model, model_geometry(model, loaded.fingerprint, max_context))
    is_fused = accelerate(backbone, weights)
    if has_kernels:
        progress(f"layers: {'all in one native call a step' if is_fused else 'module by module'}")
    report = _probed(backbone, twin_figure, own, texts)
    if report.rounding is not None:
        progress(str(report.rounding))
    _settle_memory()
    return LoadedBase(
        name=base_name(reference),
        backbone=backbone,
        tokenizer=loaded.tokenizer,
        eos_ids=loaded.eos_ids,
        generation=model.generation_config.to_dict(),
        report=report,
        decoder_start_id=loaded.decoder_start_id,
    )


def _probed(
    backbone: AnyBackbone, twin_figure: float, own: list[Tensor], texts: OwnTexts | None
) -> ProbeReport:
    """Compare an accelerated base with its own logits before that: rounded weights on whole texts."""
    if texts is None:
        return ProbeReport(twin_figure, probe_weights(backbone, own), None)
    return ProbeReport(twin_figure, None, compare_rounded(backbone, texts))


def _settle_memory() -> None:
    gc.collect()
    gc.freeze()  # what stays; looking through all of it would stop every thread for 0.3 s at times
    gc.set_threshold(_YOUNG_OBJECTS)
