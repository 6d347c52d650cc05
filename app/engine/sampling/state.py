"""The sampling state of one sequence: prepared once, and extended with each token."""

from collections.abc import Sequence
from copy import copy
from dataclasses import replace

import numpy as np

from app.engine.sampling.inputs import LogitsEdits, SamplingInput
from app.engine.sampling.token_history import TokenHistory
from app.engine.sampling.token_rules import RowRules
from app.request import SamplingParams


class SamplingState:
    """Kept with a sequence through preemptions; makes the input of each of its tokens."""

    def __init__(
        self,
        params: SamplingParams,
        prompt: Sequence[int],
        num_top: int = 0,
        *,
        num_candidates: int = 0,
        inputs: Sequence[int] | None = None,
    ) -> None:
        """`prompt` are the ids of its text, those of resident segments included; `inputs` an encoder's."""
        looks_back = params.has_penalty or params.rules is not None
        self._history = TokenHistory(prompt, inputs) if looks_back else None
        self._rules = RowRules(params.rules) if params.rules is not None else None
        self._edits = _bias(params) if params.logit_bias else LogitsEdits() if looks_back else None
        is_bare = not params.logit_bias and params.rules is None
        self._params = params if is_bare else replace(params, logit_bias=(), rules=None)
        self._num_top = num_top
        self._num_candidates = num_candidates

    def fork(self) -> "SamplingState":
        """Return another one, which goes on by itself."""
        twin = copy(self)
        twin._history = None if self._history is None else self._history.fork()
        return twin

    def accept(self, token_id: int) -> None:
        """Take a generated token."""
        if self._history is not None:
            self._history.append(token_id)

    def input(self, position: int, *, is_constrained: bool = False) -> SamplingInput:
        """Return what choosing token number `position` needs; a grammar's mask comes beside it."""
        edits = self._edits if self._history is None else self.edits()
        return SamplingInput(
            self._params, position, edits, self._num_top, self._num_candidates, is_constrained
        )

    def input_ahead(self, position: int, *, is_constrained: bool = False) -> SamplingInput:
        """Return the same before the token in front of it is known: `edits` are taken when it is."""
        looks_back = self._history is not None
        edits = LogitsEdits() if looks_back else self._edits
        return SamplingInput(
            self._params, position, edits, self._num_top, self._num_candidates, is_constrained, looks_back
        )

    def edits(self) -> LogitsEdits | None:
        """Return the changes to the logits of the token after all that were accepted."""
        edits, history = self._edits, self._history
        if edits is not None and history is not None:
            if self._params.has_penalty:
                edits = edits._replace(seen_ids=history.seen_ids, counts=history.counts)
            if self._rules is not None:
                edits = self._rules.add_to(edits, history)
        return edits


def _bias(params: SamplingParams) -> LogitsEdits:
    ids, values = zip(*params.logit_bias, strict=True)
    return LogitsEdits(bias_ids=np.array(ids), bias=np.array(values))
