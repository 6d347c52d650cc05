"""What came of a run: JSON for machines, a table for people."""

import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch
import transformers

from benchmarks.limits import Hardware, ModelCost, decode_step, whole_work
from benchmarks.processes import RemoteSide
from benchmarks.rounds import Record, ratio
from benchmarks.spread import Spread
from benchmarks.work import Work


def machine() -> dict[str, Any]:
    """What the figures depend on."""
    return {
        "platform": platform.platform(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "cpu_kernels": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


def side_json(record: Record) -> dict[str, Any]:
    """One entrant's figures."""
    return {
        "requests_per_round": record.num_requests,
        "tokens_per_second": Spread.of(record.rates).as_json(1),
        "seconds": [round(value, 3) for value in record.seconds],
        "first_token_seconds": Spread.of(record.first_token).as_json(4) if record.first_token else None,
        "time_per_token_seconds": Spread.of(record.time_per_token).as_json(4)
        if record.time_per_token
        else None,
        "extra_memory_mib": None if record.extra_memory is None else record.extra_memory >> 20,
    }


def limits_json(
    hardware: Hardware, cost: ModelCost, work: Work, record: Record, steps: Sequence[float]
) -> dict[str, Any]:
    """t* of one of our works and the fraction of it that was reached."""
    whole = whole_work(hardware, cost, work)
    step = decode_step(hardware, cost, work, work.prompt_tokens + work.new_tokens / 2)
    taken = Spread.of(record.seconds).median
    report = {"whole_work_seconds": round(whole, 3), "whole_work_fraction": round(whole / taken, 3)}
    if steps:
        median = Spread.of(steps).median
        report |= {
            "decode_step_seconds": round(step, 4),
            "decode_step_measured_seconds": round(median, 4),
            "decode_step_fraction": round(step / median, 3),
        }
    return report


def mixing_json(
    hardware: Hardware, cost: ModelCost, mixed: RemoteSide, single: RemoteSide, records: Mapping[str, Record]
) -> dict[str, Any]:
    """Many tasks beside one task, and beside R* = t*(one) / t*(many): what mixing must cost at least."""
    measured = ratio(records[mixed.label], records[single.label])
    ideal = whole_work(hardware, cost, single.work) / whole_work(hardware, cost, mixed.work)
    return {
        "ratio": measured.as_json(),
        "ideal": round(ideal, 3),
        "fraction_of_ideal": round(measured.median / ideal, 3),
    }


def agreement(ours: Record, other: Record) -> dict[str, float] | None:
    """How far two sides say the same: random bf16 weights have near-ties, so it isn't expected to be all."""
    pairs = list(zip(ours.answers, other.answers, strict=False))
    if len(ours.answers) != len(other.answers):
        return None  # a sample
    return {
        "first_token": round(sum(a.token_ids[0] == b.token_ids[0] for a, b in pairs) / len(pairs), 3),
        "whole_answer": round(sum(a.token_ids == b.token_ids for a, b in pairs) / len(pairs), 3),
    }


def build(
    ours: Sequence[RemoteSide],
    sides: Sequence[RemoteSide],
    records: Mapping[str, Record],
    hardware: Hardware,
    cost: ModelCost,
    steps: Mapping[str, Sequence[float]],
) -> dict[str, Any]:
    """The whole report but for the first-token figures."""
    others = [side for side in sides if side not in ours]
    return {
        "work": asdict(ours[0].work),
        "machine": machine(),
        "hardware": {
            "read_gb_per_s": round(hardware.bandwidth / 1e9, 1),
            "bf16_gflop_per_s": round(hardware.throughput / 1e9, 1),
            "parameters": cost.parameters + cost.head_parameters,
        },
        "sides": {side.label: side_json(records[side.label]) for side in sides},
        "ratios": {mine.label: _ratios(mine, others, records) for mine in ours},
        "agreement": {mine.label: _agreements(mine, others, records) for mine in ours},
        "mixing": {
            mine.label: mixing_json(hardware, cost, mine, single, records)
            for mine in ours
            if mine.work.tasks > 1 and (single := _single(mine, ours)) is not None
        },
        "limits": {
            mine.label: limits_json(hardware, cost, mine.work, records[mine.label], steps[mine.label])
            for mine in ours
        },
    }


def _single(mixed: RemoteSide, ours: Sequence[RemoteSide]) -> RemoteSide | None:
    """The same work with one task."""
    return next(
        (side for side in ours if side.work == replace(mixed.work, tasks=1)),
        None,
    )


def _opponents(mine: RemoteSide, others: Sequence[RemoteSide]) -> list[RemoteSide]:
    """Those who did the same work; without prompts, as many requests."""
    return [
        other
        for other in others
        if (other.work == mine.work if other.uses_prompts else other.work.requests == mine.work.requests)
    ]


def _ratios(mine: RemoteSide, others: Sequence[RemoteSide], records: Mapping[str, Record]) -> dict[str, Any]:
    return {
        other.name: ratio(records[mine.label], records[other.label]).as_json(2)
        for other in _opponents(mine, others)
    }


def _agreements(
    mine: RemoteSide, others: Sequence[RemoteSide], records: Mapping[str, Record]
) -> dict[str, Any]:
    same = {
        other.name: agreement(records[mine.label], records[other.label])
        for other in _opponents(mine, others)
        if other.uses_prompts or not mine.work.virtual_tokens
    }
    return {name: figures for name, figures in same.items() if figures is not None}


def table(report: Mapping[str, Any]) -> str:
    """For a terminal."""
    lines = [
        f"{'tokens/s':>10}  {'quartiles':>15}  {'first token':>11}  {'per token':>9}  {'memory':>8}  side"
    ]
    for label, side in report["sides"].items():
        lines.append(_side_line(label, side))
    for label, opponents in report["ratios"].items():
        for name, figures in opponents.items():
            low, high = figures["quartiles"]
            lines.append(f"{figures['median']:>9}x  [{low}, {high}]  {label} / {name}")
    for label, figures in report["mixing"].items():
        median = figures["ratio"]["median"]
        lines.append(f"{median:>9}x  {label} / one task; ideal {figures['ideal']}")
    for label, figures in report["limits"].items():
        reached = figures["whole_work_fraction"]
        lines.append(f"{reached:>10.0%} of t* = {figures['whole_work_seconds']} s reached: {label}")
    if "first_token" in report:
        first = report["first_token"]
        lines.append(
            f"{first['ratio']['median']:>9}x  time to first token, {first['prompt_tokens']} tokens in: "
            f"{first['virtual_tokens']} resident virtual tokens / none"
        )
    return "\n".join(lines)


def markdown(report: Mapping[str, Any], mine: str) -> str:
    """The table of a document: every opponent of one of our works, `mine`."""
    lines = [
        "| side | tokens/s | first token | per token | Promptplex is faster by |",
        "|---|---|---|---|---|",
    ]
    own, ratios = report["sides"][mine], report["ratios"][mine]
    lines.append(_markdown_line(mine, own, ""))
    for label, side in report["sides"].items():
        name = label.split(" (")[0]
        if name in ratios:
            low, high = ratios[name]["quartiles"]
            lines.append(_markdown_line(label, side, f"{ratios[name]['median']}x [{low}, {high}]"))
    return "\n".join(lines)


def _markdown_line(label: str, side: Mapping[str, Any], ratio_cell: str) -> str:
    first, later = (side[name] for name in ("first_token_seconds", "time_per_token_seconds"))
    cells = [
        label,
        f"{side['tokens_per_second']['median']:.1f}",
        "-" if first is None else f"{first['median']:.2f} s",
        "-" if later is None else f"{1000 * later['median']:.0f} ms",
        ratio_cell,
    ]
    return f"| {' | '.join(cells)} |".replace("|  |", "| |")


def _side_line(label: str, side: Mapping[str, Any]) -> str:
    rate = side["tokens_per_second"]
    first, later = (side[name] for name in ("first_token_seconds", "time_per_token_seconds"))
    cells = [
        f"{rate['median']:>10}",
        f"[{rate['quartiles'][0]}, {rate['quartiles'][1]}]".rjust(15),
        ("-" if first is None else f"{first['median']:.2f} s").rjust(11),
        ("-" if later is None else f"{1000 * later['median']:.0f} ms").rjust(9),
        ("-" if side["extra_memory_mib"] is None else f"{side['extra_memory_mib']} MiB").rjust(8),
        label,
    ]
    return "  ".join(cells)
