"""What figures depend on: the processor, its kind, and the versions of what ran."""

import os
import platform
from pathlib import Path
from typing import Any

import torch
import transformers

_CPUINFO = Path("/proc/cpuinfo")
# What makes products of bf16 fast, the best first, and the flags of /proc/cpuinfo that tell it.
_KINDS = {
    "cpu-amx": ("amx_tile", "amx_bf16"),
    "cpu-avx512-bf16": ("avx512_bf16",),
    "cpu-avx512": ("avx512f",),
    "cpu-avx2": ("avx2",),
}


def machine() -> dict[str, Any]:
    """The machine and the software of this process."""
    return {
        "kind": processor_kind(),
        "platform": platform.platform(),
        "processor": _field("model name") or platform.processor(),
        "family_and_model": f"{_field('cpu family')}/{_field('model')}",
        "instructions": kinds_supported(_field("flags")),
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "cpu_kernels": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def processor_kind() -> str:
    """What figures may be compared within: `cpu-amx`, `cpu-avx512-bf16` ... or `cpu` and the architecture."""
    kinds = kinds_supported(_field("flags"))
    return kinds[0] if kinds else f"cpu-{platform.machine()}"


def kinds_supported(flags: str) -> list[str]:
    """The kinds whose flags are all there, the best first."""
    there = set(flags.split())
    return [kind for kind, needed in _KINDS.items() if there.issuperset(needed)]


def _field(name: str) -> str:
    """Of the first processor; "" where the system doesn't tell."""
    lines = _CPUINFO.read_text().splitlines() if _CPUINFO.is_file() else []
    found = (line.split(":", 1)[1].strip() for line in lines if line.split(":")[0].strip() == name)
    return next(found, "")
