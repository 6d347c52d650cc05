"""What a failing Redis costs generations: ``python -m benchmarks.redis_faults``.

Two `promptplex serve` processes stand side by side on one store: one without Redis, one whose Redis lies
behind a proxy that lets it come and go, or swallows all that is sent. Both get the same requests in the
same seconds, so that whatever else the machine does hits both; what their p99 differ by is Redis's doing.

The device holds the prompts of a few tasks only, so that most requests ask host memory. There are two
sets: with all prompts in host memory, and with none there, when every load asks Redis, then the store.

Clients are paced: each asks at fixed moments, and a latency counts from the moment at which its request
was due. So a server that hangs can't better its figures by getting fewer requests.

A difference of two p99 is judged with its interval: blocks of seconds, the same ones for both servers, are
drawn again and again. Where the interval has the bar within it, nothing is judged. The phase with a Redis
that works is the control: what it shows is what this measurement can't tell from nothing.
"""

import argparse
import asyncio
import itertools
import json
import random
import sys
import tempfile
import time
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import httpx2
import numpy as np

from app.prompt import VersionDraft
from app.store.prompt_store import open_store
from benchmarks.other_load import OtherLoad
from benchmarks.registered_tasks import publish_task, soft_prompt, task_id
from benchmarks.serve_process import prompt_cache_counts, serving
from benchmarks.tails import percentile
from tests.store.fault_proxy import Fault, FaultProxy
from tests.store.redis_server import RedisServer

BAR_MILLISECONDS = 25.0  # that p99 may be above store-only
STORE_ONLY, WITH_REDIS = "store_only", "redis"
HOST_CACHE_BYTES = {"prompts in host memory": 1 << 30, "prompts not in host memory": 1}
_MODEL = Path("demo/demo-causal")
_BLOCK = 16  # slots of a K/V block, and virtual tokens of a prompt: a prompt is a block
_RESIDENT_PROMPTS = 8
_REQUEST_SECONDS = 30.0
_BLOCK_SECONDS = 4.0  # longer than what one disturbance lasts, by and large, and two turns of flapping
_DRAWS = 1000
_FLAP_SECONDS = 1.0  # up, and as long down
_WARM_UP_SECONDS = 10.0
_RECOVERY_SECONDS = 3.0  # between phases, until the server has found Redis again
_INPUT_TOKENS = 16  # at most, of _INPUTS
_PROMPT_SCALE = 0.02  # of the demo model's own embeddings, by and large
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


def phase_report(
    samples: dict[str, list[Sample]], counts: dict[str, dict[str, int]], other_load: float
) -> dict[str, Any]:
    """Both servers, and what Redis added to p99."""
    added = tail(samples[WITH_REDIS]) - tail(samples[STORE_ONLY])
    low, high = added_interval(samples[STORE_ONLY], samples[WITH_REDIS])
    failed = sum(sample.failed for each in samples.values() for sample in each)
    return {
        **{label: server_report(each, counts[label]) for label, each in samples.items()},
        "added_p99_ms": round(added, 2),
        "added_p99_ms_interval": [round(low, 2), round(high, 2)],
        "other_load": round(other_load, 3),
        "failed": failed,
        "reached": verdict(low, high, failed),
    }


def verdict(low: float, high: float, failed: int) -> bool | None:
    """None where the bar lies within the interval."""
    if failed or low > BAR_MILLISECONDS:
        return False
    return True if high <= BAR_MILLISECONDS else None


def added_interval(plain: list[Sample], behind: list[Sample]) -> tuple[float, float]:
    """90% of the differences of p99 when blocks of the phase are drawn with replacement."""
    sides = [blocks_of(plain), blocks_of(behind)]
    blocks = sorted(sides[0].keys() & sides[1].keys())
    generator = random.Random(0)
    differences = []
    for _ in range(_DRAWS):
        drawn = generator.choices(blocks, k=len(blocks))
        base, tried = (tail([sample for block in drawn for sample in side[block]]) for side in sides)
        differences.append(tried - base)
    return percentile(differences, 5), percentile(differences, 95)


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


def blocks_of(samples: list[Sample]) -> dict[int, list[Sample]]:
    """By the block of the phase in which they were due."""
    blocks: dict[int, list[Sample]] = {}
    for sample in samples:
        blocks.setdefault(int(sample.due // _BLOCK_SECONDS), []).append(sample)
    return blocks


async def flap(proxy: FaultProxy) -> None:
    """Redis comes and goes by the second."""
    for fault in itertools.cycle((Fault.REFUSE, Fault.NONE)):
        proxy.set(fault)
        await asyncio.sleep(_FLAP_SECONDS)


async def stay(proxy: FaultProxy, fault: Fault) -> None:
    """One state for the whole phase."""
    proxy.set(fault)


Conduct = Callable[[FaultProxy], Coroutine[Any, Any, None]]

PHASES: dict[str, Conduct] = {
    "up": partial(stay, fault=Fault.NONE),
    "flapping": flap,
    "black hole": partial(stay, fault=Fault.BLACK_HOLE),
}


async def measure_phase(
    servers: dict[str, Server], proxy: FaultProxy, load: Load, name: str, seconds: float
) -> dict[str, Any]:
    """One phase under load, from a Redis that works to one that works again."""
    before = {label: await prompt_cache_counts(each.http, each.url) for label, each in servers.items()}
    conduct = asyncio.create_task(PHASES[name](proxy))
    try:
        with OtherLoad() as others:
            samples = await run_phase(servers, load, name, seconds)
    finally:
        conduct.cancel()
        proxy.set(Fault.NONE)
    after = {label: await prompt_cache_counts(each.http, each.url) for label, each in servers.items()}
    counts = {
        label: {tier: now - before[label].get(tier, 0) for tier, now in after[label].items()}
        for label in servers
    }
    return phase_report(samples, counts, others.share)


async def measure_set(
    urls: Mapping[str, str], proxy: FaultProxy, load: Load, seconds: float
) -> dict[str, Any]:
    """All phases on two servers, after a warm-up that isn't counted."""
    limits = httpx2.Limits(max_connections=load.clients)
    async with AsyncExitStack() as stack:
        servers = {}
        for label, url in urls.items():
            client = httpx2.AsyncClient(timeout=_REQUEST_SECONDS, limits=limits, trust_env=False)
            servers[label] = Server(url, await stack.enter_async_context(client))
        await run_phase(servers, load, "warm-up", _WARM_UP_SECONDS)
        report = {}
        for name in PHASES:
            report[name] = await measure_phase(servers, proxy, load, name, seconds)
            added, low_high = report[name]["added_p99_ms"], report[name]["added_p99_ms_interval"]
            say(f"  {name}: p99 {added:+.1f} ms {low_high}, {report[name]['failed']} failed")
            await asyncio.sleep(_RECOVERY_SECONDS)
    return report


def run(load: Load, seconds: float) -> dict[str, Any]:
    """One pair of servers for each set; Redis starts empty for each."""
    report = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        register_tasks(folder / "store", load.tasks)
        for label, host_cache_bytes in HOST_CACHE_BYTES.items():
            say(f"{label}: starting two servers")
            with both_servers(folder, load, host_cache_bytes) as (urls, proxy):
                report[label] = asyncio.run(measure_set(urls, proxy, load, seconds))
    return report


def register_tasks(folder: Path, num_tasks: int) -> None:
    """Each with a random soft prompt that fits the demo model."""
    hidden_size = _model_config()["hidden_size"]
    generator = np.random.default_rng(0)
    store = open_store(folder)
    for number in range(num_tasks):
        rows = generator.normal(scale=_PROMPT_SCALE, size=(_BLOCK, hidden_size)).astype(np.float32)
        data = (rows.view(np.uint32) >> 16).astype("<u2").tobytes()  # bf16: the upper half of a float32
        draft = VersionDraft(prompt=soft_prompt((_BLOCK, hidden_size), data), template="{text}\n")
        publish_task(store, task_id(number), draft)


@contextmanager
def both_servers(
    folder: Path, load: Load, host_cache_bytes: int
) -> Iterator[tuple[dict[str, str], FaultProxy]]:
    """Equal but for Redis; a thread each, so that two cores are enough for both."""
    settings = {
        "model": _MODEL,
        "store": folder / "store",
        "threads": 1,
        "dtype": "float32",
        "max_rows": load.clients,
        "kv_cache_bytes": kv_cache_bytes(load),
        "host_cache_bytes": host_cache_bytes,
    }
    with ExitStack() as stack:
        redis = RedisServer(Path(stack.enter_context(tempfile.TemporaryDirectory(dir=folder))))
        stack.callback(redis.kill)
        proxy = FaultProxy(redis.port)
        stack.callback(proxy.close)
        plain = stack.enter_context(serving(folder / "store-only.log", settings))
        behind = stack.enter_context(serving(folder / "redis.log", {**settings, "redis_url": proxy.url}))
        yield {STORE_ONLY: plain.url, WITH_REDIS: behind.url}, proxy


def kv_cache_bytes(load: Load) -> int:
    """Room for as many rows as there are clients, a spare block for each, and a few idle prompts."""
    config = _model_config()
    bytes_per_token = 2 * config["num_hidden_layers"] * config["num_key_value_heads"] * config["head_dim"] * 4
    row = -(-(_INPUT_TOKENS + load.new_tokens) // _BLOCK) + 1
    return int((load.clients * (row + 1) + _RESIDENT_PROMPTS) * _BLOCK * bytes_per_token)


def _model_config() -> dict[str, Any]:
    config: dict[str, Any] = json.loads((_MODEL / "config.json").read_text())
    return config


def table(report: dict[str, Any]) -> str:
    """The report as Markdown."""
    lines = [
        "| prompts | Redis | store-only p99 ms | with it | added | 90% interval | failed | other | bar |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for label, phases in report["sets"].items():
        for name, phase in phases.items():
            low, high = phase["added_p99_ms_interval"]
            bar = {True: "reached", False: "not reached", None: "not judged"}[phase["reached"]]
            lines.append(
                f"| {label} | {name} | {phase[STORE_ONLY]['p99_ms']} | {phase[WITH_REDIS]['p99_ms']} | "
                f"{phase['added_p99_ms']:+} | {low} to {high} | {phase['failed']} | "
                f"{phase['other_load']:.0%} | {bar} |"
            )
    return "\n".join(lines)


def say(line: str) -> None:
    """Progress goes to stderr; stdout is for the result."""
    print(line, file=sys.stderr, flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the options, measure, print the table, write JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.redis_faults", description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0, help="of each phase")
    parser.add_argument("--clients", type=int, default=8, help="of each server")
    parser.add_argument("--interval", type=float, default=1.0, help="seconds between a client's requests")
    parser.add_argument("--tasks", type=int, default=256)
    parser.add_argument("--new-tokens", type=int, default=8)
    parser.add_argument("--out", type=Path, default=Path("build/bench/redis-faults.json"))
    options = parser.parse_args(arguments)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    load = Load(
        clients=options.clients,
        interval=options.interval,
        tasks=options.tasks,
        new_tokens=options.new_tokens,
    )
    report = {
        "load": asdict(load),
        "seconds": options.seconds,
        "bar_milliseconds": BAR_MILLISECONDS,
        "sets": run(load, options.seconds),
    }
    options.out.write_text(json.dumps(report, indent=2) + "\n")
    print(table(report))
    print(f"written to {options.out}")


if __name__ == "__main__":
    main()
