"""What makes a loaded, frozen model faster on this machine without changing what it computes.

Everything here is for bf16 on CPUs. float32 runs transformers' own modules, and is the reference.
"""

from app.models.cpu.gated_mlp import GatedMLP, fuse_gated_mlps
from app.models.cpu.library import kernels_for
from app.models.cpu.openmp import release_workers
from app.models.cpu.packed_linear import pack_linears
from app.models.cpu.rms_norm import fuse_rms_norms
from app.models.cpu.sampled_rows import skip_unread_rows
from app.models.decoder_only import DecoderOnly
from app.sites import Site


def accelerate(backbone: DecoderOnly) -> None:
    """Replace modules by faster ones where this machine has them, each after comparing the two."""
    model, kernels = backbone.model, kernels_for(backbone.dtype, backbone.device)
    if pack_linears(model):
        fuse_gated_mlps(model, kernels)
        skip_unread_rows(
            model, GatedMLP, len(backbone.geometry.layers[Site.DECODER_SELF]), backbone.sampled_rows
        )
    if kernels is not None:
        fuse_rms_norms(model, kernels)
    release_workers()
