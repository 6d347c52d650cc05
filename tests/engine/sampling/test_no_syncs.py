"""Nothing between logits and chosen tokens waits for a GPU.

Shapes: V vocabulary.
"""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from app.engine.sampling.sampler import sample, score_tokens
from app.engine.sampling.state import SamplingState
from app.engine.sampling.torch_sampler import greedy, sampled
from app.models.transfer import from_device, to_device
from app.request import SamplingParams, TokenRules
from tests.engine.no_syncs import DEVICE, WouldSync, no_syncs

VOCABULARY = 5000  # more than candidates are looked at
PROMPT = (5, 6, 7)
DRAWN = SamplingParams(do_sample=True)
RULES = TokenRules(
    sequence_bias=(((6, 7), 2.5),),
    bad_words=((17,), (7, 4)),
    encoder_repetition_penalty=1.2,
    forced_last=(21, 22),
    max_new_tokens=1,
    length_decay=(-1, 1.3),
    eos_ids=(0,),
    suppressed=(2,),
)
KINDS = {
    "greedy": SamplingParams(),
    "plain": DRAWN,
    "top-k": replace(DRAWN, top_k=50),
    "top-p": replace(DRAWN, top_p=0.9),
    "min-p": replace(DRAWN, min_p=0.1, temperature=0.5),
    "top-h": replace(DRAWN, top_h=0.5),
    "typical": replace(DRAWN, typical_p=0.5),
    "cutoffs": replace(DRAWN, epsilon_cutoff=0.001, eta_cutoff=0.001),
    "filters and shapes": replace(DRAWN, top_k=2000, typical_p=0.5),
    "penalties": replace(DRAWN, repetition_penalty=1.3, frequency_penalty=0.5, presence_penalty=0.2),
    "bias": SamplingParams(logit_bias=((3, 6.5), (8, -100.0))),
    "rules": SamplingParams(rules=RULES),
}


def logits_of(num_rows: int) -> Tensor:
    return torch.empty(num_rows, VOCABULARY, dtype=torch.bfloat16, device=DEVICE)


@pytest.mark.parametrize("names", [*((name,) for name in KINDS), tuple(KINDS), tuple(KINDS) * 5])
@pytest.mark.parametrize("num_top", [0, 5])
def test_rows_of_every_kind_are_chosen_without_waiting(names: tuple[str, ...], num_top: int) -> None:
    states = [SamplingState(KINDS[name], PROMPT, num_top) for name in names]
    beams = [SamplingState(KINDS[name], PROMPT, num_candidates=4) for name in names]
    inputs = [state.input(0) for state in (*states, *beams)]
    logits = logits_of(len(inputs))
    masks = {row: np.full(VOCABULARY // 32, 77, dtype=np.uint32) for row in range(0, len(names), 2)}
    with no_syncs():
        without, with_masks = sample(logits, inputs, {}), sample(logits, inputs, masks)
    for found in (without, with_masks):
        assert found.ids.device == DEVICE
        tokens = found.tokens()
        assert [len(token.top) for token in tokens] == [num_top] * len(names) + [0] * len(names)
        assert [len(token.candidates) for token in tokens] == [0] * len(names) + [4] * len(names)


def test_reports_of_some_rows_alone_are_made_without_waiting() -> None:
    inputs = [SamplingState(SamplingParams(), PROMPT, num).input(0) for num in (0, 2, 5, 2)]
    with no_syncs():
        found = sample(logits_of(4), inputs, {})
    assert [len(token.top) for token in found.tokens()] == [0, 2, 5, 2]


def test_tokens_are_scored_without_waiting() -> None:
    with no_syncs():
        scores = score_tokens(logits_of(3), PROMPT, 4)
    assert [(score.token_id, len(score.top)) for score in scores()] == [(id_, 4) for id_ in PROMPT]


def test_a_choice_for_graphs_is_made_without_waiting() -> None:
    with no_syncs():
        found = sampled(greedy(logits_of(8)), 5)
    assert len(found.tokens()) == len(found.ids) == 5


def test_a_graphs_choice_is_the_samplers() -> None:
    logits = torch.randn(6, VOCABULARY, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    logits[1, 7], logits[2, 3], logits[3] = float("nan"), float("inf"), float("-inf")
    inputs = [SamplingState(SamplingParams(), PROMPT).input(0)] * 5
    expected, found = sample(logits[:5], inputs, {}), sampled(greedy(logits), 5)
    assert inputs[0].is_bare_greedy
    for mine, theirs in zip(found.tokens(), expected.tokens(), strict=True):
        assert (mine.is_finite, str(mine.error)) == (theirs.is_finite, str(theirs.error))
        if mine.is_finite:
            assert mine == theirs
    finite = [0, 4]
    assert torch.equal(found.ids[finite], expected.ids[finite])


# -- the proof's own proof -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x[0, 0].item(),
        lambda x: x.tolist(),
        lambda x: bool(x.any()),
        lambda x: float(x[0, 0]),
        lambda x: x[x > 0],
        lambda x: x.masked_fill_(x > 0, 0.0)[[1, 2]],
        lambda x: x[np.array([1, 2])],
        lambda x: x[torch.from_numpy(np.array([1, 2]))],
        lambda x: x.__setitem__([1, 2], 0.0),
        lambda x: (x > 0).nonzero(),
        lambda x: x.view(-1).index_put_((x.new_empty(3, dtype=torch.int64),), x[:, 0], accumulate=True),
        lambda x: x.cpu(),
        lambda x: x.to("cpu"),
        lambda x: torch.tensor([1, 2], device=x.device),
        lambda x: torch.from_numpy(np.ones(3)).to(x.device),
        lambda x: torch.from_numpy(np.ones(3)).to(x.device, non_blocking=True),
        lambda x: from_device([x])()[0].tolist(),
        lambda x: x.copy_(torch.from_numpy(np.ones((3, VOCABULARY)))),
    ],
)
def test_what_would_wait_is_noticed(wait: Callable[[Tensor], object]) -> None:
    with pytest.raises(WouldSync), no_syncs():
        wait(logits_of(3))


def test_what_would_not_wait_is_let_through() -> None:
    with no_syncs():
        x = logits_of(3)
        rows = to_device(np.array([2, 0]), x.device)
        x[rows] = x[rows].masked_fill(x[rows] > 0, 1.0).softmax(-1)
        x[0, :7].add_(2.0)
        found = from_device([x, rows])
    assert [each.device.type for each in found()] == ["cpu", "cpu"]
