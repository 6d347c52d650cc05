"""The GPU, its driver, the versions of what runs, and what the GPU can do: bandwidth and arithmetic."""

import importlib.metadata
import shutil
import subprocess
from dataclasses import asdict
from typing import Any

import torch

from app.models.limits import measure_hardware
from benchmarks.gpu.findings import Findings
from benchmarks.gpu.setup import Clock, Setup
from benchmarks.machine import machine

_PACKAGES = ("triton", "peft", "numpy", "safetensors")


def find_facts(setup: Setup, findings: Findings, clock: Clock) -> None:
    """Note what figures depend on."""
    findings.note("machine", machine())
    findings.note("versions", {name: _version(name) for name in _PACKAGES} | {"cuda": torch.version.cuda})
    findings.note("gpu", gpu() if setup.device.startswith("cuda") else None)
    findings.note("hardware", asdict(measure_hardware(setup.device)))


def gpu() -> dict[str, Any]:
    """Return what the driver tells of the GPU."""
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_gib": round(properties.total_memory / (1 << 30), 1),
        "l2_mib": getattr(properties, "L2_cache_size", 0) >> 20,
        "driver": _driver(),
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _driver() -> str | None:
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    command = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20)
    except subprocess.TimeoutExpired:
        return None
    return next(iter(found.stdout.split()), None)
