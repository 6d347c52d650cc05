"""What the hardware allows a base's decode steps, t*, and how much of it the engine reaches here.

Both with 64 own tokens a row: prompts of 48 tokens, and 32 generated ones.
"""

import asyncio
import random
from statistics import median
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # torch takes seconds to import, and commands must start at once
    from app.engine.statistics import StepStats
    from app.models.limits import Hardware, ModelCost
    from app.models.loading import LoadedBase

_PROMPT_TOKENS, _NEW_TOKENS = 48, 32
_OWN_TOKENS = _PROMPT_TOKENS + _NEW_TOKENS // 2
_ROWS = (1, 32, 64)  # the last are as many as run at once by default


def decode_limits(hardware: "Hardware", cost: "ModelCost", kv_bytes: int) -> dict[str, dict[str, Any]]:
    """Return t* of steps of several rows and what limits them; `kv_bytes` of K/V a token."""
    from app.models.limits import decode_step, decode_step_in_words

    cached = {rows: rows * _OWN_TOKENS * kv_bytes for rows in _ROWS}
    return {
        f"decode_step_of_{rows}_rows": {
            "least_ms": round(1e3 * decode_step(hardware, cost, rows, cached[rows]), 3),
            "limited_by": decode_step_in_words(hardware, cost, rows, cached[rows]),
        }
        for rows in _ROWS
    }


def measure_steps(base: "LoadedBase", limits: dict[str, dict[str, Any]]) -> None:
    """Let the engine run such steps, and add what they took and the share of t* that was reached."""
    for rows, entry in zip(_ROWS, limits.values(), strict=True):
        steps = [step for step in asyncio.run(_steps(base, rows)) if _only_decodes(step, rows)]
        if steps:
            taken = 1e3 * median(step.duration for step in steps)
            entry["taken_ms"] = round(taken, 3)
            entry["waiting_for_python_ms"] = round(1e3 * median(step.device_wait for step in steps), 3)
            entry["reached"] = round(entry["least_ms"] / taken, 2)


def in_words(entry: dict[str, Any]) -> str:
    """Return a line for a terminal."""
    words = f"at least {entry['least_ms']} ms, limited by {entry['limited_by']}"
    if "taken_ms" not in entry:
        return words
    return (
        f"{words}; taken {entry['taken_ms']} ms: {entry['reached']:.0%} of what is possible. The rest goes "
        f"into kernels that don't reach the machine's limits, small operations, sampling, and "
        f"{entry['waiting_for_python_ms']} ms between steps"
    )


def _only_decodes(step: "StepStats", rows: int) -> bool:
    return step.num_decode_rows == rows and not step.num_prefill_tokens


async def _steps(base: "LoadedBase", rows: int) -> "list[StepStats]":
    """Run `rows` requests on the base alone; return what each step did."""
    from app.engine.engine import Engine, EngineConfig
    from app.request import Request

    steps: list[StepStats] = []
    config = EngineConfig(max_rows=rows, kv_cache_bytes=None)
    engine = Engine(base.backbone, _NoPrompts(), config, on_step=steps.append)
    engine.start()
    ids = random.Random(0)
    size = base.backbone.geometry.vocab_size

    async def run(number: int) -> None:
        tokens = tuple(ids.randrange(size) for _ in range(_PROMPT_TOKENS))
        async for _ in engine.generate(
            Request(id=str(number), token_ids=tokens, max_new_tokens=_NEW_TOKENS, task=str(number))
        ):
            pass

    try:
        await asyncio.gather(*map(run, range(rows)))
    finally:
        await asyncio.to_thread(engine.stop)
    return steps


class _NoPrompts:
    """A source for an engine whose requests have no prompts."""

    def load(self, digest: str) -> Any:
        """Never called."""
        raise KeyError(digest)
