"""Beam search through serving: answers and scores of `generate`, and what comes where beams can't be had."""

import asyncio
import string
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from app.engine import scheduler
from app.errors import ConstraintFailed, DeadlineExceeded, InvalidRequest
from app.prompt import VersionDraft
from app.serving.base_defaults import reported_defaults
from app.serving.generation_request import ClassificationRequest, GenerationRequest, GenerationResult
from app.serving.structured_output.constraints import Constraint, ConstraintKind
from tests.oracle import as_prompt, soft_config, tuned
from tests.serving.stack import Stack, run, running_stack, upload_of

TEXT = "the film was great and the food was the film"
REGEX = Constraint(ConstraintKind.REGEX, "[a-z ]{60}", "grammar")
BASE = {
    "num_beams": 4,
    "length_penalty": 2.0,
    "no_repeat_ngram_size": 2,
    "early_stopping": True,
    "min_length": 18,
    "max_length": 30,
}  # as bart-large-cnn's


@pytest.fixture(scope="module")
def searching(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """A base whose generation config asks for beams."""
    with running_stack(tmp_path_factory.mktemp("store"), generation=BASE) as running:
        yield running


def ask(**settings: Any) -> GenerationRequest:
    parameters = {"max_new_tokens": 12} | settings.pop("parameters", {})
    return GenerationRequest(inputs=settings.pop("inputs", TEXT), parameters=parameters, **settings)


def answers(stack: Stack, request: GenerationRequest) -> list[GenerationResult]:
    return run(stack.generation.generate_all([request]))


def ids_of(results: list[GenerationResult]) -> list[list[int]]:
    return [[token.id for token in result.tokens] for result in results]


def expected(stack: Stack, model: Any = None, text: str = TEXT, **settings: Any) -> tuple[Any, Any]:
    """Ids of all answers, up to EOS, and their scores."""
    ids = stack.tokenizer(text, return_tensors="pt")["input_ids"]
    eos = stack.tokenizer.eos_token_id
    with torch.inference_mode():
        output = (model or stack.base).generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            pad_token_id=0,
            eos_token_id=eos,
            do_sample=False,
            output_scores=True,
            return_dict_in_generate=True,
            **settings,
        )
    found = output.sequences[:, ids.shape[1] :].tolist()
    cut = [each[: each.index(eos) + 1] if eos in each else each for each in found]
    return cut, output.sequences_scores.tolist()


def check(results: list[GenerationResult], wanted: tuple[Any, Any]) -> None:
    assert ids_of(results) == wanted[0]
    assert [result.score for result in results] == pytest.approx(wanted[1], abs=1e-4)


def test_a_base_s_own_beams_are_the_default(searching: Stack) -> None:
    request = GenerationRequest(inputs=TEXT)
    check(answers(searching, request), expected(searching))
    assert searching.generation.defaults.shown == BASE
    wanted = expected(searching, num_return_sequences=3)
    check(answers(searching, replace(request, num_samples=3)), wanted)
    changed = {"num_beams": 2, "length_penalty": -1.0, "early_stopping": "never", "min_new_tokens": 3}
    ours = replace(request, parameters=changed)
    check(answers(searching, ours), expected(searching, **changed, min_length=0))


def test_a_base_s_own_beams_give_way(searching: Stack) -> None:
    """Greedy, or drawn, as it would be on a base without beams."""
    (greedy,) = ids_of(answers(searching, ask(parameters={"num_beams": 1})))
    drawn = {"do_sample": True, "seed": 3}
    assert greedy != ids_of(answers(searching, ask()))[0]

    async def streamed() -> list[int]:
        stream = await searching.generation.start([ask()])
        return [delta.token.id async for _, delta in stream if delta.token is not None]

    assert run(streamed()) == greedy
    assert ids_of(answers(searching, ask(num_samples=5))) == [greedy] * 5
    (sampled,) = answers(searching, ask(parameters=drawn))
    assert sampled.score is None
    assert ids_of([sampled]) == ids_of(answers(searching, ask(parameters=drawn | {"num_beams": 1})))
    (route,) = answers(searching, ask(fallbacks={"do_sample": True}, parameters={"seed": 3}))
    assert ids_of([route]) == ids_of([sampled]), "what a route samples by default is above the base"
    (held,) = answers(searching, ask(constraint=REGEX))
    assert set(held.text) <= {*string.ascii_lowercase, " "}
    labels = ClassificationRequest(choices=("great", "cold"))
    assert answers(searching, ask(classification=labels))[0].classification is not None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"is_stream": True}, "can't be streamed|nothing can be streamed"),
        ({"parameters": {"do_sample": True}}, "doesn't draw tokens"),
        ({"constraint": REGEX}, "doesn't follow a grammar"),
        ({"num_samples": 3}, "with 2 beams has 2 answers, not n = 3"),
        ({"best_of": 4}, "doesn't go with best_of"),
        ({"parameters": {"num_beams": 16}}, "this server runs 8 rows"),
    ],
)
def test_beams_of_a_request_s_own_are_refused_where_they_can_t_be_had(
    settings: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with running_stack(tmp_path, max_rows=8) as small:
        parameters = {"num_beams": 2} | settings.pop("parameters", {})
        with pytest.raises(InvalidRequest, match=message) as refused:
            answers(small, ask(parameters=parameters, **settings))
    assert refused.value.param == "parameters.num_beams"


def test_a_task_s_beams_are_its_default(stack: Stack, tmp_path: Path) -> None:
    model = tuned(stack.base, soft_config(5), seed=4)
    defaults = {"num_beams": 3, "length_penalty": 0.5, "max_new_tokens": 10, "no_repeat_ngram_size": 2}
    prompt = as_prompt(model, tmp_path / "soft")
    stack.store.publish("searches", VersionDraft(prompt=prompt, template="{text}", defaults=defaults))
    request = GenerationRequest(inputs=TEXT, task="searches@1", num_samples=3, fallbacks={"do_sample": True})
    check(answers(stack, request), expected(stack, model, **defaults, num_return_sequences=3))
    outcome = stack.outcomes[-1]
    assert (outcome.task, outcome.reason) == ("searches", "length")
    assert outcome.generated_tokens == 3 * 10, "the tokens of all beams are charged"
    drawn = replace(request, num_samples=1, parameters={"do_sample": True})
    assert answers(stack, drawn)[0].score is None, "a request's sampling comes before its task's beams"
    task = {"template": "{text}", "defaults": {"num_beams": 2, "do_sample": True}}
    with pytest.raises(InvalidRequest, match="draw tokens"):
        run(stack.publishing.upload("both", upload_of(task=task)))


def test_a_task_s_beams_need_rows(tmp_path: Path) -> None:
    """They are what the task was tuned for, so it doesn't answer without them in silence."""
    task = {"template": "{text}", "defaults": {"num_beams": 6}}
    remedy = "6 beams .* runs 4 rows .* lower num_beams .* task's defaults.* raise the server's max_rows"
    with running_stack(tmp_path, max_rows=4) as small:
        with pytest.raises(InvalidRequest, match=remedy) as refused:
            run(small.publishing.upload("wide", upload_of(task=task)))
        assert refused.value.param == "task.defaults.num_beams"
        small.store.publish("wide", VersionDraft(prompt=None, **task))  # on a server with more rows
        with pytest.raises(InvalidRequest, match=remedy):
            answers(small, ask(task="wide@1"))
        assert answers(small, ask(task="wide@1", parameters={"num_beams": 4}))[0].score is not None
        assert answers(small, ask(task="wide@1", num_samples=7))[0].score is None, "they give way to n"


def test_a_base_s_beams_beyond_the_rows_are_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with running_stack(tmp_path, generation=BASE, max_rows=3) as small:
        greedy = ids_of(answers(small, ask(parameters={"num_beams": 1})))
        assert ids_of(answers(small, ask())) == greedy
        assert answers(small, ask(parameters={"num_beams": 2}))[0].score is not None
        defaults = small.generation.defaults
    assert defaults.shown == {name: value for name, value in BASE.items() if name != "num_beams"}
    assert reported_defaults(BASE, max_rows=3) == defaults
    (warning,) = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert "num_beams = 4 can't be used: " in warning
    assert "runs 3 rows" in warning
    assert defaults.not_honoured[0] in warning


def test_answers_end_before_stop_strings(stack: Stack) -> None:
    parameters: dict[str, Any] = {"num_beams": 3, "max_new_tokens": 16}
    (whole,) = answers(stack, ask(parameters=parameters))
    stop = whole.text[4:7]
    (cut,) = answers(stack, ask(parameters=parameters | {"stop": (stop,)}))
    assert cut.text == whole.text[: whole.text.index(stop)]
    assert cut.finish == "stop_sequence"


def test_fewer_possible_answers_than_wanted_are_an_error(stack: Stack) -> None:
    size = stack.engine.geometry.vocab_size
    few = {"suppress_tokens": tuple(range(size - 2)), "num_beams": 4, "max_new_tokens": 1}
    assert len(answers(stack, ask(num_samples=2, parameters=few))) == 2
    with pytest.raises(ConstraintFailed, match="only 2 of 3 answers"):
        answers(stack, ask(num_samples=3, parameters=few))


LONG = {"num_beams": 3, "early_stopping": "never", "ignore_eos": True, "max_new_tokens": 200}


def after_three_tokens(patch: pytest.MonkeyPatch, wait: Callable[[], object]) -> None:
    """Call this on the engine's thread when the beams of a search have got their third token."""
    advance, calls = scheduler.advance, []

    def advance_and_wait(*arguments: Any) -> Any:
        output = advance(*arguments)
        calls.append(output)
        if len(calls) == 3:
            wait()
        return output

    patch.setattr(scheduler, "advance", advance_and_wait)


def test_a_search_that_its_deadline_ends_is_charged(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    deadline = time.monotonic() + 1.0
    after_three_tokens(monkeypatch, lambda: time.sleep(max(0.0, deadline - time.monotonic())))
    with pytest.raises(DeadlineExceeded):
        answers(stack, ask(parameters=LONG, deadline=deadline))
    outcome = stack.outcomes[-1]
    assert (outcome.reason, outcome.generated_tokens) == ("deadline", 3 * 3)


def test_a_search_that_its_client_leaves_is_charged(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    """For the two tokens that it knew of."""
    third, left = threading.Event(), threading.Event()

    def wait() -> None:
        third.set()
        left.wait(60)

    after_three_tokens(monkeypatch, wait)

    async def leave() -> None:
        search = asyncio.create_task(stack.generation.generate_all([ask(parameters=LONG)]))
        await asyncio.to_thread(third.wait, 60)
        search.cancel()
        await asyncio.wait([search])
        left.set()

    run(leave())
    outcome = stack.outcomes[-1]
    assert (outcome.reason, outcome.generated_tokens) == ("cancelled", 2 * 3)


def test_best_of_returns_the_most_probable_samples(stack: Stack) -> None:
    parameters = {"do_sample": True, "temperature": 1.5, "seed": 5}
    samples = answers(stack, ask(num_samples=6, parameters=parameters))
    means = [sum(token.logprob for token in each.tokens) / len(each.tokens) for each in samples]
    ranked = [each.text for _, each in sorted(zip(means, samples, strict=True), key=lambda pair: -pair[0])]
    before = len(stack.outcomes)
    best = answers(stack, ask(num_samples=2, best_of=6, parameters=parameters))
    assert [each.text for each in best] == ranked[:2]
    assert len(stack.outcomes) == before + 6, "all samples are charged"
