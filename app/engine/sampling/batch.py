"""The sampling batch of one step: its rows, grouped by how they are drawn."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from app.engine.sampling.draws import draw_filtered, draw_plain, draw_shaped
from app.engine.sampling.inputs import SamplingInput
from app.engine.sampling.parameters import Parameters, table
from app.models.transfer import to_device
from app.request import SamplingParams

Draw = Callable[[Tensor, Parameters], Tensor]

# Rows that a GPU draws at once: whole rows are sorted there, which takes some 60 bytes a token.
_MOST_ROWS = 32


@dataclass(frozen=True, slots=True)
class SamplingBatch:
    """Sampling inputs of N rows; the parameters of those that are drawn are on the device."""

    inputs: Sequence[SamplingInput]
    drawn: tuple[tuple[Draw, Tensor, Parameters], ...]  # each with its rows `[n]`; the others are greedy

    @classmethod
    def of(cls, inputs: Sequence[SamplingInput], device: torch.device) -> "SamplingBatch":
        """Build the batch, once a step, by one copy to the device."""
        groups = _groups(inputs, len(inputs) if device.type == "cpu" else _MOST_ROWS)
        rows = [row for _, group in groups for row in group]
        if not rows:
            return cls(inputs, ())
        vectors = to_device(np.vstack([rows, table([inputs[row] for row in rows])]), device)
        parts = torch.split(vectors, [len(group) for _, group in groups], dim=1)
        return cls(
            inputs,
            tuple(
                (draw, part[0].long(), Parameters.of([inputs[row].params for row in group], part[1:]))
                for (draw, group), part in zip(groups, parts, strict=True)
            ),
        )


def _groups(inputs: Sequence[SamplingInput], most: int) -> list[tuple[Draw, list[int]]]:
    """Return the drawn rows by their draw, at most so many together."""
    rows_of: dict[Draw, list[int]] = {}
    for row, given in enumerate(inputs):
        if given.params.do_sample:
            rows_of.setdefault(_draw_of(given.params), []).append(row)
    return [
        (draw, rows[begin : begin + most])
        for draw, rows in rows_of.items()
        for begin in range(0, len(rows), most)
    ]


def _draw_of(params: SamplingParams) -> Draw:
    """Return the draw by the row's own parameters alone, never by its neighbours'."""
    if params.has_filter:
        return draw_filtered
    return draw_shaped if params.has_shape else draw_plain
