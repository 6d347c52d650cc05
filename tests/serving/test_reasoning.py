"""Reasoning: the base's own text holds the markers, so that they come where it says them anyway."""

import asyncio
import itertools
from pathlib import Path
from typing import Any

import pytest

from app.errors import InvalidRequest
from app.request import FinishReason
from app.serving.decoding import resolve
from app.serving.generation_request import GenerationRequest, GenerationResult, TextDelta
from app.serving.parameters import parse_parameters
from app.serving.program_settings import ProgramSettings
from app.serving.structured_output.constraints import Constraint, ConstraintKind
from tests.serving.stack import Stack, run, running_stack, upload_of
from tests.waiting import wait_until

NEVER = "@#"
LENGTH = 60
_numbers = itertools.count()


def ask(
    inputs: str, task: str | None = None, *, of: dict[str, Any] | None = None, **given: Any
) -> GenerationRequest:
    parameters = parse_parameters({"max_new_tokens": LENGTH} | given)
    return GenerationRequest(inputs=inputs, task=task, parameters=parameters, **of or {})


def generate(stack: Stack, *args: Any, **given: Any) -> GenerationResult:
    return run(stack.generation.generate(ask(*args, **given)))


def publish(stack: Stack, **program: Any) -> str:
    """Return a new task, which reads its input as the base does."""
    task = f"reasoned-{next(_numbers)}"
    run(stack.publishing.upload(task, upload_of(task={"template": "{x}", **program})))
    return task


def reasoning(stack: Stack, answer_after: str, **settings: Any) -> str:
    return publish(stack, reasoning={"answer_after": answer_after, **settings})


def ids(result: GenerationResult) -> list[int]:
    return [token.id for token in result.tokens]


@pytest.fixture(scope="module")
def said(stack: Stack) -> tuple[str, GenerationResult]:
    """An input, and the base's long answer to it."""
    word = stack.talkative()
    return word, generate(stack, word)


def streamed(stack: Stack, request: GenerationRequest) -> list[TextDelta]:
    async def read() -> list[TextDelta]:
        stream = await stack.generation.start([request])
        try:
            return [delta async for _, delta in stream]
        finally:
            await stream.close()

    return run(read())


def check_stream(stack: Stack, request: GenerationRequest, whole: GenerationResult) -> None:
    """The stream's deltas are the whole answer."""
    deltas = streamed(stack, request)
    assert whole.reasoning is not None
    texts = ["".join(each.text for each in deltas if each.is_reasoning == which) for which in (True, False)]
    assert texts == [whole.reasoning.text, whole.text]
    assert tuple(each.step for each in deltas if each.step is not None) == whole.reasoning.steps
    assert [each.token.id for each in deltas if each.token is not None] == ids(whole)
    before = [each.token for each in deltas if each.token is not None and each.is_reasoning]
    assert len(before) == whole.reasoning.num_tokens
    last = deltas[-1].result
    assert last is not None
    assert (last.text, last.reasoning, last.finish) == (whole.text, whole.reasoning, whole.finish)


def test_the_same_tokens_are_read_as_steps_and_answer(
    stack: Stack, said: tuple[str, GenerationResult]
) -> None:
    word, plain = said
    for start, length in ((12, 5), (31, 1), (40, 3)):
        marker, end = plain.text[start : start + length], plain.text[4:5]
        before, _, after = plain.text.partition(marker)
        task = reasoning(stack, marker, steps_end=end)
        result = generate(stack, word, task)
        assert ids(result) == ids(plain)
        assert result.text == after.lstrip()
        assert result.reasoning is not None
        assert result.reasoning.text == before
        assert list(result.reasoning.steps) == [s for step in before.split(end) if (s := step.strip())]
        texts = list(itertools.accumulate(token.text for token in plain.tokens))
        assert result.reasoning.num_tokens == 1 + next(i for i, text in enumerate(texts) if marker in text)
        assert result.finish is FinishReason.LENGTH
        check_stream(stack, ask(word, task), result)


def test_without_a_marker_steps_are_no_answer(stack: Stack, said: tuple[str, GenerationResult]) -> None:
    word, plain = said
    task = reasoning(stack, NEVER)
    result = generate(stack, word, task)
    assert (result.text, result.finish) == ("", FinishReason.LENGTH)
    assert result.reasoning is not None
    assert (result.reasoning.text, result.reasoning.num_tokens) == (plain.text, LENGTH)
    ended = generate(stack, word, task, stop_token_ids=[ids(plain)[9]])
    assert (ended.text, ended.finish) == ("", FinishReason.NO_ANSWER)
    assert ended.reasoning is not None
    assert ended.reasoning.steps == (ended.reasoning.text.strip(),)
    check_stream(stack, ask(word, task, stop_token_ids=[ids(plain)[9]]), ended)


def by_hand(stack: Stack, word: str, before: list[int], text: str, **given: Any) -> GenerationResult:
    """Send what was read and generated so far as a prompt of ids, with more text behind it."""
    read = stack.tokenizer(word)["input_ids"]
    put_in = stack.tokenizer(text, add_special_tokens=False)["input_ids"]
    return generate(stack, "", of={"token_ids": (*read, *before, *put_in)}, **given)


@pytest.mark.parametrize("more", [{}, {"do_sample": True, "seed": 5, "temperature": 1.3}])
def test_at_its_budget_the_marker_is_put_in(
    stack: Stack, said: tuple[str, GenerationResult], more: dict[str, Any]
) -> None:
    word, plain = said[0], generate(stack, said[0], **more)
    task = reasoning(stack, NEVER, steps_end="|")
    for budget, put_in in ((0, NEVER), (1, f"|{NEVER}"), (17, f"|{NEVER}")):
        given = more | {"thinking_token_budget": budget}
        result = generate(stack, word, task, **given)
        kept = ids(plain)[:budget]
        expected = by_hand(stack, word, kept, put_in, **more | {"max_new_tokens": LENGTH - budget})
        assert ids(result) == kept + ids(expected)
        assert result.text == expected.text.lstrip()
        assert result.reasoning is not None
        assert result.reasoning.num_tokens == budget
        assert result.prompt_tokens == plain.prompt_tokens
        assert (result.finish, result.seed) == (expected.finish, expected.seed if more else result.seed)
        check_stream(stack, ask(word, task, **given), result)
    wait_until(stack.is_idle)


def test_efforts_are_budgets(stack: Stack, said: tuple[str, GenerationResult]) -> None:
    word, _ = said
    task = reasoning(stack, NEVER, effort={"low": 3, "high": 9})
    for effort, tokens in {"none": 0, "minimal": 3, "low": 3, "medium": 3, "high": 9, "max": 9}.items():
        result = generate(stack, word, task, reasoning_effort=effort)
        assert result.reasoning is not None
        assert result.reasoning.num_tokens == tokens
    unbound = generate(stack, word, task, reasoning_effort="low", thinking_token_budget=-1)
    assert unbound.reasoning is not None
    assert unbound.reasoning.num_tokens == LENGTH
    by_default = publish(
        stack,
        reasoning={"answer_after": NEVER, "effort": {"low": 3}},
        defaults={"thinking_token_budget": 8},
    )
    for given, tokens in (({}, 8), ({"reasoning_effort": "low"}, 3)):
        result = generate(stack, word, by_default, **given)
        assert result.reasoning is not None
        assert result.reasoning.num_tokens == tokens


def test_a_grammar_holds_the_answer_only(stack: Stack, said: tuple[str, GenerationResult]) -> None:
    word, plain = said
    constraint = Constraint(ConstraintKind.REGEX, "[0-9]{3}", "grammar")
    for marker, given in ((plain.text[12:17], {}), (NEVER, {"thinking_token_budget": 6})):
        request = ask(word, reasoning(stack, marker), of={"constraint": constraint}, **given)
        result = run(stack.generation.generate(request))
        assert len(result.text) == 3
        assert result.text.isdigit()
        assert result.finish is FinishReason.EOS
        assert result.reasoning is not None
        assert result.reasoning.text == plain.text.partition(marker)[0] or marker == NEVER
        check_stream(stack, request, result)


def test_stop_strings_end_the_answer_and_not_the_steps(
    stack: Stack, said: tuple[str, GenerationResult]
) -> None:
    word, plain = said
    marker = plain.text[20:24]
    before, _, after = plain.text.partition(marker)
    stop = [plain.text[3:5], after[9:11]]
    task = reasoning(stack, marker)
    result = generate(stack, word, task, stop=stop)
    answer = after.lstrip()
    assert result.text == answer[: min(at for each in stop if (at := answer.find(each)) >= 0)]
    assert result.finish is FinishReason.STOP
    assert result.reasoning is not None
    assert result.reasoning.text == before
    check_stream(stack, ask(word, task, stop=stop), result)
    wait_until(stack.is_idle)
    assert stack.outcomes[-1].reason == "stop_sequence"


@pytest.mark.parametrize("marker", ["<turn>", "\n<turn>"])
def test_a_special_token_may_be_the_marker(
    stack: Stack, said: tuple[str, GenerationResult], marker: str
) -> None:
    word, plain = said
    task = reasoning(stack, marker, steps_end="<s>")
    turn, line = stack.tokenizer.convert_tokens_to_ids("<turn>"), stack.tokenizer.encode("\n")[-1]
    for budget in (0, 5):
        result = generate(stack, word, task, thinking_token_budget=budget)
        put_in = ([0] if budget else []) + ([line] if marker.startswith("\n") else []) + [turn]
        read = (*stack.tokenizer(word)["input_ids"], *ids(plain)[:budget], *put_in)
        expected = generate(stack, "", of={"token_ids": read}, max_new_tokens=LENGTH - budget)
        assert ids(result) == ids(plain)[:budget] + ids(expected)
    found = ask(word, task, of={"logit_bias": ((turn, 100.0), (line, 90.0))}, bad_words=["\n\n"])
    if marker == "<turn>":
        said_at_once = run(stack.generation.generate(found))
        assert said_at_once.reasoning is not None
        assert (said_at_once.reasoning.text, said_at_once.reasoning.num_tokens) == ("", 1)
        assert said_at_once.text == ""


def test_each_sample_reasons(stack: Stack, said: tuple[str, GenerationResult]) -> None:
    word, _ = said
    task = reasoning(stack, NEVER)
    given = {"do_sample": True, "seed": 3, "thinking_token_budget": 5}
    results = run(stack.generation.generate_all([ask(word, task, of={"num_samples": 3}, **given)]))
    assert len({tuple(ids(result)) for result in results}) == 3
    for result in results:
        assert result.reasoning is not None
        assert result.reasoning.num_tokens == 5


def test_hidden_reasoning_is_counted_and_not_told(stack: Stack, said: tuple[str, GenerationResult]) -> None:
    word, plain = said
    task = reasoning(stack, plain.text[20:24], steps_end=plain.text[4:5])
    shown, hidden = (generate(stack, word, task, include_reasoning=each) for each in (True, False))
    assert (hidden.text, ids(hidden)) == (shown.text, ids(shown))
    assert hidden.reasoning is not None
    assert shown.reasoning is not None
    assert (hidden.reasoning.text, hidden.reasoning.steps) == ("", ())
    assert hidden.reasoning.num_tokens == shown.reasoning.num_tokens
    check_stream(stack, ask(word, task, include_reasoning=False), hidden)


def test_scores_of_the_prompt_are_its_own(stack: Stack, said: tuple[str, GenerationResult]) -> None:
    word, _ = said
    task = reasoning(stack, NEVER)
    expected = generate(stack, word, decoder_input_details=True, max_new_tokens=2).prompt_scores
    for budget in (0, 4):
        result = generate(stack, word, task, decoder_input_details=True, thinking_token_budget=budget)
        assert [each.id for each in result.prompt_scores] == [each.id for each in expected]
        assert [each.logprob for each in result.prompt_scores[1:]] == pytest.approx(
            [each.logprob for each in expected[1:]], abs=1e-4
        )


@pytest.mark.parametrize(
    ("given", "param"),
    [
        ({"reasoning_effort": "low"}, "reasoning_effort"),
        ({"thinking_token_budget": 0}, "thinking_token_budget"),
        ({"include_reasoning": False}, "include_reasoning"),
    ],
)
def test_a_plain_task_refuses_what_would_have_no_effect(
    stack: Stack, given: dict[str, Any], param: str
) -> None:
    plain = publish(stack)
    for task in (plain, None):
        with pytest.raises(InvalidRequest) as refused:
            generate(stack, "a", task, **given)
        assert refused.value.param == f"parameters.{param}"
    neutral = {"reasoning_effort": "none", "thinking_token_budget": -1, "include_reasoning": True}
    assert generate(stack, "a", plain, **neutral).reasoning is None


def test_beams_of_the_request_are_refused_and_those_of_defaults_give_way(stack: Stack) -> None:
    task = reasoning(stack, NEVER)
    program = ProgramSettings.of({"reasoning": {"answer_after": NEVER}})
    assert resolve({"num_beams": 2}, {}, ask("a"), program).num_beams == 1
    with pytest.raises(InvalidRequest, match="num_beams"):
        generate(stack, "a", task, num_beams=2)
    with pytest.raises(InvalidRequest, match="no budgets by effort"):
        generate(stack, "a", task, reasoning_effort="high")


def test_a_client_that_leaves_while_it_reasons_leaves_nothing(stack: Stack) -> None:
    task = reasoning(stack, NEVER)

    async def leave() -> None:
        request = ask(stack_word, task, thinking_token_budget=20)
        stream = await stack.generation.start([request])
        async for _, delta in stream:
            if not delta.is_reasoning:
                break
        await stream.close()

    stack_word = "film"
    asyncio.run(leave())
    wait_until(stack.is_idle)
    assert stack.generation.limiter.taken == 0


def test_the_marker_takes_room_of_the_answer_where_memory_has_no_more(tmp_path: Path) -> None:
    """K/V memory of fewer slots than the base has positions, all of which the request may take."""
    with running_stack(tmp_path, kv_cache_bytes=1 << 17, max_rows=4) as small:
        marker = "the answer that we have come to is:"
        task = reasoning(small, marker)
        num_put_in = len(small.tokenizer(f" {marker}", add_special_tokens=False).input_ids)
        for count, left in ((160, 160), (200, 200 - num_put_in)):
            given = {"max_new_tokens": count, "thinking_token_budget": 5, "ignore_eos": True}
            result = generate(small, "food", task, **given)
            assert (result.finish, len(result.tokens)) == (FinishReason.LENGTH, left)
