"""What a failing Redis costs generations: ``python -m benchmarks.redis_faults``.

Two `promptplex serve` processes stand side by side on one store: one without Redis, one whose Redis lies
behind a proxy that lets it come and go, or swallows all that is sent. Both get the same requests in the
same seconds, so that whatever else the machine does hits both; what their p99 differ by is Redis's doing.

The device holds the prompts of a few tasks only, so that most requests ask host memory. There are two
sets: with all prompts in host memory, and with none there, when every load asks Redis, then the store.

Clients are paced: each asks at fixed moments, and a latency counts from the moment at which its request
was due. So a server that hangs can't better its figures by getting fewer requests.
"""

import argparse
import asyncio
import json
import os
import random
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2

from app.prompt import VersionDraft
from app.store.prompt_store import open_store
from benchmarks.registered_tasks import publish_task, soft_prompt, task_id
from benchmarks.serve_process import prompt_cache_counts, serving
from benchmarks.spread import Spread
from benchmarks.tails import percentile

BAR_MILLISECONDS = 25.0  # that p99 may be above store-only
STORE_ONLY, WITH_REDIS = "store_only", "redis"
HOST_CACHE_BYTES = {"prompts in host memory": 1 << 30, "prompts not in host memory": 1}
_MODEL = Path("models/demo-causal")
_BLOCK = 16  # slots of a K/V block, and virtual tokens of a prompt: a prompt is a block
_RESIDENT_PROMPTS = 8
_REQUEST_SECONDS = 30.0
_SLICE_SECONDS = 10.0
_INPUTS = ("hello", "what is the time", "2 * 3 + 4", "the food was good")


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What each of the two servers gets."""

    clients: int
    interval: float  # seconds from one request of a client to its next one
    tasks: int
    new_tokens: int


@dataclass(frozen=True, slots=True)
class Sample:
    """One request: when it was due (seconds into its phase), and when it was answered after that."""

    due: float
    seconds: float
    failed: bool


@dataclass(frozen=True, slots=True)
class Server:
    """One of the two, as clients see it."""

    url: str
    http: httpx2.AsyncClient

    async def generate(self, body: dict[str, Any]) -> bool:
        """Whether it answered with a text."""
        try:
            response = await self.http.post(f"{self.url}/generate", json=body)
        except httpx2.HTTPError:
            return False
        return response.is_success


async def paced_client(
    server: Server, load: Load, seed: str, began: float, first: float, seconds: float
) -> list[Sample]:
    """Ask every `interval` seconds from `first` on; late requests follow at once, and count from when due."""
    generator = random.Random(seed)
    samples = []
    due = first
    while due < seconds:
        await asyncio.sleep(began + due - time.monotonic())
        ok = await server.generate(random_body(generator, load))
        samples.append(Sample(due, time.monotonic() - began - due, not ok))
        due += load.interval
    return samples


def random_body(generator: random.Random, load: Load) -> dict[str, Any]:
    """Any task as often as any other."""
    return {
        "task_id": task_id(generator.randrange(load.tasks)),
        "inputs": generator.choice(_INPUTS),
        "parameters": {"max_new_tokens": load.new_tokens, "details": False},
    }


async def run_phase(
    servers: dict[str, Server], load: Load, name: str, seconds: float
) -> dict[str, list[Sample]]:
    """All clients of both servers; moments are spread evenly over the interval, the servers in turns."""
    began = time.monotonic() + 0.1
    step = load.interval / (load.clients * len(servers))
    runs = {
        label: [
            paced_client(
                server, load, f"{name} {client}", began, step * (client * len(servers) + place), seconds
            )
            for client in range(load.clients)
        ]
        for place, (label, server) in enumerate(servers.items())
    }
    gathered = await asyncio.gather(*(asyncio.gather(*clients) for clients in runs.values()))
    return {
        label: [sample for samples in clients for sample in samples]
        for label, clients in zip(runs, gathered, strict=True)
    }


def phase_report(samples: dict[str, list[Sample]], counts: dict[str, dict[str, int]]) -> dict[str, Any]:
    """Both servers, and what Redis added to p99: over the whole phase, and slice by slice."""
    whole = {label: tail(each) for label, each in samples.items()}
    slices = {label: sliced(each) for label, each in samples.items()}
    common = slices[STORE_ONLY].keys() & slices[WITH_REDIS].keys()
    by_slice = [tail(slices[WITH_REDIS][key]) - tail(slices[STORE_ONLY][key]) for key in sorted(common)]
    added = whole[WITH_REDIS] - whole[STORE_ONLY]
    failed = sum(sample.failed for each in samples.values() for sample in each)
    return {
        **{label: server_report(each, counts[label]) for label, each in samples.items()},
        "added_p99_ms": round(added, 2),
        "added_p99_ms_by_slice": Spread.of(by_slice).as_json(2),
        "failed": failed,
        "reached": added <= BAR_MILLISECONDS and not failed,
    }


def server_report(samples: list[Sample], counts: dict[str, int]) -> dict[str, Any]:
    """One server's latencies, and how often each tier had a prompt."""
    milliseconds = [1000 * sample.seconds for sample in samples]
    return {
        "requests": len(samples),
        "failed": sum(sample.failed for sample in samples),
        "median_ms": round(percentile(milliseconds, 50), 2),
        "p99_ms": round(tail(samples), 2),
        "tiers": counts,
    }


def tail(samples: list[Sample]) -> float:
    """p99 in ms."""
    return percentile([1000 * sample.seconds for sample in samples], 99)


def sliced(samples: list[Sample]) -> dict[int, list[Sample]]:
    """By the slice of the phase in which they were due."""
    slices: dict[int, list[Sample]] = {}
    for sample in samples:
        slices.setdefault(int(sample.due // _SLICE_SECONDS), []).append(sample)
    return slices
