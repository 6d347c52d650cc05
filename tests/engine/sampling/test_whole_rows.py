"""On a GPU every filtered row is sorted whole: what is drawn is what candidates give, where scores differ."""

import pytest
import torch

from app.engine.sampling.draws import draw_from_candidates, draw_from_whole_rows
from app.engine.sampling.filters import log_sum_exp
from app.engine.sampling.inputs import SamplingInput
from app.engine.sampling.parameters import Parameters, table
from app.request import SamplingParams

ROWS, VOCABULARY = 64, 3000


@pytest.mark.parametrize(
    "settings",
    [{"top_k": 50}, {"top_k": 2000, "min_p": 0.01}, {"top_p": 0.3}, {"top_p": 0.99}, {"top_h": 0.5}],
    ids=str,
)
@pytest.mark.parametrize("spread", [0.5, 4.0])
def test_whole_rows_give_the_tokens_of_their_candidates(settings: dict[str, float], spread: float) -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.stack([torch.randperm(VOCABULARY, generator=generator) for _ in range(ROWS)])
    scores = (scores / VOCABULARY - 1) * spread  # no two of a row are equal
    inputs = [SamplingInput(SamplingParams(do_sample=True, seed=seed, **settings), 0) for seed in range(ROWS)]
    parameters = Parameters.of([each.params for each in inputs], torch.from_numpy(table(inputs)))
    total = log_sum_exp(scores)
    expected = draw_from_candidates(scores, total, parameters)
    assert torch.equal(draw_from_whole_rows(scores, total, parameters), expected)
    assert len(expected.unique()) > 20
