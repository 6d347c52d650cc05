"""What a reader of the live stream costs the server: ``python -m benchmarks.live_stream``.

One `promptplex serve` process with the shipped demo, whose steps are so short that whatever happens four
times a second weighs most. A process of clients, each of which asks again as soon as it has its answer,
gives it the same requests with and without a reader of `/ops/stream`, in pairs next to each other whose
order alternates. Compared is the CPU time that the server takes for a generated token.

Answers are long and all of one length (their end is banned), so the batch is as large as there are clients
all the time: what a token costs depends on that, and a reader must not show as clients that ask later.
"""

import argparse
import asyncio
import json
import multiprocessing
import random
import re
import shutil
import statistics
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx2

from benchmarks.other_load import OtherLoad
from benchmarks.serve_process import Served, serving
from benchmarks.spread import Spread

BAR = 1.02  # times the CPU time of a token without a reader, at most
MAX_OTHER_LOAD = 0.05  # share of the CPUs that others may have; beyond it nothing is judged
NEW_TOKENS = 200
_STORE = Path("prompts_store")
_MODEL = Path("demo/demo-causal")
_HELDOUT = Path("demo/heldout")
_REQUEST_SECONDS = 60.0
_GENERATED = re.compile(r"^promptplex_generation_tokens_total ([0-9.e+]+)$", re.M)
_WITH, _WITHOUT = "with_reader", "without_reader"


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What the server gets in one run."""

    clients: int
    requests: int
    readers: int  # of the live stream, in the runs that have any


@dataclass(frozen=True, slots=True)
class Run:
    """One run: what the server did for it."""

    cpu_seconds: float
    tokens: int
    snapshots: int  # that each reader got, summed
    other_load: float

    @property
    def cost(self) -> float:
        """CPU seconds a token."""
        return self.cpu_seconds / self.tokens


def make_bodies(count: int, seed: int) -> list[dict[str, Any]]:
    """Held-out inputs of all tasks, for `/v1/completions`; the same seed gives the same requests."""
    lines = {path.stem: path.read_text().splitlines() for path in sorted(_HELDOUT.glob("*.jsonl"))}
    tasks = [name for name in lines if "." not in name]
    generator = random.Random(seed)
    chosen = generator.choices(tasks, k=count)
    common = {"max_tokens": NEW_TOKENS, "temperature": 0, "logit_bias": {_end_of_text(): -100}}
    return [
        {"model": task, "prompt": json.loads(generator.choice(lines[task]))["inputs"], **common}
        for task in chosen
    ]


def _end_of_text() -> str:
    """The id of the base's token that ends an answer."""
    return str(json.loads((_MODEL / "generation_config.json").read_text())["eos_token_id"])


def send_all(url: str, load: Load, seed: int, with_reader: bool) -> int:
    """Runs in a process of its own: all requests; how many snapshots came."""
    return asyncio.run(_send_all(url, load, make_bodies(load.requests, seed), with_reader))


async def _send_all(url: str, load: Load, bodies: list[dict[str, Any]], with_reader: bool) -> int:
    left = iter(bodies)
    counts = [0] * load.readers
    limits = httpx2.Limits(max_connections=load.clients + load.readers)
    async with httpx2.AsyncClient(timeout=_REQUEST_SECONDS, limits=limits, trust_env=False) as client:

        async def ask() -> None:
            for body in left:
                (await client.post(f"{url}/v1/completions", json=body)).raise_for_status()

        async def read(number: int) -> None:
            async with client.stream("GET", f"{url}/ops/stream") as response:
                response.raise_for_status()
                async for line in response.aiter_lines():
                    counts[number] += bool(line)

        readers = [asyncio.create_task(read(number)) for number in range(load.readers if with_reader else 0)]
        await asyncio.gather(*(ask() for _ in range(load.clients)))
        for reader in readers:
            reader.cancel()
            with suppress(asyncio.CancelledError):
                await reader
    return sum(counts)


class Server:
    """A running server's CPU time, and what it has generated."""

    def __init__(self, served: Served) -> None:
        self.url, self._process = served

    def cpu_seconds(self) -> float:
        """Of all its threads so far."""
        times = self._process.cpu_times()
        return float(times.user + times.system)

    def generated(self) -> int:
        """Tokens so far."""
        found = _GENERATED.search(httpx2.get(f"{self.url}/metrics", trust_env=False).text)
        assert found is not None
        return int(float(found[1]))

    def run(self, load: Load, seed: int, with_reader: bool) -> Run:
        """All requests of a run, from a fresh process of clients."""
        with multiprocessing.get_context("spawn").Pool(1) as clients, OtherLoad() as others:
            clients.apply(make_bodies, (1, 0))  # it has started and imported
            tokens, seconds = self.generated(), self.cpu_seconds()
            snapshots = clients.apply(send_all, (self.url, load, seed, with_reader))
            done, spent = self.generated(), self.cpu_seconds()
        return Run(spent - seconds, done - tokens, snapshots, others.share)


def measure(load: Load, pairs: int, threads: int) -> list[dict[str, Run]]:
    """A warm-up, then pairs."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shutil.copytree(_STORE, folder / "store")
        settings = {"model": _MODEL, "store": folder / "store", "threads": threads, "dtype": "float32"}
        with serving(folder / "server.log", settings) as served:
            server = Server(served)
            server.run(load, 0, with_reader=True)
            return [run_pair(server, load, number) for number in range(1, pairs + 1)]


def run_pair(server: Server, load: Load, number: int) -> dict[str, Run]:
    """The same requests twice."""
    order = (_WITH, _WITHOUT) if number % 2 else (_WITHOUT, _WITH)
    runs = {name: server.run(load, number, name == _WITH) for name in order}
    say(f"pair {number}: ratio {ratio(runs):.4f}, {runs[_WITH].snapshots} snapshots")
    return runs


def ratio(pair: dict[str, Run]) -> float:
    """Of CPU time a token, with a reader to without."""
    return pair[_WITH].cost / pair[_WITHOUT].cost


def report(pairs: list[dict[str, Run]]) -> dict[str, Any]:
    """Both sides, and the ratio within pairs."""
    ratios = Spread.of([ratio(pair) for pair in pairs])
    quiet = max(run.other_load for pair in pairs for run in pair.values()) <= MAX_OTHER_LOAD
    return {
        **{name: _side_report([pair[name] for pair in pairs]) for name in (_WITHOUT, _WITH)},
        "ratio": ratios.as_json(4),
        "ratios": [round(ratio(pair), 4) for pair in pairs],
        "bar": BAR,
        "reached": ratios.median <= BAR if quiet else None,
    }


def _side_report(runs: list[Run]) -> dict[str, Any]:
    return {
        "cpu_microseconds_per_token": Spread.of([1e6 * run.cost for run in runs]).as_json(1),
        "tokens": sum(run.tokens for run in runs),
        "cpu_seconds": round(sum(run.cpu_seconds for run in runs), 2),
        "snapshots": sum(run.snapshots for run in runs),
        "other_load": round(statistics.fmean(run.other_load for run in runs), 3),
    }


def table(result: dict[str, Any]) -> str:
    """The report as Markdown."""
    lines = ["| | CPU us/token | tokens | snapshots | other load |", "|---|---|---|---|---|"]
    for name in (_WITHOUT, _WITH):
        side = result[name]
        lines.append(
            f"| {name.replace('_', ' ')} | {side['cpu_microseconds_per_token']['median']} | {side['tokens']} "
            f"| {side['snapshots']} | {side['other_load']:.0%} |"
        )
    low, high = result["ratio"]["quartiles"]
    words = {True: "reached", False: "not reached", None: "not judged, since others disturbed it"}
    lines.append(
        f"\nratio {result['ratio']['median']} ({low} to {high}), bar {BAR}: {words[result['reached']]}"
    )
    return "\n".join(lines)


def say(line: str) -> None:
    """Progress goes to stderr; stdout is for the result."""
    print(line, file=sys.stderr, flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the options, measure, print the table, write JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.live_stream", description=__doc__)
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--requests", type=int, default=96, help="of each run")
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--readers", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1, help="of the engine")
    parser.add_argument("--out", type=Path, default=Path("build/bench/live-stream.json"))
    options = parser.parse_args(arguments)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    load = Load(clients=options.clients, requests=options.requests, readers=options.readers)
    result = {"load": asdict(load), **report(measure(load, options.pairs, options.threads))}
    options.out.write_text(json.dumps(result, indent=2) + "\n")
    print(table(result))
    print(f"written to {options.out}")


if __name__ == "__main__":
    main()
