"""All attention backends, the most specialised first."""

from typing import Any

import torch

from app.models.attention.backend import AttentionBackend
from app.models.attention.cpu import CPUBackend
from app.models.attention.torch import TorchBackend
from app.models.attention.triton import TritonBackend
from app.prompt import LayerGeometry

BACKENDS: tuple[type[AttentionBackend[Any]], ...] = (
    CPUBackend,
    TritonBackend,
    TorchBackend,
)


def choose_backend(
    geometry: LayerGeometry, dtype: torch.dtype, device: torch.device
) -> AttentionBackend[Any]:
    """Return the first backend that supports layers of this geometry; torch's supports all."""
    backend = next(each for each in BACKENDS if each.supports(geometry, dtype, device))
    return backend(geometry, dtype, device)
