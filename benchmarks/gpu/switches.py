"""Engines with parts of the GPU's path switched off, over one model."""

import copy
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from app.engine.engine import Engine, EngineConfig
from app.engine.statistics import StepStats
from app.models.attention.backend import AttentionBackend
from app.models.attention.cascade import NEVER
from app.models.attention.registry import choose_backend
from app.models.attention.torch import TorchBackend
from app.models.attention.triton import TritonBackend
from app.models.backbones import AnyBackbone
from app.prompt import LayerGeometry, PromptSource


class Switches(NamedTuple):
    """What is on."""

    kernels: bool = True  # Triton's; off: torch's attention
    graphs: bool = True
    overlap: bool = True  # a step is scheduled while the one before runs
    cascade: bool = True  # rows that share a long prefix attend to it together

    @property
    def name(self) -> str:
        """The name that reports have."""
        off = [name for name, is_on in zip(self._fields, self, strict=True) if not is_on]
        return f"without {', '.join(off)}" if 0 < len(off) < len(self) else "none" if off else "all"


ALL, NONE = Switches(), Switches(False, False, False, False)


def variants() -> tuple[Switches, ...]:
    """Return all on, each one off, and all off."""
    return (ALL, *(ALL._replace(**{name: False}) for name in Switches._fields), NONE)


def settings_of(switches: Switches) -> dict[str, Any]:
    """Return the fields of EngineConfig that switch an engine's own parts."""
    return {"cuda_graphs": switches.graphs, "steps_in_flight": 2 if switches.overlap else 1}


def switched(backbone: AnyBackbone, switches: Switches) -> AnyBackbone:
    """Return a backbone over the same model, which has backends of its own."""
    mine = copy.copy(backbone)
    mine.backends = [
        backend_of(group.geometry, mine.dtype, mine.device, switches) for group in mine.kv_groups
    ]
    return mine


def backend_of(
    geometry: LayerGeometry, dtype: torch.dtype, device: torch.device, switches: Switches = ALL
) -> AttentionBackend[Any]:
    """Return the backend that a server would have, or torch's; under the interpreter Triton's on a CPU."""
    if not switches.kernels:
        return TorchBackend(geometry, dtype, device)
    chosen = choose_backend(geometry, dtype, device)
    if isinstance(chosen, TritonBackend) or is_interpreted(device):
        return TritonBackend(geometry, dtype, device, costs=None if switches.cascade else NEVER)
    return chosen


def is_interpreted(device: torch.device) -> bool:
    """Return whether Triton's kernels run on this CPU, by its interpreter."""
    return device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"


def switched_engine(
    backbone: AnyBackbone,
    source: PromptSource,
    switches: Switches,
    on_step: Callable[[StepStats], None] | None = None,
    **settings: Any,
) -> Engine:
    """Return an engine that isn't started yet; `settings` are more fields of EngineConfig."""
    config = EngineConfig(**settings | settings_of(switches))
    return Engine(switched(backbone, switches), source, config, on_step=on_step)
