"""Votes: ballots are the samples of one seed, the most frequent answer wins, and nothing stays behind."""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from app.errors import DeadlineExceeded, InvalidRequest, Overloaded
from app.request import FinishReason
from app.serving.generation_request import (
    Ballot,
    ClassificationRequest,
    GenerationRequest,
    GenerationResult,
    TextDelta,
    Vote,
    VoteRequest,
)
from app.serving.programs.vote import winner_of
from tests.serving.stack import Stack, run, upload_of
from tests.waiting import eventually, wait_until

WARM = {"max_new_tokens": 6, "seed": 11, "temperature": 3.0}


def voted(num_ballots: int, **more: Any) -> GenerationRequest:
    return GenerationRequest(
        **{"inputs": "what a film", "parameters": WARM} | more, vote=VoteRequest(num_ballots=num_ballots)
    )


def vote_of(result: GenerationResult) -> Vote:
    assert result.vote is not None
    return result.vote


def ids_of(result: GenerationResult) -> list[int]:
    return [token.id for token in result.tokens]


@pytest.fixture(scope="module")
def one(stack: Stack) -> GenerationResult:
    return run(stack.generation.generate(GenerationRequest(inputs="what a film", parameters=WARM)))


def test_ballots_are_the_samples_of_the_seed(stack: Stack) -> None:
    vote = vote_of(run(stack.generation.generate(voted(9))))
    asked = GenerationRequest(inputs="what a film", num_samples=9, parameters={**WARM, "do_sample": True})
    samples = run(stack.generation.generate_all([asked]))
    assert [ids_of(ballot.result) for ballot in vote.ballots] == [ids_of(sample) for sample in samples]
    assert [ballot.index for ballot in vote.ballots] == list(range(9))
    assert len({ballot.answer for ballot in vote.ballots}) > 2


def test_the_first_ballot_is_the_answer_to_a_request_without_a_vote(stack: Stack) -> None:
    vote = vote_of(run(stack.generation.generate(voted(2))))
    alone = replace(voted(1), parameters={**WARM, "do_sample": True})
    single = run(stack.generation.generate(alone))
    assert single.vote is None
    assert ids_of(vote.ballots[0].result) == ids_of(single)


def test_ballots_may_reason(stack: Stack) -> None:
    """The marker is put in after three tokens; the draws go on behind it in sequences of their own."""
    settings = {"answer_after": "=", "steps_end": "e"}
    task = {"template": "{x}", "reasoning": settings, "vote": {"n": 5}}
    run(stack.publishing.upload("thinking", upload_of(task=task)))
    warm = {**WARM, "max_new_tokens": 9, "thinking_token_budget": 3, "do_sample": True}
    request = GenerationRequest(inputs="what a film", task="thinking", parameters=warm)
    result = run(stack.generation.generate(request))
    samples = run(stack.generation.generate_all([replace(request, num_samples=5)]))
    assert [ballot.result.text for ballot in vote_of(result).ballots] == [each.text for each in samples]
    assert [ballot.result.reasoning for ballot in vote_of(result).ballots] == [
        each.reasoning for each in samples
    ]
    assert {each.reasoning.num_tokens for each in samples if each.reasoning} == {3}
    deltas = run(read(stack, request))
    assert result.reasoning is not None
    assert "".join(each.text for each in deltas if each.is_reasoning) == result.reasoning.text
    assert "".join(each.text for each in deltas if not each.is_reasoning) == result.text
    wait_until(stack.is_idle)
    assert stack.generation.limiter.taken == 0


def test_ballots_may_be_chains(stack: Stack) -> None:
    """Each one's steps are drawn with its own index, and its later steps read its own steps."""
    settings = {"template": "{x}\n{so_far}", "step_ends": "i", "max_steps": 3}
    task = {"template": "{x}", "chain": settings, "vote": {"n": 4}}
    run(stack.publishing.upload("stepping", upload_of(task=task)))
    given = {"max_new_tokens": 60, "do_sample": True, "seed": 11, "temperature": 0.7}
    request = GenerationRequest(inputs="name", task="stepping", parameters=given)
    vote = vote_of(run(stack.generation.generate(request)))
    samples = run(stack.generation.generate_all([replace(request, num_samples=4)]))
    assert [ids_of(ballot.result) for ballot in vote.ballots] == [ids_of(each) for each in samples]
    assert [ballot.result.reasoning for ballot in vote.ballots] == [each.reasoning for each in samples]
    assert len({ballot.result.reasoning for ballot in vote.ballots}) > 1
    assert max(len(each.reasoning.steps) for each in samples if each.reasoning) > 1
    assert "promptplex_chain_steps_count 0.0" not in stack.metrics.render().decode()
    wait_until(stack.is_idle)
    assert stack.generation.limiter.taken == 0


def ballots(one: GenerationResult, *texts: str, weights: Sequence[int] = ()) -> list[Ballot]:
    return [
        Ballot(result=replace(one, text=text, seed=index), index=index, weight=weight)
        for index, (text, weight) in enumerate(zip(texts, weights or [1] * len(texts), strict=True))
    ]


@pytest.mark.parametrize(
    ("texts", "weights", "winner", "share"),
    [
        (("a", "b", "b"), (), 1, 2 / 3),
        (("a", "b", "b", "a"), (), 0, 1 / 2),  # of equal ones the earliest
        ((" a  b\n", "c", "a b"), (), 0, 2 / 3),  # white space doesn't count
        (("", "", "", "c"), (), 3, 1 / 4),  # empty ones abstain
        (("a", "a", "b"), (1, 1, 3), 2, 3 / 5),
    ],
)
def test_the_answer_with_most_weight_wins(
    one: GenerationResult, texts: tuple[str, ...], weights: tuple[int, ...], winner: int, share: float
) -> None:
    result = winner_of(ballots(one, *texts, weights=weights))
    assert (result.text, result.seed) == (texts[winner], winner)
    assert vote_of(result).share == pytest.approx(share)


def test_where_all_abstain_there_is_no_answer(one: GenerationResult) -> None:
    result = winner_of(ballots(one, "", " \n"))
    assert (result.text, result.finish, vote_of(result).share) == ("", FinishReason.NO_ANSWER, 0.0)


def test_all_ballots_are_counted_and_charged(stack: Stack) -> None:
    before = len(stack.outcomes)
    result = run(stack.generation.generate(voted(5)))
    tokens = sum(len(ballot.result.tokens) for ballot in vote_of(result).ballots)
    assert result.num_generated == tokens == sum(each.generated_tokens for each in stack.outcomes[before:])
    assert len(stack.outcomes) - before == 5
    assert result.num_read == result.prompt_tokens


def test_each_request_of_a_call_has_its_vote(stack: Stack) -> None:
    first, second = run(stack.generation.generate_all([voted(3), voted(3, inputs="food")]))
    assert [len(vote_of(each).ballots) for each in (first, second)] == [3, 3]
    assert first.prompt_text != second.prompt_text


def counted(stack: Stack, kind: str, reason: str) -> float:
    name = f'promptplex_programs_total{{kind="{kind}",reason="{reason}"}} '
    (line,) = (each for each in stack.metrics.render().decode().splitlines() if each.startswith(name))
    return float(line.removeprefix(name))


def test_programs_are_counted_by_kind_and_end(stack: Stack) -> None:
    def counts() -> list[float]:
        return [
            counted(stack, *each) for each in (("vote", "length"), ("vote", "deadline"), ("vote", "error"))
        ]

    before = counts()
    run(stack.generation.generate(voted(3, parameters={**WARM, "ignore_eos": True})))
    run(read(stack, voted(3, parameters={**WARM, "ignore_eos": True})))
    given = {"max_new_tokens": 200, "ignore_eos": True}
    long: dict[str, Any] = {"inputs": stack.talkative(), "parameters": given}
    with pytest.raises(DeadlineExceeded):
        run(stack.generation.generate(voted(64, **long, deadline=time.monotonic() + 0.2)))
    assert [after - each for after, each in zip(counts(), before, strict=True)] == [2, 1, 0]
    assert 'promptplex_vote_ballots_bucket{le="4.0"}' in stack.metrics.render().decode()


@pytest.mark.parametrize("num_ballots", [5, 64])
def test_the_prompt_of_a_vote_is_prefilled_once(stack: Stack, num_ballots: int) -> None:
    """Also where most ballots wait for a row, and those before them end in one step."""
    before = len(stack.steps)
    prompt = "what a film " * 8
    parameters = {**WARM, "ignore_eos": True}
    result = run(stack.generation.generate(voted(num_ballots, inputs=prompt, parameters=parameters)))
    wait_until(stack.is_idle)
    prefilled = sum(step.num_prefix_tokens for step in stack.steps[before:])
    assert prefilled == result.prompt_tokens - 1


@pytest.mark.parametrize(
    ("more", "what"),
    [
        ({"num_samples": 2}, "leave n out"),
        ({"best_of": 3}, "leave best_of out"),
        ({"classification": ClassificationRequest(choices=("a", "b"))}, "leave choices out"),
        ({"parameters": {"do_sample": False}}, "leave out do_sample: false"),
        ({"parameters": {"num_beams": 2}}, "leave num_beams out"),
        ({"parameters": {"max_new_tokens": 0}}, "send max_new_tokens"),
    ],
)
def test_a_vote_of_the_request_is_refused_beside_what_it_cannot_be_had_with(
    stack: Stack, more: dict[str, Any], what: str
) -> None:
    with pytest.raises(InvalidRequest, match=what) as caught:
        run(stack.generation.generate(voted(3, **more)))
    assert caught.value.param == "parameters.vote"
    assert stack.generation.limiter.taken == 0


@pytest.fixture(scope="module")
def voting(stack: Stack) -> str:
    """A task that votes; greedy decoding is the default of the base and of requests."""
    defaults = {"temperature": 3.0, "max_new_tokens": 6}
    task = {"template": "V: {x}", "vote": {"n": 4}, "defaults": defaults}
    run(stack.publishing.upload("voting", upload_of(task=task)))
    return "voting"


def test_a_task_may_vote_by_itself(stack: Stack, voting: str) -> None:
    asked = GenerationRequest(inputs="film", task=voting, parameters={"seed": 3})
    vote = vote_of(run(stack.generation.generate(asked)))
    assert len(vote.ballots) == 4
    assert len({ballot.answer for ballot in vote.ballots}) > 1
    more = vote_of(run(stack.generation.generate(replace(asked, vote=VoteRequest(num_ballots=6)))))
    assert [ids_of(each.result) for each in more.ballots[:4]] == [
        ids_of(each.result) for each in vote.ballots
    ]


@pytest.mark.parametrize(
    "more",
    [
        {"num_samples": 2, "parameters": {"do_sample": True}},
        {"classification": ClassificationRequest(choices=("a", "b"))},
        {"parameters": {"do_sample": False}},
        {"parameters": {"num_beams": 2}},
        {"vote": VoteRequest(num_ballots=1)},
    ],
)
def test_a_tasks_vote_gives_way_to_what_a_request_says(
    stack: Stack, voting: str, more: dict[str, Any]
) -> None:
    results = run(stack.generation.generate_all([GenerationRequest(inputs="film", task=voting, **more)]))
    assert [result.vote for result in results] == [None] * more.get("num_samples", 1)


def test_defaults_that_are_not_samples_give_way_to_a_vote(stack: Stack) -> None:
    defaults = {"do_sample": False, "num_beams": 2, "temperature": 3.0}
    run(stack.publishing.upload("greedy", upload_of(task={"template": "V: {x}", "defaults": defaults})))
    vote = vote_of(run(stack.generation.generate(voted(4, task="greedy"))))
    assert len({ballot.answer for ballot in vote.ballots}) > 1


def test_a_vote_takes_room_for_all_its_ballots(stack: Stack, voting: str) -> None:
    limiter = stack.generation.limiter
    for asked in (voted(4), GenerationRequest(inputs="film", task=voting)):
        with limiter.hold(limiter.bound - 3), pytest.raises(Overloaded):
            run(stack.generation.generate(asked))
        with limiter.hold(limiter.bound - 4):
            assert vote_of(run(stack.generation.generate(asked)))
    assert limiter.taken == 0


def test_a_call_whose_votes_never_have_room_together_is_not_sent_again(
    stack: Stack, voting: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stack.generation.limiter, "bound", 6)
    both = [GenerationRequest(inputs=text, task=voting) for text in ("film", "food")]
    with pytest.raises(InvalidRequest, match="8 answers at once are more than this server's 6"):
        run(stack.generation.generate_all(both))
    assert stack.generation.limiter.taken == 0


def test_64_ballots_on_few_rows(stack: Stack) -> None:
    vote = vote_of(run(stack.generation.generate(voted(64))))
    assert len(vote.ballots) == 64
    assert max(step.num_decode_rows for step in stack.steps) <= 16
    wait_until(stack.is_idle)
    assert stack.generation.limiter.taken == 0


async def read(stack: Stack, asked: GenerationRequest) -> list[TextDelta]:
    stream = await stack.generation.start([asked])
    try:
        return [delta async for _, delta in stream]
    finally:
        await stream.close()


def test_a_stream_has_each_ballot_as_it_comes_in_then_the_winner(stack: Stack) -> None:
    *cast, last = run(read(stack, voted(5)))
    assert sorted(delta.ballot.index for delta in cast if delta.ballot) == list(range(5))
    assert "".join(delta.text for delta in cast) == ""
    assert last.result is not None
    assert last.text == last.result.text
    assert {delta.ballot for delta in cast} == {*vote_of(last.result).ballots}


def test_a_reader_who_leaves_frees_all_rows(stack: Stack) -> None:
    """64 ballots on 16 rows: the first one is there long before the last."""

    async def leave() -> None:
        stream = await stack.generation.start([voted(64, parameters={**WARM, "max_new_tokens": 40})])
        await stream.close()
        ended = len(stack.steps)
        await eventually(stack.is_idle)
        assert len(stack.steps) - ended <= 2

    before = len(stack.outcomes)
    asyncio.run(leave())
    assert stack.generation.limiter.taken == 0
    assert {each.reason for each in stack.outcomes[before:]} >= {"cancelled"}


def test_a_vote_that_comes_too_late_leaves_nothing(stack: Stack) -> None:
    """64 ballots of 200 tokens are 800 steps of 16 rows."""
    text, before = stack.talkative(), len(stack.outcomes)
    given = {"max_new_tokens": 200, "ignore_eos": True}
    late = voted(64, inputs=text, parameters=given, deadline=time.monotonic() + 0.2)
    with pytest.raises(DeadlineExceeded):
        run(stack.generation.generate(late))
    wait_until(stack.is_idle)
    assert stack.generation.limiter.taken == 0
    reasons = {each.reason for each in stack.outcomes[before:]}
    assert {"deadline"} <= reasons <= {"deadline", "length"}
