"""`promptplex doctor`: what this machine and, if one is named, this model can do."""

import json
import os
import platform
import sys
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from app import __version__
from app.cli.importing import large_imports
from app.cli.speed import in_words
from app.host_memory import host_memory
from app.prompt import ModelGeometry
from app.sites import Site

if TYPE_CHECKING:
    from app.models.cpu.packed_linear import Weights
    from app.models.loading import LoadedBase

_LIBRARIES = ("torch", "transformers", "fastapi", "pydantic", "safetensors")


def doctor(
    model: str | None = typer.Option(
        None, help="Base to load and probe: a directory or hub id; default: none"
    ),
    dtype: str = typer.Option("auto", help="Dtype to load it in: auto, float32, bfloat16 or float16"),
    weights: str = typer.Option("auto", help="Weights of its linear layers: auto, or int8 on CPUs"),
    device: str = typer.Option("auto", help="Device: auto, cpu, cuda or cuda:N"),
    speed: bool = typer.Option(
        False, help="With --model: let the engine run decode steps, and compare them with what is possible"
    ),
    as_json: bool = typer.Option(False, "--json", help="Print JSON"),
) -> None:
    """Show this machine's software, hardware and measured speed, and with --model the probe of a base."""
    if weights not in ("auto", "int8"):
        raise ValueError(f"unknown weights {weights!r}; choose auto or int8")
    report: dict[str, Any] = {"software": _software(), "machine": _machine(), "choices": _choices(device)}
    report["gpu"] = _gpu(report["choices"]["device"])
    typer.echo("measuring (a few seconds)", err=True)
    report["measured"] = _measure(report["choices"]["device"])
    if model is not None:
        report |= _model(model, dtype, "int8" if weights == "int8" else "auto", device, speed=speed)
    if as_json:
        typer.echo(json.dumps(report, indent=2))
    else:
        _print_report(report)


def register(cli: typer.Typer) -> None:
    """Add the command."""
    cli.command("doctor")(doctor)


def _software() -> dict[str, str]:
    libraries = {name: version(name) for name in _LIBRARIES}
    return {"promptplex": __version__, "python": sys.version.split()[0], **libraries}


def _machine() -> dict[str, Any]:
    import torch

    total, free = host_memory()
    return {
        "system": platform.platform(),
        "cpu": _cpu_name(),
        "cores_usable": _usable_cores(),
        "torch_threads": torch.get_num_threads(),
        "memory_gib": _gib(total),
        "memory_free_gib": _gib(free),
        "torch_cpu_kernels": torch.backends.cpu.get_cpu_capability(),
        "gpus": torch.cuda.device_count(),
    }


def _choices(device: str) -> dict[str, Any]:
    """What `auto` means here."""
    from app.models.cpu.summary import kernels_in_words
    from app.models.placement import (
        choose_device,
        choose_dtype,
        cpu_bfloat16_in_words,
        cpu_has_native_bfloat16,
    )

    chosen = choose_device(device)
    return {
        "device": str(chosen),
        "dtype": str(choose_dtype("auto", chosen)).removeprefix("torch."),
        "cpu_native_bfloat16": cpu_has_native_bfloat16(),
        "cpu_bfloat16_by": cpu_bfloat16_in_words(),
        "cpu_kernels": kernels_in_words(),
    }


def _gpu(device: str) -> dict[str, str]:
    """Return what there is of a GPU, what is used of it, and what is missing."""
    import torch

    from app.models.cuda.summary import gpu_in_words, read_facts

    return gpu_in_words(read_facts(torch.device(device)))


def _measure(device: str) -> dict[str, float]:
    """Read bandwidth, and matrix products in both dtypes: the two limits of every decode step."""
    import torch

    from app.models.limits import matmul_throughput, read_bandwidth

    figures = {"read_gb_per_s": round(read_bandwidth(device) / 1e9, 1)}
    for dtype in (torch.float32, torch.bfloat16):
        name = f"matmul_{str(dtype).removeprefix('torch.')}_gflop_per_s"
        figures[name] = round(matmul_throughput(device, dtype) / 1e9, 1)
    return figures


def _model(reference: str, dtype: str, weights: "Weights", device: str, *, speed: bool) -> dict[str, Any]:
    with large_imports():
        from app.models.loading import load_base

    base = load_base(
        reference,
        dtype=dtype,
        weights=weights,
        device=device,
        progress=lambda line: typer.echo(line, err=True),
    )
    report, limits = {"model": _shapes(base)}, _limits(reference, base, weights, speed=speed)
    return report | {"limits": limits} if limits else report


def _limits(reference: str, base: "LoadedBase", weights: "Weights", *, speed: bool) -> dict[str, Any]:
    """Return what the hardware allows the base's decode steps; empty where that can't be said."""
    from app.cli.speed import decode_limits, measure_steps
    from app.models.limits import cost_of, measure_hardware
    from app.models.pretrained import read_config

    backbone = base.backbone
    cost = cost_of(read_config(reference), backbone.dtype, weights)
    if cost is None:
        return {}
    typer.echo("measuring what is possible (seconds)", err=True)
    hardware = measure_hardware(str(backbone.device), backbone.dtype)
    kv_bytes = _bytes_at(Site.DECODER_SELF, backbone.geometry, backbone.dtype.itemsize)
    limits = decode_limits(hardware, cost, kv_bytes)
    if speed:
        typer.echo("running decode steps (a minute for a large base)", err=True)
        measure_steps(base, limits)
    return limits


def _shapes(base: "LoadedBase") -> dict[str, Any]:
    geometry = base.backbone.geometry
    layers = geometry.layers[Site.DECODER_SELF]
    encoder = {
        "encoder_layers": len(geometry.layers.get(Site.ENCODER_SELF, ())),
        "source_positions": geometry.max_source_positions,
        "cross_kv_bytes_per_source_token": _bytes_at(
            Site.DECODER_CROSS, geometry, base.backbone.dtype.itemsize
        ),
        "decoder_start_id": base.decoder_start_id,
    }
    return {
        "name": base.name,
        "architecture": geometry.architecture,
        "fingerprint": geometry.fingerprint,
        "dtype": geometry.dtype,
        "layers": len(layers),
        "hidden_size": geometry.hidden_size,
        "vocabulary": geometry.vocab_size,
        "positions": geometry.max_positions,
        "sliding_windows": sorted({layer.window for layer in layers if layer.window is not None}),
        "kv_bytes_per_token": _bytes_at(Site.DECODER_SELF, geometry, base.backbone.dtype.itemsize),
        **(encoder if geometry.has_encoder else {}),
        "probe_twin_error": base.report.twin_error,
        "probe_weights_error": base.report.weights_error,
    }


def _bytes_at(site: Site, geometry: ModelGeometry, item_bytes: int) -> int:
    """Bytes of the keys and values that a token has in all layers of a site."""
    return item_bytes * sum(layer.kv_width for layer in geometry.layers.get(site, ()))


def _print_report(report: dict[str, Any]) -> None:
    for section, entries in report.items():
        typer.echo(f"{section}:")
        for name, value in entries.items():
            shown = ", ".join(map(str, value)) or "none" if isinstance(value, list) else value
            if section == "limits":
                shown = in_words(value)
            typer.echo(f"  {name.replace('_', ' '):<32} {shown}")


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _usable_cores() -> int:
    """Cores that this process may use, which containers often restrict."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _gib(size: int) -> float:
    return round(size / (1 << 30), 1)
