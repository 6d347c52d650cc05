"""Logits processors: bias, penalties, rules and masks of grammars, applied to all rows at once.

The order is that of `transformers`, and so is what they act on: the log-probabilities of beams' rows, the
logits of all others. Shapes: N rows, V vocabulary, E single logits.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from enum import IntEnum
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from app.engine.sampling.inputs import FloatArray, IdArray, LogitsEdits, SamplingInput
from app.engine.sampling.token_masks import PackedMask
from app.models.transfer import packed_to_device, to_device
from app.request import BAN

_Number = TypeVar("_Number", np.int64, np.float64)
_NEVER = float("-inf")
_NO_EDITS = LogitsEdits()


class Operation(IntEnum):
    """What becomes of a logit x, by a value v; as in native/sampling.h."""

    ADD = 0  # x + v, one after the other where an id occurs more than once
    SCALE = 1  # x * v below 0, else x / v: CTRL's penalty (Keskar et al. 2019)
    SET = 2  # v
    FORCE = 3  # v, and all other logits of the row are ruled out
    GAIN = 4  # x + |x| * v where that is finite


class Edit(NamedTuple):
    """One operation on single logits, of any rows."""

    operation: Operation
    rows: IdArray  # [E]; in order
    ids: IdArray  # [E]
    values: NDArray[np.float32]  # [E]


def edits_of(inputs: Sequence[SamplingInput], vocabulary: int) -> list[Edit]:
    """Return what the rows' inputs change, in order. Ids without a logit are skipped."""
    if all(given.edits is None for given in inputs):
        return []
    edits = [given.edits or _NO_EDITS for given in inputs]
    found = []
    for kind, processor in _PROCESSORS:
        ids = [getattr(each, kind) for each in edits]
        if any(map(len, ids)):
            entries = _Entries.of(ids, vocabulary)
            found += [
                Edit(operation, entries.rows, entries.ids, values.astype(np.float32))
                for operation, values in processor(entries, inputs, edits)
            ]
    return found


@contextmanager
def processed(
    logits: Tensor, normaliser: Tensor, inputs: Sequence[SamplingInput], masks: Mapping[int, PackedMask]
) -> Iterator[None]:
    """Change `logits [N, V]` in place by the rows' inputs and some rows' masks; put them back at the end.

    Less `normaliser [N]`, logits are log-probabilities.
    """
    changed = [
        row
        for row, given in enumerate(inputs)
        if given.edits is not None or given.num_candidates or row in masks
    ]
    if not changed:
        yield
        return
    edits = edits_of(inputs, logits.shape[1])
    rows, beams, masked, *places = packed_to_device(
        [
            np.array(changed),
            np.array([row for row in changed if inputs[row].num_candidates], dtype=np.int64),
            np.array([*masks], dtype=np.int64),
            *(edit.rows * logits.shape[1] + edit.ids for edit in edits),
        ],
        logits.device,
    )
    values = packed_to_device([edit.values for edit in edits], logits.device)
    own = logits[rows]
    if len(beams):
        logits[beams] -= normaliser[beams, None]
    for edit, at, each in zip(edits, places, values, strict=True):
        _apply(edit.operation, logits, at, each)
    if masks:
        _mask(logits, masked, np.stack([*masks.values()]))
    yield
    logits[rows] = own


def _apply(operation: Operation, logits: Tensor, places: Tensor, values: Tensor) -> None:
    """Change `logits [N, V]` in place, at `places [E]` of all their numbers."""
    flat = logits.view(-1)
    if operation is Operation.ADD:
        # Ids were checked on the host: `index_put_` would wait for the device to check them again.
        torch._index_put_impl_(flat, (places,), values, accumulate=True, unsafe=True)
        return
    if operation is Operation.FORCE:
        logits.index_fill_(0, places // logits.shape[1], _NEVER)
    scores = flat[places]
    if operation is Operation.SCALE:
        values = torch.where(scores < 0, scores * values, scores / values)
    elif operation is Operation.GAIN:
        values = scores + (scores.abs() * values).masked_fill(~scores.isfinite(), 0.0)
    flat[places] = values


class _Entries(NamedTuple):
    """Single logits of the rows."""

    rows: IdArray  # [E]
    ids: IdArray  # [E]
    has_logit: NDArray[np.bool_]  # of all given ids: a base's own lists may hold others

    @classmethod
    def of(cls, ids: Sequence[IdArray], vocabulary: int) -> "_Entries":
        """Return the entries of each row's ids."""
        flat = np.concatenate(ids)
        rows = np.repeat(np.arange(len(ids)), [len(each) for each in ids])
        has_logit = (flat >= 0) & (flat < vocabulary)
        return cls(rows[has_logit], flat[has_logit], has_logit)

    def per_id(self, values: Sequence[NDArray[_Number]]) -> NDArray[_Number]:
        """Return `values`, one for each id of each row, as `[E]`."""
        return np.concatenate(values)[self.has_logit]

    def per_row(self, values: Sequence[float]) -> FloatArray:
        """Return `values`, one for each row, as `[E]`."""
        return np.array(values, dtype=np.float64)[self.rows]

    def same(self, value: float) -> FloatArray:
        """Return one value as `[E]`."""
        return np.full(len(self.ids), value)


_Inputs = Sequence[SamplingInput]
_Edits = Sequence[LogitsEdits]
_Changes = tuple[tuple[Operation, FloatArray], ...]  # with a value for each entry


def _add_bias(at: _Entries, inputs: _Inputs, edits: _Edits) -> _Changes:
    bias = at.per_id([each.bias for each in edits])
    return ((Operation.ADD, np.where(bias <= BAN, _NEVER, bias)),)


def _add_completing_bias(at: _Entries, inputs: _Inputs, edits: _Edits) -> _Changes:
    return ((Operation.ADD, at.per_id([each.completing_bias for each in edits])),)


def _favour_prompt(at: _Entries, inputs: _Inputs, edits: _Edits) -> _Changes:
    return ((Operation.SCALE, 1 / at.per_row([each.encoder_repetition_penalty for each in edits])),)


def _penalise(at: _Entries, inputs: _Inputs, edits: _Edits) -> _Changes:
    """Apply the repetition penalty as transformers does, the others as OpenAI."""
    params = [given.params for given in inputs]
    counts = at.per_id([each.counts for each in edits])
    frequency = at.per_row([each.frequency_penalty for each in params]) * counts
    presence = at.per_row([each.presence_penalty for each in params]) * (counts > 0)
    return (
        (Operation.SCALE, at.per_row([each.repetition_penalty for each in params])),
        (Operation.ADD, -(frequency + presence)),
    )


def _ban(at: _Entries, inputs: _Inputs, edits: _Edits) -> _Changes:
    return ((Operation.SET, at.same(_NEVER)),)


def _force(at: _Entries, inputs: _Inputs, edits: _Edits) -> _Changes:
    return ((Operation.FORCE, at.same(0.0)),)


def _hasten_end(at: _Entries, inputs: _Inputs, edits: _Edits) -> _Changes:
    return ((Operation.GAIN, at.per_row([each.end_gain for each in edits])),)


# By the field of LogitsEdits that lists the ids.
_PROCESSORS: tuple[tuple[str, Callable[[_Entries, _Inputs, _Edits], _Changes]], ...] = (
    ("bias_ids", _add_bias),
    ("completing_ids", _add_completing_bias),
    ("prompt_ids", _favour_prompt),
    ("seen_ids", _penalise),
    ("banned_ids", _ban),
    ("forced_ids", _force),
    ("end_ids", _hasten_end),
    ("suppressed_ids", _ban),
)


def _mask(logits: Tensor, rows: Tensor, masks: PackedMask) -> None:
    """Ban in place what the masks of `rows [n]` don't allow, ids beyond their ends included."""
    packed = to_device(masks.view(np.uint8), logits.device)
    bits = torch.arange(8, dtype=torch.uint8, device=logits.device)
    allowed = ((packed[:, :, None] >> bits) & 1).flatten(1).bool()  # [n, ceil(V / 32) * 32]
    allowed = functional.pad(allowed, (0, logits.shape[1] - allowed.shape[1]))
    logits[rows] = logits[rows].masked_fill(~allowed, _NEVER)
