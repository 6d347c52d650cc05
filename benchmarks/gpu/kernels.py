"""Every kernel beside torch in float64 on the same numbers, and how much of the bandwidth it reaches."""

import statistics
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from app.models.attention.backend import AttentionBackend
from app.models.attention.cascade import ALWAYS, NEVER
from app.models.attention.kv_cache import KVCache, KVGroup
from app.models.attention.torch import TorchBackend
from app.models.attention.triton import TritonBackend
from app.models.limits import read_bandwidth
from app.prompt import LayerGeometry
from app.sites import Site
from benchmarks.gpu.apart import noted
from benchmarks.gpu.cases import Case, attend, cases, inputs_of
from benchmarks.gpu.findings import Findings
from benchmarks.gpu.setup import Clock, Setup
from benchmarks.gpu.switches import backend_of

# Norm of the difference over that of the reference. bfloat16 itself has steps of 2**-8.
_WRITTEN = ((64, 64, torch.float32), (128, 128, torch.bfloat16), (80, 48, torch.float16))
LIMITS = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
_ENOUGH = 4.0  # seconds that a case may take, most of them for the compiler


def compare_kernels(kinds: Collection[str], setup: Setup, findings: Findings, clock: Clock) -> None:
    """Note the errors of all cases of some kinds of layers."""
    device = torch.device(setup.device)
    findings.note("writes", compare_writes(device))
    errors: dict[str, Any] = {}
    for case in cases(kinds, is_tiny=setup.is_tiny):
        if clock.left < _ENOUGH:
            findings.note("not tried", f"without more time: {case.name} and what follows")
            return
        errors[case.name] = _try(partial(compare_case, case, device))
        findings.note("errors", errors)


def time_kernels(setup: Setup, findings: Findings, clock: Clock) -> None:
    """Note how fast the kernels are on a few steps of usual sizes."""
    times = {}
    for name, figures in time_cases(setup, clock):
        times[name] = figures
        findings.note("times", times)


def compare_case(case: Case, device: torch.device) -> dict[str, Any]:
    """Return the relative errors of the kernels, and of torch in the same dtype, by dtype."""
    found = {}
    for dtype, limit in LIMITS.items():
        if device.type == "cpu" and dtype != torch.float32:
            continue  # Triton's interpreter has no products of bf16
        inputs = inputs_of(case, dtype, device)
        right = _run(TorchBackend(case.geometry, torch.float64, device), case, inputs.to(torch.float64))
        error = _error(run_kernels(case, dtype, device), right)
        found[str(dtype).removeprefix("torch.")] = {
            "kernels": error,
            "torch": _error(_run(TorchBackend(case.geometry, dtype, device), case, inputs), right),
            "is right": error <= limit,  # NaN is not
        }
    return found


def run_kernels(case: Case, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return what the kernels compute of a case's inputs, `[T, H, Dv]`."""
    # Shared slots are read together, whatever that gains.
    backend = TritonBackend(case.geometry, dtype, device, costs=ALWAYS)
    return _run(backend, case, inputs_of(case, dtype, device))


def compare_writes(device: torch.device) -> dict[str, Any]:
    """Return whether keys and values of several widths lie where they were written, and nowhere else."""
    found = {}
    for key_dim, value_dim, dtype in (
        (64, 64, torch.float32),
        (128, 128, torch.bfloat16),
        (80, 48, torch.float16),
    ):
        geometry = LayerGeometry(num_kv_heads=3, key_dim=key_dim, value_dim=value_dim)
        cache = KVCache([KVGroup(Site.DECODER_SELF, geometry, (0,))], [301], dtype=dtype, device=device)
        layer = (Site.DECODER_SELF, 0)
        expected = []
        for pool in cache.pools(layer):
            pool.normal_()
            expected.append(pool.clone())
        slots = torch.randperm(300, device=device)[:123] + 1
        rows = [torch.randn(123, 3, width, device=device).to(dtype) for width in (key_dim, value_dim)]
        cache.write(layer, slots, *rows)
        for pool, row in zip(expected, rows, strict=True):
            pool[slots] = row.flatten(1)
        same = [torch.equal(a, b) for a, b in zip(cache.pools(layer), expected, strict=True)]
        found[f"{key_dim} and {value_dim}, {str(dtype).removeprefix('torch.')}"] = all(same)
    return found


def time_cases(setup: Setup, clock: Clock) -> Iterator[tuple[str, dict[str, float]]]:
    """Yield seconds of the backend that serves and of torch's, and the share of the bandwidth reached."""
    device = torch.device(setup.device)
    dtype = torch.float32 if setup.is_tiny else torch.bfloat16
    bandwidth = read_bandwidth(setup.device)
    for case in _timed_cases(is_tiny=setup.is_tiny):
        if clock.left < _ENOUGH:
            return
        inputs = inputs_of(case, dtype, device)
        found: dict[str, float] = {}
        for name, backend in _timed_backends(case, dtype, device).items():
            layout = backend.plan(inputs.contexts)
            found[name] = median_seconds(partial(attend, backend, case, inputs, layout), device)
        read = case.kv_slots * case.geometry.kv_width * dtype.itemsize
        yield case.name, found | {"of bandwidth": read / bandwidth / found["seconds"]}


def _timed_backends(case: Case, dtype: torch.dtype, device: torch.device) -> dict[str, AttentionBackend[Any]]:
    """Return them by the names of their seconds. A shared prefix is read by each row alone, and together."""
    given = case.geometry, dtype, device
    found: dict[str, AttentionBackend[Any]] = {
        "seconds": backend_of(*given),
        "torch seconds": TorchBackend(*given),
    }
    if case.prefix:
        found["seconds together"] = TritonBackend(*given, costs=ALWAYS)
        found["seconds alone"] = TritonBackend(*given, costs=NEVER)
    return found


def median_seconds(work: Callable[[], Any], device: torch.device) -> float:
    """Return the median time of several runs, each with a cold L2 cache where the device is a GPU."""
    if device.type == "cuda":
        from triton.testing import do_bench

        milliseconds: float = do_bench(work, warmup=50, rep=200, return_mode="median")
        return milliseconds / 1e3
    seconds = []
    for _ in range(3):
        began = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


def _timed_cases(*, is_tiny: bool) -> Iterator[Case]:
    if is_tiny:
        tiny = LayerGeometry(num_kv_heads=1, key_dim=16, value_dim=16)
        yield Case(name="3 rows on a prefix of 20", geometry=tiny, rows=(25,) * 3, prefix=20)
        return
    llama = LayerGeometry(num_kv_heads=8, key_dim=128, value_dim=128, queries_per_kv=4)
    qwen = LayerGeometry(num_kv_heads=2, key_dim=64, value_dim=64, queries_per_kv=7)
    for name, geometry in (("8B", llama), ("0.5B", qwen)):
        yield Case(name=f"{name}: 1 row of 4096", geometry=geometry, rows=(4096,))
        yield Case(name=f"{name}: 64 rows of 1024", geometry=geometry, rows=(1024,) * 64)
        yield Case(name=f"{name}: 256 rows of 148", geometry=geometry, rows=(148,) * 256)
        rows = (2128,) * 64
        yield Case(name=f"{name}: 64 rows on a prefix of 2000", geometry=geometry, rows=rows, prefix=2000)
        yield Case(name=f"{name}: a chunk of 2048", geometry=geometry, chunks=((2048, 2048),))


def _run(backend: AttentionBackend[Any], case: Case, inputs: Any) -> Tensor:
    layout = backend.plan(inputs.contexts)
    _leave_poison(case, inputs.query)
    return attend(backend, case, inputs, layout)


def _leave_poison(case: Case, like: Tensor) -> None:
    """Leave NaN where the output is likely to be allocated next, so that what isn't written shows."""
    heads = case.geometry.num_kv_heads * case.geometry.queries_per_kv
    poison = like.new_full((case.num_tokens, heads, case.geometry.value_dim), float("nan"))
    del poison


def _error(found: Tensor, right: Tensor) -> float:
    return float((found.double() - right.double()).norm() / right.double().norm())


def _try(work: Callable[[], Mapping[str, Any]]) -> Mapping[str, Any]:
    try:
        return work()
    except Exception as error:
        return {"error": noted(error)}
