"""Seeded sampling is the same in any company, and distributed as it should be."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)
from transformers.generation.logits_process import TopHLogitsWarper

from app.engine.sampling.parameters import uniforms
from app.errors import ConstraintFailed
from app.prompt import Prompt
from app.request import SamplingParams
from benchmarks.completions import submit
from tests import oracle
from tests.engine.conftest import Bench
from tests.engine.sampling.rows import chosen, row

# The 0.999 quantiles of chi-square with 1 .. 40 degrees of freedom, by Wilson and Hilferty.
_Z = 3.0902


def chi_square_limit(degrees: int) -> float:
    spread = 2 / (9 * degrees)
    return degrees * (1 - spread + _Z * spread**0.5) ** 3


def transformers_probabilities(logits: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """The exact distribution by transformers' own warpers, in float64."""
    warpers = LogitsProcessorList()
    if params.temperature != 1:
        warpers.append(TemperatureLogitsWarper(params.temperature))
    if params.top_h:
        warpers.append(TopHLogitsWarper(params.top_h))
    if params.top_k:
        warpers.append(TopKLogitsWarper(params.top_k))
    if params.top_p < 1:
        warpers.append(TopPLogitsWarper(params.top_p))
    if params.min_p:
        warpers.append(MinPLogitsWarper(params.min_p))
    if params.typical_p < 1:
        warpers.append(TypicalLogitsWarper(params.typical_p))
    if params.epsilon_cutoff:
        warpers.append(EpsilonLogitsWarper(params.epsilon_cutoff))
    if params.eta_cutoff:
        warpers.append(EtaLogitsWarper(params.eta_cutoff))
    ids = torch.zeros(1, 1, dtype=torch.long)
    return warpers(ids, logits.double()[None])[0].softmax(-1)


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(do_sample=True),
        SamplingParams(do_sample=True, temperature=1.7),
        SamplingParams(do_sample=True, temperature=0.6, top_k=5),
        SamplingParams(do_sample=True, top_p=0.8),
        SamplingParams(do_sample=True, top_p=0.999),
        SamplingParams(do_sample=True, min_p=0.1),
        SamplingParams(do_sample=True, temperature=1.3, top_k=12, top_p=0.9, min_p=0.02),
        SamplingParams(do_sample=True, typical_p=0.95),
        SamplingParams(do_sample=True, typical_p=0.2),
        SamplingParams(do_sample=True, temperature=0.8, top_k=12, top_p=0.9, typical_p=0.6),
        SamplingParams(do_sample=True, epsilon_cutoff=0.05),
        SamplingParams(do_sample=True, eta_cutoff=0.3, temperature=1.4),
        SamplingParams(do_sample=True, top_h=0.5),
        SamplingParams(do_sample=True, top_h=0.9, top_p=0.9, min_p=0.01, typical_p=0.9, eta_cutoff=0.01),
    ],
    ids=str,
)
def test_samples_follow_the_exact_distribution(params: SamplingParams) -> None:
    draws = 20_000
    logits = torch.randn(24, generator=torch.Generator().manual_seed(3)) * 1.5
    inputs = [row(replace(params, seed=seed)) for seed in range(draws)]
    tokens = [token.token_id for token in chosen(logits.expand(draws, -1), inputs)]
    observed = np.bincount(tokens, minlength=24)
    expected = transformers_probabilities(logits, params).numpy() * draws
    assert observed[expected == 0].sum() == 0, "filtered tokens are never drawn"
    kept = expected > 0
    statistic = float(((observed[kept] - expected[kept]) ** 2 / expected[kept]).sum())
    assert statistic < chi_square_limit(int(kept.sum()) - 1)


def test_engine_samples_follow_the_models_own_distribution(bench: Bench, soft_prompt: Prompt) -> None:
    """End to end: first tokens of 2,000 seeds against the softmax that PEFT's logits give."""
    model = oracle.tuned(bench.base, oracle.soft_config(6), seed=1)
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([[5, 6, 7]])).logits[0, -1]
    params = SamplingParams(do_sample=True, temperature=0.7, top_k=8)
    expected = transformers_probabilities(logits, params).numpy() * 2000
    observed = np.zeros(len(expected), dtype=int)
    for seeds in (range(1000), range(1000, 2000)):  # the queue is bounded
        futures = [
            submit(
                bench.engine,
                bench.request(f"r{seed}", soft_prompt, max_new_tokens=1, sampling=replace(params, seed=seed)),
            )
            for seed in seeds
        ]
        np.add.at(observed, [future.result(60).token_ids[0] for future in futures], 1)
    kept = expected > 0
    assert observed[~kept].sum() == 0
    statistic = float(((observed[kept] - expected[kept]) ** 2 / expected[kept]).sum())
    assert statistic < chi_square_limit(int(kept.sum()) - 1)


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(do_sample=True, temperature=1.2, seed=11),
        SamplingParams(do_sample=True, top_k=20, top_p=0.9, seed=12),
        SamplingParams(do_sample=True, top_p=0.7, min_p=0.05, repetition_penalty=1.3, seed=13),
        SamplingParams(do_sample=True, frequency_penalty=0.8, presence_penalty=0.4, seed=2**63 + 5),
    ],
    ids=["temperature", "top-k and top-p", "top-p, min-p, repetition", "frequency, presence"],
)
def test_a_seed_gives_the_same_tokens_among_32_strangers(
    bench: Bench, soft_prompt: Prompt, params: SamplingParams
) -> None:
    asked = bench.request("seeded", soft_prompt, max_new_tokens=24, sampling=params)
    alone = submit(bench.engine, asked).result(60)
    strangers = []
    for i in range(32):
        sampling = SamplingParams(do_sample=i % 3 > 0, temperature=0.5 + i / 16, top_k=i % 7, seed=i)
        stranger = bench.request(
            f"s{i}", soft_prompt if i % 2 else None, sampling=sampling, token_ids=tuple(range(1, 2 + 3 * i))
        )
        strangers.append(replace(stranger, max_new_tokens=40))
    futures = [submit(bench.engine, stranger) for stranger in strangers[:16]]
    crowded = submit(bench.engine, replace(asked, id="crowded"))
    futures += [submit(bench.engine, stranger) for stranger in strangers[16:]]
    assert crowded.result(60).token_ids == alone.token_ids
    assert len({future.result(60).token_ids for future in futures}) > 8
    assert max(step.num_decode_rows for step in bench.steps) >= 16


@pytest.mark.parametrize(
    ("params", "num_wide"),
    [
        (SamplingParams(do_sample=True, top_p=0.5), 4000),  # beyond the candidates: sorted whole
        (SamplingParams(do_sample=True, top_p=0.5, temperature=0.05), 4000),  # within them
        (SamplingParams(do_sample=True, min_p=0.3), 4000),
        (SamplingParams(do_sample=True, top_k=2000), 4000),
        (SamplingParams(do_sample=True), 4000),
        (SamplingParams(do_sample=True, typical_p=0.5), 4000),
        (SamplingParams(do_sample=True, top_h=0.7, typical_p=0.9), 4000),
        (SamplingParams(do_sample=True, epsilon_cutoff=0.0004, eta_cutoff=0.0009), 4000),
    ],
    ids=lambda value: f"{value}",
)
def test_large_vocabularies_are_filtered_exactly(params: SamplingParams, num_wide: int) -> None:
    """Every draw is one that transformers' filters leave, and the kept mass is drawn evenly."""
    logits = torch.randn(num_wide, generator=torch.Generator().manual_seed(4))
    expected = transformers_probabilities(logits, params).numpy()
    inputs = [row(replace(params, seed=seed)) for seed in range(2000)]
    tokens = [token.token_id for token in chosen(logits.expand(2000, -1), inputs)]
    assert all(expected[token] > 0 for token in tokens)
    # Ten classes of about equal probability, by the order of the vocabulary.
    observed = np.histogram(np.cumsum(expected)[tokens] - expected[tokens] / 2, bins=10, range=(0, 1))[0]
    shares = np.histogram(np.cumsum(expected) - expected / 2, bins=10, range=(0, 1), weights=expected)[0]
    kept = shares > 0.01
    statistic = float(((observed[kept] - shares[kept] * 2000) ** 2 / (shares[kept] * 2000)).sum())
    assert statistic < chi_square_limit(max(1, int(kept.sum()) - 1))


def test_different_seeds_and_sample_indices_differ() -> None:
    seeds, indices, positions = zip(*itertools.product(range(5), repeat=3), strict=True)
    values = uniforms(seeds, indices, positions)
    assert len(set(values.tolist())) == 125
    assert np.array_equal(uniforms(seeds, indices, positions), values)


def test_the_uniforms_are_uniform() -> None:
    values = uniforms([1] * 50_000, [0] * 50_000, range(50_000))
    observed = np.histogram(values, bins=40, range=(0, 1))[0]
    assert float(((observed - 1250) ** 2 / 1250).sum()) < chi_square_limit(39)


def test_repetition_penalty_is_transformers_own() -> None:
    logits = torch.randn(1, 30, generator=torch.Generator().manual_seed(1)) * 3
    seen = (1, 4, 4, 9)
    expected = RepetitionPenaltyLogitsProcessor(1.9)(torch.tensor([seen]), logits.clone()).argmax(-1)
    params = SamplingParams(repetition_penalty=1.9)
    (token,) = chosen(logits, [row(params, prompt=seen[:2], generated=seen[2:])])
    assert token.token_id == int(expected)
    assert token.logprob == pytest.approx(float(logits.log_softmax(-1)[0, token.token_id]), abs=1e-5)


def test_frequency_and_presence_penalties_are_openais() -> None:
    logits = torch.zeros(1, 6)
    logits[0, :4] = torch.tensor([3.0, 2.9, 2.0, 1.0])
    params = SamplingParams(frequency_penalty=0.5, presence_penalty=0.3)
    # Token 0 came twice: 3.0 - 2 * 0.5 - 0.3 = 1.7; token 1 once: 2.9 - 0.8 = 2.1; token 2 leads no more.
    (token,) = chosen(logits, [row(params, prompt=[2], generated=[0, 0, 1])])
    assert token.token_id == 1
    (token,) = chosen(logits, [row(params, prompt=[2], generated=[0, 0, 1, 1])])
    assert token.token_id == 2


def test_a_bad_row_is_reported_and_its_neighbours_are_not_touched() -> None:
    logits = torch.randn(4, 50, generator=torch.Generator().manual_seed(2))
    clean = chosen(logits, [row(SamplingParams())] * 4)
    broken = logits.clone()
    broken[1, 7] = float("nan")
    broken[2, 3] = float("inf")
    tokens = chosen(broken, [row(SamplingParams())] * 4)
    assert [token.is_finite for token in tokens] == [True, False, False, True]
    assert (tokens[0], tokens[3]) == (clean[0], clean[3])
    sampled = row(SamplingParams(do_sample=True, top_p=0.9))
    assert [token.is_finite for token in chosen(broken, [sampled] * 4)] == [True, False, False, True]


@settings(max_examples=200, deadline=None)
@given(
    temperature=st.floats(0.01, 50),
    top_k=st.integers(0, 60),
    top_p=st.floats(0.001, 1.0),
    min_p=st.floats(0.0, 1.0),
    seed=st.integers(0, 2**64 - 1),
    scale=st.sampled_from([0.0, 0.01, 1.0, 10.0, 100.0]),
)
def test_whatever_the_parameters_a_kept_token_is_drawn(
    temperature: float, top_k: int, top_p: float, min_p: float, seed: int, scale: float
) -> None:
    logits = torch.randn(40, generator=torch.Generator().manual_seed(seed % 1000)) * scale
    params = SamplingParams(
        do_sample=True, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=seed
    )
    (token,) = chosen(logits[None], [row(params)])
    allowed = min(top_k or 40, 40)
    rank = int((logits > logits[token.token_id]).sum())
    assert token.is_finite
    assert rank < allowed
    scaled = (logits - logits.max()) / temperature
    assert float(scaled[token.token_id]) >= float(np.log(max(min_p, 1e-300))) - 1e-4


# -- bias ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(),
        SamplingParams(do_sample=True),
        SamplingParams(do_sample=True, temperature=0.7, top_k=9, top_p=0.9, min_p=0.01),
        SamplingParams(repetition_penalty=1.4, frequency_penalty=0.3, presence_penalty=-0.2),
    ],
)
def test_a_bias_is_added_to_the_logits_and_not_to_what_is_reported(params: SamplingParams) -> None:
    """The same choice as without a bias from logits that have it added by hand; the model's own figures."""
    logits = torch.randn(300, 50, generator=torch.Generator().manual_seed(5))
    bias = ((3, 2.5), (7, -4.0), (49, 100.0 / 64), (0, -100.0))
    by_hand = logits.clone()
    for id_, value in bias:
        by_hand[:, id_] += value if value > -100 else -torch.inf
    asked = [replace(params, seed=seed) for seed in range(300)]
    plain = [row(each, 4, [1, 3], [3, 7, 7]) for each in asked]
    biased = [row(replace(each, logit_bias=bias), 4, [1, 3], [3, 7, 7]) for each in asked]
    expected = [token.token_id for token in chosen(by_hand, plain)]
    before = logits.clone()
    found = chosen(logits, biased)
    assert torch.equal(logits, before), "the model's logits are left alone"
    assert [token.token_id for token in found] == expected
    assert 0 not in expected
    assert len(set(expected)) > 5
    own = logits.log_softmax(-1)
    for logprobs, token in zip(own, found, strict=True):
        assert token.logprob == pytest.approx(logprobs[token.token_id].item(), abs=1e-6)


def test_a_bias_of_minus_100_bans_whatever_the_temperature() -> None:
    logits = torch.zeros(2000, 8)
    logits[:, 5] = 1000.0
    params = SamplingParams(do_sample=True, temperature=100.0, logit_bias=((5, -100.0),))
    tokens = chosen(logits, [row(replace(params, seed=seed)) for seed in range(2000)])
    assert {token.token_id for token in tokens} == {0, 1, 2, 3, 4, 6, 7}


@pytest.mark.parametrize("do_sample", [False, True])
def test_a_row_that_may_say_nothing_fails_alone(do_sample: bool) -> None:
    logits = torch.randn(3, 6, generator=torch.Generator().manual_seed(1))
    params = SamplingParams(do_sample=do_sample, seed=2)
    plain, banned = row(params), row(replace(params, logit_bias=tuple((id_, -100.0) for id_ in range(6))))
    alone = chosen(logits[[0, 2]], [plain, plain])
    first, bad, last = chosen(logits, [plain, banned, plain])
    assert isinstance(bad.error, ConstraintFailed)
    assert (first, last) == alone
