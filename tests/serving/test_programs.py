"""Programs: where one answer fails, the others end at once, and nothing stays behind; others can be added."""

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pytest

from app.errors import DeadlineExceeded, RequestFailed
from app.request import ProgramKind
from app.serving.admitted import Admitted
from app.serving.generation_request import ClassificationRequest, GenerationRequest, TextDelta
from app.serving.programs.program import Program
from app.serving.session import Session
from tests import oracle
from tests.engine.test_isolation import poisoned
from tests.serving.stack import Stack, run, upload_of
from tests.waiting import eventually, wait_until

LONG = {"max_new_tokens": 150}
NEIGHBOURS = [(20, 21), (30, 31), (40, 41)]


def request(ids: tuple[int, ...], **more: Any) -> GenerationRequest:
    return GenerationRequest(token_ids=ids, parameters=LONG, **more)


def said(stack: Stack, ids: tuple[int, ...]) -> list[int]:
    return oracle.greedy(stack.base, list(ids), 150).tokens


@pytest.fixture
def poison(stack: Stack) -> int:
    """A token that none of the neighbours sees or says."""
    seen = {token for ids in NEIGHBOURS for token in (*ids, *said(stack, ids))}
    return next(token for token in range(60, stack.base.config.vocab_size) if token not in seen)


@contextlib.contextmanager
def ends_all(stack: Stack, num_others: int, num_failed: int = 1) -> Iterator[None]:
    """The request fails, and the others of its answers were cancelled before their ends."""
    before = len(stack.outcomes)
    with pytest.raises(RequestFailed):
        yield
    wait_until(stack.is_idle)
    ends = stack.outcomes[before:]
    assert sorted(end.reason for end in ends) == ["cancelled"] * num_others + ["error"] * num_failed
    assert all(end.generated_tokens < 150 for end in ends)
    assert stack.generation.limiter.taken == 0
    assert stack.engine.is_accepting


def test_one_of_several_that_fails_ends_the_others(stack: Stack, poison: int) -> None:
    requests = [request(ids) for ids in NEIGHBOURS]
    with poisoned(stack.engine.backbone, poison), ends_all(stack, 3):
        run(stack.generation.generate_all([*requests[:2], request((5, poison)), requests[2]]))
    results = run(stack.generation.generate_all(requests))
    assert [[token.id for token in result.tokens] for result in results] == [
        _until_eos(stack, ids) for ids in NEIGHBOURS
    ]


def _until_eos(stack: Stack, ids: tuple[int, ...]) -> list[int]:
    tokens, eos = said(stack, ids), stack.tokenizer.eos_token_id
    return tokens[: tokens.index(eos) + 1] if eos in tokens else tokens


def test_one_that_fails_at_once_ends_the_others_streams(stack: Stack, poison: int) -> None:
    requests = [request(ids) for ids in NEIGHBOURS]
    with poisoned(stack.engine.backbone, poison), ends_all(stack, 3):
        run(stack.generation.start([*requests, request((5, poison))]))


def test_one_that_fails_midway_ends_the_others_streams(stack: Stack) -> None:
    answers = {ids: said(stack, ids) for ids in NEIGHBOURS}
    ids, token = _only_one_says(answers)

    async def read() -> None:
        group = await stack.generation.start([request(each) for each in NEIGHBOURS])
        pieces: list[int] = []
        try:
            async for number, piece in group:
                if NEIGHBOURS[number] == ids and piece.token is not None:
                    pieces.append(piece.token.id)
        finally:
            await group.close()
            assert pieces == answers[ids][: answers[ids].index(token) + 1]

    with poisoned(stack.engine.backbone, token), ends_all(stack, 2):
        run(read())


def _only_one_says(answers: dict[tuple[int, ...], list[int]]) -> tuple[tuple[int, ...], int]:
    for ids, tokens in answers.items():
        others = {token for other in answers if other != ids for token in (*other, *answers[other][:60])}
        for token in tokens[2:20]:
            if token not in others and token not in ids and token > 2:
                return ids, token
    raise AssertionError("all say the same")


def test_a_shared_prompt_that_fails_ends_all_samples_once(stack: Stack, poison: int) -> None:
    with poisoned(stack.engine.backbone, poison), pytest.raises(RequestFailed):
        run(stack.generation.generate_all([request((poison, *range(20, 60)), num_samples=6)]))
    wait_until(stack.is_idle)
    assert stack.generation.limiter.taken == 0
    assert run(stack.generation.generate_all([request((20, 21), num_samples=3)]))


def test_a_label_that_fails_ends_the_choice(stack: Stack) -> None:
    labels = ("film", "food", "cold", "Thai")
    ids = [set(stack.tokenizer.encode(label)) for label in labels]
    token = next(iter(ids[2] - (ids[0] | ids[1] | ids[3])))
    labelled = request((20, 21), classification=ClassificationRequest(choices=labels))

    async def run_twice() -> None:
        with poisoned(stack.engine.backbone, token), pytest.raises(RequestFailed):
            await stack.generation.generate(labelled)
        await eventually(stack.is_idle)
        assert stack.generation.limiter.taken == 0
        chosen = await stack.generation.generate(labelled)
        assert chosen.classification is not None
        assert len(chosen.classification.probabilities) == 4

    asyncio.run(run_twice())


@dataclass(frozen=True)
class Chain:
    """A program as one could be added: each step's text goes into the next step's inputs."""

    kind: ClassVar = ProgramKind.CHAIN
    request: GenerationRequest
    num_steps: int
    after_step: Callable[[], object] = lambda: None

    async def run(self, session: Session, admitted: Admitted) -> AsyncGenerator[tuple[int, TextDelta], None]:
        for left in reversed(range(self.num_steps)):
            async with aclosing(session.generate(admitted)) as deltas:
                async for delta in deltas:
                    yield 0, delta._replace(result=None) if left else delta
            self.after_step()
            if left and delta.result is not None:
                so_far = f"{delta.result.prompt_text}{delta.result.text}"[-80:]
                admitted = await session.admit(replace(self.request, inputs=so_far))


def pick(monkeypatch: pytest.MonkeyPatch, make: Callable[[GenerationRequest], Program]) -> None:
    """Let every request run the program that `make` makes of it."""
    monkeypatch.setattr("app.serving.generation.program_for", lambda request, admitted: make(request))


def test_a_chain_stays_on_its_version_and_each_step_counts(
    stack: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    for template in ("one {x}", "two {x}"):
        run(stack.publishing.upload("chained", upload_of(task={"template": template})))
    stack.store.move_alias("chained", "live", 1)
    pick(
        monkeypatch,
        lambda request: Chain(request, 3, lambda: stack.store.move_alias("chained", "live", 2)),
    )
    before = len(stack.outcomes)
    asked = GenerationRequest(inputs="film", task="chained", parameters={"max_new_tokens": 4})
    result = run(stack.generation.generate(asked))
    ends = stack.outcomes[before:]
    assert [(end.task, end.version) for end in ends] == [("chained", 1)] * 3
    assert all(0 < end.generated_tokens <= 4 for end in ends)
    assert result.prompt_text.startswith("one one one film")
    assert stack.generation.limiter.taken == 0


def test_a_chain_that_is_left_or_late_ends_in_any_step(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[int] = []
    text = stack.talkative()
    pick(monkeypatch, lambda request: Chain(request, 100, lambda: steps.append(1)))

    async def leave() -> None:
        working = asyncio.ensure_future(stack.generation.generate(GenerationRequest(inputs=text)))
        await eventually(lambda: len(steps) > 1)
        working.cancel()
        await asyncio.wait([working])
        await eventually(stack.is_idle)

    before = len(stack.outcomes)
    asyncio.run(leave())
    assert len(stack.outcomes) - before < 100
    assert stack.generation.limiter.taken == 0
    late = GenerationRequest(inputs=text, deadline=time.monotonic() + 0.5)
    with pytest.raises(DeadlineExceeded):
        run(stack.generation.generate(late))
    wait_until(stack.is_idle)
    assert stack.outcomes[-1].reason == "deadline"
    assert stack.generation.limiter.taken == 0
