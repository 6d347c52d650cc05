"""Training tokens per second beside a plain PEFT loop: ``python -m benchmarks.training``.

Each side has a process of its own and trains the same prompt from the same start, on the same examples.
Sides take turns of so many steps, in another order each round; ratios are taken within a round. Tokens are
those of sources and answers, without padding. The first turn warms up and shows the losses and memory.
"""

import argparse
import itertools
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.machine import machine
from benchmarks.processes import SideProcess
from benchmarks.spread import Spread
from benchmarks.training_sides import BASES, METHODS, TASKS, TrainingWork, Turn, make_ours, make_peft

Turns = dict[str, list[Turn]]  # by the name of the side


def measure(work: TrainingWork, rounds: int, steps: int, say: Callable[[str], None]) -> dict[str, Any]:
    """Let the sides take turns on one work."""
    say(work.label)
    builds: list[tuple[Any, ...]] = [(make_ours, work), (make_peft, work, True), (make_peft, work, False)]
    processes = [SideProcess(*each) for each in builds]
    sides = [side for process in processes for side in process.sides]
    try:
        warm = {side.name: side.ask("train", steps) for side in sides}
        turns: Turns = {side.name: [] for side in sides}
        for number in range(rounds):
            shift = number % len(sides)
            for side in (*sides[shift:], *sides[:shift]):
                turns[side.name].append(side.ask("train", steps))
                say(f"  round {number + 1}: {side.name}: {_rate(turns[side.name][-1]):.0f} tokens/s")
    finally:
        for process in processes:
            process.close()
    return result(work, warm, turns)


def _rate(turn: Turn) -> float:
    return turn.tokens / turn.seconds


def _cpu_rate(turn: Turn) -> float:
    return turn.tokens / turn.cpu_seconds


def _ratios(turns: Turns, rate: Callable[[Turn], float]) -> dict[str, Any]:
    """Return how many times as fast ours is as each other side: rates divided within each round."""
    ours, *others = turns
    return {
        name: Spread.of(
            [rate(mine) / rate(theirs) for mine, theirs in zip(turns[ours], turns[name], strict=True)]
        ).as_json()
        for name in others
    }


def result(work: TrainingWork, warm: dict[str, Turn], turns: Turns) -> dict[str, Any]:
    """Return the figures of one work, from the turns that warmed up and those that count."""
    ours, same, _ = turns
    apart = [abs(mine - theirs) for mine, theirs in zip(warm[ours].losses, warm[same].losses, strict=True)]
    return {
        "work": asdict(work),
        "tokens_per_second": {
            name: Spread.of(list(map(_rate, of_side))).as_json(0) for name, of_side in turns.items()
        },
        "times_as_fast_as": _ratios(turns, _rate),
        "times_as_fast_by_cpu_time_as": _ratios(turns, _cpu_rate),
        "extra_memory_mib": {
            name: max(turn.extra_memory for turn in (warm[name], *of_side)) >> 20
            for name, of_side in turns.items()
        },
        "first_losses": [round(loss, 4) for loss in warm[ours].losses[:3]],
        "losses_apart_at_most": round(max(apart), 5),  # from the PEFT loop with our batches, step by step
    }


def table(results: Sequence[dict[str, Any]]) -> str:
    """Return a line for each side of each work: rates, our ratios to it with quartiles, memory."""
    lines = [
        "| work | side | tokens/s | promptplex is x times as fast | by CPU time | peak memory, MiB |",
        "|---|---|---|---|---|---|",
    ]
    for result in results:
        label = TrainingWork(**result["work"]).label
        for name, rate in result["tokens_per_second"].items():
            ratios = [
                _shown(result[key].get(name)) for key in ("times_as_fast_as", "times_as_fast_by_cpu_time_as")
            ]
            cells = [label, name, f"{rate['median']:.0f}", *ratios, str(result["extra_memory_mib"][name])]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _shown(ratio: dict[str, Any] | None) -> str:
    return "" if ratio is None else "{:.2f} ({:.2f} to {:.2f})".format(ratio["median"], *ratio["quartiles"])


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the options, measure every combination, print the table, write JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.training", description=__doc__)
    parser.add_argument("--bases", nargs="+", choices=BASES, default=BASES)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS)
    parser.add_argument("--precisions", nargs="+", choices=("float32", "bfloat16"), default=("bfloat16",))
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument(
        "--steps", type=int, default=20, help="of a turn (default 20; a tenth on large bases)"
    )
    parser.add_argument("--out", type=Path, default=Path("build/bench/training.json"))
    options = parser.parse_args(arguments)
    works = [
        TrainingWork(base=base, task=task, method=method, precision=precision)
        for base, task, method, precision in itertools.product(
            options.bases, options.tasks, options.methods, options.precisions
        )
    ]

    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    results = []
    for work in works:
        steps = options.steps if work.base == "demo" else max(1, options.steps // 10)
        results.append(measure(work, options.rounds, steps, say))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps({"machine": machine(), "results": results}, indent=2) + "\n")
    print(table(results))
    print(f"written to {options.out}")


if __name__ == "__main__":
    main()
