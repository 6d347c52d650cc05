"""Chains: the same steps by hand, each a request of its own, are the oracle."""

import asyncio
import time
from typing import Any, NamedTuple

import pytest

from app.errors import DeadlineExceeded, Forbidden, InvalidRequest, NotFound
from app.request import FinishReason
from app.serving.generation_request import ClassificationRequest, GenerationRequest, GenerationResult
from app.serving.structured_output.constraints import Constraint, ConstraintKind
from tests.serving.stack import Stack, run
from tests.serving.test_reasoning import ask, check_stream, generate, ids, publish
from tests.waiting import eventually, wait_until

END = "i"  # with which the base ends many of its steps
SO_FAR = "{x}\n{so_far}"
LAST = "Q: {last}\nA:"


def chain(stack: Stack, template: str = SO_FAR, **settings: Any) -> str:
    return publish(stack, chain={"template": template, **settings})


class ByHand(NamedTuple):
    """What separate requests gave."""

    steps: list[str]
    tokens: list[int]
    results: list[GenerationResult]


def by_hand(
    stack: Stack, word: str, template: str, end: str, count: int, length: int = 120, **given: Any
) -> ByHand:
    """Send each step by itself, up to the first that repeats, or doesn't end with `end`."""
    steps, results = list[str](), list[GenerationResult]()
    for _ in range(count):
        left = length - sum(len(result.tokens) for result in results)
        rendered = (
            template.replace("{x}", word)
            .replace("{so_far}", "".join(step + end for step in steps))
            .replace("{last}", steps[-1] if steps else word)
        )
        results.append(generate(stack, rendered, stop=[end], max_new_tokens=min(left, 60), **given))
        words = [step.split() for step in steps]
        steps.append(results[-1].text)
        if results[-1].finish is not FinishReason.STOP or steps[-1].split() in words:
            break
    return ByHand(steps, [id_ for result in results for id_ in ids(result)], results)


@pytest.mark.parametrize("template", [SO_FAR, LAST, "the {so_far}{x}"])
@pytest.mark.parametrize("more", [{}, {"do_sample": True, "seed": 11, "temperature": 0.7}])
def test_a_chain_is_the_same_steps_by_hand(stack: Stack, template: str, more: dict[str, Any]) -> None:
    """Rendered steps are tokenized anew, so that ids of a text that was generated may be others when read."""
    task = chain(stack, template, step_ends=END, max_steps=4)
    expected = by_hand(stack, "name", template, END, 4, **more)
    assert len({*expected.steps}) > 2 or more
    request = ask("name", task, max_new_tokens=120, **more)
    result = run(stack.generation.generate(request))
    assert ids(result) == expected.tokens
    assert result.prompt_tokens == expected.results[0].prompt_tokens
    assert result.reasoning is not None
    assert result.reasoning.text == END.join(expected.steps)
    assert list(result.reasoning.steps) == [s for step in expected.steps if (s := step.strip())]
    if len(expected.steps) == 4:
        assert (result.text, result.finish) == (expected.steps[-1].strip(), FinishReason.STOP)
    check_stream(stack, request, result)
    logprobs = [token.logprob for each in expected.results for token in each.tokens]
    assert [token.logprob for token in result.tokens] == pytest.approx(logprobs, abs=1e-4)


def test_steps_that_the_model_ends_are_shown_as_lines(stack: Stack) -> None:
    prompt = LAST.replace("{last}", "name")
    stops = [ids(generate(stack, prompt, max_new_tokens=12))[-1]]
    first = generate(stack, prompt, stop_token_ids=stops, max_new_tokens=60)
    prompt = LAST.replace("{last}", first.text)
    second = generate(stack, prompt, stop_token_ids=stops, max_new_tokens=60 - len(first.tokens))
    request = ask("name", chain(stack, LAST, max_steps=2), max_new_tokens=60, stop_token_ids=stops)
    result = run(stack.generation.generate(request))
    assert result.reasoning is not None
    assert result.reasoning.text == f"{first.text}\n{second.text}"
    check_stream(stack, request, result)


def test_a_model_that_ends_makes_the_last_step_the_answer(stack: Stack) -> None:
    expected = by_hand(stack, "film", SO_FAR, "r", 8)
    assert expected.results[-1].finish is FinishReason.EOS
    request = ask("film", chain(stack, step_ends="r"), max_new_tokens=120)
    result = run(stack.generation.generate(request))
    assert ids(result) == expected.tokens
    assert (result.text, result.finish) == (expected.steps[-1].strip(), FinishReason.EOS)
    check_stream(stack, request, result)
    endless = generate(stack, "film", chain(stack, max_steps=1), max_new_tokens=120)
    assert (endless.text, endless.finish) == (generate(stack, "film\n").text.strip(), FinishReason.EOS)


def test_the_answer_stands_behind_what_marks_it(stack: Stack) -> None:
    expected = by_hand(stack, "name", SO_FAR, END, 3)
    third = expected.steps[2]
    done = next(
        third[i : i + 2]
        for i in range(len(third) - 2)
        if not any(third[i : i + 2] in step for step in (*expected.steps[:2], third[: i + 1]))
        and third[i : i + 2].strip()
    )
    task = chain(stack, step_ends=END, done=done)
    request = ask("name", task, max_new_tokens=120)
    result = run(stack.generation.generate(request))
    assert ids(result) == expected.tokens
    before, _, answer = third.partition(done)
    assert (result.text, result.finish) == (answer.lstrip(), FinishReason.STOP)
    assert result.reasoning is not None
    assert result.reasoning.text == END.join([*expected.steps[:2], before])
    check_stream(stack, request, result)
    stopped = ask("name", task, max_new_tokens=120, stop=[answer.lstrip()[:1], expected.steps[0][:1]])
    cut = run(stack.generation.generate(stopped))
    assert (cut.text, cut.finish) == ("", FinishReason.STOP)
    check_stream(stack, stopped, cut)


def test_all_steps_without_an_answer(stack: Stack) -> None:
    expected = by_hand(stack, "name", SO_FAR, END, 3)
    task = chain(stack, step_ends=END, done="@#", max_steps=3)
    request = ask("name", task, max_new_tokens=120)
    result = run(stack.generation.generate(request))
    assert (result.text, result.finish) == ("", FinishReason.MAX_STEPS)
    assert ids(result) == expected.tokens
    check_stream(stack, request, result)
    hidden = generate(stack, "name", task, max_new_tokens=120, include_reasoning=False)
    assert hidden.reasoning is not None
    assert (hidden.reasoning.text, hidden.reasoning.num_tokens) == ("", len(expected.tokens))


def test_a_step_that_never_ends(stack: Stack) -> None:
    for given, more in (({"max_new_tokens": 9}, {}), ({}, {"max_step_tokens": 9})):
        task = chain(stack, step_ends="@#", done="#@", **more)
        request = ask("name", task, **given)
        result = run(stack.generation.generate(request))
        assert (result.text, result.finish, len(result.tokens)) == ("", FinishReason.LENGTH, 9)
        check_stream(stack, request, result)
    few = len(by_hand(stack, "name", SO_FAR, END, 2).tokens)
    result = generate(stack, "name", chain(stack, step_ends=END, done="@#"), max_new_tokens=few)
    assert (result.text, result.finish, len(result.tokens)) == ("", FinishReason.LENGTH, few)


def test_a_step_that_repeats_is_a_loop(stack: Stack) -> None:
    """Of what each step reads, only the end of the input is left, so that each is the same."""
    task = chain(stack, "{so_far}{x}", step_ends=END, done="@#")
    request = ask("name", task, max_new_tokens=120, truncate=1)
    result = run(stack.generation.generate(request))
    assert (result.text, result.finish) == ("", FinishReason.LOOP)
    assert result.reasoning is not None
    first, second = result.reasoning.steps
    assert first == second
    assert result.reasoning.text.split(END)[0].strip() == first
    check_stream(stack, request, result)


def test_positions_that_run_out_end_a_chain(stack: Stack) -> None:
    task = chain(stack, step_ends=END, done="@#", max_steps=64)
    request = ask("the film was great and " * 9, task, max_new_tokens=150)
    result = run(stack.generation.generate(request))
    assert result.text == ""
    assert result.finish in (FinishReason.LENGTH, FinishReason.LOOP, FinishReason.NO_ANSWER)


def test_steps_of_other_tasks(stack: Stack) -> None:
    other = publish(stack, defaults={"bad_words": ["the"], "max_new_tokens": 3})
    task = chain(stack, step_ends=END, max_steps=3, steps=[{"task": other}, {"task": "tiny-base"}])
    plain = chain(stack, step_ends=END, max_steps=3)
    before = len(stack.outcomes)
    request = ask("name", task, max_new_tokens=120)
    result = run(stack.generation.generate(request))
    assert [each.task for each in stack.outcomes[before:]][:1] == [other]
    assert {each.task for each in stack.outcomes[before + 1 :]} == {""}
    check_stream(stack, request, result)
    allowed: list[str] = []
    asked: list[str] = []

    def require(reference: str) -> None:
        asked.append(reference)
        if reference not in allowed:
            raise Forbidden("no")

    bound = ask("name", task, of={"require": require})
    before = len(stack.outcomes)
    with pytest.raises(Forbidden):
        run(stack.generation.generate(bound))
    assert all(each.generated_tokens == 0 for each in stack.outcomes[before:])
    allowed += [other, "tiny-base"]
    run(stack.generation.generate(bound))
    assert {*asked} == {other, "tiny-base"}
    assert run(stack.generation.generate(ask("name", plain, of={"require": require})))


def test_what_a_chain_cannot_do_is_refused(stack: Stack) -> None:
    task = chain(stack, step_ends=END)
    constraint = Constraint(ConstraintKind.REGEX, "a", "parameters.grammar")
    for request in (
        GenerationRequest(token_ids=(3, 4), task=task),
        ask("name", task, of={"constraint": constraint}),
        ask("name", task, num_beams=2),
        ask("name", task, reasoning_effort="low"),
    ):
        with pytest.raises(InvalidRequest):
            run(stack.generation.generate(request))
    with pytest.raises(InvalidRequest, match="the task is a chain, which max_new_tokens bounds"):
        run(stack.generation.generate(ask("name", task, thinking_token_budget=8)))


def test_a_step_that_is_missing_names_its_chain(stack: Stack) -> None:
    task = chain(stack, step_ends=END, steps=[{"task": "tiny-base"}, {"task": "never-published"}])
    with pytest.raises(NotFound, match=r"chain has a step of never-published.*author"):
        run(stack.generation.generate(ask("name", task, max_new_tokens=120)))


def test_choices_follow_the_plain_template(stack: Stack) -> None:
    task = chain(stack, "never {x} {so_far}", step_ends=END)
    of = {"classification": ClassificationRequest(choices=("name", "food"))}
    expected, found = (
        run(stack.generation.generate(GenerationRequest(inputs="cold", task=each, **of)))
        for each in (None, task)
    )
    assert found.classification is not None
    assert expected.classification is not None
    assert dict(found.classification.probabilities) == pytest.approx(
        dict(expected.classification.probabilities), abs=1e-5
    )


def test_samples_and_votes_are_chains(stack: Stack) -> None:
    task = chain(stack, step_ends=END, max_steps=3)
    given = {"do_sample": True, "seed": 4, "max_new_tokens": 100}
    several = run(stack.generation.generate_all([ask("name", task, of={"num_samples": 3}, **given)]))
    assert ids(several[0]) == ids(generate(stack, "name", task, **given))
    assert len({tuple(ids(result)) for result in several}) == 3


def test_a_client_that_leaves_in_mid_chain_leaves_nothing(stack: Stack) -> None:
    task = chain(stack, step_ends=END, done="@#", max_steps=64)
    generate(stack, "name", task, max_new_tokens=2)  # so that its leading text is resident
    wait_until(stack.is_idle)
    before, usage = len(stack.outcomes), stack.engine.stats().kv_usage

    async def leave() -> None:
        stream = await stack.generation.start([ask("name", task, max_new_tokens=120)])
        steps = 0
        async for _, delta in stream:
            steps += delta.step is not None
            if steps == 2 and delta.token is not None and delta.step is None:
                break
        await stream.close()
        await eventually(stack.is_idle)

    asyncio.run(leave())
    assert [each.reason for each in stack.outcomes[before:]][-1] == "cancelled"
    wait_until(lambda: stack.generation.limiter.taken == 0)
    wait_until(lambda: stack.engine.stats().kv_usage <= usage)


def test_a_deadline_ends_a_chain(stack: Stack) -> None:
    task = chain(stack, "{x} {so_far}", step_ends=END, done="@#", max_steps=64)
    for seconds in (0.05, 0.2):
        try:
            run(stack.generation.generate(ask("name", task, of={"deadline": time.monotonic() + seconds})))
        except DeadlineExceeded:
            wait_until(stack.is_idle)
            assert stack.outcomes[-1].reason == "deadline"
    wait_until(lambda: stack.generation.limiter.taken == 0)
