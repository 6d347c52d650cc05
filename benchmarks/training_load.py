"""What a training run costs those who are served meanwhile: ``python -m benchmarks.training_load``.

One server, one stream of the demo's own requests, which arrive at a fixed rate whatever the server does. A
run of the same server begins and ends between the phases, so that phases with and without it alternate.
Latency counts from when a request was due: a server that falls behind can't hide it.
"""

import argparse
import asyncio
import itertools
import json
import shutil
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2

from benchmarks.serve_process import serving
from benchmarks.spread import Spread
from benchmarks.tails import percentile

BAR_RATIO = 2.0  # p99 with a run, at most so many times that without
_TRAINED = "trained-meanwhile"
_RUNS = f"/tasks/{_TRAINED}/training-runs"
_PAUSE = 0.5  # seconds between two looks at a run
_WARM_UPS = 20  # requests
_EXAMPLES = 400  # to train on
_LONG = {"method": "prefix", "steps": 20_000, "eval_every": 20_000, "publish": False}


@dataclass(frozen=True, slots=True)
class Phase:
    """What one phase of the stream saw."""

    latencies: Sequence[float]  # seconds, of requests that were answered
    num_failed: int
    training_rate: float | None  # tokens a second; None: there was no run

    def as_json(self) -> dict[str, Any]:
        """Return milliseconds and counts."""
        milliseconds = [1000 * each for each in self.latencies]
        return {
            "requests": len(self.latencies) + self.num_failed,
            "failed": self.num_failed,
            "p50_ms": round(percentile(milliseconds, 50), 1),
            "p99_ms": round(percentile(milliseconds, 99), 1),
            "training_tokens_per_second": self.training_rate and round(self.training_rate, 1),
        }


async def demo_requests(client: httpx2.AsyncClient) -> list[dict[str, Any]]:
    """Return a request for each example of each task that is served."""
    listed = (await client.get("/tasks")).json()["tasks"]
    found = []
    for row in listed:
        versions = (await client.get(f"/tasks/{row['id']}")).json()["versions"]
        found += [{"task_id": row["id"], "inputs": each["inputs"]} for each in versions[-1]["examples"]]
    return found


async def stream(
    client: httpx2.AsyncClient, requests: Sequence[dict[str, Any]], rate: float, seconds: float
) -> tuple[list[float], int]:
    """Send requests as they are due. Return latencies of those answered, and how many were not."""
    begin = time.perf_counter()

    async def one(number: int) -> float | None:
        due = begin + number / rate
        await asyncio.sleep(due - time.perf_counter())
        try:
            response = await client.post("/generate", json=requests[number % len(requests)])
        except httpx2.HTTPError:
            return None
        return time.perf_counter() - due if response.is_success else None

    taken = await asyncio.gather(*map(one, range(round(rate * seconds))))
    answered = [each for each in taken if each is not None]
    return answered, len(taken) - len(answered)


@asynccontextmanager
async def training(client: httpx2.AsyncClient) -> AsyncIterator[str]:
    """Train for as long as the block lasts; yield the run's path. Raise RuntimeError where it ends early."""
    words = ("fine", "dull", "warm", "cold", "late", "good", "poor")
    lines = (
        {"text": f"{first} and {second}, number {number}", "label": first}
        for number, (first, second) in enumerate(itertools.product(words, words * 9))
    )
    data = "".join(json.dumps(line) + "\n" for line in itertools.islice(lines, _EXAMPLES))
    parts = {"data": (None, data), "settings": (None, json.dumps(_LONG))}
    run = (await client.post(_RUNS, files=parts)).json()
    path = f"{_RUNS}/{run['id']}"
    await _until(client, path, lambda row: row["step"] > 1)
    yield path
    if (await client.get(path)).json()["state"] != "running":
        raise RuntimeError("the run ended before its phase did")
    await client.delete(path)
    await _until(client, path, lambda row: row["state"] == "cancelled")


async def _until(client: httpx2.AsyncClient, path: str, is_there: Any) -> None:
    while not is_there(row := (await client.get(path)).json()):
        if row["state"] in ("done", "failed", "interrupted"):
            raise RuntimeError(f"the run is {row['state']}: {row['error']}")
        await asyncio.sleep(_PAUSE)


async def measure(url: str, options: argparse.Namespace) -> dict[str, list[Phase]]:
    """Let phases without and with a run alternate."""
    phases: dict[str, list[Phase]] = {"without": [], "with": []}
    async with httpx2.AsyncClient(base_url=url, trust_env=False, timeout=120) as client:
        requests = await demo_requests(client)
        for number in range(_WARM_UPS):
            await client.post("/generate", json=requests[number % len(requests)])
        for round_ in range(options.rounds):
            print(f"round {round_ + 1} of {options.rounds}", file=sys.stderr, flush=True)
            plain = await stream(client, requests, options.rate, options.seconds)
            phases["without"].append(Phase(*plain, None))
            async with training(client) as path:
                beside = await stream(client, requests, options.rate, options.seconds)
                rate = (await client.get(path)).json()["tokens_per_second"]
            phases["with"].append(Phase(*beside, rate))
    return phases


def report_of(phases: dict[str, list[Phase]], options: argparse.Namespace) -> dict[str, Any]:
    """Return all figures. The ratio is that of each round's two phases, which lie side by side in time."""
    rows = {name: [phase.as_json() for phase in each] for name, each in phases.items()}
    pairs = list(zip(rows["without"], rows["with"], strict=True))
    ratio = Spread.of([beside["p99_ms"] / plain["p99_ms"] for plain, beside in pairs])
    pooled = {
        name: round(1000 * percentile([value for phase in each for value in phase.latencies], 99), 1)
        for name, each in phases.items()
    }
    return {
        "requests_per_second": options.rate,
        "seconds_a_phase": options.seconds,
        "phases": rows,
        "pooled_p99_ms": pooled,
        "p99_ratio": ratio.as_json(2),
        "bar_ratio": BAR_RATIO,
        "failed": sum(phase.num_failed for each in phases.values() for phase in each),
        "reached": ratio.median <= BAR_RATIO,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and print a report as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=30.0, help="of a phase")
    parser.add_argument("--rate", type=float, default=10.0, help="requests a second")
    parser.add_argument("--threads", type=int, default=None, help="of the server")
    parser.add_argument("--model", default="demo/demo-causal")
    parser.add_argument("--store", type=Path, default=Path("prompts_store"))
    parser.add_argument("--out", type=Path, default=None, help="file for the report")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="training-load-") as name:
        folder = Path(name)
        shutil.copytree(options.store, folder / "store")
        settings: dict[str, object] = {"model": options.model, "store": folder / "store", "training": True}
        settings |= {} if options.threads is None else {"threads": options.threads}
        with serving(folder / "server.log", settings) as served:
            report = report_of(asyncio.run(measure(served.url, options)), options)
    text = json.dumps(report, indent=1)
    print(text)
    if options.out is not None:
        options.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
