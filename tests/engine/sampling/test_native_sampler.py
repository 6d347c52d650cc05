"""The sampler in native code gives what torch's operations give, to the last bit.

Shapes: V vocabulary.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from app.engine.sampling import native_sampler, torch_sampler
from app.engine.sampling.inputs import SamplingInput
from app.engine.sampling.native_sampler import NativeSampler, load_native_sampler
from app.engine.sampling.sampler import sample
from app.engine.sampling.state import SamplingState
from app.models.cpu.building import NotBuilt
from app.request import SamplingParams, TokenRules


@pytest.fixture(scope="module")
def native() -> NativeSampler:
    try:
        return load_native_sampler()
    except NotBuilt as reason:
        pytest.skip(str(reason))


@st.composite
def sampling_params(draw: st.DrawFn) -> SamplingParams:
    rules = TokenRules(
        bad_words=((3,),),
        suppressed=(5, 10**6),
        encoder_repetition_penalty=1.3,
        length_decay=(0, 1.2),
        eos_ids=(2, 2),
    )
    return SamplingParams(
        do_sample=draw(st.sampled_from([True, True, True, False])),
        temperature=draw(st.sampled_from([1.0, 1.0, 0.001, 0.7, 2.0, 100.0])),
        top_k=draw(st.sampled_from([0, 0, 1, 5, 50, 1000, 1024, 1025])),
        top_p=draw(st.sampled_from([1.0, 0.01, 0.5, 0.9, 0.9999])),
        min_p=draw(st.sampled_from([0.0, 0.0, 1e-8, 0.05, 1.0])),
        top_h=draw(st.sampled_from([0.0] * 5 + [0.5])),
        typical_p=draw(st.sampled_from([1.0] * 5 + [0.5])),
        repetition_penalty=draw(st.sampled_from([1.0, 1.3])),
        frequency_penalty=draw(st.sampled_from([0.0, 0.4])),
        seed=draw(st.integers(0, 2**64)),
        logit_bias=draw(st.sampled_from([(), ((1, 2.5), (7, -100.0))])),
        rules=draw(st.sampled_from([None, None, rules])),
    )


@st.composite
def rows(draw: st.DrawFn) -> tuple[list[SamplingInput], list[int]]:
    """Rows' inputs, and which of them have a mask."""
    inputs = []
    for _ in range(draw(st.integers(1, 5))):
        state = SamplingState(draw(sampling_params()), [1, 2, 9], draw(st.sampled_from([0, 0, 1, 20])))
        state.accept(draw(st.integers(0, 12)))
        inputs.append(state.input(draw(st.integers(0, 999))))
    return inputs, draw(st.lists(st.integers(0, len(inputs) - 1), max_size=2))


@settings(max_examples=150, deadline=None)
@given(
    rows(),
    st.sampled_from([5, 8, 17, 64, 512, 1000, 1024, 1025, 5003, 33000, 70001]),
    st.sampled_from([0.3, 1.0, 4.0]),
    st.sampled_from([2.0, 16.0, 2.0**20]),
    st.sampled_from([None, None, "nan", "inf", "never", "few"]),
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.sampled_from([None, None, "rising", "falling"]),
    st.integers(0, 2**32),
)
def test_any_row_gets_the_token_and_the_numbers_of_the_reference(
    native: NativeSampler,
    given_rows: tuple[list[SamplingInput], list[int]],
    vocabulary: int,
    spread: float,
    steps: float,
    broken: str | None,
    dtype: torch.dtype,
    order: str | None,
    seed: int,
) -> None:
    inputs, masked = given_rows
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(len(inputs), vocabulary, generator=generator).mul(spread * steps).round() / steps
    if order is not None:
        logits = logits.sort(dim=-1, descending=order == "falling").values
    if broken in ("nan", "inf"):
        logits[0, -1] = float(broken)
    if broken in ("never", "few"):
        logits[0, 0 if broken == "never" else 12 :] = float("-inf")
    logits = logits.to(dtype)
    before = logits.clone()
    words = np.random.default_rng(seed).integers(0, 2**32, (len(inputs), vocabulary // 32), np.uint32)
    masks = {row: words[row] for row in masked}
    theirs = torch_sampler.sample(logits.float(), inputs, masks)
    ours = sample(logits, inputs, masks).tokens()
    assert torch.equal(logits, before) or broken == "nan"
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.is_finite == other.is_finite
        assert (mine.error is None) == (other.error is None)
        if mine.is_finite and mine.error is None:
            assert mine == other


def test_common_rows_are_decided_in_native_code(native: NativeSampler) -> None:
    """Rows of rare kinds, and those that rounding would decide, are few."""
    generator = torch.Generator().manual_seed(0)
    inputs = [
        SamplingInput(params, position)
        for position in range(30)
        for params in (
            SamplingParams(repetition_penalty=1.2),
            SamplingParams(do_sample=True, top_k=50, temperature=0.7),
            SamplingParams(do_sample=True, temperature=1.3),
            SamplingParams(do_sample=True, top_p=0.9),
            SamplingParams(do_sample=True, min_p=0.05),
        )
    ]
    logits = torch.randn(len(inputs), 32000, generator=generator).mul(3).to(torch.bfloat16)
    tokens = native.sample(logits, inputs, {})
    assert sum(token is None for token in tokens) <= 1


def test_plain_draws_need_the_exponentials_of_torchs_softmax(
    native: NativeSampler, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without them, as with another torch, torch draws; all else stays native."""
    monkeypatch.setattr(native_sampler, "_SOFTMAX_EXP", "no_such_function")
    without = load_native_sampler()
    plain, filtered = SamplingParams(do_sample=True), SamplingParams(do_sample=True, top_p=0.9)
    logits = torch.randn(2, 300, generator=torch.Generator().manual_seed(0))
    inputs = [SamplingInput(plain, 0), SamplingInput(filtered, 0)]
    left, token = without.sample(logits, inputs, {})
    assert (left, token) == (None, torch_sampler.sample(logits, inputs, {})[1])


def test_more_banned_ids_than_there_are_logits(native: NativeSampler) -> None:
    """Without repetition each token of a long history is banned anew."""
    state = SamplingState(SamplingParams(rules=TokenRules(no_repeat_ngram_size=1)), [1, 2, 9] * 20_000)
    logits = torch.randn(1, 64, generator=torch.Generator().manual_seed(0))
    logits[0, 9] = 100
    inputs = [state.input(0)]
    assert native.sample(logits, inputs, {}) == [*torch_sampler.sample(logits, inputs, {})]


def test_numbers_that_no_request_should_have_do_not_reach_memory(native: NativeSampler) -> None:
    logits = torch.randn(2, 300, generator=torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match="num_top is -1"):
        native.sample(logits, [SamplingInput(SamplingParams(), 0, num_top=-1)], {})
    biased = SamplingState(SamplingParams(logit_bias=((-7, 50.0), (300, 50.0))), [1]).input(0)
    neighbour = SamplingInput(SamplingParams(), 0)
    assert native.sample(logits, [neighbour, biased], {}) == native.sample(logits, [neighbour] * 2, {})
    for strange in (SamplingParams(top_k=-3), SamplingParams(temperature=0.0, top_k=5)):
        sampled = replace(strange, do_sample=True, top_p=0.9)
        native.sample(logits, [SamplingInput(sampled, 0)] * 2, {})


def test_without_a_compiler_rows_are_sampled_by_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> NativeSampler:
        raise NotBuilt("no C++ compiler found")

    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    inputs = [SamplingInput(SamplingParams(do_sample=True, top_p=0.9, seed=seed), 0) for seed in range(3)]
    before = sample(logits, inputs, {}).tokens()
    monkeypatch.setattr(native_sampler, "load_native_sampler", fail)
    native_sampler.native_sampler.cache_clear()
    try:
        assert native_sampler.native_sampler() is None
        assert sample(logits, inputs, {}).tokens() == before
    finally:
        native_sampler.native_sampler.cache_clear()
