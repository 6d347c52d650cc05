"""What the model reads of a version with examples, options, paraphrases or a chain, to the id."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest

from app.errors import InvalidRequest, NotServable
from app.prompt import VersionDraft
from app.serving.admitted import Admitted
from app.serving.generation_request import GenerationRequest
from app.serving.parameters import parse_parameters
from app.store.traffic_split import EnsembleTarget, SpreadTarget, choose_paraphrase
from app.text.message import Message
from tests.oracle import greedy
from tests.serving.stack import Stack, run, upload_of
from tests.store.builders import soft

SHOTS = [{"inputs": "cold", "output": " bad"}, {"inputs": {"text": "great"}, "output": " good"}]
SHOWN = "Review: cold\nIt was: bad\n\nReview: great\nIt was: good\n\n"
CHAIN = {"template": "{question}\n{so_far}", "step_ends": "\n"}


def publish(stack: Stack, task_id: str, **task: Any) -> None:
    run(stack.publishing.upload(task_id, upload_of(task=task)))


def read(
    stack: Stack,
    task_id: str,
    inputs: str | Mapping[str, str] = "",
    steps: Sequence[str] = (),
    **parameters: Any,
) -> Admitted:
    request = GenerationRequest(inputs=inputs, task=task_id, request_id="t", steps=tuple(steps))
    return build(stack, replace(request, parameters=parse_parameters(parameters)))


def build(stack: Stack, request: GenerationRequest) -> Admitted:
    return stack.generation.request_builder.build(request, stack.store.resolve(request.task or ""))


def ids_of(stack: Stack, text: str) -> tuple[int, ...]:
    return tuple(stack.tokenizer(text)["input_ids"])


def test_examples_stand_before_the_inputs_and_are_resident(stack: Stack) -> None:
    publish(stack, "shots", template="Review: {text}\nIt was:", few_shot=SHOTS)
    admitted = read(stack, "shots", "the food")
    text = SHOWN + "Review: the food\nIt was:"
    assert (admitted.prompt_text, admitted.prompt_ids) == (text, ids_of(stack, text))
    [leading] = admitted.request.segments
    assert leading.is_kept
    assert len(leading.token_ids) >= len(ids_of(stack, SHOWN + "Review:")) - 1
    other = read(stack, "shots", "what a film")
    assert other.request.segments == admitted.request.segments
    expected = greedy(stack.base, list(admitted.prompt_ids), 6).tokens
    result = run(stack.generation.generate(replace(admitted.asked, parameters={"max_new_tokens": 6})))
    assert [token.id for token in result.tokens] == expected
    short = read(stack, "shots", "the food was cold", truncate=1)
    assert short.prompt_text.startswith(SHOWN)
    assert len(short.prompt_text) < len(SHOWN + "Review: the food was cold\nIt was:")


def test_options_stand_in_the_text(stack: Stack) -> None:
    choices = ["good", {"value": "bad", "text": " really bad"}]
    publish(stack, "options", template="{text}\n{options}\n:", choices=choices)
    assert read(stack, "options", "x").prompt_text == "x\n- good\n- really bad\n:"
    with pytest.raises(InvalidRequest, match="options"):
        read(stack, "options", {"text": "x", "options": "- fine"})
    publish(stack, "own-options", template="{text}\n{options}\n:")
    assert read(stack, "own-options", {"text": "x", "options": "- a"}).prompt_text == "x\n- a\n:"


def test_a_paraphrase_is_another_template_with_leading_text_of_its_own(stack: Stack) -> None:
    paraphrases = ["What of {text}?", "{text}: what is it?"]
    publish(stack, "phrases", template="Review: {text}\nIt was:", paraphrases=paraphrases, few_shot=SHOTS)
    assert read(stack, "phrases", "x").prompt_text == SHOWN + "Review: x\nIt was:"
    shown = "What of cold? bad\n\nWhat of great? good\n\nWhat of x?"
    first = read(stack, "phrases", "x", paraphrase=0)
    assert (first.prompt_text, first.prompt_ids) == (shown, ids_of(stack, shown))
    assert [segment.is_kept for segment in first.request.segments] == [True]
    assert read(stack, "phrases", {"text": "x"}, paraphrase=1).prompt_text.endswith("x: what is it?")
    with pytest.raises(InvalidRequest, match="2 paraphrases, numbered from 0 to 1") as caught:
        read(stack, "phrases", "x", paraphrase=2)
    assert caught.value.param == "parameters.paraphrase"
    publish(stack, "one-phrase", template="{text}", paraphrases=paraphrases[:1])
    with pytest.raises(InvalidRequest, match="one paraphrase; send 0"):
        read(stack, "one-phrase", "x", paraphrase=1)
    request = GenerationRequest(task="phrases", token_ids=(5, 6), parameters={"paraphrase": 0})
    with pytest.raises(InvalidRequest, match="ids are read as they are"):
        build(stack, request)


def test_a_task_may_have_a_paraphrase_by_default(stack: Stack) -> None:
    defaults = {"paraphrase": 1}
    publish(stack, "usual", template="own {text}", paraphrases=["0 {text}", "1 {text}"], defaults=defaults)
    assert read(stack, "usual", "x").prompt_text == "1 x"
    assert read(stack, "usual", "x", paraphrase=0).prompt_text == "0 x"
    assert build(stack, GenerationRequest(task="usual", token_ids=(5, 6))).prompt_ids == (5, 6)


def test_a_task_without_paraphrases_says_so(stack: Stack) -> None:
    publish(stack, "one-phrase", template="{text}:")
    with pytest.raises(InvalidRequest, match="has no paraphrases"):
        read(stack, "one-phrase", "x", paraphrase=0)
    with pytest.raises(InvalidRequest, match="has no paraphrases"):
        stack.generation.request_builder.build(GenerationRequest(parameters={"paraphrase": 0}), None)


def test_a_chain_reads_its_steps(stack: Stack) -> None:
    publish(stack, "steps", template="{question}", chain=CHAIN)
    first, second = read(stack, "steps", "film"), read(stack, "steps", "film", ["what\n", "the food\n"])
    assert (first.prompt_text, second.prompt_text) == ("film\n", "film\nwhat\nthe food\n")
    assert second.prompt_ids == ids_of(stack, "film\nwhat\nthe food\n")
    chat = GenerationRequest(task="steps", messages=(Message("user", "a"), Message("user", "film")))
    assert build(stack, replace(chat, steps=("what\n",))).prompt_text == "film\nwhat\n"
    with pytest.raises(InvalidRequest, match="Token ids have no steps"):
        build(stack, GenerationRequest(task="steps", token_ids=(5, 6)))


def test_a_chain_by_its_last_step(stack: Stack) -> None:
    publish(stack, "last-step", chain={"template": "what of {last}?", "step_ends": "\n"})
    assert read(stack, "last-step", "film").prompt_text == "what of film?"
    assert read(stack, "last-step", "film", ["food\n", "cold\n"]).prompt_text == "what of cold?"


def admit(stack: Stack, **request: Any) -> Admitted:
    builder, asked = stack.generation.request_builder, GenerationRequest(**request)
    return builder.admit(asked, builder.find(asked))


def test_an_alias_may_spread_the_paraphrases_over_its_users(stack: Stack) -> None:
    paraphrases = ["0 {text}", "1 {text}"]
    publish(stack, "spread", template="own {text}", paraphrases=paraphrases)
    stack.store.move_alias("spread", "live", SpreadTarget(1))
    users = {f"user-{number}": choose_paraphrase(2, "spread", 1, f"user-{number}") for number in range(8)}
    assert {*users.values()} == {0, 1}
    for user, index in users.items():
        assert admit(stack, task="spread", inputs="x", user=user).prompt_text == f"{index} x"
    own = admit(
        stack, task="spread", inputs="x", user="user-0", parameters={"paraphrase": 1 - users["user-0"]}
    )
    assert own.prompt_text == f"{1 - users['user-0']} x", "a request's own choice counts"
    assert admit(stack, task="spread@1", inputs="x", user="user-0").prompt_text == "own x"
    assert admit(stack, task="spread", token_ids=(5, 6)).prompt_ids == (5, 6)


def test_an_ensemble_is_admitted_with_all_its_versions(stack: Stack) -> None:
    for template in ("1 {text}", "2 {text}", "3 {text}"):
        publish(stack, "several", template=template)
    stack.store.move_alias("several", "live", EnsembleTarget({1: 1, 2: 3}))
    admitted = admit(stack, task="several", inputs="x")
    assert [(version.version, weight) for version, weight in admitted.members] == [(2, 3), (1, 1)]
    assert (admitted.version, admitted.prompt_text) == (admitted.members[0][0], "2 x")
    assert admit(stack, task="several@3", inputs="x").members == ()


def test_an_ensemble_needs_a_base_that_serves_all_its_versions(stack: Stack) -> None:
    publish(stack, "mixed", template="{text}")
    stack.store.publish("mixed", VersionDraft(prompt=soft(3, hidden=16)))
    stack.store.move_alias("mixed", "live", EnsembleTarget({1: 2, 2: 1}))
    with pytest.raises(NotServable, match="mixed version 2"):
        admit(stack, task="mixed", inputs="x")
