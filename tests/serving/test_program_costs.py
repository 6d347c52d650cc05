"""What programs cost, in tokens that the engine's steps take through the model, and what they leave."""

import asyncio
from dataclasses import replace
from typing import Any

import pytest

from app.serving.generation_request import GenerationRequest, VoteRequest
from tests.serving.stack import Stack, run
from tests.serving.test_reasoning import publish
from tests.waiting import eventually, wait_until

LETTERS = "BCDFGHJKLMNPQRSTVWXZ"
CHAIN = {"template": "{x}\n{so_far}", "step_ends": "Z", "max_steps": 6}
TEXT = "the film was good"


def at_rest(stack: Stack) -> bool:
    return stack.is_idle() and not stack.engine.stats().num_held


def writing_letters(stack: Stack, **more: Any) -> GenerationRequest:
    """Letters, which are read as the ids that were written; with this seed, steps of 20 and an end."""
    allowed = stack.tokenizer.convert_tokens_to_ids([*LETTERS])
    assert isinstance(allowed, list)
    parameters = {"do_sample": True, "temperature": 1.5, "seed": 1, "max_new_tokens": 150, "ignore_eos": True}
    return GenerationRequest(
        inputs=TEXT, parameters=parameters, logit_bias=tuple((id_, 100.0) for id_ in allowed), **more
    )


def test_a_chain_costs_what_one_pass_over_its_text_costs(stack: Stack) -> None:
    """Each step takes one token of what came before it, beside its own.

    Tokens that the engine has made when an end of a step is seen are dropped; how many depends on time.
    """
    asked = writing_letters(stack, task=publish(stack, chain=CHAIN))
    wait_until(lambda: at_rest(stack))
    stack.steps.clear()
    result = run(stack.generation.generate(asked))
    wait_until(lambda: at_rest(stack))
    assert result.reasoning is not None
    assert [len(step) for step in result.reasoning.steps] == [20] * 6
    whole = len(stack.tokenizer(f"{TEXT}\n{result.reasoning.text}Z")["input_ids"])
    prefill = sum(step.num_prefill_tokens + step.num_prefix_tokens for step in [*stack.steps])
    assert prefill == (whole - len(result.tokens)) + 5
    assert prefill + len(result.tokens) - 6 <= whole


@pytest.mark.parametrize("num_ballots", [9, 64])
def test_a_vote_prefills_its_prompt_once(num_ballots: int, stack: Stack) -> None:
    """Also where there are more ballots than rows."""
    wait_until(lambda: at_rest(stack))
    stack.steps.clear()
    asked = writing_letters(stack, vote=VoteRequest(num_ballots=num_ballots))
    asked = replace(asked, parameters={**asked.parameters, "max_new_tokens": 20})
    result = run(stack.generation.generate(asked))
    wait_until(lambda: at_rest(stack))
    assert sum(step.num_prefix_tokens for step in stack.steps) == result.prompt_tokens - 1
    assert sum(step.num_prefill_tokens for step in stack.steps) == num_ballots


def test_a_client_that_leaves_in_mid_chain_leaves_nothing_held(stack: Stack) -> None:
    asked = writing_letters(stack, task=publish(stack, chain=CHAIN))

    async def leave() -> None:
        working = asyncio.ensure_future(stack.generation.generate(asked))
        await eventually(lambda: stack.engine.stats().num_held)
        working.cancel()
        await asyncio.wait([working])
        await eventually(lambda: at_rest(stack))

    asyncio.run(leave())
    assert stack.generation.limiter.taken == 0
