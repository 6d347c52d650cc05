"""Beam search of one request alone, by the own `generate` of PEFT and transformers."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from app.request import Hypothesis, Request

Answer = tuple[list[int], float]  # token ids, with the stop id that ended them, and the score


def searched(model: Any, request: Request, **settings: Any) -> list[Answer]:
    """All answers of a request, best first; `settings` are transformers' own."""
    given = request.prompt_ids if request.source is None else request.source.token_ids
    ids = torch.tensor([given])
    sampling = request.sampling
    output = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        **{
            "max_new_tokens": request.max_new_tokens,
            "do_sample": False,
            "num_beams": sampling.num_beams,
            "num_return_sequences": sampling.num_beams,
            "length_penalty": sampling.length_penalty,
            "early_stopping": sampling.early_stopping,
            "eos_token_id": sorted(request.stop_ids) or None,
            "pad_token_id": 0,
            "output_scores": True,
            "return_dict_in_generate": True,
        }
        | settings,
    )
    answers = output.sequences[:, len(request.prompt_ids) :].tolist()
    return [
        (_up_to_stop(answer, request.stop_ids)[: request.max_new_tokens], score)
        for answer, score in zip(answers, output.sequences_scores.tolist(), strict=True)
        if score > -1e5  # below is what transformers fills up with, where few tokens may come
    ]


def check(found: Sequence[Hypothesis], wanted: Sequence[Answer]) -> None:
    """Assert that all answers and scores are the same."""
    assert [[token.token_id for token in each.tokens] for each in found] == [ids for ids, _ in wanted]
    assert [each.score for each in found] == pytest.approx([score for _, score in wanted], abs=1e-4)


def _up_to_stop(ids: list[int], stop_ids: frozenset[int]) -> list[int]:
    end = next((place for place, id_ in enumerate(ids) if id_ in stop_ids), len(ids))
    return ids[: end + 1]
