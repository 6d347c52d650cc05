"""What makes a loaded, frozen model faster on this machine without changing what it computes.

Everything here is for bf16 on CPUs. float32 runs transformers' own modules, and is the reference.
"""

import torch
from torch import nn

from app.models.gated_mlp import fuse_gated_mlps
from app.models.native.library import kernels_for
from app.models.native.openmp import release_workers
from app.models.packed_linear import pack_linears
from app.models.rms_norm import fuse_rms_norms


def accelerate(model: nn.Module, dtype: torch.dtype, device: torch.device) -> None:
    """Replace modules by faster ones where this machine has them, each after comparing the two."""
    kernels = kernels_for(dtype, device)
    if pack_linears(model):
        fuse_gated_mlps(model, kernels)
    if kernels is not None:
        fuse_rms_norms(model, kernels)
    release_workers()
