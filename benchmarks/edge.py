"""What a request costs at the edge, on the demo: ``python -m benchmarks.edge``.

Servers of this checkout, and of another one if it is named, are processes of their own and take turns round
by round. Their threads' CPU time comes from the kernel, in nanoseconds (/proc/<pid>/task/<tid>/schedstat):

- the event loop's for each request, by route, and for each streamed token (the slope from short streams to
  long ones), over connections that are kept;
- the whole process's for a lone request after a pause, and for each second in which nothing comes;
- the 99th percentile of latencies at 80% of saturation: requests arrive by a Poisson process of that rate.
  Saturation is what requests reach that follow each other on as many connections as the server has rows.
"""

import argparse
import asyncio
import functools
import itertools
import json
import random
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.serve_process import Served, serving
from benchmarks.spread import Spread

SHARE = 0.8  # of saturation, at which requests arrive
_TASKS = ("sentiment", "intent", "mood", "date-iso")
_HELD_OUT = Path(__file__).parents[1] / "demo" / "heldout"
_SHORT, _LONG = 8, 64  # tokens of streams
_CONNECTIONS = 8
_PAUSE_SECONDS = 0.3  # before a lone request, and behind it: threads may go on spinning
_CHAT = "/v1/chat/completions"
_CHOICES = "/generate with choices"
_WITH_CHOICES = ("sentiment", "intent", "mood")
_LATE_SECONDS = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """How much is measured in a round."""

    requests: int  # of each route
    lone: int  # requests, one after the other
    idle_seconds: float
    load_seconds: float  # at saturation, and at 80% of it
    rows: int  # connections at saturation
    new_tokens: int


class Connection(asyncio.Protocol):
    """One connection that is kept; a request at a time."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self._answer: asyncio.Future[bytes] | None = None
        self._transport: asyncio.Transport | None = None

    @classmethod
    async def to(cls, port: int) -> "Connection":
        """Connect to this machine."""
        loop = asyncio.get_running_loop()
        transport, connection = await loop.create_connection(cls, "127.0.0.1", port)
        connection._transport = transport
        return connection

    def data_received(self, data: bytes) -> None:
        """Collect an answer until it is whole."""
        self._parts.append(data)
        answer = b"".join(self._parts)
        if self._answer is not None and not self._answer.done() and _is_whole(answer):
            self._answer.set_result(answer)

    def connection_lost(self, error: Exception | None) -> None:
        """Fail what waits."""
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(error or ConnectionError("the server closed the connection"))

    async def ask(self, request: bytes) -> bytes:
        """Return the whole answer. Raise RuntimeError where it is an error."""
        self._parts.clear()
        self._answer = asyncio.get_running_loop().create_future()
        assert self._transport is not None
        self._transport.write(request)
        answer = await self._answer
        if not answer.startswith(b"HTTP/1.1 200"):
            raise RuntimeError(f"the server answered {answer[:500].decode(errors='replace')}")
        return answer

    def close(self) -> None:
        """Disconnect."""
        if self._transport is not None:
            self._transport.close()


def _is_whole(answer: bytes) -> bool:
    """Return whether an answer has ended; a stream ends with an empty chunk."""
    head, end, body = answer.partition(b"\r\n\r\n")
    if not end:
        return False
    length = head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0]
    return len(body) >= int(length) if length else body.endswith(b"0\r\n\r\n")


class Threads:
    """CPU seconds of a process's threads."""

    def __init__(self, pid: int) -> None:
        self._folder = Path(f"/proc/{pid}/task")
        self._first = str(pid)

    def event_loop(self) -> float:
        """Of the main thread, which runs the event loop."""
        return self._of(self._first)

    def all(self) -> float:
        """Of all threads; none ends meanwhile."""
        return sum(self._of(each.name) for each in self._folder.iterdir())

    def _of(self, name: str) -> float:
        return int((self._folder / name / "schedstat").read_text().split()[0]) / 1e9


def request_of(route: str, number: int, new_tokens: int) -> bytes:
    """Return a request with an input that the demo's tasks were made for."""
    tasks = _WITH_CHOICES if route == _CHOICES else _TASKS
    task = tasks[number % len(tasks)]
    lines = _inputs(task)
    text = lines[number // len(tasks) % len(lines)]
    length: dict[str, Any] = {"max_new_tokens": new_tokens, "ignore_eos": True}
    body: dict[str, Any] = {"task_id": task, "inputs": text, "parameters": length}
    if route == _CHAT:
        message = {"role": "user", "content": text}
        body = {"model": task, "messages": [message], "max_tokens": new_tokens, "ignore_eos": True}
    if route == _CHOICES:
        body["parameters"] = {"choices": True}
    data = json.dumps(body).encode()
    head = f"POST {route.split()[0]} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data


@functools.cache
def _inputs(task: str) -> list[str]:
    lines = (_HELD_OUT / f"{task}.jsonl").read_text().splitlines()[:50]
    return [json.loads(line)["inputs"] for line in lines]


async def closed_loop(port: int, requests: Sequence[bytes], connections: int, seconds: float) -> float:
    """Send requests on some connections, the next one after an answer; return answers per second.

    It ends with the requests, or `seconds` after it began.
    """
    left, begin = iter(requests), time.perf_counter()
    end, count = begin + seconds, 0

    async def go() -> None:
        nonlocal count
        connection = await Connection.to(port)
        while time.perf_counter() < end and (request := next(left, None)) is not None:
            await connection.ask(request)
            count += 1
        connection.close()

    await asyncio.gather(*(go() for _ in range(connections)))
    return count / (time.perf_counter() - begin)


async def poisson(port: int, make: Callable[[int], bytes], rate: float, seconds: float) -> list[float]:
    """Return the seconds of each request; they arrive at `rate` a second, whatever is still under way."""
    random_ = random.Random(0)
    kept: list[Connection] = []
    latencies: list[float] = []

    async def one(number: int, due: float) -> None:
        connection = kept.pop() if kept else await Connection.to(port)
        await connection.ask(make(number))
        latencies.append(time.perf_counter() - due)
        kept.append(connection)

    due, end = (now := time.perf_counter()), now + seconds
    running = []
    for number in itertools.count():
        due += random_.expovariate(rate)
        if due > end:
            break
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
        running.append(asyncio.ensure_future(one(number, due)))
    async with asyncio.timeout(_LATE_SECONDS):
        await asyncio.gather(*running)
    for connection in kept:
        connection.close()
    return latencies


class Side:
    """One server under measurement."""

    def __init__(self, served: Served, sizes: Sizes) -> None:
        self._port = int(served.url.rpartition(":")[2])
        self._threads = Threads(served.process.pid)
        self._sizes = sizes
        self._most = 0.0  # requests a second

    def loop_ms(self, route: str, new_tokens: int) -> float:
        """Return the event loop's milliseconds for each request."""
        requests = [request_of(route, number, new_tokens) for number in range(self._sizes.requests)]
        before = self._threads.event_loop()
        asyncio.run(closed_loop(self._port, requests, _CONNECTIONS, _LATE_SECONDS))
        return 1000 * (self._threads.event_loop() - before) / len(requests)

    def lone_ms(self) -> float:
        """Return the process's milliseconds for a lone request, what threads do after it included."""
        found = []
        for number in range(self._sizes.lone):
            time.sleep(_PAUSE_SECONDS)
            before = self._threads.all()
            request = request_of("/generate", number, self._sizes.new_tokens)
            asyncio.run(closed_loop(self._port, [request], 1, _LATE_SECONDS))
            time.sleep(_PAUSE_SECONDS)
            found.append(1000 * (self._threads.all() - before))
        return statistics.median(found)

    def idle_ms(self) -> float:
        """Return the process's milliseconds for each second without a request."""
        before = self._threads.all()
        time.sleep(self._sizes.idle_seconds)
        return 1000 * (self._threads.all() - before) / self._sizes.idle_seconds

    def saturation(self) -> float:
        """Return the requests a second that it reaches."""
        requests = [self._of_some_length(number) for number in range(round(2000 * self._sizes.load_seconds))]
        self._most = asyncio.run(
            closed_loop(self._port, requests, self._sizes.rows, self._sizes.load_seconds)
        )
        return self._most

    def under_load(self) -> float:
        """Return the 99th percentile of latencies at 80% of that, in milliseconds."""
        rate, seconds = SHARE * self._most, self._sizes.load_seconds
        found = asyncio.run(poisson(self._port, self._of_some_length, rate, seconds))
        return 1000 * sorted(found)[int(0.99 * len(found))]

    def _of_some_length(self, number: int) -> bytes:
        """Return a request of half as many tokens to half as many more, so that rows don't go in step."""
        tokens = self._sizes.new_tokens
        return request_of("/generate", number, tokens // 2 + 7 * number % (tokens + 1))

    def token_ms(self) -> float:
        """Return the event loop's milliseconds for each token of a stream."""
        short, long = (self.loop_ms("/generate_stream", each) for each in (_SHORT, _LONG))
        return (long - short) / (_LONG - _SHORT)

    def figures(self) -> dict[str, Callable[[], float]]:
        """Return what measures each figure, in this order."""
        routes = ("/generate", _CHOICES, _CHAT, "/generate_stream")
        of_routes = {
            f"loop ms: {each}": partial(self.loop_ms, each, self._sizes.new_tokens) for each in routes
        }
        return {
            **of_routes,
            "loop ms a streamed token": self.token_ms,
            "CPU ms of a lone request": self.lone_ms,
            "CPU ms of an idle second": self.idle_ms,
            "requests a second at saturation": self.saturation,
            "p99 ms at 80%": self.under_load,
        }


def measure(checkouts: dict[str, Path], sizes: Sizes, rounds: int) -> dict[str, dict[str, list[float]]]:
    """Serve each checkout, warm up, and run the rounds: by figure and side, its value in each.

    Sides take turns within seconds, figure by figure; every other round goes backwards.
    """
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        sides = {}
        for name, checkout in checkouts.items():
            store = shutil.copytree(checkout / "prompts_store", f"{folder}/{name}")
            settings = {"store": store, "max_rows": sizes.rows}
            served = stack.enter_context(serving(Path(f"{folder}/{name}.log"), settings, checkout))
            sides[name] = Side(served, sizes)
            sides[name].loop_ms("/generate", sizes.new_tokens)
        ways = {name: side.figures() for name, side in sides.items()}
        found: dict[str, dict[str, list[float]]] = {
            figure: {name: [] for name in sides} for figure in next(iter(ways.values()))
        }
        for number in range(rounds):
            for figure, values in found.items():
                for name in list(sides)[:: -1 if number % 2 else 1]:
                    values[name].append(ways[name][figure]())
                line = ", ".join(f"{name} {of_side[-1]:.3f}" for name, of_side in values.items())
                print(f"round {number + 1}, {figure}: {line}", file=sys.stderr, flush=True)
        return found


def report_of(found: dict[str, dict[str, list[float]]]) -> dict[str, Any]:
    """Return medians with quartiles, by figure and side; with two sides, the ratio within each round."""
    report: dict[str, Any] = {}
    for figure, of_sides in found.items():
        report[figure] = {name: Spread.of(values).as_json() for name, values in of_sides.items()}
        if len(of_sides) > 1:
            pairs = zip(*of_sides.values(), strict=True)
            report[figure]["ratio"] = Spread.of([mine / other for mine, other in pairs]).as_json()
    return report


def table(report: dict[str, Any]) -> str:
    """Return the report as Markdown."""
    sides = list(next(iter(report.values())))
    lines = [f"| figure | {' | '.join(sides)} |", "|---|" + "---|" * len(sides)]
    for name, found in report.items():
        cells = (f"{found[side]['median']} {found[side]['quartiles']}" for side in sides)
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the options, measure, print the table, write JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.edge", description=__doc__)
    parser.add_argument("--other", type=Path, help="another checkout, to compare with")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--requests", type=int, default=200, help="of each route in a round")
    parser.add_argument("--lone", type=int, default=9)
    parser.add_argument("--idle-seconds", type=float, default=3.0)
    parser.add_argument("--load-seconds", type=float, default=10.0)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=16)
    parser.add_argument("--out", type=Path, default=Path("build/bench/edge.json"))
    options = vars(parser.parse_args(arguments))
    out, rounds, other = (options.pop(name) for name in ("out", "rounds", "other"))
    checkouts = {"this": Path.cwd()} | ({} if other is None else {"other": other.resolve()})
    report = report_of(measure(checkouts, Sizes(**options), rounds))
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(report, indent=2) + "\n")
    print(table(report))
    print(f"written to {out}")


if __name__ == "__main__":
    main()
