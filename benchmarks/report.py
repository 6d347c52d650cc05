"""What came of the rounds of a work, as JSON."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from statistics import median
from typing import Any

import torch

from benchmarks.encoder_decoder.work import EncoderDecoderShape
from benchmarks.limits import Hardware, cost_of, decode_step, prefill, whole_work
from benchmarks.rounds import Measured, Record, ratio
from benchmarks.spread import Spread
from benchmarks.work import Work, config_of
from benchmarks.works import shape_name


def work_json(measured: Measured, left_out: Mapping[str, str]) -> dict[str, Any]:
    """All figures of one work; `left_out` are peers that didn't take part, and why."""
    mine, work = measured.sides[0], measured.sides[0].work
    same = [side for side in measured.sides if side.work.name == work.name]
    return {
        "description": work.description,
        "work": asdict(work) | {"shape": shape_name(work.shape)},
        "unit": work.unit,
        "hardware": hardware_json(measured.hardware),
        "sides": {side.name: side_json(measured.records[side], work) for side in same},
        "ratios": {side.name: ratio(measured.ours, measured.records[side]).as_json(2) for side in same[1:]},
        "beside": {
            side.work.name: _beside(measured.ours, measured.records[side])
            for side in measured.sides
            if side.process is mine.process and side.work.name != work.name
        },
        "agreement": _agreements(measured),
        "limits": _limits(measured),
        "waiting_sides_cpus": round(max(measured.waiting), 3),
        "other_load": round(max(measured.other_load), 3),
        "repeated_rounds": measured.repeated,
        "left_out": {**left_out, **measured.failed},
    }


def _beside(ours: Record, other: Record) -> dict[str, Any]:
    steps = {"decode_step_seconds": Spread.of(other.decode_steps).as_json(4)} if other.decode_steps else {}
    return ratio(ours, other).as_json() | steps


def hardware_json(found: Sequence[Hardware]) -> dict[str, float]:
    """Medians of what was measured between the rounds."""
    hardware = typical(found)
    return {
        "read_gb_per_s": round(hardware.bandwidth / 1e9, 1),
        "bf16_gflop_per_s": round(hardware.throughput / 1e9, 1),
    }


def typical(found: Sequence[Hardware]) -> Hardware:
    """Of each figure the median."""
    return Hardware(median(each.bandwidth for each in found), median(each.throughput for each in found))


def side_json(record: Record, work: Work) -> dict[str, Any]:
    """One side's figures."""
    counted = record.num_tokens if work.new_tokens > 1 else record.num_requests
    spreads = {
        "first_token_seconds": record.first_token,
        "time_per_token_seconds": record.time_per_token,
        "decode_step_seconds": record.decode_steps,
    }
    return {
        "requests_per_round": record.num_requests,
        "per_second": Spread.of([counted / seconds for seconds in record.seconds]).as_json(1),
        "seconds": [round(value, 3) for value in record.seconds],
        **{name: Spread.of(values).as_json(4) for name, values in spreads.items() if values},
        "extra_memory_mib": None if record.extra_memory is None else record.extra_memory >> 20,
    }


def limits_json(hardware: Hardware, work: Work, record: Record) -> dict[str, Any]:
    """t* of one of our works and the fraction of it that was reached."""
    cost = cost_of(config_of(work.shape), torch.bfloat16)
    assert cost is not None  # a decoder without experts
    whole = (prefill if work.new_tokens == 1 else whole_work)(hardware, cost, work)
    taken = Spread.of(record.seconds).median
    report = {"whole_work_seconds": round(whole, 3), "whole_work_fraction": round(whole / taken, 3)}
    if record.decode_steps:
        step = decode_step(hardware, cost, work, work.prompt_tokens + work.new_tokens / 2)
        measured = Spread.of(record.decode_steps).median
        report |= {
            "decode_step_seconds": round(step, 4),
            "decode_step_measured_seconds": round(measured, 4),
            "decode_step_fraction": round(step / measured, 3),
        }
    return report


def _limits(measured: Measured) -> dict[str, Any]:
    work = measured.sides[0].work
    if isinstance(work.shape, EncoderDecoderShape):
        return {}  # t* counts decoders only
    return limits_json(typical(measured.hardware), work, measured.ours)


def agreement(ours: Record, other: Record) -> dict[str, float] | None:
    """How far two sides say the same: random bf16 weights have near-ties, so it isn't expected to be all."""
    pairs = list(zip(ours.answers, other.answers, strict=False))
    if len(ours.answers) != len(other.answers):
        return None  # a sample
    return {
        "first_token": round(sum(a.token_ids[0] == b.token_ids[0] for a, b in pairs) / len(pairs), 3),
        "whole_answer": round(sum(a.token_ids == b.token_ids for a, b in pairs) / len(pairs), 3),
    }


def _agreements(measured: Measured) -> dict[str, Any]:
    """With those that do exactly the same: with the prompts, greedily, and without labels."""
    mine = measured.sides[0].work
    if mine.sampling or mine.num_labels:
        return {}
    same = {
        side.name: agreement(measured.ours, measured.records[side])
        for side in measured.sides[1:]
        if side.work.name == mine.name and (side.uses_prompts or not mine.virtual_tokens)
    }
    return {name: figures for name, figures in same.items() if figures is not None}
