"""Parameters of the rows that are drawn, as vectors on the device. Shapes: n rows.

Each row gets one uniform number from a counter-based hash of (seed, sample index, position in the request),
so that a seed gives the same draws whatever else is in the batch.
"""

from collections.abc import Sequence
from operator import attrgetter
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from app.engine.sampling.inputs import SamplingInput
from app.request import SamplingParams

_UINT64 = 0xFFFFFFFFFFFFFFFF


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
    def of(cls, params: Sequence[SamplingParams], vectors: Tensor) -> "Parameters":
        """Name the rows of `vectors [9, n]`, a `table` on the device."""
        flags = any(each.top_h for each in params), any(each.has_shape for each in params)
        return cls._make([*vectors[:, :, None].unbind(), *flags])

    def take(self, rows: Tensor) -> "Parameters":
        """Return those of some rows."""
        *vectors, has_top_h, has_shape = self
        return Parameters._make([*(vector[rows] for vector in vectors), has_top_h, has_shape])


_COLUMNS = attrgetter(*Parameters._fields[:8])


def table(inputs: Sequence[SamplingInput]) -> NDArray[np.float64]:
    """Return the parameters of the rows `[9, n]`, in the order of the vectors of `Parameters`."""
    params = [given.params for given in inputs]
    columns = np.array([_COLUMNS(each) for each in params], dtype=np.float64).T
    drawn = uniforms(
        [each.seed for each in params],
        [each.sample_index for each in params],
        [given.position for given in inputs],
    )
    return np.vstack([columns, drawn])


def uniforms(
    seeds: Sequence[int], sample_indices: Sequence[int], positions: Sequence[int]
) -> NDArray[np.float64]:
    """Return numbers in [0, 1) `[n]` that depend on these three only (splitmix64, Steele et al. 2014)."""
    state = np.zeros(len(seeds), dtype=np.uint64)
    for values in (seeds, sample_indices, positions):
        state = _mix(state ^ np.array([value & _UINT64 for value in values], dtype=np.uint64))
    return (state >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mix(state: NDArray[np.uint64]) -> NDArray[np.uint64]:
    state = state + np.uint64(0x9E3779B97F4A7C15)
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))
