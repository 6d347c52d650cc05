"""This checkout beside another one, in turns: ``python -m benchmarks.two_checkouts --other DIRECTORY``.

Both run with this Python. Rounds alternate within seconds, and ratios are taken within a round, since a
machine's speed may change twofold within minutes. Above 1 means that this checkout is faster.

The engine does the 386M work, and lone requests for their first token; then both checkouts serve the same
base and store over HTTP.
"""

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx2

from app.settings import ENV_PREFIX
from benchmarks.http_throughput import http_requests, publish, save_base, send_all, word_asks
from benchmarks.spread import Spread
from benchmarks.work import SHAPES, Work

_HERE = Path(__file__).parent.parent
_SIDE = Path(__file__).with_name("checkout_side.py")
_START_SECONDS = 300.0


class EngineSide:
    """A checkout's engine in a process of its own."""

    def __init__(self, checkout: Path, work: dict[str, Any]) -> None:
        command = [sys.executable, "-P", str(_SIDE), json.dumps({"work": work})]
        self._process = subprocess.Popen(
            command,
            cwd=checkout,
            env=_environment(checkout),
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        self._answer()

    def ask(self, line: str) -> dict[str, Any]:
        """Send a command and wait for its answer."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{line}\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"a side ended with status {self._process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(60)


def _environment(checkout: Path) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(ENV_PREFIX)}
    return kept | {"PYTHONPATH": str(checkout)}


@contextmanager
def http_server(checkout: Path, base: Path, store: Path, port: int, rows: int) -> Iterator[int]:
    """Serve `base` and `store` with a checkout's code; yields the port when it is ready."""
    flags = [
        f"--model={base}",
        f"--store={store}",
        f"--port={port}",
        "--dtype=bfloat16",
        f"--max-rows={rows}",
    ]
    command = [sys.executable, "-m", "app.cli", "serve", *flags, "--log-level=warning"]
    process = subprocess.Popen(command, cwd=checkout, env=_environment(checkout))
    try:
        _wait_until_ready(process, port)
        yield port
    finally:
        process.terminate()
        process.wait(60)


def _wait_until_ready(process: "subprocess.Popen[bytes]", port: int) -> None:
    end = time.monotonic() + _START_SECONDS
    while process.poll() is None and time.monotonic() < end:
        try:
            if httpx2.get(f"http://127.0.0.1:{port}/health/ready", trust_env=False).is_success:
                return
        except httpx2.TransportError:
            pass
        time.sleep(0.2)
    raise RuntimeError("a server didn't come up")


def compare(name: str, sides: Sequence[Callable[[], float]], rounds: int) -> dict[str, Any]:
    """Seconds of both sides in turns, the first one the older; the ratio older / this of each round."""
    seconds: tuple[list[float], list[float]] = ([], [])
    for side in sides:
        side()
    for number in range(rounds):
        for index in (0, 1) if number % 2 == 0 else (1, 0):
            seconds[index].append(sides[index]())
        print(
            f"{name}, round {number + 1}: {seconds[0][-1]:.4f} {seconds[1][-1]:.4f}",
            file=sys.stderr,
            flush=True,
        )
    ratios = [other / this for other, this in zip(*seconds, strict=True)]
    return {
        "ratio": Spread.of(ratios).as_json(),
        "other_seconds": Spread.of(seconds[0]).as_json(5),
        "this_seconds": Spread.of(seconds[1]).as_json(5),
    }


def compare_engines(other: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Throughput of each number of rows, and the first token of lone requests."""
    report: dict[str, Any] = {}
    for rows in options.rows:
        work = {
            "shape": options.shape,
            "requests": rows,
            "tasks": min(8, rows),
            "new_tokens": options.new_tokens,
        }
        sides = [EngineSide(checkout, work) for checkout in (other, _HERE)]
        try:
            outputs = {side.ask("run")["tokens"] for side in sides}
            runs = [lambda side=side: side.ask("run")["seconds"] for side in sides]
            report[f"{rows} rows"] = compare(f"{rows} rows", runs, options.rounds)
            report[f"{rows} rows"]["same_tokens"] = len(outputs) == 1
            if rows == options.rows[0]:
                firsts = [lambda side=side: side.ask("first_token")["resident"]["median"] for side in sides]
                report["first token"] = compare("first token", firsts, options.rounds)
        finally:
            for side in sides:
                side.close()
    return report


def compare_servers(other: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Whole answers, streams, and lone requests one after the other."""
    work = Work(shape=SHAPES[options.http_shape], requests=32, new_tokens=options.new_tokens)
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        folder = Path(name)
        publish(work, save_base(work, folder / "base"), folder / "store")
        ports = [
            stack.enter_context(
                http_server(checkout, folder / "base", folder / "store", options.port + number, work.requests)
            )
            for number, checkout in enumerate((other, _HERE))
        ]
        report = {}
        for route in ("/generate", "/generate_stream"):
            requests = http_requests(work, word_asks(work), route)
            runs = [lambda port=port: asyncio.run(send_all(port, requests))[0] for port in ports]  # noqa: B023
            report[f"32 x {route}"] = compare(route, runs, options.rounds)
        lone = http_requests(work, word_asks(work)[:1], "/generate")
        runs = [lambda port=port: _one_by_one(port, lone[0]) for port in ports]
        report["lone /generate"] = compare("lone /generate", runs, options.rounds)
        return report


def _one_by_one(port: int, request: bytes) -> float:
    """The median seconds of ten requests, one after the other."""
    return statistics.median(asyncio.run(send_all(port, [request]))[0] for _ in range(10))


def main() -> None:
    """Parse the options, measure, print and write JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.two_checkouts", description=__doc__)
    parser.add_argument("--other", type=Path, required=True, help="the checkout to compare with")
    parser.add_argument("--shape", choices=SHAPES, default="qwen2-0.4b")
    parser.add_argument("--http-shape", choices=SHAPES, default="tiny", help="tiny: mostly what HTTP costs")
    parser.add_argument("--rows", type=lambda text: [int(part) for part in text.split(",")], default=[32, 1])
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--port", type=int, default=8410, help="the first of two ports")
    parser.add_argument("--out", type=Path, default=Path("build/bench/two-checkouts.json"))
    options = parser.parse_args()
    other = options.other.resolve()
    report = compare_servers(other, options) | compare_engines(other, options)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(report, indent=2) + "\n")
    for name, result in report.items():
        print(f"{name}: {result['ratio']['median']} {result['ratio']['quartiles']}")


if __name__ == "__main__":
    main()
