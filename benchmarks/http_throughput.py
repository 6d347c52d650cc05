"""What HTTP costs: ``python -m benchmarks.http_throughput``.

One process serves the 386M shape. Its engine gets the same 32 requests in three ways, which take turns: past
HTTP, as `POST /generate` with whole answers (and their details), and as streams. A round runs each way once,
in an order that goes round; ratios are taken within a round.

The client is a process of its own on the same cores, and what it takes counts against the server. So the
server's CPU seconds for each token are told too.
"""

import argparse
import asyncio
import itertools
import json
import string
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from app.prompt import TaskVersion, VersionDraft
from app.request import Request, Segment, segments_of
from app.store.prompt_store import open_store
from benchmarks.other_load import OtherLoad
from benchmarks.registered_tasks import publish_task, soft_prompt, task_id
from benchmarks.served_engine import ServedEngine
from benchmarks.spread import Spread
from benchmarks.work import SHAPES, Ask, Work, make_asks, random_model, random_prompts

ENGINE, WHOLE, STREAM = "engine", "whole answers", "streams"
BARS = {WHOLE: 0.95, STREAM: 0.90}  # of the engine's own throughput, at least
_ROUTES = {WHOLE: "/generate", STREAM: "/generate_stream"}


@dataclass(slots=True)
class Way:
    """One way to the engine: figures round by round."""

    rates: list[float] = field(default_factory=list)  # tokens per second
    cpu: list[float] = field(default_factory=list)  # seconds of the server's CPU for each token
    other_load: list[float] = field(default_factory=list)  # share of the CPUs that strangers had


def vocabulary(size: int) -> list[str]:
    """A space, letters, and words that grow letter by letter: each word with its space is one token."""
    tokens = ["Ġ", *string.ascii_lowercase]
    spelled = itertools.chain.from_iterable(
        itertools.product(string.ascii_lowercase, repeat=length) for length in itertools.count(1)
    )
    return tokens + ["Ġ" + "".join(each) for each in itertools.islice(spelled, size - len(tokens))]


def byte_level_bpe(tokens: Sequence[str]) -> Tokenizer:
    """Of the kind that most decoders have: a word is its beginning and one more letter."""
    merges = [(token[:-1], token[-1]) for token in tokens if len(token) > 1]
    tokenizer = Tokenizer(models.BPE({token: number for number, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def save_base(work: Work, folder: Path) -> list[torch.Tensor]:
    """Random weights, and a tokenizer of words; the tasks' prompts, made for these weights."""
    model = random_model(work.shape)
    model.save_pretrained(folder)
    tokenizer = byte_level_bpe(vocabulary(work.shape.vocabulary))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    return random_prompts(model, work)


def publish(work: Work, prompts: Sequence[torch.Tensor], folder: Path) -> list[TaskVersion]:
    """One task for each prompt."""
    store = open_store(folder)
    for number, rows in enumerate(prompts):
        data = rows.contiguous().view(torch.uint8).numpy().tobytes()
        prompt = soft_prompt((len(rows), work.shape.hidden), data)
        publish_task(store, task_id(number), VersionDraft(prompt=prompt))
    return [store.resolve(task_id(number)) for number in range(len(prompts))]


def word_asks(work: Work) -> list[Ask]:
    """The work's requests, of words only, so that a text of them has just these ids."""
    letters = 1 + len(string.ascii_lowercase)
    return [
        replace(
            ask, token_ids=tuple(letters + id_ % (work.shape.vocabulary - letters) for id_ in ask.token_ids)
        )
        for ask in make_asks(work)
    ]


def engine_requests(work: Work, asks: Sequence[Ask], versions: Sequence[TaskVersion]) -> list[Request]:
    """What admission makes of the bodies below."""
    return [
        Request(
            id=f"{time.perf_counter_ns()}-{number}",
            token_ids=ask.token_ids,
            segments=segments_of(
                Segment(
                    prompt_digest=versions[ask.task].prompt_digest,
                    num_virtual_tokens=versions[ask.task].num_virtual_tokens,
                )
            ),
            max_new_tokens=work.new_tokens,
            task=versions[ask.task].task_id,
        )
        for number, ask in enumerate(asks)
    ]


def http_requests(work: Work, asks: Sequence[Ask], route: str) -> list[bytes]:
    """Ready to be sent; each on a connection of its own."""
    spelled = [token.replace("Ġ", " ") for token in vocabulary(work.shape.vocabulary)]
    bodies = [
        json.dumps(
            {
                "task_id": task_id(ask.task),
                "inputs": "".join(spelled[id_] for id_ in ask.token_ids),
                "parameters": {"max_new_tokens": work.new_tokens},
            }
        ).encode()
        for ask in asks
    ]
    head = (
        f"POST {route} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nConnection: close\r\n"
    )
    return [f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body for body in bodies]


async def send_all(port: int, requests: Sequence[bytes]) -> tuple[float, list[bytes]]:
    """Seconds until the last answer is whole, and the answers."""
    began = time.perf_counter()
    answers = await asyncio.gather(*(_exchange(port, request) for request in requests))
    return time.perf_counter() - began, answers


async def _exchange(port: int, request: bytes) -> bytes:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(request)
    answer = await reader.read()
    writer.close()
    return answer


def check(answers: Sequence[bytes], work: Work, name: str) -> None:
    """Every answer has all its tokens, and as many input tokens as the engine got past HTTP."""
    for answer in answers:
        head, _, body = answer.partition(b"\r\n\r\n")
        if not head.startswith(b"HTTP/1.1 200"):
            raise RuntimeError(f"the server answered {answer[:500].decode(errors='replace')}")
        if name == STREAM:
            assert body.count(b"data: ") == work.new_tokens, body[-500:]
        else:
            details = json.loads(body)["details"]
            found = (details["generated_tokens"], details["prompt_tokens"])
            assert found == (work.new_tokens, work.prompt_tokens), found


def measure(work: Work, rounds: int) -> dict[str, Way]:
    """Serve, warm up, then run all ways in turns."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        say("making random weights and prompts")
        prompts = save_base(work, folder / "base")
        versions = publish(work, prompts, folder / "store")
        say("starting the server")
        settings = {
            "model": str(folder / "base"),
            "store": str(folder / "store"),
            "port": 0,
            "dtype": "bfloat16",
            "max_rows": work.requests,
            "log_level": "warning",
        }
        with ServedEngine(settings) as served:
            runs = _runs(work, served, versions)
            for run in runs.values():
                run()
            return _rounds(work, served, runs, rounds)


def _runs(
    work: Work, served: ServedEngine, versions: Sequence[TaskVersion]
) -> dict[str, Callable[[], float]]:
    """Each way: seconds of one run."""
    asks = word_asks(work)

    def past_http() -> float:
        return served.run(engine_requests(work, asks, versions))

    def over_http(name: str) -> Callable[[], float]:
        requests = http_requests(work, asks, _ROUTES[name])

        def run() -> float:
            seconds, answers = asyncio.run(send_all(served.port, requests))
            check(answers, work, name)
            return seconds

        return run

    return {ENGINE: past_http, WHOLE: over_http(WHOLE), STREAM: over_http(STREAM)}


def _rounds(
    work: Work, served: ServedEngine, runs: dict[str, Callable[[], float]], rounds: int
) -> dict[str, Way]:
    ways = {name: Way() for name in runs}
    num_tokens = work.requests * work.new_tokens
    names = list(runs)
    for number in range(rounds):
        shift = number % len(names)
        for name in (*names[shift:], *names[:shift]):
            before = served.cpu_seconds()
            with OtherLoad() as others:
                seconds = runs[name]()
            ways[name].rates.append(num_tokens / seconds)
            ways[name].cpu.append((served.cpu_seconds() - before) / num_tokens)
            ways[name].other_load.append(others.share)
            say(f"round {number + 1} of {rounds}: {name}: {ways[name].rates[-1]:.1f} tokens/s")
    return ways


def report_of(ways: dict[str, Way]) -> dict[str, Any]:
    """Medians with quartiles; ratios within each round."""
    engine = ways[ENGINE]
    report: dict[str, Any] = {}
    for name, way in ways.items():
        report[name] = {
            "tokens_per_second": Spread.of(way.rates).as_json(1),
            "server_cpu_ms_per_token": Spread.of([1000 * each for each in way.cpu]).as_json(2),
            "other_load": round(max(way.other_load), 3),
        }
        if name in BARS:
            share = Spread.of([mine / whole for mine, whole in zip(way.rates, engine.rates, strict=True)])
            # A round of a toy may take less than a tick of the processes' clocks: 0.
            cpu = Spread.of(
                [mine / (whole or mine or 1) for mine, whole in zip(way.cpu, engine.cpu, strict=True)]
            )
            report[name] |= {
                "of_engine": share.as_json(),
                "cpu_of_engine": cpu.as_json(),
                "bar": BARS[name],
                "reached": share.median >= BARS[name],
            }
    return report


def table(report: dict[str, Any]) -> str:
    """The report as Markdown."""
    lines = [
        "| way | tokens/s | of the engine's | bar | server CPU ms per token | of the engine's | other load |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, way in report["ways"].items():
        share, cpu = (_spread(way.get(key)) for key in ("of_engine", "cpu_of_engine"))
        bar = f"{way['bar']} ({'reached' if way['reached'] else 'not reached'})" if "bar" in way else ""
        lines.append(
            f"| {name} | {way['tokens_per_second']['median']} | {share} | {bar} | "
            f"{way['server_cpu_ms_per_token']['median']} | {cpu} | {way['other_load']:.0%} |"
        )
    return "\n".join(lines)


def _spread(value: dict[str, Any] | None) -> str:
    return "" if value is None else f"{value['median']} {value['quartiles']}"


def say(line: str) -> None:
    """Progress goes to stderr; stdout is for the result."""
    print(line, file=sys.stderr, flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the options, measure, print the table, write JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.http_throughput", description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="qwen2-0.4b", help="tiny tries the command only")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--out", type=Path, default=Path("build/bench/http-throughput.json"))
    options = parser.parse_args(arguments)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    work = Work(shape=SHAPES[options.shape], requests=options.requests, new_tokens=options.new_tokens)
    setup = {"shape": options.shape, "rounds": options.rounds, "requests": work.requests, "tasks": work.tasks}
    report = {"setup": setup, "ways": report_of(measure(work, options.rounds))}
    options.out.write_text(json.dumps(report, indent=2) + "\n")
    print(table(report))
    print(f"written to {options.out}")


if __name__ == "__main__":
    main()
