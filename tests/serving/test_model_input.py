"""Where a learned prompt and the ids of a text go, for both kinds of bases."""

from typing import Any

import pytest

from app.errors import InvalidRequest, RequestTooLong
from app.prompt import ModelGeometry, PromptKind, TaskVersion
from app.request import Segment, Source
from app.serving.model_input import Input, causal_input, check_source, encoder_decoder_input

GEOMETRY = ModelGeometry(
    architecture="bart",
    hidden_size=8,
    vocab_size=64,
    max_positions=32,
    layers={},
    dtype="float32",
    fingerprint="tiny",
    max_source_positions=12,
)


def version(kind: PromptKind, lengths: Any) -> TaskVersion:
    virtual = max(lengths.values()) if isinstance(lengths, dict) else lengths
    return TaskVersion(
        task_id="t",
        version=1,
        digest="d",
        kind=kind,
        prompt_digest="p",
        num_virtual_tokens=virtual,
        position_offset=0,
        template=None,
        defaults={},
        choices=(),
        examples=(),
        notes="",
        base={},
        provenance={},
        geometry={"num_virtual_tokens": lengths},
    )


def given(version: TaskVersion | None = None, *ids: int, **more: Any) -> Input:
    settings: dict[str, Any] = {"leading_ids": (), "num_rows": 1, "is_scored": False} | more
    return Input(version=version, token_ids=ids, **settings)


def test_a_causal_base_reads_the_prompt_the_leading_text_and_the_rest() -> None:
    soft = version(PromptKind.SOFT, 3)
    request = causal_input(given(soft, 1, 2, 3, 4, leading_ids=(1, 2), num_rows=4))
    assert request.segments == (
        Segment(prompt_digest="p", num_virtual_tokens=3),
        Segment(token_ids=(1, 2)),
        Segment(token_ids=(3,), is_kept=False),
    )
    assert (request.token_ids, request.source, request.num_scored) == ((4,), None, 0)
    scored = causal_input(given(soft, 1, 2, 3, leading_ids=(1, 2), num_rows=4, is_scored=True))
    assert (len(scored.segments), scored.token_ids, scored.num_scored) == (1, (1, 2, 3), 2)
    assert [(each.num_prompt, each.num_virtual_tokens) for each in (request, scored)] == [(4, 3), (3, 3)]


def test_an_encoder_decoder_reads_the_text_as_its_source() -> None:
    request = encoder_decoder_input("r", given(None, 5, 6, 1), (0,))
    assert request.source == Source(id="r", token_ids=(5, 6, 1))
    assert (request.token_ids, request.segments) == ((0,), ())
    assert (request.num_prompt, request.num_virtual_tokens) == (1, 0)


def test_keys_and_values_are_one_resident_segment_for_all_sites() -> None:
    prefix = version(PromptKind.PREFIX, {"enc.self": 2, "dec.self": 3, "dec.cross": 4})
    request = encoder_decoder_input("r", given(prefix, 5, 1), (0,))
    assert request.segments == (
        Segment(prompt_digest="p", num_virtual_tokens=3, num_cross_tokens=4, num_encoder_tokens=2),
    )
    assert request.source == Source(id="r", token_ids=(5, 1))
    cross = encoder_decoder_input("r", given(version(PromptKind.PREFIX, {"dec.cross": 4}), 5, 1), (0,))
    assert cross.segments == (Segment(prompt_digest="p", num_cross_tokens=4),)


def test_rows_of_soft_prompts_belong_to_the_source_and_to_the_decoder() -> None:
    both = version(PromptKind.SOFT, {"enc.embeds": 2, "dec.embeds": 3})
    request = encoder_decoder_input("r", given(both, 5, 1), (0,))
    assert request.segments == (Segment(prompt_digest="p", num_virtual_tokens=3, is_kept=False),)
    assert request.source == Source(id="r", token_ids=(5, 1), prompt_digest="p", num_virtual_tokens=2)
    encoder = encoder_decoder_input("r", given(version(PromptKind.SOFT, {"enc.embeds": 2}), 5, 1), (0,))
    assert encoder.segments == ()


def test_a_source_is_bounded_by_the_encoder_alone() -> None:
    check_source(Source(id="s", token_ids=(1,) * 12), GEOMETRY, None)
    soft = Source(id="s", token_ids=(1,) * 11, prompt_digest="p", num_virtual_tokens=2)
    with pytest.raises(RequestTooLong, match=r"2 virtual .* takes 12; .* truncate to at most 10") as refused:
        check_source(soft, GEOMETRY, None)
    assert (refused.value.param, refused.value.limit) == ("inputs", 12)
    with pytest.raises(InvalidRequest, match="own text has 5 tokens") as cut:
        check_source(Source(id="s", token_ids=(1,) * 5), GEOMETRY, 4)
    assert cut.value.param == "parameters.truncate"
