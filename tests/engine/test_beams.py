"""Beam search alone gives what the own `generate` of transformers gives on the same log-probabilities."""

import itertools
import random
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from app.engine.beams import BeamSearch
from app.engine.sampling.state import SamplingState
from app.request import Hypothesis, Request, SamplingParams, TokenRules
from tests import beam_oracle
from tests.engine.sampling.rows import chosen
from tests.tiny_models import tiny_model

SIZE = 23  # of the vocabulary, so that answers end and n-grams repeat
NEW = 9


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny_model("gpt2", vocab_size=SIZE, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)


def searched(model: PreTrainedModel, request: Request) -> tuple[Hypothesis, ...]:
    """Search with the logits of whole passes, without an engine."""
    search = BeamSearch(request)
    count = request.sampling.num_beams + len(request.stop_ids)
    state = SamplingState(request.sampling, request.prompt_ids, num_candidates=count)
    beams: list[tuple[list[int], SamplingState]] = [([*request.token_ids], state)]
    for position in itertools.count():
        logits = model(input_ids=torch.tensor([ids for ids, _ in beams])).logits[:, -1].contiguous()
        extensions = search.advance(chosen(logits, [state.input(position) for _, state in beams]))
        if not extensions:
            return search.hypotheses()
        beams = [([*beams[parent][0], token_id], beams[parent][1].fork()) for parent, token_id in extensions]
        for ids, state in beams:
            state.accept(ids[-1])
    raise AssertionError


CASES = list(
    itertools.product(
        (2, 3, 5), (-1.0, 0.0, 0.6, 1.0, 2.0), (True, False, "never"), ((), (3,), (3, 7, 11), tuple(range(9)))
    )
)
RULES: list[tuple[dict[str, Any], dict[str, Any]]] = [  # transformers' settings, and ours
    ({}, {}),
    ({"no_repeat_ngram_size": 2}, {"no_repeat_ngram_size": 2}),
    ({"min_new_tokens": 5}, {"min_new_tokens": 5}),
    ({"repetition_penalty": 1.7}, {}),
    ({"encoder_no_repeat_ngram_size": 1, "encoder_repetition_penalty": 1.4},) * 2,
    (
        {"bad_words_ids": [[12], [13, 14]]},
        {"sequence_bias": (((12,), -float("inf")), ((13, 14), -float("inf")))},
    ),
    ({"forced_bos_token_id": 8, "forced_eos_token_id": 3}, {"forced_first": 8, "forced_last": (3,)}),
]


@pytest.mark.parametrize(("settings", "rules"), RULES, ids=lambda each: "-".join(each))
def test_all_answers_and_scores_are_those_of_generate(
    model: PreTrainedModel, settings: dict[str, Any], rules: dict[str, Any]
) -> None:
    rng = random.Random(str(settings))
    for beams, penalty, early_stopping, stop_ids in rng.sample(CASES, 12):
        forced = rules.get("forced_last", ())
        stops = frozenset(stop_ids) | frozenset(forced)
        params = SamplingParams(
            num_beams=beams,
            length_penalty=penalty,
            early_stopping=early_stopping,  # type: ignore[arg-type]
            repetition_penalty=settings.get("repetition_penalty", 1.0),
            rules=TokenRules(stop_ids=tuple(stops), max_new_tokens=NEW, **rules),
        )
        length = 1 if forced else rng.randrange(1, 6)
        request = Request(
            id="r",
            token_ids=tuple(rng.randrange(SIZE) for _ in range(length)),
            sampling=params,
            max_new_tokens=NEW,
            stop_ids=stops,
        )
        beam_oracle.check(searched(model, request), beam_oracle.searched(model, request, **settings))


def test_log_probabilities_are_the_model_s_own(model: PreTrainedModel) -> None:
    bias = tuple((id_, -0.5) for id_ in range(SIZE))
    sampling = SamplingParams(num_beams=4, logit_bias=bias)
    request = Request(id="r", token_ids=(5, 6), sampling=sampling, max_new_tokens=NEW)
    best, *_ = searched(model, request)
    ids = [*request.token_ids, *(token.token_id for token in best.tokens)]
    logprobs = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
    own = [float(logprobs[place + 1, id_]) for place, id_ in enumerate(ids[2:])]
    assert [token.logprob for token in best.tokens] == pytest.approx(own, abs=1e-4)
    assert best.score == pytest.approx(sum(own) / len(own) - 0.5, abs=1e-4), "processed, not normalised again"


def test_fewer_answers_where_fewer_tokens_may_come(model: PreTrainedModel) -> None:
    rules = TokenRules(suppressed=tuple(range(2, SIZE)), no_repeat_ngram_size=1)
    request = Request(
        id="r", token_ids=(5,), sampling=SamplingParams(num_beams=4, rules=rules), max_new_tokens=2
    )
    found = searched(model, request)
    assert sorted([token.token_id for token in each.tokens] for each in found) == [[0, 1], [1, 0]]
