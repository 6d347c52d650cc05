"""The command line: ``python -m benchmarks.encoder_decoder``.

Shape after shape; within a shape all sides take turns, each in a process of its own. A side that can't run
here is left out, and the report says why. No answer ends early on any side, so that all have the same work.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmarks.encoder_decoder.compiled_sides import RUNTIMES, build_compiled
from benchmarks.encoder_decoder.sides import (
    PeftGrouped,
    PeftOneAtATime,
    build_ours,
    build_padded,
    build_peft,
)
from benchmarks.encoder_decoder.work import SHAPES, SourceWork
from benchmarks.processes import RemoteSide, SideProcess
from benchmarks.report import machine, side_json
from benchmarks.rounds import Record, ratio, run_rounds, warm_up

_PEFT = {"peft-single": PeftOneAtATime, "peft-grouped": PeftGrouped}
PEERS = (*_PEFT, "padded", *RUNTIMES)


def say(line: str) -> None:
    """Progress goes to stderr; stdout is for the result."""
    print(line, file=sys.stderr, flush=True)


def works_of(options: argparse.Namespace, shape: str) -> list[SourceWork]:
    """Return the same requests once for each number of beams."""
    return [
        SourceWork(
            shape=SHAPES[shape],
            tasks=options.tasks,
            requests=options.requests,
            virtual_tokens=options.virtual_tokens,
            prompt_tokens=options.source_tokens,
            new_tokens=options.new_tokens,
            num_beams=num_beams,
        )
        for num_beams in options.beams
    ]


class Field:
    """All sides of a shape: ours, and of the peers those that are named and can run."""

    def __init__(self, works: Sequence[SourceWork], options: argparse.Namespace) -> None:
        self.processes: list[SideProcess] = []
        self.skipped: dict[str, str] = {}
        self._stack = ExitStack()
        self._add(SideProcess(build_ours, works))
        if kinds := [kind for name, kind in _PEFT.items() if name in options.peers]:
            self._add(SideProcess(build_peft, works, kinds))
        if "padded" in options.peers:
            self._add(SideProcess(build_padded, works))
        for name in [name for name in RUNTIMES if name in options.peers]:
            self._add_compiled(name, works, options)

    def _add_compiled(self, name: str, works: Sequence[SourceWork], options: argparse.Namespace) -> None:
        runtime = RUNTIMES[name]
        reason = runtime.reason_to_skip(options.compiled_python)
        if reason is None:
            say(f"starting {runtime.name}, which compiles the model")
            try:
                log = options.out.with_suffix(f".{name}.log")
                self._add(SideProcess(build_compiled, works, runtime, options.compiled_python, log))
            except RuntimeError as error:
                reason = str(error).strip().splitlines()[-1]
        if reason is not None:
            say(f"left out: {runtime.name}: {reason}")
            self.skipped[runtime.name] = reason

    def _add(self, process: SideProcess) -> None:
        self._stack.callback(process.close)
        self.processes.append(process)

    @property
    def sides(self) -> list[RemoteSide]:
        """All of them, ours first."""
        return [side for process in self.processes for side in process.sides]

    def close(self) -> None:
        """End all processes."""
        self._stack.close()


def measure(works: Sequence[SourceWork], options: argparse.Namespace) -> dict[str, Any]:
    """Start the sides of a shape, warm them up, let them take turns; return their figures and ratios."""
    field = Field(works, options)
    try:
        records = warm_up(field.sides, say)
        for side in field.sides:
            _check_lengths(side, records[side.label], works[0].new_tokens)
        run_rounds(field.processes, records, options.rounds, say)
    finally:
        field.close()
    return {
        "sides": {side.label: side_json(records[side.label]) for side in field.sides},
        "ratios": {
            mine.label: {
                other.name: ratio(records[mine.label], records[other.label]).as_json(2)
                for other in field.sides[len(works) :]
                if other.work == mine.work
            }
            for mine in field.sides[: len(works)]
        },
        "skipped": field.skipped,
    }


def _check_lengths(side: RemoteSide, record: Record, new_tokens: int) -> None:
    lengths = {len(answer.token_ids) for answer in record.answers}
    if lengths != {new_tokens}:
        raise RuntimeError(f"{side.label}: answers of {sorted(lengths)} tokens, expected {new_tokens} each")


def table(report: dict[str, Any]) -> str:
    """Return the report for a terminal."""
    lines = [f"{report['machine']['processor']}, {report['machine']['torch_threads']} threads"]
    for shape, found in report["shapes"].items():
        lines += ["", f"{shape}", f"{'tokens/s':>10}  {'quartiles':>18}  {'memory':>9}  side"]
        for label, side in found["sides"].items():
            rate, memory = side["tokens_per_second"], side["extra_memory_mib"]
            lines.append(f"{rate['median']:>10}  {rate['quartiles']!s:>18}  {memory:>5} MiB  {label}")
        for label, ratios in found["ratios"].items():
            for name, figures in ratios.items():
                lines.append(f"{figures['median']:>9}x  {figures['quartiles']!s:>18}  {label} / {name}")
        lines += [f"left out: {name}: {reason}" for name, reason in found["skipped"].items()]
    return "\n".join(lines)


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def _names(text: str) -> list[str]:
    return [name for name in text.split(",") if name]


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the options, run, print the table, write JSON."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.encoder_decoder",
        description="Measure Promptplex on encoder-decoders beside its peers, on random weights.",
    )
    parser.add_argument("--shapes", type=_names, default=["t5-base", "bart-base"], help=", ".join(SHAPES))
    parser.add_argument("--beams", type=_numbers, default=[1, 4], metavar="B,...", help="1 is greedy")
    parser.add_argument("--tasks", type=int, default=8)
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--virtual-tokens", type=int, default=20)
    parser.add_argument("--source-tokens", type=int, default=256)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--peers", type=_names, default=list(PEERS), help=f"default {','.join(PEERS)}")
    parser.add_argument(
        "--compiled-python",
        type=Path,
        default=Path(sys.executable),
        help="the python of a virtual environment with ctranslate2 and optimum-intel[openvino]",
    )
    parser.add_argument("--out", type=Path, default=Path("build/bench/encoder-decoder.json"))
    options = parser.parse_args(arguments)
    if unknown := [*set(options.peers) - set(PEERS), *set(options.shapes) - set(SHAPES)]:
        parser.error(
            f"unknown: {', '.join(unknown)}; peers are {', '.join(PEERS)}, shapes {', '.join(SHAPES)}"
        )
    options.out.parent.mkdir(parents=True, exist_ok=True)
    works = {shape: works_of(options, shape) for shape in options.shapes}
    shapes = {shape: measure(of_shape, options) for shape, of_shape in works.items()}
    report = {"rounds": options.rounds, "machine": machine(), "shapes": shapes}
    options.out.write_text(json.dumps(report, indent=2) + "\n")
    print(table(report))
    print(f"written to {options.out}")


if __name__ == "__main__":
    main()
