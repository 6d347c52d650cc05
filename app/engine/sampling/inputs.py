"""Sampling's input and output for one row: plain, picklable data, arrays and numbers only.

Beside them `Sampled`, which stays between the sampler and the runner. Shapes: N rows.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from app.errors import PromptplexError
from app.request import SamplingParams

IdArray = NDArray[np.int64]
FloatArray = NDArray[np.float64]

NO_IDS: IdArray = np.zeros(0, dtype=np.int64)
NO_VALUES: FloatArray = np.zeros(0)


class LogitsEdits(NamedTuple):
    """Changes to one row's logits, in the order in which they are made. Ids without a logit are skipped."""

    bias_ids: IdArray = NO_IDS
    bias: FloatArray = NO_VALUES  # [len(bias_ids)]; `BAN` or less rules out
    completing_ids: IdArray = NO_IDS  # last ids of sequences that have a bias:
    completing_bias: FloatArray = NO_VALUES  # [len(completing_ids)]
    prompt_ids: IdArray = NO_IDS  # each once, more probable by:
    encoder_repetition_penalty: float = 1.0
    seen_ids: IdArray = NO_IDS  # of prompt and answer, each once; penalised
    counts: IdArray = NO_IDS  # [len(seen_ids)]: how often the answer has each
    banned_ids: IdArray = NO_IDS
    forced_ids: IdArray = NO_IDS  # where there are any, no others may come
    end_ids: IdArray = NO_IDS  # more probable by:
    end_gain: float = 0.0  # times the size of their logits
    suppressed_ids: IdArray = NO_IDS  # banned, even if forced


class SamplingInput(NamedTuple):
    """The input of sampling one row's next token. `position` numbers the token within its request."""

    params: SamplingParams
    position: int
    edits: LogitsEdits | None = None
    num_top: int = 0  # most probable tokens to report
    num_candidates: int = 0  # best next tokens to return, instead of choosing one: a beam's row
    is_constrained: bool = False  # a grammar's mask comes beside the batch
    has_late_edits: bool = False  # they depend on a token that isn't known yet, and come in their place

    @property
    def is_bare_greedy(self) -> bool:
        """Whether the most probable token is chosen as the model has it, with nothing more to report."""
        reports = self.num_top or self.num_candidates
        return not (self.params.do_sample or self.edits is not None or reports or self.is_constrained)


class Candidate(NamedTuple):
    """A token that may come next in a beam."""

    token_id: int
    score: float  # its log-probability after all processors, which don't normalise it again
    logprob: float  # the model's own


class SampledToken(NamedTuple):
    """The next token of one sampling item; `is_finite` is False where its logits were not.

    With an `error`, no token may come, and `token_id` means nothing; nor does it where the token `is_late`:
    the row's mask wasn't known in time, and its last token has to be taken again. A beam's row has the best
    `candidates` that may come, and its `token_id` means nothing.
    """

    token_id: int
    logprob: float
    is_finite: bool
    top: tuple[tuple[int, float], ...] = ()  # (id, log-probability), most probable first
    error: PromptplexError | None = None
    is_late: bool = False
    candidates: tuple[Candidate, ...] = ()  # best first


class Sampled(NamedTuple):
    """What was chosen for N rows: on the device at once, and for its reader once the device is done."""

    ids: Tensor  # [N] int64, on the device; that of a row with an error, or one that is late, means nothing
    tokens: Callable[[], tuple[SampledToken, ...]]  # waits for the device
