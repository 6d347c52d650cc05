"""Segments that many requests share: what it takes to look at them."""

from collections.abc import Iterator
from dataclasses import replace

import pytest

from app.engine.admissibility import check_tokens
from app.engine.prefixes import prefix_keys
from app.errors import InvalidRequest
from app.models.geometry import model_geometry
from app.request import Request, Segment
from tests.tiny_models import packed_backbone, tiny_model

GEOMETRY = model_geometry(packed_backbone(tiny_model("llama")).model, "tiny")


class Counted(tuple[int, ...]):
    """Ids that count how often they are read."""

    num_reads = 0

    def __iter__(self) -> Iterator[int]:
        Counted.num_reads += 1
        return super().__iter__()


def test_all_labels_of_a_prompt_read_it_no_more_often_than_one() -> None:
    segment = Segment(token_ids=Counted(range(9)), is_kept=False)
    labels = [Request(id=str(number), segments=(segment,), token_ids=(1, number)) for number in range(64)]
    reads, keys = [], []
    for label in labels:
        check_tokens(label, GEOMETRY)
        keys.append(prefix_keys(label, GEOMETRY))
        reads.append(Counted.num_reads)
    assert reads == [reads[0]] * 64
    other = replace(labels[0], segments=(Segment(token_ids=tuple(range(9)), is_kept=False),))
    assert {*keys} == {prefix_keys(other, GEOMETRY)}


@pytest.mark.parametrize("wrong", [-1, GEOMETRY.vocab_size])
def test_ids_of_segments_are_checked_too(wrong: int) -> None:
    request = Request(id="", segments=(Segment(token_ids=(1, wrong, 2)),), token_ids=(1,))
    with pytest.raises(InvalidRequest, match="token ids must be from 0"):
        check_tokens(request, GEOMETRY)
