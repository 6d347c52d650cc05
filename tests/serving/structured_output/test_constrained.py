"""Constrained answers from the running service: all valid, all ended, and neighbours as if alone."""

import asyncio
import json
import random
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from app.errors import ConstraintFailed, InvalidRequest, RequestTooLong
from app.metrics import FAILURES
from app.request import FinishReason
from app.serving.generation_request import ClassificationRequest, GenerationRequest, GenerationResult
from app.serving.structured_output.constraints import Constraint, ConstraintKind
from tests.serving.stack import POSITIONS, Stack, run, running_stack
from tests.serving.structured_output.random_schemas import random_schema
from tests.serving.structured_output.test_constraints import FOLLOWED

JSON, REGEX, CHOICE = ConstraintKind.JSON_SCHEMA, ConstraintKind.REGEX, ConstraintKind.CHOICE
NEW_TOKENS = POSITIONS - 30
EMOJI_AND_CJK = {
    "type": "object",
    "properties": {
        "料理": {"type": "string", "pattern": "^(漢字|🙂|é){3,5}$"},
        "name": {"enum": ["東京タワー", "🍜🍣", "Zoë"]},
    },
    "required": ["料理", "name"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    with running_stack(tmp_path_factory.mktemp("wide"), max_rows=32, kv_cache_bytes=1 << 24) as stack:
        yield stack


def ask(words: str, constraint: Constraint | None = None, **parameters: Any) -> GenerationRequest:
    given = {"max_new_tokens": NEW_TOKENS, **parameters}
    return GenerationRequest(inputs=words, constraint=constraint, parameters=given)


def random_parameters(rng: random.Random) -> dict[str, Any]:
    """Greedy in a third of the cases; else any mixture of temperature, filters and penalties."""
    given: dict[str, Any] = {"seed": rng.randrange(2**31)}
    if rng.random() < 0.3:
        given["repetition_penalty"] = rng.choice([0.8, 1.1, 1.5])
    if rng.random() < 0.2:
        given |= {"frequency_penalty": rng.uniform(-0.5, 1.5), "presence_penalty": rng.uniform(-0.5, 1.5)}
    if rng.random() < 0.33:
        return given
    given |= {"do_sample": True, "temperature": rng.choice([0.3, 1.0, 2.0, 10.0])}
    for name, values in {"top_k": [1, 5, 50], "top_p": [0.3, 0.9, 0.99], "min_p": [0.01, 0.2]}.items():
        if rng.random() < 0.3:
            given[name] = rng.choice(values)
    return given


def answers(stack: Stack, asks: list[GenerationRequest]) -> list[GenerationResult]:
    """All at once, in one batch as far as there is room."""

    async def all_of_them() -> list[GenerationResult]:
        return await asyncio.gather(*(stack.generation.generate(each) for each in asks))

    return run(all_of_them())


@pytest.mark.slow
def test_500_random_schemas_among_unconstrained_rows(wide: Stack) -> None:
    """Line 9 of what issue 5 shows. Every answer ends by itself, parses and validates."""
    rng = random.Random(9)
    words = ["the film was", "name:", "food", "漢字 🙂", "what a", "1 2 3"]
    free = [ask(rng.choice(words), **random_parameters(rng) | {"max_new_tokens": 40}) for _ in range(100)]
    alone = answers(wide, free)
    schemas = [random_schema(rng) for _ in range(500)]
    bound = [
        ask(rng.choice(words), Constraint(JSON, schema, "p"), **random_parameters(rng)) for schema in schemas
    ]
    order = [*range(600)]
    rng.shuffle(order)
    found = dict(zip(order, answers(wide, [[*bound, *free][number] for number in order]), strict=True))
    for number, schema in enumerate(schemas):
        result = found[number]
        assert result.finish is FinishReason.EOS, (schema, result.text)
        Draft202012Validator(schema).validate(json.loads(result.text))
    for number, before in enumerate(alone):
        after = found[500 + number]
        assert [token.id for token in after.tokens] == [token.id for token in before.tokens]
    assert len({found[number].text for number in range(500)}) > 200, "they are not all the same"


@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize(
    "constraint",
    [
        Constraint(REGEX, r"(?i:yes|no)[.!]{1,3}( [a-z]{2,5}){2}", "p"),
        Constraint(REGEX, r"[0-9]{3}-[A-Z]{2}", "p"),
        Constraint(CHOICE, ["positive", "negative", "positive or negative", "漢字 🙂\n"], "p"),
    ],
    ids=["words", "digits", "choice"],
)
def test_regex_and_choice(wide: Stack, constraint: Constraint, sampled: bool) -> None:
    asks = [ask("the food", constraint, do_sample=sampled, temperature=3.0, seed=seed) for seed in range(30)]
    results = answers(wide, asks)
    for result in results:
        assert result.finish is FinishReason.EOS
        if constraint.kind is CHOICE:
            assert result.text in constraint.value
        else:
            assert re.fullmatch(constraint.value, result.text)
    assert (len({result.text for result in results}) > 1) == sampled


@pytest.mark.parametrize("kind", FOLLOWED)
def test_unicode_with_every_kind_of_tokenizer(kind: str, tmp_path: Path) -> None:
    with running_stack(tmp_path / "store", kind=kind, padding=29) as stack:
        constraint = Constraint(JSON, EMOJI_AND_CJK, "p")
        asks = [ask("a", constraint, do_sample=True, temperature=2.0, seed=seed) for seed in range(8)]
        for result in answers(stack, asks):
            assert result.finish is FinishReason.EOS
            assert "\ufffd" not in result.text
            Draft202012Validator(EMOJI_AND_CJK).validate(json.loads(result.text))
            assert not any(token.special for token in result.tokens[:-1])


@pytest.mark.parametrize("kind", ["unigram", "word_piece"])
def test_a_tokenizer_that_cant_be_followed_is_refused_at_admission(kind: str, tmp_path: Path) -> None:
    with running_stack(tmp_path / "store", kind=kind) as stack:
        with pytest.raises(InvalidRequest, match="can't be constrained"):
            run(stack.generation.generate(ask("film", Constraint(CHOICE, ["film"], "p"), max_new_tokens=5)))
        assert run(stack.generation.generate(ask("film", max_new_tokens=5))).tokens


def test_streams_and_samples(wide: Stack) -> None:
    constraint = Constraint(JSON, EMOJI_AND_CJK, "p")
    given = ask("the film", constraint, do_sample=True, temperature=2.0, seed=11)

    async def streamed() -> list[str]:
        return [piece.text async for _, piece in await wide.generation.start([given])]

    whole = run(wide.generation.generate(given))
    pieces = run(streamed())
    assert len(pieces) > 5
    assert "".join(pieces) == whole.text
    several = run(wide.generation.generate_all([replace(given, num_samples=6)]))
    for result in several:
        Draft202012Validator(EMOJI_AND_CJK).validate(json.loads(result.text))
    assert several[0].text == whole.text
    assert len({result.text for result in several}) > 1


def test_a_stop_string_and_a_length_end_a_constrained_answer(wide: Stack) -> None:
    constraint = Constraint(REGEX, "aaaa-bbbb-cccc", "p")
    stopped = run(wide.generation.generate(ask("x", constraint, stop=("-bb",))))
    assert (stopped.text, stopped.finish) == ("aaaa", FinishReason.STOP)
    short = run(wide.generation.generate(ask("x", constraint, max_new_tokens=3)))
    assert "aaaa-bbbb-cccc".startswith(short.text)
    assert (len(short.tokens), short.finish) == (3, FinishReason.LENGTH)
    whole = run(wide.generation.generate(ask("x", constraint, stop=("zz",))))
    assert (whole.text, whole.finish) == ("aaaa-bbbb-cccc", FinishReason.EOS)


def test_truncation_and_scores_of_the_prompt(wide: Stack) -> None:
    constraint = Constraint(CHOICE, ["cold", "great"], "p")
    long = "the film was great and " * 200
    with pytest.raises(RequestTooLong):
        run(wide.generation.generate(ask(long, constraint, max_new_tokens=9)))
    cut = run(wide.generation.generate(ask(long, constraint, max_new_tokens=9, truncate=20)))
    assert cut.text in ("cold", "great")
    scored = run(wide.generation.generate(ask("the film", constraint, decoder_input_details=True)))
    assert len(scored.prompt_scores) == scored.prompt_tokens
    assert scored.text in ("cold", "great")


def test_a_bad_grammar_among_good_neighbours(wide: Stack) -> None:
    """Some are refused at admission, some fail on their way; nobody else hears of it."""
    good = [ask("the food", Constraint(REGEX, "[a-z]{20,30}", "p"), seed=seed) for seed in range(8)]
    clean = [result.text for result in answers(wide, good)]
    bad = [
        ask("b", Constraint(REGEX, "(", "p")),
        ask("b", Constraint(JSON, {"type": "nothing"}, "p")),
        ask("b", Constraint(REGEX, "[b-f]{30}a{4000000000}", "p")),
    ]

    async def mixed() -> list[GenerationResult | BaseException]:
        working = [wide.generation.generate(each) for each in (*good[:4], *bad, *good[4:])]
        return await asyncio.gather(*working, return_exceptions=True)

    results = run(mixed())
    failed = results[4:7]
    assert [type(each).__name__ for each in failed] == [
        "InvalidRequest",
        "InvalidRequest",
        "ConstraintFailed",
    ]
    texts = [each.text for each in (*results[:4], *results[7:]) if isinstance(each, GenerationResult)]
    assert texts == clean


def test_a_grammar_that_leads_nowhere_is_charged(wide: Stack) -> None:
    """Its tokens were made; only what the server fails at is free."""
    letter = wide.tokenizer.convert_tokens_to_ids("x")
    nowhere = replace(ask("b", Constraint(REGEX, "[b-f]{10}x", "p")), logit_bias=((letter, -100.0),))
    wide.outcomes.clear()
    with pytest.raises(ConstraintFailed, match="no token may come next"):
        run(wide.generation.generate(nowhere))
    (outcome,) = wide.outcomes
    assert (outcome.reason, outcome.generated_tokens) == ("constraint", 10)
    assert outcome.reason in FAILURES


def test_an_end_that_is_banned_is_refused_at_once(wide: Stack) -> None:
    """The finished answer would be thrown away."""
    given = ask("b", Constraint(REGEX, "[a-z ]{40}", "p"))
    eos = wide.tokenizer.eos_token_id
    with pytest.raises(InvalidRequest, match="bans every token that ends an answer") as caught:
        run(wide.generation.generate(replace(given, logit_bias=((eos, -100.0),))))
    assert caught.value.param == "logit_bias"
    assert (
        run(wide.generation.generate(replace(given, logit_bias=((eos, -99.0),)))).finish is FinishReason.EOS
    )
    assert run(wide.generation.generate(replace(given, constraint=None, logit_bias=((eos, -100.0),)))).tokens


def test_what_is_refused_anyway_is_never_compiled(wide: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    grammars = wide.generation.request_builder._grammars
    assert grammars is not None
    compiled: list[str] = []
    inner = grammars._compile
    monkeypatch.setattr(grammars, "_compile", lambda grammar: compiled.append(grammar) or inner(grammar))
    given = ask("the film", Constraint(REGEX, "seen only [a-z]{5}", "p"), max_new_tokens=POSITIONS)
    with pytest.raises(RequestTooLong):
        run(wide.generation.generate(given))
    assert not compiled
    several = replace(given, parameters={"max_new_tokens": 40}, num_samples=8)
    assert len(run(wide.generation.generate_all([several]))) == 8
    assert len(compiled) == 1, "all of them at once, but one compiles"


def test_labels_are_scored_without_a_grammar(wide: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    grammars = wide.generation.request_builder._grammars
    assert grammars is not None
    started: list[str] = []
    inner = grammars.start
    monkeypatch.setattr(grammars, "start", lambda grammar: started.append(grammar) or inner(grammar))
    how = ClassificationRequest(choices=("cold", "great"))
    free, bound = (
        run(wide.generation.generate(replace(ask("the food", constraint), classification=how))).classification
        for constraint in (None, Constraint(REGEX, "[0-9]", "p"))
    )
    assert free is not None
    assert bound is not None
    assert dict(bound.probabilities) == pytest.approx(dict(free.probabilities))
    assert not started


def test_a_bias_reaches_the_model(wide: Stack) -> None:
    free = run(wide.generation.generate(ask("the film", max_new_tokens=6)))
    first = free.tokens[0].id
    given = {"max_new_tokens": 6}
    banned = run(
        wide.generation.generate(
            GenerationRequest(inputs="the film", parameters=given, logit_bias=((first, -100.0),))
        )
    )
    assert first not in [token.id for token in banned.tokens]
    wanted = run(
        wide.generation.generate(
            GenerationRequest(inputs="the film", parameters=given, logit_bias=((77, 100.0),))
        )
    )
    assert [token.id for token in wanted.tokens] == [77] * 6
    assert wanted.tokens[0].logprob < -0.1, "the model's own"
    with pytest.raises(InvalidRequest) as caught:
        run(wide.generation.generate(GenerationRequest(inputs="a", logit_bias=((10**8, 1.0),))))
    assert caught.value.param == "logit_bias"
