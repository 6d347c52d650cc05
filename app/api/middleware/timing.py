"""Timing headers of whole answers; a stream begins before its times are known."""

from collections.abc import Sequence

from app.request import RequestTimings
from app.serving.generation_request import GenerationResult

TIMING_HEADERS = (
    "X-Queue-Time",
    "X-Prefill-Time",
    "X-Decode-Time",
    "X-Total-Time",
    "X-Prompt-Tokens",
    "X-Generated-Tokens",
)


def timing_of(results: Sequence[GenerationResult], seconds: float, num_prompts: int = 1) -> dict[str, str]:
    """Return headers of answers that ran together: the longest times, all tokens, each prompt's once."""
    answers_each = len(results) // num_prompts
    return timing_headers(
        [result.timings for result in results],
        seconds,
        prompt_tokens=sum(result.num_read for result in results[::answers_each]),
        generated_tokens=sum(result.num_generated for result in results),
    )


def timing_headers(
    timings: Sequence[RequestTimings], seconds: float, *, prompt_tokens: int, generated_tokens: int
) -> dict[str, str]:
    """Return times in whole milliseconds, as TGI does; `seconds` is the total."""
    times = (
        max(each.queue for each in timings),
        max(each.prefill for each in timings),
        max(each.decode for each in timings),
        seconds,
    )
    values = [*(round(time * 1000) for time in times), prompt_tokens, generated_tokens]
    return {name.lower(): str(value) for name, value in zip(TIMING_HEADERS, values, strict=True)}
