"""What every test shares: one torch thread, no network, and what tests in several rooms need."""

import os

# Before torch is imported anywhere: tests of several rooms run side by side on small machines.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
from pathlib import Path

import pytest

# Rooms whose tests start processes, browsers or whole servers.
SLOW_ROOMS = {"benchmarks", "cli", "console", "docker", "docs", "replicas"}


@pytest.hookimpl(tryfirst=True)  # before `-m` looks at marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what `make test-fast` leaves out."""
    for item in items:
        if item.path.relative_to(Path(__file__).parent).parts[0] in SLOW_ROOMS:
            item.add_marker("slow")
