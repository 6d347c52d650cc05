"""Time to the first token of a lone request: with a resident soft prompt, and without any."""

import time
from dataclasses import replace
from typing import Any

import torch

from app.request import Request, Segment, segments_of
from benchmarks.completions import submit
from benchmarks.shared_engine import SharedEngine
from benchmarks.spread import Spread
from benchmarks.work import Work, make_asks

VIRTUAL_TOKENS = 100
PROMPT_TOKENS = 128


def measure_first_token(shared: SharedEngine, work: Work, pairs: int) -> dict[str, Any]:
    """Compare a soft prompt with none."""
    rows = (torch.randn(VIRTUAL_TOKENS, work.shape.hidden) * shared.embedding_width).to(torch.bfloat16)
    return compare_first_token(shared, work, pairs, shared.source.add(rows), VIRTUAL_TOKENS)


def compare_first_token(
    shared: SharedEngine, work: Work, pairs: int, digest: str, num_virtual_tokens: int
) -> dict[str, Any]:
    """With a resident prompt and without take turns on the same inputs; ratios are taken within each pair."""
    prompt = Segment(prompt_digest=digest, num_virtual_tokens=num_virtual_tokens)
    single = replace(work, tasks=1, requests=pairs + 1, prompt_tokens=PROMPT_TOKENS)
    seconds: dict[str, list[float]] = {"resident": [], "none": []}
    for number, ask in enumerate(make_asks(single)):
        for name in sorted(seconds, reverse=bool(number % 2)):
            taken = _first_token(shared, ask.token_ids, prompt if name == "resident" else Segment())
            if number:  # the first one makes the prompt resident
                seconds[name].append(taken)
    ratios = [a / b for a, b in zip(seconds["resident"], seconds["none"], strict=True)]
    return {
        "virtual_tokens": num_virtual_tokens,
        "prompt_tokens": PROMPT_TOKENS,
        "seconds": {name: Spread.of(values).as_json(4) for name, values in seconds.items()},
        "ratio": Spread.of(ratios).as_json(),
    }


def _first_token(shared: SharedEngine, token_ids: tuple[int, ...], prompt: Segment) -> float:
    request = Request(
        id=str(time.perf_counter_ns()),
        token_ids=token_ids,
        segments=segments_of(prompt),
        max_new_tokens=1,
    )
    began = time.perf_counter()
    submit(shared.engine, request).result(timeout=60)
    return time.perf_counter() - began
