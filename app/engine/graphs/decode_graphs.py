"""Decode steps by recorded graphs, at bucketed row counts.

The host launches such a step by one call, instead of some ten for each layer. A step with fewer rows than its
bucket has padding rows, which disturb nothing. All other steps run eagerly.

Shapes: R rows of a bucket, n of them a step's own, M the most rows of any bucket, V vocabulary.
"""

from bisect import bisect_left
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from app.engine.graphs.capture import Capture, Work
from app.engine.graphs.decode_inputs import DecodeInputs, Followed
from app.engine.plan import Plan, PlanItem
from app.engine.sampling.inputs import Sampled
from app.engine.sampling.torch_sampler import Choice, greedy, sampled
from app.models.backbone import Backbone

_FINE, _STEP = (1, 2, 4), 8


def bucket_sizes(max_rows: int) -> list[int]:
    """Return the row counts of graphs, the least first: multiples of 8, and beyond 64 of more."""
    sizes, size = [each for each in _FINE if each < max_rows], _STEP
    while size < max_rows:
        sizes.append(size)
        size += max(_STEP, (1 << size.bit_length()) // 8)
    return [*sizes, max_rows]


def is_decode(plan: Plan) -> bool:
    """Return whether all of a plan are single tokens that choose the next ones."""
    return not plan.sources and all(map(_decodes, plan.items))


def _decodes(item: PlanItem) -> bool:
    is_token = item.kv.num_tokens == 1 and item.soft_prompt is None
    return is_token and len(item.sampling) == 1 and not item.score_ids


class Bucket(NamedTuple):
    """What was recorded for steps of up to R rows."""

    num_rows: int
    forward: Work  # from the inputs to the logits
    choose: Work  # from the logits to each row's most probable token


class Replayed(NamedTuple):
    """A forward pass that was launched."""

    logits: Tensor  # [n, V], until the next replay
    choose: Callable[[], Sampled]  # each row's most probable token


class DecodeGraphs:
    """The graphs of one base, over memory that they share, for steps that are launched one after the other.

    What a replay computes stands in that memory until the next one. What outlasts it is copied from there, in
    the order of the device's stream.
    """

    def __init__(self, backbone: Backbone, inputs: DecodeInputs) -> None:
        self.inputs = inputs
        self._backbone = backbone
        self._buckets: list[Bucket] = []  # the smallest first
        self._logits: Tensor  # [M, V]
        self._ids: Tensor  # [M], of the most probable tokens
        self._numbers: Tensor  # [M, ...], what is known of them

    @property
    def sizes(self) -> list[int]:
        """The row counts that were recorded, the least first."""
        return [bucket.num_rows for bucket in self._buckets]

    @torch.inference_mode()
    def record(self, num_rows: int, capture: Capture, example: Tensor) -> None:
        """Record steps of up to so many rows: fewer than those that were recorded before.

        `example [n, V]` are logits. Raises whatever keeps the steps from being recorded.
        """
        if not self._buckets:
            choice = greedy(example)
            self._logits, self._ids, self._numbers = (
                torch.zeros_like(each[:1]).repeat(num_rows, *[1] * (each.ndim - 1))
                for each in (example, choice.ids, choice.numbers)
            )
        bucket = Bucket(
            num_rows,
            capture.record(self._forward(num_rows)),
            capture.record(self._choose(num_rows)),
        )
        self._buckets.insert(0, bucket)

    def _forward(self, num_rows: int) -> Work:
        logits = self._logits[:num_rows]
        positions, metadata = self.inputs.positions(num_rows), self.inputs.metadata(num_rows)

        def forward() -> None:
            embeds = self._backbone.embed(self.inputs.token_ids(num_rows))
            logits.copy_(self._backbone.forward(embeds, positions, metadata))

        return forward

    def _choose(self, num_rows: int) -> Work:
        logits, ids, numbers = (each[:num_rows] for each in (self._logits, self._ids, self._numbers))

        def choose() -> None:
            choice = greedy(logits)
            ids.copy_(choice.ids)
            numbers.copy_(choice.numbers)

        return choose

    def replay(self, items: Sequence[PlanItem], last: Followed | None) -> "Replayed | None":
        """Launch the forward pass of single tokens; None: there is no graph that they fit."""
        place = bisect_left(self._buckets, len(items), key=lambda bucket: bucket.num_rows)
        if place == len(self._buckets) or not self.inputs.fill(items, last, self._buckets[place].num_rows):
            return None
        self._buckets[place].forward()
        return Replayed(self._logits[: len(items)], partial(self._chosen, self._buckets[place], len(items)))

    def _chosen(self, bucket: Bucket, count: int) -> Sampled:
        bucket.choose()
        return sampled(Choice(self._ids[:count].clone(), self._numbers[:count].clone()), count)
