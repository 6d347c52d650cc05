"""What makes a loaded, frozen model faster on this machine without changing what it computes.

Everything here is for bf16 on CPUs. float32 runs transformers' own modules, and is the reference.
"""

from transformers import PreTrainedModel

from app.models.backbones import AnyBackbone
from app.models.cpu.fusing import fuse_layers
from app.models.cpu.library import kernels_for
from app.models.cpu.mlp import GatedMLP, MergedMLP, fuse_mlps
from app.models.cpu.openmp import release_workers
from app.models.cpu.packed_linear import Weights, pack_linears
from app.models.cpu.rms_norm import fuse_rms_norms
from app.models.cpu.sampled_rows import skip_unread_rows
from app.models.decoder_only import DecoderOnly


def accelerate(backbone: AnyBackbone, weights: Weights = "auto") -> bool:
    """Replace modules by faster ones where this machine has them, each after comparing the two.

    With "int8" weights the linear layers of the stacks compute in integers of 8 bits. Return whether all
    layers are one native call now.
    """
    is_fused = isinstance(backbone, DecoderOnly) and fuse_layers(backbone, weights)
    accelerate_modules(backbone.model, weights)
    release_workers()
    return is_fused


def accelerate_modules(model: PreTrainedModel, weights: Weights = "auto") -> None:
    """Replace single modules, which stay a plain transformers model's."""
    kernels = kernels_for(model.dtype, model.device)
    if pack_linears(model, weights):
        fuse_mlps(model)
        if not model.config.is_encoder_decoder:  # there a prompt's tokens are the encoder's, and all are read
            skip_unread_rows(model, (GatedMLP, MergedMLP), model.config.get_text_config().num_hidden_layers)
    if kernels is not None:
        fuse_rms_norms(model, kernels)
