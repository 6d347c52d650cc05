"""What a seed means: the same tokens as ever, alone and in any company.

Shapes: V vocabulary.
"""

import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from app.engine.sampling.inputs import SampledToken, SamplingInput
from app.engine.sampling.state import SamplingState
from app.engine.sampling.token_history import TokenHistory
from app.engine.sampling.token_masks import PackedMask
from app.request import SamplingParams, TokenRules
from tests.engine.sampling.rows import chosen

VOCABULARY = 3000
PROMPT = (5, 6, 7, 5, 6, 9)
STEPS = 10
SAMPLED = SamplingParams(do_sample=True, seed=7)
RULES = TokenRules(
    sequence_bias=(((5, 6), 2.5), ((9,), -1.0)),
    bad_words=((17,), (3, 4)),
    encoder_repetition_penalty=1.2,
    no_repeat_ngram_size=2,
    min_new_tokens=4,
    stop_ids=(0, 1),
    eos_ids=(0,),
    length_decay=(2, 1.3),
    max_new_tokens=STEPS,
    suppressed=(2, VOCABULARY + 5),
    suppressed_first=(11, 12),
)

# The tokens of each row, as the sampler chose them before rows shared one batch of vectors.
ROWS: dict[str, tuple[SamplingParams, list[int]]] = {
    "greedy": (SamplingParams(), [2208, 2413, 2618, 2208, 2413, 2618, 2208, 2413, 2618, 2208]),
    "plain": (SAMPLED, [1751, 2925, 1192, 512, 2978, 276, 1481, 1363, 59, 1211]),
    "hot": (
        replace(SAMPLED, temperature=1.7, seed=2**63 + 5),
        [1940, 2357, 2403, 2316, 1363, 2943, 2856, 2198, 2133, 2585],
    ),
    "second sample": (
        replace(SAMPLED, sample_index=1),
        [1430, 2551, 548, 2399, 1958, 2756, 784, 343, 871, 2076],
    ),
    "top-k": (replace(SAMPLED, top_k=50), [327, 1930, 1653, 597, 1660, 1007, 2212, 2417, 1007, 1889]),
    "wide top-k": (replace(SAMPLED, top_k=2000), [2994, 2712, 2435, 1379, 2818, 1789, 786, 2876, 1789, 463]),
    "top-p": (replace(SAMPLED, top_p=0.8), [922, 2742, 2571, 1838, 857, 2248, 2807, 2689, 2248, 599]),
    "wide top-p": (
        replace(SAMPLED, top_p=0.99, temperature=3.0),
        [1170, 2633, 1516, 465, 2824, 552, 2969, 2273, 1468, 2744],
    ),
    "min-p": (replace(SAMPLED, min_p=0.2), [2486, 2098, 42, 1194, 213, 1604, 278, 2368, 1604, 2163]),
    "top-h": (replace(SAMPLED, top_h=0.4), [2299, 2827, 178, 1653, 2827, 2063, 91, 296, 2063, 91]),
    "typical": (replace(SAMPLED, typical_p=0.6), [1519, 2963, 960, 550, 2963, 44, 1519, 1401, 44, 1196]),
    "cutoffs": (
        replace(SAMPLED, epsilon_cutoff=0.0004, eta_cutoff=0.002),
        [1814, 2829, 985, 416, 2882, 180, 1655, 1537, 180, 1332],
    ),
    "all filters": (
        replace(SAMPLED, top_k=900, top_p=0.9, min_p=0.01, typical_p=0.8),
        [552, 164, 316, 1468, 2372, 1878, 552, 434, 1878, 229],
    ),
    "penalties": (
        replace(
            SAMPLED, temperature=0.3, repetition_penalty=1.3, frequency_penalty=0.5, presence_penalty=-0.2
        ),
        [1980, 2778, 452, 42, 2455, 775, 2250, 570, 505, 688],
    ),
    "greedy penalties": (
        SamplingParams(repetition_penalty=1.5, presence_penalty=1.0),
        [2709, 2914, 1234, 824, 1029, 1557, 1147, 1352, 1880, 1470],
    ),
    "bias": (
        replace(SAMPLED, logit_bias=((3, 6.5), (8, -100.0), (9, 5.0))),
        [1659, 2780, 830, 150, 2833, 131, 1606, 1541, 131, 1336],
    ),
    "rules": (
        replace(SAMPLED, temperature=0.5, rules=RULES),
        [2065, 2916, 590, 180, 2916, 267, 2065, 1031, 267, 826],
    ),
    "greedy rules": (
        SamplingParams(rules=RULES, repetition_penalty=1.1),
        [2524, 2729, 2934, 639, 844, 1049, 2847, 1167, 1372, 962],
    ),
    "forced": (
        SamplingParams(rules=TokenRules(forced_last=(21, 22), max_new_tokens=STEPS)),
        [1098, 1303, 1508, 1098, 1303, 1508, 1098, 1303, 1508, 21],
    ),
}


def logits_of(row: int, step: int) -> torch.Tensor:
    """Numbers in [0, 12) `[1, V]` that no generator of a library decides; steps repeat, so penalties bind."""
    ids = np.arange(VOCABULARY) * 2654435761 + row * 40503 + step % 3 * 977
    logits = ids % 4093 / 4093
    for _ in range(5):  # few are high
        logits = logits * logits
    return torch.from_numpy((12 * logits).astype(np.float32))[None]


def decoded(names: list[str]) -> dict[str, list[int]]:
    """The tokens of rows that decode together."""
    states = [SamplingState(ROWS[name][0], PROMPT) for name in names]
    rows = [list(ROWS).index(name) for name in names]
    tokens: dict[str, list[int]] = {name: [] for name in names}
    for step in range(STEPS):
        logits = torch.cat([logits_of(row, step) for row in rows])
        found = chosen(logits, [state.input(step) for state in states])
        for name, state, token in zip(names, states, found, strict=True):
            state.accept(token.token_id)
            tokens[name].append(token.token_id)
    return tokens


def test_all_rows_together_get_the_tokens_that_they_always_got() -> None:
    assert decoded(list(ROWS)) == {name: tokens for name, (_, tokens) in ROWS.items()}


@pytest.mark.parametrize("name", ROWS)
def test_a_row_alone_gets_the_tokens_that_it_always_got(name: str) -> None:
    assert decoded([name]) == {name: ROWS[name][1]}


# -- company ---------------------------------------------------------------------------------------

SMALL = 40
IDS = st.lists(st.integers(0, SMALL - 1), max_size=5)
SEQUENCES = st.lists(st.tuples(st.integers(0, 3), st.integers(0, SMALL + 2)), max_size=4).map(tuple)


@st.composite
def sampling_params(draw: st.DrawFn) -> SamplingParams:
    rules = st.builds(
        TokenRules,
        sequence_bias=SEQUENCES.map(lambda each: tuple((ids, 1.5) for ids in each)),
        bad_words=SEQUENCES,
        encoder_repetition_penalty=st.sampled_from([1.0, 1.5]),
        no_repeat_ngram_size=st.integers(0, 3),
        min_new_tokens=st.integers(0, 6),
        stop_ids=st.just((0, 1)),
        eos_ids=st.just((0,)),
        forced_last=st.sampled_from([(), (5, 6), (SMALL,)]),
        max_new_tokens=st.integers(1, 6),
        length_decay=st.sampled_from([None, (1, 1.4)]),
        suppressed=IDS.map(tuple),
    )
    bias = st.dictionaries(st.integers(0, SMALL - 1), st.sampled_from([-100.0, -2.0, 3.0]), max_size=4)
    return SamplingParams(
        do_sample=draw(st.booleans()),
        temperature=draw(st.sampled_from([0.3, 1.0, 2.0])),
        top_h=draw(st.sampled_from([0.0, 0.0, 0.6])),
        top_k=draw(st.sampled_from([0, 0, 3, 100])),
        top_p=draw(st.sampled_from([1.0, 1.0, 0.7])),
        min_p=draw(st.sampled_from([0.0, 0.0, 0.1])),
        typical_p=draw(st.sampled_from([1.0, 1.0, 0.8])),
        epsilon_cutoff=draw(st.sampled_from([0.0, 0.0, 0.03])),
        repetition_penalty=draw(st.sampled_from([1.0, 1.0, 1.4])),
        frequency_penalty=draw(st.sampled_from([0.0, 0.0, 0.5])),
        seed=draw(st.integers(0, 2**64)),
        logit_bias=tuple(draw(bias).items()),
        rules=draw(st.none() | rules),
    )


@st.composite
def company_row(draw: st.DrawFn) -> tuple[SamplingInput, PackedMask | None, int]:
    """A row's input, its mask if it is bound, and the seed of its logits."""
    prompt, generated = draw(IDS), draw(IDS)
    state = SamplingState(draw(sampling_params()), prompt, draw(st.integers(0, 4)))
    for token_id in generated:
        state.accept(token_id)
    words = st.lists(st.integers(0, 2**32 - 1), min_size=2, max_size=2)
    mask = draw(st.none() | words.map(lambda each: np.array(each, dtype=np.uint32)))
    is_constrained = mask is not None or draw(st.sampled_from([False, False, True]))
    return state.input(len(generated), is_constrained=is_constrained), mask, draw(st.integers(0, 99))


def told(token: SampledToken) -> tuple[object, ...]:
    """What came of a row, to the last bit; an error by its text."""
    return token._replace(error=None), str(token.error)


@settings(max_examples=100, deadline=None)
@given(st.lists(company_row(), min_size=1, max_size=6), st.booleans())
def test_a_rows_choice_is_the_same_alone_and_in_any_company(
    rows: list[tuple[SamplingInput, PackedMask | None, int]], is_broken: bool
) -> None:
    logits = torch.stack(
        [
            torch.randn(SMALL, generator=torch.Generator().manual_seed(seed)).mul(8).round() / 4
            for *_, seed in rows
        ]
    )  # many are tied
    if is_broken:
        logits[-1, 3] = float("nan")
    together = chosen(
        logits,
        [asked for asked, *_ in rows],
        {row: mask for row, (_, mask, _) in enumerate(rows) if mask is not None},
    )
    for place, (asked, mask, _) in enumerate(rows):
        (alone,) = chosen(logits[place, None], [asked], {} if mask is None else {0: mask})
        if alone.is_finite:
            assert told(together[place]) == told(alone)
        assert together[place].is_finite == alone.is_finite


@settings(deadline=None)
@given(company_row())
def test_an_input_is_plain_data_that_pickles(given: tuple[SamplingInput, PackedMask | None, int]) -> None:
    """It may go to another process, and is no larger for the lists that its request came with."""
    found = pickle.loads(pickle.dumps(given[0]))
    assert (found.params, found.position, found.num_top) == (
        given[0].params,
        given[0].position,
        given[0].num_top,
    )
    assert (found.edits is None) == (given[0].edits is None)
    for mine, theirs in zip(found.edits or (), given[0].edits or (), strict=True):
        assert np.array_equal(mine, theirs)
    assert (found.params.logit_bias, found.params.rules) == ((), None)


@given(IDS, st.lists(st.integers(0, SMALL - 1), max_size=40))
def test_a_history_counts_as_its_ids_do(prompt: list[int], answer: list[int]) -> None:
    history = TokenHistory(prompt)
    for length in range(len(answer) + 1):
        ids = [*prompt, *answer[:length]]
        counted = dict(zip(history.seen_ids.tolist(), history.counts.tolist(), strict=True))
        assert counted == {id_: answer[:length].count(id_) for id_ in ids}
        assert (history.ids.tolist(), history.generated.tolist()) == (ids, answer[:length])
        assert (history.prompt.tolist(), history.prompt_ids.tolist()) == (prompt, sorted(set(prompt)))
        if length < len(answer):
            history.append(answer[length])
