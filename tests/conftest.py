"""What every test shares: one torch thread, no network, and what tests in several rooms need."""

import gc
import os

# Before torch is imported anywhere: tests of several rooms run side by side on small machines.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
from collections.abc import Generator
from pathlib import Path

import pytest
import torch

# Before a test imports kernels for GPUs: without one they run in Triton's interpreter.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Rooms whose tests start processes, browsers or whole servers, and files that take long or wait for clocks.
SLOW_ROOMS = {"benchmarks", "cli", "console", "docker", "docs", "replicas"}
SLOW_FILES = {
    "server/test_connections.py",
    "api/test_request_guard.py",
    "server/test_pipelining.py",
    "engine/sampling/test_token_masks.py",
    "engine/sampling/test_sampler.py",
    "models/test_probe.py",
    "store/test_crashes.py",
    "training/test_kills.py",
    "test_hosting.py",
    "store/cache/test_redis_tier.py",
}
# They take five seconds or more: begun last, one would keep a worker busy while the other has nothing to do.
LONG_FILES = {
    "docs/test_guides.py",
    "engine/sampling/test_native_sampler.py",  # compiles the kernels, where they aren't yet
    "models/cpu/test_fusing.py",
    "engine/test_exactness.py",
    "console/test_console.py",
    "console/test_programs.py",
    "console/test_training.py",
    "cli/test_serve.py",
    "api/test_schemathesis.py",
    "benchmarks/test_bench.py",
    "cli/test_train.py",
    "cli/test_compare.py",
    "cli/test_doctor.py",
    "store/test_crashes.py",
    "engine/test_held_memory.py",
    "training/test_kills.py",
    "training/test_prompted_model.py",
    "training/test_loop.py",
    "docker/test_entrypoint.py",
    "server/test_slow_clients.py",
    "server/test_connections.py",
    "api/test_request_guard.py",
    "api/test_overload.py",
    "models/test_probe.py",
    "models/test_probe_sources.py",
    "benchmarks/test_http_throughput.py",
    "store/cache/test_redis_tier.py",
}


def _path(item: pytest.Item) -> Path:
    return item.path.relative_to(Path(__file__).parent)


@pytest.hookimpl(tryfirst=True)  # before `-m` looks at marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with what takes long, and mark what `make test-fast` leaves out."""
    items.sort(key=lambda item: _path(item).as_posix() not in LONG_FILES)
    for item in items:
        path = _path(item)
        if path.parts[0] in SLOW_ROOMS or path.as_posix() in SLOW_FILES:
            item.add_marker("slow")


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Import all tests without garbage collections: each looks through all that has come so far."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()
