"""What `doctor` says of this machine's GPU: what there is, what will be used, and what is missing.

`read_facts` asks the system; the rest follows from the facts.
"""

import os
import re
import shutil
import sysconfig
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from app.models.weights import in_one_line

_DRIVER = Path("/proc/driver/nvidia/version")
_LEAST_CAPABILITY = (8, 0)  # that Triton supports: Ampere


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """One GPU that torch finds."""

    name: str
    capability: tuple[int, int]
    total_bytes: int
    free_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuFacts:
    """What matters for serving on a GPU."""

    gpu: Gpu | None
    driver: str | None  # version; None: there is no driver of NVIDIA's here
    torch_cuda: str | None  # that torch was built for; None: for CPUs
    triton: str | None
    compiler: str | None  # that Triton would call for its launcher
    has_headers: bool  # Python's, for the same
    cache: Path  # where Triton keeps what it compiled
    is_cache_writable: bool
    fault: str | None = None  # why Triton can't launch anything here


def read_facts(device: torch.device) -> GpuFacts:
    """Read them, of the GPU that is `device`, or of the first; this may start CUDA."""
    looked_at = device if device.type == "cuda" else torch.device("cuda")
    gpu = _gpu(looked_at) if torch.cuda.is_available() else None
    cache = Path(os.environ.get("TRITON_CACHE_DIR") or Path.home() / ".triton" / "cache")
    triton = _version("triton")
    return GpuFacts(
        gpu=gpu,
        driver=_driver(),
        torch_cuda=torch.version.cuda,
        triton=triton,
        compiler=os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang"),
        has_headers=(Path(sysconfig.get_paths()["include"]) / "Python.h").is_file(),
        cache=cache,
        is_cache_writable=_is_writable(cache),
        fault=_fault_of_triton() if gpu is not None and triton is not None else None,
    )


def gpu_in_words(facts: GpuFacts) -> dict[str, str]:
    """Return a line for each thing that an operator wants to know; `missing` is there where anything is."""
    problems, gpu = missing(facts), facts.gpu
    lines = {
        "found": "none",
        "driver": facts.driver or "none",
        "cuda_of_torch": facts.torch_cuda or "none: this torch is built for CPUs",
        "triton": facts.triton or "not installed",
    }
    if gpu is not None:
        major, minor = gpu.capability
        lines["found"] = gpu.name
        lines["compute_capability"] = f"{major}.{minor}"
        total, free = (f"{size / (1 << 30):.1f}" for size in (gpu.total_bytes, gpu.free_bytes))
        lines["memory_gib"] = f"{total}, {free} of it free"
        uses = "torch's attention, without CUDA graphs" if problems else "our own, in Triton, and CUDA graphs"
        lines["kernels"] = uses + ("" if problems else ", where they agree with torch when a base is loaded")
    if problems and (gpu is not None or facts.driver is not None):
        lines["missing"] = "; ".join(problems)
    return lines


def missing(facts: GpuFacts) -> list[str]:
    """Return what keeps this machine from running kernels on a GPU, and what to do, most urgent first."""
    if facts.gpu is None:
        return [_why_no_gpu(facts)]
    problems = []
    if facts.gpu.capability < _LEAST_CAPABILITY:
        problems.append("Triton needs a GPU of compute capability 8.0 (Ampere) or later")
    if facts.triton is None:
        problems.append("Triton isn't installed: pip install triton, of the version that torch names")
    if facts.compiler is None:
        problems.append("no C compiler, with which Triton builds its launcher: install gcc and libc6-dev")
    if not facts.has_headers:
        problems.append("no Python.h, which the launcher includes: install Python's headers (python3-dev)")
    if not facts.is_cache_writable:
        problems.append(f"{facts.cache} can't be written: set TRITON_CACHE_DIR to a directory that can")
    if facts.fault is not None and not problems:
        problems.append(f"Triton can't launch kernels: {facts.fault}")
    return problems


def _why_no_gpu(facts: GpuFacts) -> str:
    if facts.driver is None:
        return (
            "no driver of NVIDIA's: install it, or start the container with a GPU (docker run --gpus all; "
            "the host needs NVIDIA's container toolkit)"
        )
    if facts.torch_cuda is None:
        return "torch is built for CPUs: install a build for CUDA (PyTorch's installation page lists them)"
    return (
        "torch finds no GPU: the driver may be older than its CUDA needs (update it, or install a torch for "
        "an older CUDA), or CUDA_VISIBLE_DEVICES hides it"
    )


def _gpu(device: torch.device) -> Gpu:
    free, total = torch.cuda.mem_get_info(device)
    return Gpu(
        name=torch.cuda.get_device_name(device),
        capability=torch.cuda.get_device_capability(device),
        total_bytes=total,
        free_bytes=free,
    )


def _driver() -> str | None:
    """Return the version of the kernel's module, which containers see too."""
    found = re.search(r"\s(\d+\.\d+(\.\d+)?)\s", _DRIVER.read_text()) if _DRIVER.is_file() else None
    return None if found is None else found[1]


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _is_writable(directory: Path) -> bool:
    """Return whether files can be made in it, or in the nearest directory above it that exists."""
    existing = next(each for each in (directory, *directory.parents) if each.exists())
    return existing.is_dir() and os.access(existing, os.W_OK | os.X_OK)


def _fault_of_triton() -> str | None:
    """Let Triton make its launcher for this GPU, as the first kernel would."""
    try:
        from triton.runtime import driver

        driver.active.utils  # noqa: B018 - compiles it
    except Exception as error:  # whatever a compiler, a linker or a driver comes up with
        return in_one_line(error)
    return None
