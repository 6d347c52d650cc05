"""Uploads with a program: what contradicts itself or would do nothing is refused, and its field is named."""

from typing import Any

import pytest

from app.errors import InvalidRequest, RequestTooLong
from app.serving.program_settings import ProgramSettings
from app.serving.publishing.program_checks import check_markers
from app.serving.publishing.task_settings import parse_task
from app.text.tokenization import PromptTokenizer
from tests.serving.stack import Stack, run, upload_of
from tests.text.tokenizer_zoo import tokenizer_of

CHAIN = {"template": "{x}\n{so_far}", "step_ends": "\n", "done": "answer:"}
REASONING = {"answer_after": "answer:", "steps_end": ";", "effort": {"low": 8, "high": 64}}
MANY = ["{x}" + "y" * 60_000] * 5


def chain(**changes: Any) -> dict[str, Any]:
    return {"chain": {**CHAIN, **changes}}


def reasoning(**changes: Any) -> dict[str, Any]:
    return {"reasoning": {**REASONING, **changes}}


def shots(*examples: Any) -> dict[str, Any]:
    return {"few_shot": [{"inputs": inputs, "output": "o"} for inputs in examples]}


@pytest.mark.parametrize(
    "task",
    [
        reasoning(),
        reasoning(answer_after="\n", steps_end=None, effort={"none": 0}),
        {**reasoning(), "vote": {"n": 9}, "defaults": {"reasoning_effort": "low"}},
        chain(),
        {**chain(), **shots("a", {"x": "b"}), "template": None},
        chain(template="{last}", done=None, steps=[{"task": "a"}, {"task": "b@canary"}, {"task": "c@3"}]),
        {"template": None, "chain": {"template": "of {last}"}},
        {"template": "{x} {options}", "choices": ["a", "b"], "paraphrases": ["{options}: {x}"], **shots("a")},
        {"template": "{x} {options}", "paraphrases": ["{options}: {x}"]},
        {"vote": {"n": 64}, "calibration": {"temperature": 1.7}},
    ],
)
def test_programs_that_make_sense(task: dict[str, Any]) -> None:
    given = {"template": "{x}", **task}
    draft = parse_task(given)
    assert parse_task({**given, **draft.program}).program == draft.program
    assert ProgramSettings.of(draft.program).model_dump(exclude_defaults=True) == draft.program
    assert draft.program.keys() == {name for name in ProgramSettings.model_fields if task.get(name)}


@pytest.mark.parametrize(
    ("task", "param"),
    [
        ({"reasoning": {}}, "task.reasoning"),
        (reasoning(answer_after=""), "task.reasoning.answer_after"),
        (reasoning(answer_after="  "), "task.reasoning.answer_after"),
        (reasoning(answer_after="a" * 257), "task.reasoning.answer_after"),
        (reasoning(steps_end="; answer:"), "task.reasoning.steps_end"),
        (reasoning(effort={"low": -1}), "task.reasoning.effort.low"),
        (reasoning(effort={"none": 5}), "task.reasoning.effort.none"),
        (reasoning(effort={"much": 5}), "task.reasoning.effort.much"),
        (reasoning(thinks=True), "task.reasoning"),
        ({"chain": {"step_ends": "\n"}}, "task.chain"),
        (chain(template="{x.y} {so_far}"), "task.chain.template"),
        (chain(template="{x}"), "task.chain.template"),
        (chain(template="{x} {so_far} {last}"), "task.chain.template"),
        (chain(template="{so_far}"), "task.chain.template"),
        (chain(template="{y} {so_far}"), "task.chain.template"),
        (chain(template="{y} {last}"), "task.chain.template"),
        ({**chain(template="{last}"), "template": "{x} {y}"}, "task.chain.template"),
        ({**chain(template="{last}"), "template": None, "examples": [{"inputs": {"x": ""}, "expected": ""}]},
         "task.examples[0].inputs"),
        ({**chain(), "template": "{so_far}"}, "task.template"),
        (chain(done=" "), "task.chain.done"),
        (chain(done="\nanswer:"), "task.chain.done"),
        (chain(done="a", step_ends="abc"), "task.chain.done"),
        (chain(max_steps=0), "task.chain.max_steps"),
        (chain(max_steps=65), "task.chain.max_steps"),
        (chain(max_step_tokens=0), "task.chain.max_step_tokens"),
        (chain(steps=[{"task": "a"}, {"task": "Not A Task"}]), "task.chain.steps[1].task"),
        (chain(steps=[{"task": "a@none"}]), "task.chain.steps[0].task"),
        (chain(steps=["a"]), "task.chain.steps[0]"),
        (chain(steps=[{"task": "a"}] * 9), "task.chain.steps"),
        ({**chain(), **reasoning()}, "task.chain"),
        ({**chain(), "paraphrases": ["{x}"]}, "task.paraphrases"),
        ({**chain(), "defaults": {"num_beams": 2}}, "task.defaults.num_beams"),
        ({**reasoning(), "defaults": {"num_beams": 2}}, "task.defaults.num_beams"),
        (
            {**reasoning(effort={"none": 0}), "defaults": {"reasoning_effort": "low"}},
            "task.defaults.reasoning_effort",
        ),
        ({**chain(), "defaults": {"thinking_token_budget": 2}}, "task.defaults.thinking_token_budget"),
        ({"defaults": {"reasoning_effort": "low"}}, "task.defaults.reasoning_effort"),
        ({"defaults": {"include_reasoning": False}}, "task.defaults.include_reasoning"),
        ({"vote": {"n": 1}}, "task.vote.n"),
        ({"vote": {"n": 65}}, "task.vote.n"),
        ({"vote": {"n": 3, "by": "text"}}, "task.vote.by"),
        ({"vote": {"n": 3}, "defaults": {"do_sample": False}}, "task.defaults.do_sample"),
        ({"calibration": {"temperature": 0}}, "task.calibration.temperature"),
        ({"calibration": {"temperature": 1e-320}}, "task.calibration.temperature"),
        ({"calibration": {}}, "task.calibration"),
        ({"paraphrases": "{x}"}, "task.paraphrases"),
        ({"paraphrases": ["{x}"] * 65}, "task.paraphrases"),
        ({"paraphrases": ["{x}", "{y}"]}, "task.paraphrases[1]"),
        ({"paraphrases": ["{x}", "{x} {y}"]}, "task.paraphrases[1]"),
        ({"paraphrases": ["none"]}, "task.paraphrases[0]"),
        ({"paraphrases": MANY}, "task.paraphrases[4]"),
        (shots({"y": "a"}), "task.few_shot[0].inputs"),
        (shots("a", 3), "task.few_shot[1].inputs"),
        (shots("a", "b" * 66_000), "task.few_shot[1]"),
        ({"few_shot": [{"inputs": "a"}]}, "task.few_shot[0]"),
        (shots(*["a"] * 65), "task.few_shot"),
        ({"template": "{options}", "choices": ["a"]}, "task.template"),
        ({"template": "{x} {options}", "choices": ["a"], "examples": [
            {"inputs": {"x": "a", "options": "b"}, "expected": ""}]}, "task.examples[0].inputs"),
    ],
)  # fmt: skip
def test_the_first_field_at_fault_is_named(task: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        parse_task({"template": "{x}", **task})
    assert refused.value.param == param
    assert param in refused.value.message


LONG = "film " * 300


@pytest.mark.parametrize(
    ("task", "param"),
    [
        ({"few_shot": [{"inputs": LONG, "output": ""}]}, "task.few_shot"),
        ({"paraphrases": ["{x}", LONG + "{x}"]}, "task.paraphrases[1]"),
        ({"chain": {"template": LONG + "{last}"}}, "task.chain.template"),
        ({"paraphrases": ["{x}"], "defaults": {"paraphrase": 1}}, "task.defaults.paraphrase"),
        ({"defaults": {"paraphrase": 0}}, "task.defaults.paraphrase"),
    ],
)
def test_what_does_not_fit_the_base_leaves_nothing_behind(
    stack: Stack, task: dict[str, Any], param: str
) -> None:
    before = stack.files()
    with pytest.raises(InvalidRequest) as refused:
        run(stack.publishing.upload("bad", upload_of(task={"template": "{x}", **task})))
    assert refused.value.param == param
    assert isinstance(refused.value, RequestTooLong) == ("defaults" not in param)
    assert stack.files() == before


@pytest.mark.parametrize(
    ("kind", "task", "param"),
    [
        ("unigram", reasoning(steps_end="\n"), "task.reasoning.steps_end"),
        ("unigram", {"chain": {**CHAIN, "done": None}}, "task.chain.step_ends"),
        ("byte_level_bos", reasoning(answer_after="\n</s>"), "task.reasoning.answer_after"),
        ("byte_level_bos", {"chain": {**CHAIN, "done": "</s>"}}, "task.chain.done"),
    ],
)
def test_a_marker_that_no_answer_can_hold(kind: str, task: dict[str, Any], param: str) -> None:
    tokenizer = PromptTokenizer(tokenizer_of(kind))
    with pytest.raises(InvalidRequest) as refused:
        check_markers(ProgramSettings.of(task), tokenizer)
    assert refused.value.param == param


def test_a_version_with_a_program_is_tried_and_kept(stack: Stack) -> None:
    task = {
        "template": "Q: {x}\nA:",
        **reasoning(),
        **shots("what", "film"),
        "paraphrases": ["{x}?"],
        "vote": {"n": 3},
    }
    result = run(stack.publishing.upload("with-program", upload_of(task=task)))
    expected = {name: value for name, value in task.items() if name != "template"}
    assert result.version.program == expected
    assert stack.store.resolve("with-program").program == expected


def test_examples_are_compared_by_their_answers(stack: Stack) -> None:
    """Of a vote, too, each example is one answer; they don't run into the server's bound together."""
    task = {
        "template": "{x}",
        "vote": {"n": 16},
        "defaults": {"max_new_tokens": 2},
        "examples": [{"inputs": f"{number}", "expected": ""} for number in range(16)],
    }
    result = run(stack.publishing.upload("voted", upload_of(task=task)))
    assert len(result.examples) == 16
    assert not [example.generated for example in result.examples if example.generated.startswith("(")]
    silent = {"template": "{x}", **reasoning(), "examples": [{"inputs": "film", "expected": ""}]}
    silent |= {"defaults": {"max_new_tokens": 4}}
    [example] = run(stack.publishing.upload("silent", upload_of(task=silent))).examples
    assert (example.generated, example.matches) == ("", True), "steps are no answer"
    silent |= {"examples": [{"inputs": "film", "expected": "food"}]}
    [example] = run(stack.publishing.upload("silent", upload_of(task=silent))).examples
    assert "nothing after the marker" in example.generated


def test_steps_of_tasks_that_are_not_there_yet_are_pointed_out(stack: Stack) -> None:
    run(stack.publishing.upload("there", upload_of(task={"template": "{x}"})))
    steps = [{"task": name} for name in ("there", "tiny-base", "not-yet")]
    task = {"template": "{x}", **chain(steps=steps)}
    (warning,) = run(stack.publishing.upload("stepwise", upload_of(task=task))).warnings
    assert "the chain has a step of not-yet" in warning
