"""With guesses texts end where they end without, and streams have all their tokens."""

from pathlib import Path
from typing import Any

import pytest

from app.request import FinishReason
from app.serving.generation_request import GenerationRequest, GenerationResult
from app.serving.parameters import parse_parameters
from tests.serving.stack import Stack, run, running_stack
from tests.waiting import wait_until

LOOPS = {"max_new_tokens": 60, "frequency_penalty": -2.0, "seed": 5, "top_n_tokens": 2}


async def streamed(stack: Stack, parameters: dict[str, Any]) -> GenerationResult:
    """An answer, whose pieces are its text and its tokens."""
    asked = GenerationRequest(inputs="the film the film", parameters=parse_parameters(parameters))
    deltas = [delta async for _, delta in await stack.generation.start([asked])]
    result = deltas[-1].result
    assert result is not None
    assert "".join(delta.text for delta in deltas) == result.text
    assert [delta.token for delta in deltas] == [*result.tokens]
    return result


def answers(stack: Stack, stops: list[str]) -> list[GenerationResult]:
    greedy, drawn = LOOPS, LOOPS | {"do_sample": True, "temperature": 0.5}
    found = [run(streamed(stack, each)) for each in (greedy, drawn)]
    found += [run(streamed(stack, greedy | {"stop": [stop]})) for stop in stops]
    wait_until(stack.is_idle)
    return found


def test_texts_end_where_they_end_without_guesses(tmp_path: Path) -> None:
    with running_stack(tmp_path / "plain") as stack:
        text = run(streamed(stack, LOOPS)).text
        stops = [text[begin : begin + length] for begin, length in ((3, 1), (9, 4), (14, 5), (21, 7))]
        expected = answers(stack, stops)
        assert not any(step.num_speculated_tokens for step in stack.steps)
    with running_stack(tmp_path / "guessing", speculate=4) as stack:
        found = answers(stack, stops)
        assert sum(step.num_accepted_tokens for step in stack.steps) > 40
        assert [outcome.generated_tokens for outcome in stack.outcomes] == [
            len(each.tokens) for each in found
        ]
    assert [each.finish for each in found[2:]] == [FinishReason.STOP] * len(stops)
    for ours, others in zip(found, expected, strict=True):
        assert (ours.text, ours.finish) == (others.text, others.finish)
        assert [token.id for token in ours.tokens] == [token.id for token in others.tokens]
        logprobs = [token.logprob for token in others.tokens]
        assert [token.logprob for token in ours.tokens] == pytest.approx(logprobs, abs=1e-4)
