"""Ensembles: versions of one task answer in one batch, each as it does alone, and their majority counts."""

from collections.abc import Mapping
from typing import Any

import pytest
from peft import PromptTuningConfig

from app.errors import InvalidRequest, Overloaded
from app.serving.generation_request import (
    ClassificationRequest,
    GenerationRequest,
    GenerationResult,
    VoteRequest,
)
from app.store.traffic_split import EnsembleTarget
from tests.serving.stack import Stack, run, upload_of
from tests.serving.test_votes import counted, ids_of, read, vote_of
from tests.waiting import wait_until

TEMPLATES = ("one {x}", "two: {x}", "3 {x} 3")
LABELS = ("film", "food", "cold")
BY_WEIGHT, WEIGHTS = (3, 1, 2), (3, 1, 1)  # of the versions of `three`
BY_LABELS = ClassificationRequest(choices=LABELS)


def publish(
    stack: Stack, task_id: str, weights: Mapping[int, int], *tasks: dict[str, Any], **more: Any
) -> None:
    """Publish versions of these settings; `live` is their ensemble."""
    for task in tasks:
        run(stack.publishing.upload(task_id, upload_of(task=task, **more)))
    stack.store.move_alias(task_id, "live", EnsembleTarget(weights))


@pytest.fixture(scope="module")
def three(stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Two versions of text, and one with a learned prompt."""
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5)
    _, prompt, written = stack.adapter(config, tmp_path_factory.mktemp("adapter"))
    for template in TEMPLATES[:2]:
        run(stack.publishing.upload("three", upload_of(task={"template": template})))
    run(stack.publishing.upload("three", upload_of(prompt, written, task={"template": TEMPLATES[2]})))
    stack.store.move_alias("three", "live", EnsembleTarget({1: 1, 2: 1, 3: 3}))
    return "three"


def asked(task: str, **more: Any) -> GenerationRequest:
    return GenerationRequest(
        **{"inputs": "what a film", "task": task, "parameters": {"max_new_tokens": 6}} | more
    )


def alone(stack: Stack, task: str, version: int, **more: Any) -> GenerationResult:
    return run(stack.generation.generate(asked(f"{task}@{version}", **more)))


@pytest.mark.parametrize(
    "parameters",
    [
        {"max_new_tokens": 6},
        {"max_new_tokens": 6, "do_sample": True, "temperature": 3.0, "seed": 5},
        {"max_new_tokens": 6, "num_beams": 2},
    ],
)
def test_each_version_answers_as_it_does_alone(stack: Stack, three: str, parameters: dict[str, Any]) -> None:
    result = run(stack.generation.generate(asked(three, parameters=parameters)))
    ballots = vote_of(result).ballots
    singles = [alone(stack, three, version, parameters=parameters) for version in BY_WEIGHT]
    assert [ids_of(ballot.result) for ballot in ballots] == [ids_of(each) for each in singles]
    assert [ballot.result.version for ballot in ballots] == [each.version for each in singles]
    assert [ballot.weight for ballot in ballots] == [*WEIGHTS]
    assert (result.text, result.version) == (singles[0].text, singles[0].version)
    assert vote_of(result).share == 3 / 5
    assert result.num_read == sum(each.prompt_tokens for each in singles)
    assert result.num_generated == sum(len(each.tokens) for each in singles)


def test_versions_without_a_seed_share_the_one_that_is_reported(stack: Stack, three: str) -> None:
    parameters = {"max_new_tokens": 6, "do_sample": True, "temperature": 3.0}
    result = run(stack.generation.generate(asked(three, parameters=parameters)))
    again = run(stack.generation.generate(asked(three, parameters={**parameters, "seed": result.seed})))
    assert [ids_of(each.result) for each in vote_of(result).ballots] == [
        ids_of(each.result) for each in vote_of(again).ballots
    ]


def test_all_versions_run_in_one_batch(stack: Stack, three: str) -> None:
    before = len(stack.steps)
    run(stack.generation.generate(asked(three, parameters={"max_new_tokens": 6, "ignore_eos": True})))
    wait_until(stack.is_idle)
    assert max(step.num_decode_rows for step in stack.steps[before:]) == 3


def probabilities(result: GenerationResult) -> dict[str, float]:
    assert result.classification is not None
    return dict(result.classification.probabilities)


def test_of_choices_the_weighted_mean_counts(stack: Stack, three: str) -> None:
    result = run(stack.generation.generate(asked(three, classification=BY_LABELS)))
    singles = [alone(stack, three, version, classification=BY_LABELS) for version in BY_WEIGHT]
    expected = {
        label: sum(w * probabilities(each)[label] for w, each in zip(WEIGHTS, singles, strict=True)) / 5
        for label in LABELS
    }
    assert probabilities(result) == pytest.approx(expected, abs=1e-6)
    assert result.text == max(expected, key=expected.__getitem__)
    assert [ballot.answer for ballot in vote_of(result).ballots] == [each.text for each in singles]
    agree = sum(w for w, each in zip(WEIGHTS, singles, strict=True) if each.text == result.text)
    assert vote_of(result).share == agree / 5
    masses = [each.classification.label_mass for each in singles if each.classification]
    assert result.classification is not None
    assert result.classification.label_mass == pytest.approx((3 * masses[0] + masses[1] + masses[2]) / 5)


def test_a_members_calibration_applies_before_the_mean(stack: Stack) -> None:
    cold, hot = ({"template": "one {x}", "choices": [*LABELS]}, {"calibration": {"temperature": 50.0}})
    publish(stack, "calibrated", {1: 1, 2: 1}, cold, cold | hot)
    own = ClassificationRequest(choices=None)
    result = run(stack.generation.generate(asked("calibrated", classification=own)))
    plain, calibrated = (alone(stack, "calibrated", each, classification=own) for each in (1, 2))
    assert max(probabilities(calibrated).values()) < max(probabilities(plain).values())
    for label in LABELS:
        mean = (probabilities(plain)[label] + probabilities(calibrated)[label]) / 2
        assert probabilities(result)[label] == pytest.approx(mean, abs=1e-6)


def test_choices_that_differ_have_no_mean(stack: Stack) -> None:
    tasks = [{"template": "one {x}", "choices": [*labels]} for labels in (LABELS, LABELS[:2])]
    publish(stack, "differing", {1: 1, 2: 1}, *tasks)
    with pytest.raises(InvalidRequest, match="Versions 1 and 2 of this ensemble have different choices"):
        run(stack.generation.generate(asked("differing", classification=ClassificationRequest(choices=None))))
    assert run(stack.generation.generate(asked("differing", classification=BY_LABELS))).vote


def test_a_version_may_vote_itself(stack: Stack) -> None:
    warm = {"template": "one {x}", "defaults": {"temperature": 3.0}}
    publish(stack, "voters", {1: 1, 2: 1}, warm | {"vote": {"n": 3}}, warm)
    more = {"parameters": {"max_new_tokens": 6, "seed": 4}}
    first, second = vote_of(run(stack.generation.generate(asked("voters", **more)))).ballots
    single = alone(stack, "voters", 1, **more)
    assert [ids_of(each.result) for each in vote_of(first.result).ballots] == [
        ids_of(each.result) for each in vote_of(single).ballots
    ]
    assert second.result.vote is None
    result = run(stack.generation.generate(asked("voters", **more, vote=VoteRequest(num_ballots=2))))
    assert [len(vote_of(each.result).ballots) for each in vote_of(result).ballots] == [2, 2]
    assert result.num_generated == sum(each.result.num_generated for each in vote_of(result).ballots)


def test_versions_may_reason_or_be_chains(stack: Stack) -> None:
    ways: list[dict[str, Any]] = [
        {"chain": {"template": "{x}\n{so_far}", "step_ends": "i", "max_steps": 3}},
        {"reasoning": {"answer_after": "e"}},
        {},
    ]
    publish(stack, "ways", {1: 1, 2: 1, 3: 1}, *({"template": "{x}"} | way for way in ways))
    more: dict[str, Any] = {"inputs": "name", "parameters": {"max_new_tokens": 60}}
    result = run(stack.generation.generate(asked("ways", **more)))
    singles = [alone(stack, "ways", version, **more) for version in (1, 2, 3)]
    found = [ballot.result for ballot in vote_of(result).ballots]
    assert [ids_of(each) for each in found] == [ids_of(each) for each in singles]
    assert [(each.text, each.reasoning) for each in found] == [
        (each.text, each.reasoning) for each in singles
    ]
    assert [each.reasoning is None for each in found] == [False, False, True]
    assert len(found[0].reasoning.steps if found[0].reasoning else ()) > 1


def test_an_ensemble_has_one_answer_and_takes_room_for_all(stack: Stack, three: str) -> None:
    for more in ({"num_samples": 2}, {"best_of": 2}):
        with pytest.raises(InvalidRequest, match=r"one answer.* such as three@3"):
            run(stack.generation.generate_all([asked(three, **more)]))
    with pytest.raises(InvalidRequest, match="has a prompt of its own"):
        run(stack.generation.generate(asked(three, parameters={"max_new_tokens": 0})))
    limiter = stack.generation.limiter
    with limiter.hold(limiter.bound - 2), pytest.raises(Overloaded):
        run(stack.generation.generate(asked(three)))
    with limiter.hold(limiter.bound - 3):
        run(stack.generation.generate(asked(three)))
    assert limiter.taken == 0


def test_a_stream_has_each_versions_answer_then_the_majoritys(stack: Stack, three: str) -> None:
    before = counted(stack, "ensemble", "length")
    *cast, last = run(read(stack, asked(three, parameters={"max_new_tokens": 6, "ignore_eos": True})))
    assert sorted(delta.ballot.index for delta in cast if delta.ballot) == [0, 1, 2]
    assert last.result is not None
    assert last.text == last.result.text
    assert counted(stack, "ensemble", "length") == before + 1
