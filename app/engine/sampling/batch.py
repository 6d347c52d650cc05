"""The sampling batch of one step: its rows, grouped by how they are drawn."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from app.engine.sampling.draws import draw_filtered, draw_plain, draw_shaped
from app.engine.sampling.inputs import SamplingInput
from app.engine.sampling.parameters import Parameters
from app.request import SamplingParams

Draw = Callable[[Tensor, Parameters], Tensor]


@dataclass(frozen=True, slots=True)
class SamplingBatch:
    """Sampling inputs of N rows; the parameters of those that are drawn are on the device."""

    inputs: Sequence[SamplingInput]
    drawn: tuple[tuple[Draw, Tensor, Parameters], ...]  # each with its rows `[n]`; the others are greedy

    @classmethod
    def of(cls, inputs: Sequence[SamplingInput], device: torch.device) -> "SamplingBatch":
        """Build the batch, once a step."""
        rows_of: dict[Draw, list[int]] = {}
        for row, given in enumerate(inputs):
            if given.params.do_sample:
                rows_of.setdefault(_draw_of(given.params), []).append(row)
        drawn = (
            (draw, torch.tensor(rows, device=device), Parameters.of([inputs[row] for row in rows], device))
            for draw, rows in rows_of.items()
        )
        return cls(inputs, tuple(drawn))


def _draw_of(params: SamplingParams) -> Draw:
    """Return the draw by the row's own parameters alone, never by its neighbours'."""
    if params.has_filter:
        return draw_filtered
    return draw_shaped if params.has_shape else draw_plain
