"""The sampler in native code (app/models/cpu/native/sampling.h): one call for all rows of a step, on a CPU.

It gives the tokens that the reference gives (torch_sampler.py): exponentials and logarithms are those of
torch's own library, and sums are added up in torch's order. Rows of a rarer kind, and those that rounding
would decide, are left to the reference. Shapes: N rows, V vocabulary, k most probable tokens.
"""

import ctypes
from collections.abc import Mapping, Sequence
from enum import IntEnum
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from app.engine.sampling import torch_sampler
from app.engine.sampling.inputs import SampledToken, SamplingInput
from app.engine.sampling.logits_processors import edits_of
from app.engine.sampling.parameters import uniforms
from app.engine.sampling.token_masks import PackedMask
from app.models.cpu.building import NotBuilt
from app.models.cpu.library import load_library
from app.request import SamplingParams

_POINTER, _LONG, _INT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
_ARGUMENTS: list[Any] = [
    *(_POINTER, _INT, _LONG, _LONG, _POINTER, _POINTER, _LONG),
    *(_POINTER, _POINTER, _LONG, _POINTER, _POINTER, _POINTER, _INT),
]
_DTYPES = (torch.float32, torch.bfloat16)
_FEWEST_TOKENS = 8  # torch adds up shorter rows in another order
_MOST_CANDIDATES = 1024  # as many as the reference looks at before it sorts a row

# The structs of native/sampling.h.
_ROW = np.dtype(
    [
        *((name, np.float64) for name in ("uniform", "temperature", "top_p", "min_p")),
        *((name, np.int64) for name in ("top_k", "num_top", "draw", "mask", "mask_words", "token")),
        ("logprob", np.float64),
    ]
)
_EDIT = np.dtype([(name, np.int64) for name in ("operation", "begin", "ids", "values")])


class _Draw(IntEnum):
    """How a row's token is chosen; as in native/sampling.h."""

    GREEDY = 0
    FILTERED = 1
    PLAIN = 2

    @classmethod
    def of(cls, params: SamplingParams) -> "_Draw":
        if not params.do_sample:
            return cls.GREEDY
        return cls.FILTERED if params.has_filter else cls.PLAIN


class NativeSampler:
    """The native function, and what it takes and gives as records."""

    def __init__(
        self, library: ctypes.CDLL, exponentials: int, logarithms: int, softmax_exp: int | None
    ) -> None:
        """The addresses of vector functions of MKL and of Sleef; without the latter, no plain draws."""
        choose = library.promptplex_sample
        choose.argtypes, choose.restype = _ARGUMENTS, None
        self._choose = choose
        self._functions = exponentials, logarithms, softmax_exp

    def sample(
        self, logits: Tensor, inputs: Sequence[SamplingInput], masks: Mapping[int, PackedMask]
    ) -> list[SampledToken | None]:
        """Choose the tokens of the rows of `logits [N, V]`; None for those that are left to the reference."""
        count, vocabulary = logits.shape
        rows = _rows(inputs, masks)
        if (wanted := rows["num_top"].min(initial=0)) < 0:
            raise ValueError(f"num_top is {wanted}, but must be 0 or more: how many tokens to report")
        np.minimum(rows["num_top"], vocabulary, out=rows["num_top"])
        edits = _Edits.of(inputs, vocabulary)
        most = int(rows["num_top"].max(initial=0))
        top_ids, top_values = np.empty((count, most), np.int64), np.empty((count, most), np.float32)
        self._choose(
            logits.data_ptr(),
            logits.dtype == torch.bfloat16,
            count,
            vocabulary,
            rows.ctypes.data,
            edits.records.ctypes.data,
            len(edits.records),
            top_ids.ctypes.data,
            top_values.ctypes.data,
            most,
            *self._functions,
            torch.get_num_threads(),
        )
        chosen = zip(inputs, rows["token"].tolist(), rows["logprob"].tolist(), strict=True)
        tokens: list[SampledToken | None] = [
            SampledToken(token_id, logprob, True, (), None, given.is_constrained and row not in masks)
            if token_id >= 0 and _is_for_us(given.params, given.num_candidates)
            else None
            for row, (given, token_id, logprob) in enumerate(chosen)
        ]
        return _with_top(tokens, rows["num_top"], top_ids, top_values) if most else tokens


def _is_for_us(params: SamplingParams, num_candidates: int) -> bool:
    if num_candidates or not params.do_sample:
        return not num_candidates
    return not params.has_shape and not params.top_h and params.top_k <= _MOST_CANDIDATES


def _rows(inputs: Sequence[SamplingInput], masks: Mapping[int, PackedMask]) -> NDArray[np.void]:
    """Return a record for each row."""
    params = [given.params for given in inputs]
    rows = np.zeros(len(inputs), dtype=_ROW)
    rows["num_top"] = [given.num_top for given in inputs]
    if any(each.do_sample for each in params):
        for name in ("temperature", "top_p", "min_p", "top_k"):
            rows[name] = [getattr(each, name) for each in params]
        rows["draw"] = [_Draw.of(each) for each in params]
        rows["uniform"] = uniforms(
            [each.seed for each in params],
            [each.sample_index for each in params],
            [given.position for given in inputs],
        )
    for row, mask in masks.items():
        rows[row]["mask"], rows[row]["mask_words"] = mask.ctypes.data, len(mask)
    return rows


class _Edits(NamedTuple):
    """Records of edits, and the arrays that they point to."""

    records: NDArray[np.void]
    arrays: list[NDArray[np.generic]]

    @classmethod
    def of(cls, inputs: Sequence[SamplingInput], vocabulary: int) -> "_Edits":
        """Return those of the rows."""
        edits = edits_of(inputs, vocabulary)
        records = np.zeros(len(edits), dtype=_EDIT)
        arrays: list[NDArray[np.generic]] = []
        for record, edit in zip(records, edits, strict=True):
            begin = np.searchsorted(edit.rows, np.arange(len(inputs) + 1))
            arrays += (begin, edit.ids, edit.values)
            addresses = (array.ctypes.data for array in (begin, edit.ids, edit.values))
            record["operation"] = edit.operation
            record["begin"], record["ids"], record["values"] = addresses
        return cls(records, arrays)


def _with_top(
    tokens: list[SampledToken | None],
    counts: NDArray[np.int64],
    ids: NDArray[np.int64],
    logprobs: NDArray[np.float32],
) -> list[SampledToken | None]:
    """Return the tokens with their rows' most probable ones: the first `counts [N]` of those given."""
    reported = zip(tokens, counts.tolist(), ids.tolist(), logprobs.tolist(), strict=True)
    return [
        token and token._replace(top=tuple(zip(ids[:count], logprobs[:count], strict=True)))
        for token, count, ids, logprobs in reported
    ]


def native_sampler_for(logits: Tensor) -> NativeSampler | None:
    """Return the native sampler where it applies and exists, else None."""
    if logits.device.type != "cpu" or logits.dtype not in _DTYPES or not logits.is_contiguous():
        return None
    if logits.shape[1] < _FEWEST_TOKENS:
        return None
    return native_sampler()


@cache
def native_sampler() -> NativeSampler | None:
    """Return the native sampler, else None; the first call may compile it."""
    try:
        return load_native_sampler()
    except NotBuilt:
        return None


def load_native_sampler() -> NativeSampler:
    """Return the sampler, after a comparison with the reference. Raise NotBuilt: there is none here."""
    try:
        torch_library = ctypes.CDLL(str(Path(torch.__file__).with_name("lib") / "libtorch_cpu.so"))
        exponentials, logarithms = (_address(torch_library, name) for name in ("vmsExp", "vmsLn"))
    except (OSError, AttributeError) as error:
        raise NotBuilt(f"this torch doesn't have MKL's vector functions ({error})") from error
    library = load_library()
    if torch.backends.cpu.get_cpu_capability() == "AVX512" and hasattr(torch_library, _SOFTMAX_EXP):
        softmax_exp = _address(torch_library, _SOFTMAX_EXP)
        sampler = NativeSampler(library, exponentials, logarithms, softmax_exp)
        if _agrees(sampler, [SamplingParams(do_sample=True), *_CHECKED]):
            return sampler
    sampler = NativeSampler(library, exponentials, logarithms, None)
    if not _agrees(sampler, _CHECKED):
        raise NotBuilt("the compiled sampler differs from torch's operations")
    return sampler


def _address(library: ctypes.CDLL, name: str) -> int:
    return ctypes.cast(getattr(library, name), _POINTER).value or 0


# Without AVX-512 torch's softmax has another one, and adds up in another order.
_SOFTMAX_EXP = "Sleef_expf16_u10"
_CHECKED = (
    SamplingParams(),
    SamplingParams(do_sample=True, top_k=20),
    SamplingParams(do_sample=True, top_p=0.8, temperature=0.7),
    SamplingParams(do_sample=True, min_p=0.1),
)


def _agrees(sampler: NativeSampler, checked: Sequence[SamplingParams]) -> bool:
    """Compare with the reference, to the last bit: another torch may add up in another order."""
    generator = torch.Generator().manual_seed(0)
    inputs = [SamplingInput(params, position, num_top=3) for position in range(4) for params in checked]
    for vocabulary, spread in ((300, 2.0), (5003, 0.5), (70001, 3.0)):
        logits = torch.randn(len(inputs), vocabulary, generator=generator).mul(spread * 16).round() / 16
        for count in (len(inputs), 1):
            theirs = torch_sampler.sample(logits[:count], inputs[:count], {})
            ours = sampler.sample(logits[:count], inputs[:count], {})
            if any(mine not in (None, other) for mine, other in zip(ours, theirs, strict=True)):
                return False
    return True
