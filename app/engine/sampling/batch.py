"""The sampling inputs of one step as vectors on the device.

Shapes: N rows, of which n are drawn in the same way. Each row gets one uniform number from a counter-based
hash of (seed, sample index, position in the request), so that a seed means the same in any company.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum, auto
from operator import attrgetter
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from app.engine.sampling.inputs import SamplingInput
from app.request import SamplingParams

_MASK = 0xFFFFFFFFFFFFFFFF


class Parameters(NamedTuple):
    """Parameters of n rows: `[n, 1]` each, float64."""

    temperature: Tensor
    top_h: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor
    typical_p: Tensor
    epsilon_cutoff: Tensor
    eta_cutoff: Tensor
    uniform: Tensor  # in [0, 1)
    has_top_h: bool  # in any row
    has_shape: bool  # in any row

    @classmethod
    def of(cls, inputs: Sequence[SamplingInput], device: torch.device) -> "Parameters":
        """Read them from the rows' inputs."""
        params = [given.params for given in inputs]
        columns = np.array([_COLUMNS(each) for each in params], dtype=np.float64).T
        vectors = torch.from_numpy(np.vstack([columns, _uniforms(inputs)])).to(device)[:, :, None]
        flags = any(each.top_h for each in params), any(each.has_shape for each in params)
        return cls._make([*vectors.unbind(), *flags])

    def take(self, rows: Tensor) -> "Parameters":
        """Return those of some rows."""
        *vectors, has_top_h, has_shape = self
        return Parameters._make([*(vector[rows] for vector in vectors), has_top_h, has_shape])


_COLUMNS = attrgetter(*Parameters._fields[:8])


class Draw(Enum):
    """How a row's token is drawn: told from its own parameters only, never from its neighbours'."""

    PLAIN = auto()  # from the whole vocabulary
    FILTERED = auto()  # from the most probable tokens
    SHAPED = auto()  # from what typical-p and the cutoffs leave of the whole vocabulary


@dataclass(frozen=True, slots=True)
class DrawnRows:
    """Rows that are drawn in the same way."""

    draw: Draw
    rows: list[int]
    parameters: Parameters


@dataclass(frozen=True, slots=True)
class SamplingBatch:
    """The N rows of one step that choose a token."""

    inputs: Sequence[SamplingInput]
    drawn: tuple[DrawnRows, ...]  # the others are greedy

    @classmethod
    def of(cls, inputs: Sequence[SamplingInput], device: torch.device) -> "SamplingBatch":
        """Build it once a step."""
        ways: dict[Draw, list[int]] = {}
        for row, given in enumerate(inputs):
            if given.params.do_sample:
                ways.setdefault(_draw_of(given.params), []).append(row)
        return cls(
            inputs,
            tuple(
                DrawnRows(draw, rows, Parameters.of([inputs[row] for row in rows], device))
                for draw, rows in ways.items()
            ),
        )


def _draw_of(params: SamplingParams) -> Draw:
    if params.has_filter:
        return Draw.FILTERED
    return Draw.SHAPED if params.has_shape else Draw.PLAIN


def _uniforms(inputs: Sequence[SamplingInput]) -> NDArray[np.float64]:
    return uniforms(
        np.array([given.params.seed & _MASK for given in inputs], dtype=np.uint64),
        np.array([given.params.sample_index & _MASK for given in inputs], dtype=np.uint64),
        np.array([given.position for given in inputs], dtype=np.uint64),
    )


def uniforms(
    seeds: NDArray[np.uint64], sample_indices: NDArray[np.uint64], positions: NDArray[np.uint64]
) -> NDArray[np.float64]:
    """Return numbers in [0, 1) that depend on these three `[n]` only (splitmix64, Steele et al. 2014)."""
    state = _mix(_mix(_mix(seeds) ^ sample_indices) ^ positions)
    return (state >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mix(state: NDArray[np.uint64]) -> NDArray[np.uint64]:
    state = state + np.uint64(0x9E3779B97F4A7C15)
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))
