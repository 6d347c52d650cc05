import asyncio
import threading
import time
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import pytest

from app.errors import (
    DeadlineExceeded,
    EngineStopped,
    InvalidRequest,
    NotFound,
    NotServable,
    RequestTooLong,
)
from app.prompt import VersionDraft
from app.request import FinishReason
from app.serving.generation_request import GenerationRequest, GenerationResult
from app.serving.parameters import parse_parameters
from app.serving.publishing.publisher import UploadResult
from app.text.prompt_encoder import PromptEncoder
from app.text.template import parse_template
from app.text.tokenization import Tokenized
from tests.oracle import greedy, prefix_config, soft_config
from tests.serving.stack import BASE_NAME, POSITIONS, Stack, run, running_stack, upload_of
from tests.waiting import PATIENCE, eventually, wait_until


def ask(inputs: Any, task: str | None = None, **parameters: Any) -> GenerationRequest:
    return GenerationRequest(
        inputs=inputs, task=task, request_id="t", parameters=parse_parameters(parameters)
    )


def generate(stack: Stack, inputs: Any, task: str | None = None, **parameters: Any) -> GenerationResult:
    return run(stack.generation.generate(ask(inputs, task, **parameters)))


def publish(stack: Stack, task_id: str, **parts: Any) -> UploadResult:
    return run(stack.publishing.upload(task_id, upload_of(**parts)))


def token_ids(result: GenerationResult) -> list[int]:
    return [token.id for token in result.tokens]


def wait_until_idle(stack: Stack) -> None:
    wait_until(stack.is_idle)


def test_the_base_answers_as_transformers_alone(stack: Stack) -> None:
    ids = stack.tokenizer("what a film")["input_ids"]
    expected = greedy(stack.base, ids, 12)
    result = generate(stack, "what a film", max_new_tokens=12)
    assert token_ids(result) == expected.tokens
    assert [token.logprob for token in result.tokens] == pytest.approx(expected.logprobs, abs=1e-4)
    assert result.text == stack.tokenizer.decode(expected.tokens, skip_special_tokens=True)
    assert (result.prompt_tokens, result.virtual_tokens, result.version) == (len(ids), 0, None)
    assert generate(stack, "what a film", BASE_NAME, max_new_tokens=12).text == result.text


@pytest.mark.parametrize("config", [soft_config(5), prefix_config(4)])
@pytest.mark.parametrize("template", [None, "Review: {text}\nSentiment:", "{text}<turn>"])
def test_a_task_answers_as_peft_alone(
    stack: Stack, tmp_path: Path, config: Any, template: str | None
) -> None:
    model, weights, config_json = stack.adapter(config, tmp_path)
    task_id = f"as-peft-{type(config).__name__.lower()}-{len(template or '')}"
    task = None if template is None else {"template": template}
    published = publish(stack, task_id, prompt=weights, config=config_json, task=task)
    assert published.created
    for text in ("what a film", "x", "the food was cold and the film was great " * 2):
        full = text if template is None else template.replace("{text}", text)
        expected = greedy(model, stack.tokenizer(full)["input_ids"], 8)
        result = generate(stack, text, task_id, max_new_tokens=8)
        assert token_ids(result) == expected.tokens
        assert [token.logprob for token in result.tokens] == pytest.approx(expected.logprobs, abs=1e-4)
        assert result.virtual_tokens == config.num_virtual_tokens
        assert result.version == published.version


def test_leading_text_is_resident_and_shared(stack: Stack) -> None:
    publish(stack, "resident", task={"template": "Review of the film: {text}"})
    version = stack.store.resolve("resident")
    admitted = stack.generation.request_builder.build(ask("great"), version)
    (leading,) = admitted.request.segments
    assert len(leading.token_ids) > 3
    assert leading.is_kept
    assert admitted.prompt_ids == tuple(stack.tokenizer("Review of the film: great")["input_ids"])
    base = stack.generation.request_builder.build(ask("great"), None)
    assert base.request.segments == ()


def test_a_value_that_merges_with_the_leading_text_gets_nothing_resident(stack: Stack) -> None:
    publish(stack, "merging", task={"template": "th{x}"})
    version = stack.store.resolve("merging")
    apart = stack.generation.request_builder.build(ask("!"), version)
    merged = stack.generation.request_builder.build(ask("e film"), version)
    assert [len(segment.token_ids) > 0 for segment in apart.request.segments] == [True]
    assert merged.request.segments == ()
    assert merged.prompt_ids == tuple(stack.tokenizer("the film")["input_ids"])
    expected = greedy(stack.base, stack.tokenizer("the film")["input_ids"], 6)
    assert token_ids(generate(stack, "e film", "merging", max_new_tokens=6)) == expected.tokens


def test_training_sees_the_prompts_that_serving_builds(stack: Stack) -> None:
    """Text alone makes them, without a service."""
    geometry = stack.engine.geometry
    encoder = PromptEncoder(
        stack.tokenizer, max_positions=geometry.max_positions, vocab_size=geometry.vocab_size
    )
    publish(stack, "trained", task={"template": "<turn>The food: {food}\n</s>It was {how}"})
    version = stack.store.resolve("trained")
    template = parse_template(version.template or "")
    for food in ("cold", " </s>the film", "é漢字🙂"):
        inputs = {"food": food, "how": "great"}
        built = stack.generation.request_builder.build(ask(inputs), version)
        assert encoder.encode(template, inputs) == Tokenized(built.prompt_ids, built.prompt_text)
        short = stack.generation.request_builder.build(ask(inputs, truncate=3), version)
        assert encoder.encode(template, inputs, truncate=3).ids == short.prompt_ids


def test_max_new_tokens_shrinks_only_where_it_was_not_asked(stack: Stack) -> None:
    long = "film " * 200
    used = len(stack.tokenizer(long)["input_ids"])
    assert used < POSITIONS < used + 128
    assert len(generate(stack, long).tokens) <= POSITIONS - used
    with pytest.raises(RequestTooLong) as refused:
        generate(stack, long, max_new_tokens=128)
    assert f"0 virtual + {used} prompt + 128 new tokens are {used + 128}" in refused.value.message
    assert f"{POSITIONS} positions" in refused.value.message
    with pytest.raises(RequestTooLong) as refused:
        generate(stack, "film " * 300)
    assert refused.value.param == "inputs"
    cut = generate(stack, "film " * 300, truncate=10, max_new_tokens=1)
    assert cut.prompt_tokens == 11  # BOS is not of the inputs
    with pytest.raises(RequestTooLong):
        generate(stack, "film " * 3_000_000)


def test_task_defaults_and_the_requests_own_parameters(stack: Stack) -> None:
    publish(stack, "defaults", task={"template": "{x}", "defaults": {"max_new_tokens": 3, "seed": 5}})
    assert len(generate(stack, "a", "defaults").tokens) == 3
    assert len(generate(stack, "a", "defaults", max_new_tokens=2).tokens) == 2
    assert generate(stack, "a", "defaults").seed == 5
    assert generate(stack, "a", "defaults", seed=6).seed == 6


def test_a_seed_is_drawn_reported_and_reproduces(stack: Stack) -> None:
    first = generate(stack, "the", do_sample=True, max_new_tokens=8)
    again = generate(stack, "the", do_sample=True, max_new_tokens=8, seed=first.seed)
    other = generate(stack, "the", do_sample=True, max_new_tokens=8)
    assert token_ids(first) == token_ids(again)
    assert first.seed != other.seed


def test_full_text(stack: Stack) -> None:
    publish(stack, "full", task={"template": "Q: {x}\nA:"})
    result = generate(stack, "{y}", "full", return_full_text=True, max_new_tokens=3)
    assert result.generated_text == "Q: {y}\nA:" + result.text


def test_a_stop_string_ends_the_row_and_does_not_leak(stack: Stack) -> None:
    free = generate(stack, "the film", max_new_tokens=60)
    for begin, length in ((3, 1), (5, 4), (8, 9)):
        stop = free.text[begin : begin + length]
        result = generate(stack, "the film", max_new_tokens=60, stop=[stop])
        assert result.finish is FinishReason.STOP
        assert result.text == free.text[: free.text.index(stop)]
        assert token_ids(result) == token_ids(free)[: len(result.tokens)]
    wait_until_idle(stack)


def test_a_stop_string_that_is_a_special_token_stops_by_its_id(stack: Stack) -> None:
    request = stack.generation.request_builder.build(ask("a", stop=["<turn>"]), None).request
    assert request.stop_ids == {stack.tokenizer.eos_token_id, stack.tokenizer.convert_tokens_to_ids("<turn>")}


def test_the_streams_pieces_are_the_answer(stack: Stack) -> None:
    async def pieces(**parameters: Any) -> tuple[str, GenerationResult]:
        stream = await stack.generation.start([ask("the film", **parameters)])
        deltas = [delta async for _, delta in stream]
        assert all(delta.result is None for delta in deltas[:-1])
        assert deltas[-1].result is not None
        assert [delta.token for delta in deltas] == list(deltas[-1].result.tokens)
        return "".join(delta.text for delta in deltas), deltas[-1].result

    text, result = run(pieces(max_new_tokens=40))
    assert text == result.text == generate(stack, "the film", max_new_tokens=40).text
    stop = text[10:14]
    text, result = run(pieces(max_new_tokens=40, stop=[stop]))
    assert text == result.text
    assert stop not in text


def test_what_does_not_exist_or_fit(stack: Stack, tmp_path: Path) -> None:
    for reference, error in [
        ("nobody", NotFound),
        ("full@9", NotFound),
        ("Full", InvalidRequest),
        ("../x", InvalidRequest),
    ]:
        with pytest.raises(error):
            generate(stack, "a", reference)
    from tests.store.builders import soft

    stack.store.publish("too-wide", VersionDraft(prompt=soft(3, hidden=16)))
    stack.store.move_alias("too-wide", "live", 1)
    with pytest.raises(NotServable, match="hidden size"):
        generate(stack, "a", "too-wide")
    assert "hidden size" in (stack.generation.compatibility(stack.store.resolve("too-wide")) or "")


def test_deadlines(stack: Stack) -> None:
    late = GenerationRequest(inputs="a", deadline=time.monotonic() - 1)
    with pytest.raises(DeadlineExceeded):
        run(stack.generation.generate(late))
    soon = GenerationRequest(inputs=stack.talkative(), deadline=time.monotonic() + 0.03)
    with pytest.raises(DeadlineExceeded):
        run(stack.generation.generate(soon))
    wait_until_idle(stack)
    assert stack.outcomes[-1].reason == "deadline"


def test_a_deadline_holds_while_the_store_is_slow(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    publish(stack, "slow", task={"template": "{x}"})
    meaning = stack.store.meaning
    gate = threading.Event()
    monkeypatch.setattr(stack.store, "meaning", lambda *asked: (gate.wait(PATIENCE), meaning(*asked))[1])

    async def impatient() -> None:
        soon = time.monotonic() + 0.1
        with pytest.raises(DeadlineExceeded):
            await stack.generation.generate(GenerationRequest(inputs="a", task="slow", deadline=soon))
        assert not gate.is_set()
        gate.set()

    run(impatient())


def reasons_told(stack: Stack, work: Coroutine[Any, Any, Any], error: type[Exception]) -> list[str]:
    before = len(stack.outcomes)
    with pytest.raises(error):
        run(work)
    wait_until_idle(stack)
    return [outcome.reason for outcome in stack.outcomes[before:]]


def late_failures(stack: Stack) -> float:
    name = 'promptplex_request_failure_total{reason="deadline"} '
    lines = stack.metrics.render().decode().splitlines()
    return sum(float(line.removeprefix(name)) for line in lines if line.startswith(name))


def test_a_deadline_that_passes_before_admission_is_told(
    stack: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(stack, "late", task={"template": "{x}"})
    counted = late_failures(stack)
    long_past = GenerationRequest(inputs="a", task="late", deadline=time.monotonic() - 1)
    assert reasons_told(stack, stack.generation.generate(long_past), DeadlineExceeded) == ["deadline"]
    past = GenerationRequest(inputs="a", task="late", deadline=time.monotonic())
    assert reasons_told(stack, stack.generation.generate(past), DeadlineExceeded) == ["deadline"]
    assert (stack.outcomes[-1].task, stack.outcomes[-1].version) == ("late", 1)
    meaning = stack.store.meaning
    gate = threading.Event()
    monkeypatch.setattr(stack.store, "meaning", lambda *asked: (gate.wait(PATIENCE), meaning(*asked))[1])
    soon = GenerationRequest(inputs="a", task="late", deadline=time.monotonic() + 0.1)

    async def impatient() -> None:
        try:
            await stack.generation.generate(soon)
        finally:
            gate.set()

    assert reasons_told(stack, impatient(), DeadlineExceeded) == ["deadline"]
    assert (stack.outcomes[-1].task, stack.outcomes[-1].version) == ("", 0)  # not known yet
    assert late_failures(stack) == counted + 3


def test_failures_of_admission_are_told_once_the_task_is_known(stack: Stack) -> None:
    publish(stack, "failing", task={"template": "{x}"})
    answer = stack.generation.generate
    assert reasons_told(stack, answer(ask("film " * 300, "failing")), RequestTooLong) == ["refused"]
    assert stack.outcomes[-1].task == "failing"
    assert reasons_told(stack, answer(ask("a", "unheard-of")), NotFound) == []
    assert reasons_told(stack, answer(ask("a", "failing@9")), NotFound) == []
    assert reasons_told(stack, answer(ask("a", "BAD")), InvalidRequest) == []


def test_whoever_stops_listening_frees_the_row(stack: Stack) -> None:
    text = stack.talkative()
    wait_until_idle(stack)  # so that what runs is what is asked next

    async def leave() -> None:
        working = asyncio.ensure_future(stack.generation.generate(ask(text)))
        await eventually(lambda: stack.engine.stats().num_running or working.done())
        working.cancel()
        await asyncio.wait([working])

    def was_cancelled() -> bool:
        run(leave())
        wait_until_idle(stack)
        return stack.outcomes[-1].reason == "cancelled"

    wait_until(was_cancelled, "it always ended by itself before it could be cancelled")


def test_many_tasks_at_once_answer_as_alone(stack: Stack) -> None:
    for number in range(4):
        publish(stack, f"many-{number}", task={"template": f"Task {number}: {{x}}"})
    wanted = [("the film " * (index % 5 + 1), f"many-{index % 4}") for index in range(24)]
    alone = [generate(stack, *want, max_new_tokens=10).text for want in wanted]

    async def gather_or_cancel() -> list[str]:
        asks = [stack.generation.generate(ask(*want, max_new_tokens=10)) for want in wanted]
        return [result.text for result in await asyncio.gather(*asks)]

    assert run(gather_or_cancel()) == alone
    assert stack.generation.requests_served["many-0"] == 12


def test_a_stopped_engine_says_so(tmp_path: Path) -> None:
    with running_stack(tmp_path / "store") as stack:
        assert stack.engine.drain(5)
        with pytest.raises(EngineStopped):
            generate(stack, "a")


def test_outcomes_are_told(stack: Stack) -> None:
    before = len(stack.outcomes)
    publish(stack, "told", task={"template": "{x}"})
    assert len(stack.outcomes) == before  # trial runs don't count
    result = generate(stack, "the film", "told", max_new_tokens=4)
    outcome = stack.outcomes[-1]
    assert (outcome.task, outcome.version, outcome.reason) == ("told", 1, "length")
    assert (outcome.prompt_tokens, outcome.generated_tokens) == (result.prompt_tokens, 4)
    assert outcome.timings == result.timings
