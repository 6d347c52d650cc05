"""Mixed batches of tasks through the engine, compared with each request alone: greedy tokens are equal."""

import math
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from app.errors import UnsupportedModel
from app.request import Request
from benchmarks.completions import Completion, submit_all
from benchmarks.gpu.apart import noted
from benchmarks.gpu.findings import Findings
from benchmarks.gpu.setup import Clock, Setup
from benchmarks.gpu.switches import ALL, Switches, switched_engine, variants
from benchmarks.gpu.tiny import Expected, Task, World, alone, build_world

TOLERANCE = 1e-3  # of log-probabilities, in float32
_ENOUGH = 4.0  # seconds that an engine may take
_TIMEOUT = 60.0  # of one request


def compare_tasks(architecture: str, setup: Setup, findings: Findings, clock: Clock) -> None:
    """Note how many requests differ: with all parts on, and each of them off."""
    torch.backends.cuda.matmul.allow_tf32 = False
    with tempfile.TemporaryDirectory() as folder:
        try:
            world = build_world(architecture, setup.device, Path(folder), is_tiny=setup.is_tiny)
        except UnsupportedModel as refusal:  # by this version of transformers; a server refuses it too
            findings.note("left out", str(refusal))
            return
    number, new_tokens, longest = (4, 2, 5) if setup.is_tiny else (24, 12, 90)
    asked = world.requests(number, new_tokens, longest)
    expected = [alone(task, request) for task, request in asked]
    findings.note("requests", number)
    findings.note("answers", len({tuple(each.token_ids) for each in expected}))
    tried: dict[str, Any] = {}
    for switches in (ALL, Switches(kernels=False)) if setup.is_tiny else variants():
        if clock.left < _ENOUGH:
            findings.note("not tried", f"without more time: {switches.name} and what follows")
            return
        tried[switches.name] = _differences(world, asked, expected, switches)
        findings.note("with", tried)


def _differences(
    world: World, asked: Sequence[tuple[Task, Request]], expected: Sequence[Expected], switches: Switches
) -> dict[str, Any]:
    try:
        completions = _answers(world, [request for _, request in asked], switches)
    except Exception as error:
        return {"error": noted(error)}
    apart = [_apart(answer, right) for answer, right in zip(completions, expected, strict=True)]
    wrong = [task.name for (task, _), each in zip(asked, apart, strict=True) if each > TOLERANCE]
    return {"wrong": len(wrong), "wrong tasks": sorted(set(wrong)), "furthest": max(apart)}


def _apart(answer: Completion, right: Expected) -> float:
    """Return how far log-probabilities are apart at most; infinitely far where tokens differ."""
    if list(answer.token_ids) != right.token_ids:
        return math.inf
    return max(abs(a - b) for a, b in zip(answer.logprobs, right.logprobs, strict=True))


def _answers(world: World, requests: Sequence[Request], switches: Switches) -> list[Completion]:
    """Run all at once on few rows under a small budget, so that they come, go and are cut in chunks."""
    engine = switched_engine(
        world.backbone, world.source, switches, max_rows=8, token_budget=48, kv_cache_bytes=_BYTES
    )
    engine.start()
    try:
        return [future.result(_TIMEOUT) for future in submit_all(engine, requests)]
    finally:
        engine.stop()


_BYTES = 64 << 20
