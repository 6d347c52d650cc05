"""Logits processors: bias, penalties, rules and masks of grammars, applied to all rows at once.

The order is that of `transformers`, and so is what they act on: the log-probabilities of beams' rows, the
logits of all others. Shapes: N rows, V vocabulary, E single logits.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from app.engine.sampling.inputs import LogitsEdits, SamplingInput
from app.engine.sampling.token_masks import PackedMask
from app.request import BAN

_Number = TypeVar("_Number", np.int64, np.float64)
_NEVER = float("-inf")
_NO_EDITS = LogitsEdits()


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
    rows = torch.tensor(changed, device=logits.device)
    own = logits[rows]
    beams = [row for row in changed if inputs[row].num_candidates]
    if beams:
        logits[beams] -= normaliser[beams, None]
    _edit(logits, inputs)
    if masks:
        _mask(logits, masks)
    yield
    logits[rows] = own


def _edit(logits: Tensor, inputs: Sequence[SamplingInput]) -> None:
    edits = [given.edits or _NO_EDITS for given in inputs]
    for kind, processor in _PROCESSORS:
        ids = [getattr(each, kind) for each in edits]
        if any(map(len, ids)):
            processor(_Entries.of(logits, ids), inputs, edits)


@dataclass(frozen=True, slots=True)
class _Entries:
    """Single logits, which the processors change in place."""

    logits: Tensor  # [N, V]
    rows: NDArray[np.int64]  # [E]
    places: Tensor  # [E]; in the flat logits
    has_logit: NDArray[np.bool_]  # of all given ids: a base's own lists may hold others

    @classmethod
    def of(cls, logits: Tensor, ids: Sequence[NDArray[np.int64]]) -> "_Entries":
        """Return the entries of each row's ids."""
        flat = np.concatenate(ids)
        rows = np.repeat(np.arange(len(ids)), [len(each) for each in ids])
        has_logit = flat < logits.shape[1]
        places = rows * logits.shape[1] + flat
        if not has_logit.all():
            rows, places = rows[has_logit], places[has_logit]
        return cls(logits, rows, torch.from_numpy(places).to(logits.device), has_logit)

    def per_id(self, values: Sequence[NDArray[_Number]]) -> NDArray[_Number]:
        """Return `values`, one for each id of each row, as `[E]`."""
        return np.concatenate(values)[self.has_logit]

    def per_row(self, values: Sequence[float]) -> NDArray[np.float64]:
        """Return `values`, one for each row, as `[E]`."""
        return np.array(values)[self.rows]

    def get(self) -> Tensor:
        """Return a copy of the logits `[E]`."""
        return self.logits.view(-1)[self.places]

    def tensor(self, values: NDArray[np.float64]) -> Tensor:
        """Return values `[E]` in the dtype of the logits, and on their device."""
        return torch.from_numpy(values).to(self.logits)

    def put(self, scores: Tensor) -> None:
        """Replace the logits by `[E]`, or all by one."""
        self.logits.view(-1)[self.places] = scores

    def add(self, values: NDArray[np.float64]) -> None:
        """Add `[E]`, one after the other where an entry occurs more than once."""
        self.logits.view(-1).index_put_((self.places,), self.tensor(values), accumulate=True)


_Inputs = Sequence[SamplingInput]
_Edits = Sequence[LogitsEdits]


def _add_bias(at: _Entries, inputs: _Inputs, edits: _Edits) -> None:
    bias = at.per_id([each.bias for each in edits])
    at.add(np.where(bias <= BAN, _NEVER, bias))


def _add_completing_bias(at: _Entries, inputs: _Inputs, edits: _Edits) -> None:
    at.add(at.per_id([each.completing_bias for each in edits]))


def _favour_prompt(at: _Entries, inputs: _Inputs, edits: _Edits) -> None:
    _scale(at, 1 / at.per_row([each.encoder_repetition_penalty for each in edits]))


def _penalise(at: _Entries, inputs: _Inputs, edits: _Edits) -> None:
    """Apply the repetition penalty as transformers does, the others as OpenAI."""
    params = [given.params for given in inputs]
    _scale(at, at.per_row([each.repetition_penalty for each in params]))
    counts = at.per_id([each.counts for each in edits])
    frequency = at.per_row([each.frequency_penalty for each in params]) * counts
    at.add(-(frequency + at.per_row([each.presence_penalty for each in params]) * (counts > 0)))


def _scale(at: _Entries, penalties: NDArray[np.float64]) -> None:
    """Apply CTRL's penalty (Keskar et al. 2019)."""
    scores, penalty = at.get(), at.tensor(penalties)
    at.put(torch.where(scores < 0, scores * penalty, scores / penalty))


def _ban(at: _Entries, inputs: _Inputs, edits: _Edits) -> None:
    at.put(at.logits.new_tensor(_NEVER))


def _force(at: _Entries, inputs: _Inputs, edits: _Edits) -> None:
    at.logits[at.rows] = _NEVER
    at.put(at.logits.new_tensor(0.0))


def _hasten_end(at: _Entries, inputs: _Inputs, edits: _Edits) -> None:
    scores = at.get()
    gain = scores.abs() * at.tensor(at.per_row([each.end_gain for each in edits]))
    at.put(scores + gain.masked_fill(~scores.isfinite(), 0.0))


# By the field of LogitsEdits that lists the ids.
_PROCESSORS: tuple[tuple[str, Callable[[_Entries, _Inputs, _Edits], None]], ...] = (
    ("bias_ids", _add_bias),
    ("completing_ids", _add_completing_bias),
    ("prompt_ids", _favour_prompt),
    ("seen_ids", _penalise),
    ("banned_ids", _ban),
    ("forced_ids", _force),
    ("end_ids", _hasten_end),
    ("suppressed_ids", _ban),
)


def _mask(logits: Tensor, masks: Mapping[int, PackedMask]) -> None:
    """Ban in place what the masks don't allow, ids beyond their ends included."""
    rows = list(masks)
    packed = torch.from_numpy(np.stack(list(masks.values())).view(np.uint8)).to(logits.device)
    bits = torch.arange(8, dtype=torch.uint8, device=logits.device)
    allowed = ((packed[:, :, None] >> bits) & 1).flatten(1).bool()  # [rows, ceil(V / 32) * 32]
    allowed = functional.pad(allowed, (0, logits.shape[1] - allowed.shape[1]))
    logits[rows] = logits[rows].masked_fill(~allowed, _NEVER)
