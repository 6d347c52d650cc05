"""Rules of a row: the tokens are those of transformers' own `generate` with the same settings."""

import asyncio
import tracemalloc
from dataclasses import replace
from typing import Any

import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from peft import PeftModel

from app.engine.sampling.token_rules import continuations
from app.errors import ConstraintFailed
from app.prompt import Prompt
from app.request import FinishReason, SamplingParams, TokenDelta, TokenRules
from benchmarks.completions import submit
from tests.engine.conftest import Bench
from tests.engine.sampling.rows import chosen, row

PROMPT = (5, 6, 7, 5, 6, 9)
NEW = 24
IDS = st.integers(0, 2)


def generated(model: Any, prompt: tuple[int, ...], **settings: Any) -> list[int]:
    ids = torch.tensor([prompt])
    settings = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0} | settings
    output = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **settings)
    tokens: list[int] = output[0, len(prompt) :].tolist()
    return tokens


def served(
    bench: Bench, rules: TokenRules, prompt: Prompt | None = None, *, resident: int = 0, **settings: Any
) -> list[int]:
    token_ids = settings.pop("token_ids", PROMPT)
    sampling = SamplingParams(rules=rules, **settings.pop("sampling", {}))
    request = bench.request(
        "r",
        prompt,
        token_ids=token_ids[resident:],
        text=token_ids[:resident],
        sampling=sampling,
        **{"max_new_tokens": NEW} | settings,
    )
    return list(submit(bench.engine, request).result(60).token_ids)


def often(bench: Bench) -> list[int]:
    """Tokens that the base likes, so that rules about them bind."""
    return generated(bench.base, PROMPT)


def test_n_grams_occur_once_also_those_of_the_prompt(bench: Bench) -> None:
    for size in (1, 2, 3):
        expected = generated(bench.base, PROMPT, no_repeat_ngram_size=size)
        assert served(bench, TokenRules(no_repeat_ngram_size=size)) == expected
        expected = generated(bench.base, PROMPT, encoder_no_repeat_ngram_size=size)
        assert served(bench, TokenRules(encoder_no_repeat_ngram_size=size)) == expected
    assert often(bench) != generated(bench.base, PROMPT, no_repeat_ngram_size=2), "the rule binds"


@hypothesis.settings(max_examples=200, deadline=None)
@hypothesis.given(
    st.lists(st.integers(0, 2), max_size=30), st.lists(st.integers(0, 2), max_size=6), st.integers(1, 7)
)
def test_n_grams_are_found_wherever_they_overlap(text: list[int], more: list[int], size: int) -> None:
    context = text + more
    tail = context[len(context) - size + 1 :]
    places = range(len(text) - size + 1) if len(context) >= size - 1 else ()
    expected = {text[at + size - 1] for at in places if text[at : at + size - 1] == tail}
    found = continuations(np.array(text, np.int64), np.array(context, np.int64), size)
    assert expected == set(found.tolist())


def test_long_n_grams_take_no_more_memory_than_short_ones() -> None:
    text = np.full(100_000, 7, dtype=np.int64)
    tracemalloc.start()
    try:
        assert set(continuations(text, text, 1024).tolist()) == {7}
        assert tracemalloc.get_traced_memory()[1] < 16 * len(text) * text.itemsize
    finally:
        tracemalloc.stop()


def test_resident_ids_count_and_learned_tokens_have_none(
    bench: Bench, soft_prompt: Prompt, soft_model: PeftModel
) -> None:
    settings: dict[str, Any] = {
        "no_repeat_ngram_size": 2,
        "repetition_penalty": 1.3,
        "encoder_repetition_penalty": 1.5,
    }
    expected = generated(soft_model, PROMPT, **settings)
    rules = TokenRules(no_repeat_ngram_size=2, encoder_repetition_penalty=1.5)
    penalty = {"repetition_penalty": 1.3}
    for resident in (0, 3):
        assert served(bench, rules, soft_prompt, resident=resident, sampling=penalty) == expected


def test_sequences_get_their_bias(bench: Bench) -> None:
    liked = often(bench)
    biases = (((liked[0],), -3.0), ((liked[1], liked[2]), float("-inf")), ((6, 9, 11), 50.0))
    expected = generated(
        bench.base, PROMPT, sequence_bias=[[list(ids), bias] for ids, bias in biases], repetition_penalty=1.2
    )
    penalty = {"repetition_penalty": 1.2}
    assert served(bench, TokenRules(sequence_bias=biases), sampling=penalty) == expected != liked


def test_bad_words_look_at_generated_tokens_only(bench: Bench) -> None:
    liked = often(bench)
    across, within = (PROMPT[-1], liked[0]), (liked[0], liked[1])
    assert served(bench, TokenRules(bad_words=(across,))) == liked
    banned = served(bench, TokenRules(bad_words=(within,)))
    assert banned[0] == liked[0]
    assert banned[1] != liked[1]


def test_ends_come_late_or_hasten_or_are_forced(bench: Bench) -> None:
    eos = often(bench)[2]
    assert len(generated(bench.base, PROMPT, eos_token_id=eos)) == 3
    expected = generated(bench.base, PROMPT, eos_token_id=eos, min_new_tokens=8)
    assert served(bench, TokenRules(min_new_tokens=8, stop_ids=(eos,)), stop_ids=frozenset({eos})) == expected
    other = 17
    decay = (2, 1.4)
    expected = generated(bench.base, PROMPT, eos_token_id=other, exponential_decay_length_penalty=decay)
    rules = TokenRules(length_decay=decay, eos_ids=(other,))
    assert served(bench, rules, stop_ids=frozenset({other})) == expected
    assert expected[-1] == other
    expected = generated(bench.base, PROMPT, eos_token_id=other, forced_eos_token_id=other)
    rules = TokenRules(forced_last=(other,), max_new_tokens=NEW)
    assert served(bench, rules, stop_ids=frozenset({other})) == expected
    assert expected[-1] == other


@pytest.mark.parametrize("prompt", [(5,), (5, 6)])
def test_beginnings_are_forced_or_suppressed(bench: Bench, prompt: tuple[int, ...]) -> None:
    liked = generated(bench.base, prompt)
    settings: dict[str, Any] = {
        "begin_suppress_tokens": [liked[0], liked[1]],
        "suppress_tokens": [liked[3], 210],
        "forced_bos_token_id": 12,
    }
    rules = TokenRules(
        suppressed_first=(liked[0], liked[1]), suppressed=(liked[3], 210, 100_000), forced_first=12
    )
    assert served(bench, rules, token_ids=prompt) == generated(bench.base, prompt, **settings)
    del settings["forced_bos_token_id"]
    rules = replace(rules, forced_first=None)
    assert served(bench, rules, token_ids=prompt) == generated(bench.base, prompt, **settings) != liked


def test_a_seed_means_the_same_under_rules_in_any_company(bench: Bench) -> None:
    rules = TokenRules(no_repeat_ngram_size=2, suppressed=(3, 4))
    sampling = {"do_sample": True, "temperature": 1.5, "typical_p": 0.9, "seed": 5}
    alone = served(bench, rules, sampling=sampling)
    company = [
        bench.request(
            f"c{i}",
            token_ids=PROMPT[: 1 + i % 6],
            max_new_tokens=40,
            sampling=SamplingParams(
                do_sample=i % 2 > 0,
                typical_p=0.5 + i / 40,
                seed=i,
                rules=TokenRules(no_repeat_ngram_size=1 + i % 3),
            ),
        )
        for i in range(16)
    ]
    futures = [submit(bench.engine, request) for request in company]
    assert served(bench, rules, sampling=sampling) == alone
    for future in futures:
        assert len(future.result(60).token_ids) == 40


def test_a_row_without_any_token_left_fails_alone() -> None:
    logits = torch.zeros(2, 4)
    every = SamplingParams(rules=TokenRules(suppressed=(0, 1, 2, 3)))
    failed, other = chosen(logits, [row(every), row(SamplingParams())])
    assert isinstance(failed.error, ConstraintFailed)
    assert other.error is None


def test_nothing_is_generated_where_nothing_is_asked_for(bench: Bench) -> None:
    request = bench.request("score", token_ids=PROMPT, max_new_tokens=0, num_scored=5)

    async def deltas() -> list[TokenDelta]:
        return [delta async for delta in bench.engine.generate(request)]

    (delta,) = asyncio.run(deltas())
    assert (delta.token_id, delta.finish) == (None, FinishReason.LENGTH)
    with torch.inference_mode():
        expected = bench.base(torch.tensor([PROMPT])).logits[0].log_softmax(-1)
    assert [score.token_id for score in delta.scores] == list(PROMPT[1:])
    for index, score in enumerate(delta.scores):
        assert abs(score.logprob - float(expected[index, PROMPT[index + 1]])) < 1e-4
