"""What a burst beyond the queue's bound costs those who are served: ``python -m benchmarks.overload``.

One `promptplex serve` process takes as many requests as it has room for, all at once; then ten times as
many, all at once, of which most are refused. Both take turns, round by round, and ratios are taken within
a round: tokens per second of the answers that were given, from the first connection to the last of them.

The client is a process of its own on the same cores, and all its connections count against the server. So
the server's CPU seconds for each token are told too.
"""

import argparse
import asyncio
import json
import re
import resource
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from benchmarks.http_throughput import save_base
from benchmarks.other_load import OtherLoad
from benchmarks.serve_process import serving
from benchmarks.spread import Spread
from benchmarks.work import SHAPES, Work

UNLOADED, BURST = "as many as there is room for", "ten times as many"
TIMES = {UNLOADED: 1, BURST: 10}
BAR = 0.9  # of the unloaded throughput, at least
_FILES = 256  # of the client, beside its connections
_SAMPLE_SECONDS = 0.02
_TOKENS = re.compile(rb"\r\nx-generated-tokens: (\d+)\r\n")
_RETRY = re.compile(rb"\r\nretry-after: \d+\r\n")


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """The server's room, and what each request asks for."""

    rows: int
    queue: int
    new_tokens: int

    @property
    def room(self) -> int:
        """Requests that run or wait, at most."""
        return self.rows + self.queue


@dataclass(slots=True)
class Side:
    """Figures round by round."""

    rates: list[float] = field(default_factory=list)  # tokens per second
    cpu: list[float] = field(default_factory=list)  # seconds of the server's CPU for each token
    served: list[int] = field(default_factory=list)
    refused: list[int] = field(default_factory=list)
    added_memory: list[int] = field(default_factory=list)  # bytes at the peak, above those at the beginning
    other_load: list[float] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Answer:
    """One of the server's answers."""

    tokens: int  # 0: refused
    seconds: float  # since the burst began


class Client:
    """Sends requests at once, each on a connection of its own."""

    def __init__(self, url: str, load: Load) -> None:
        parameters = {"max_new_tokens": load.new_tokens, "do_sample": True, "details": False}
        body = json.dumps({"inputs": "what is the time", "parameters": parameters}).encode()
        head = "POST /generate HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        self._request = f"{head}Connection: close\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body
        self._port = int(url.rpartition(":")[2])

    async def send(self, count: int) -> list[Answer]:
        """All answers. Raises RuntimeError where one is neither a result nor a refusal."""
        began = time.perf_counter()
        return await asyncio.gather(*(self._exchange(began) for _ in range(count)))

    async def _exchange(self, began: float) -> Answer:
        reader, writer = await asyncio.open_connection("127.0.0.1", self._port)
        writer.write(self._request)
        answer = await reader.read()
        writer.close()
        head = answer.partition(b"\r\n\r\n")[0] + b"\r\n"
        tokens = _TOKENS.search(head)
        if answer.startswith(b"HTTP/1.1 200") and tokens:
            return Answer(int(tokens[1]), time.perf_counter() - began)
        if answer.startswith(b"HTTP/1.1 503") and _RETRY.search(head):
            return Answer(0, time.perf_counter() - began)
        raise RuntimeError(f"the server answered {answer[:500].decode(errors='replace')}")


async def peak_memory(server: psutil.Process, until: "asyncio.Future[Any]") -> int:
    """Bytes above those of now, while the burst lasts."""
    begin = peak = server.memory_info().rss
    while not until.done():
        await asyncio.wait({until}, timeout=_SAMPLE_SECONDS)
        peak = max(peak, server.memory_info().rss)
    return int(peak - begin)


async def run_side(client: Client, server: psutil.Process, count: int, side: Side) -> None:
    """One burst, and its figures."""
    before = sum(server.cpu_times()[:2])
    with OtherLoad() as others:
        sending = asyncio.ensure_future(client.send(count))
        side.added_memory.append(await peak_memory(server, sending))
        answers = await sending
    served = [answer for answer in answers if answer.tokens]
    tokens = sum(answer.tokens for answer in served)
    side.rates.append(tokens / max(answer.seconds for answer in served))
    side.cpu.append((sum(server.cpu_times()[:2]) - before) / tokens)
    side.served.append(len(served))
    side.refused.append(len(answers) - len(served))
    side.other_load.append(others.share)


async def run_rounds(url: str, server: psutil.Process, load: Load, rounds: int) -> dict[str, Side]:
    """A warm-up of each, which doesn't count; then both in turns."""
    client = Client(url, load)
    for times in TIMES.values():
        await run_side(client, server, times * load.room, Side())
    sides = {name: Side() for name in TIMES}
    for number in range(rounds):
        names = list(TIMES)[:: 1 if number % 2 else -1]
        for name in names:
            await run_side(client, server, TIMES[name] * load.room, sides[name])
            say(f"round {number + 1} of {rounds}: {name}: {sides[name].rates[-1]:.0f} tokens/s")
    return sides


def measure(model: str, load: Load, rounds: int) -> dict[str, Side]:
    """Serve with room for so many, and run all rounds."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = TIMES[BURST] * load.room + _FILES
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, wanted)), hard))
    with tempfile.TemporaryDirectory() as name:
        settings = {
            "model": model,
            "store": Path(name) / "store",
            "max_rows": load.rows,
            "max_queue": load.queue,
        }
        with serving(Path(name) / "log", settings) as server:
            return asyncio.run(run_rounds(server.url, server.process, load, rounds))


def report_of(sides: dict[str, Side]) -> dict[str, Any]:
    """Medians with quartiles; the ratio within each round."""
    share = Spread.of([b / u for b, u in zip(sides[BURST].rates, sides[UNLOADED].rates, strict=True)])
    figures = {
        name: {
            "tokens_per_second": Spread.of(side.rates).as_json(1),
            "server_cpu_ms_per_token": Spread.of([1000 * each for each in side.cpu]).as_json(3),
            "served": side.served,
            "refused": side.refused,
            "added_memory_mib": round(max(side.added_memory) / (1 << 20), 1),
            "other_load": round(max(side.other_load), 3),
        }
        for name, side in sides.items()
    }
    return {"sides": figures, "of_unloaded": share.as_json(), "bar": BAR, "reached": share.median >= BAR}


def table(report: dict[str, Any]) -> str:
    """The report as Markdown."""
    lines = [
        "| requests at once | tokens/s of those served | served | refused | server CPU ms per token | "
        "added memory MiB | other load |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, side in report["sides"].items():
        rate, cpu = side["tokens_per_second"], side["server_cpu_ms_per_token"]
        served, refused = sum(side["served"]), sum(side["refused"])
        lines.append(
            f"| {name} | {rate['median']} {rate['quartiles']} | {served} | {refused} | "
            f"{cpu['median']} {cpu['quartiles']} | {side['added_memory_mib']} | {side['other_load']:.0%} |"
        )
    share, verdict = report["of_unloaded"], "reached" if report["reached"] else "not reached"
    lines.append(
        f"\nOf the unloaded throughput: {share['median']} {share['quartiles']}; bar {BAR}: {verdict}."
    )
    return "\n".join(lines)


def say(line: str) -> None:
    """Progress goes to stderr; stdout is for the result."""
    print(line, file=sys.stderr, flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the options, measure, print the table, write JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.overload", description=__doc__)
    parser.add_argument("--model", default="demo/demo-causal")
    parser.add_argument("--shape", choices=SHAPES, help="random weights of this shape instead of a model")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--queue", type=int, default=448)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--out", type=Path, default=Path("build/bench/overload.json"))
    options = parser.parse_args(arguments)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    load = Load(rows=options.rows, queue=options.queue, new_tokens=options.new_tokens)
    base = options.shape or options.model
    setup = {"model": base, "rounds": options.rounds, "rows": load.rows, "queue": load.queue}
    setup |= {"new_tokens": load.new_tokens}
    with tempfile.TemporaryDirectory() as folder:
        if options.shape is not None:
            save_base(Work(shape=SHAPES[options.shape]), Path(folder))
            options.model = folder
        report = {"setup": setup, **report_of(measure(options.model, load, options.rounds))}
    options.out.write_text(json.dumps(report, indent=2) + "\n")
    print(table(report))
    print(f"written to {options.out}")


if __name__ == "__main__":
    main()
