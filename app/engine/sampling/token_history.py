"""The ids of one sequence, kept for penalties and rules as tokens are accepted."""

from collections.abc import Sequence
from copy import copy

import numpy as np

from app.engine.sampling.inputs import IdArray

_ROOM = 16  # tokens, at the least


class TokenHistory:
    """The ids of a prompt and its answer, and how often the answer has each.

    Arrays grow at their ends only, and into larger ones where they are full, so views of them stay as they
    were; `counts` are copied.
    """

    def __init__(self, prompt: Sequence[int], inputs: Sequence[int] | None = None) -> None:
        """`inputs` are those of an encoder beside the prompt; None: the prompt is the input."""
        self.prompt = self._ids = np.array(prompt, dtype=np.int64)  # in order
        self._length = len(prompt)
        self.prompt_ids = np.unique(self.prompt)  # each once
        self.inputs = self.prompt if inputs is None else np.array(inputs, dtype=np.int64)  # in order
        self.input_ids = self.prompt_ids if inputs is None else np.unique(self.inputs)  # each once
        self._seen = self.prompt_ids
        self._counts = np.zeros(len(self._seen), dtype=np.int64)
        self._places = {id_: place for place, id_ in enumerate(self.prompt_ids.tolist())}

    def fork(self) -> "TokenHistory":
        """Return another one with the same ids, which goes on by itself."""
        twin = copy(self)
        twin._ids, twin._seen = self._ids.copy(), self._seen.copy()
        twin._counts, twin._places = self._counts.copy(), self._places.copy()
        return twin

    def append(self, token_id: int) -> None:
        """Take a generated token."""
        place = self._places.setdefault(token_id, len(self._places))
        if place == len(self._seen):
            self._seen, self._counts = _grown(self._seen), _grown(self._counts)
        self._seen[place] = token_id
        self._counts[place] += 1
        if self._length == len(self._ids):
            self._ids = _grown(self._ids)
        self._ids[self._length] = token_id
        self._length += 1

    @property
    def ids(self) -> IdArray:
        """Return all ids in order."""
        return self._ids[: self._length]

    @property
    def generated(self) -> IdArray:
        """Return the generated ids in order."""
        return self._ids[len(self.prompt) : self._length]

    @property
    def seen_ids(self) -> IdArray:
        """Return all ids, each once."""
        return self._seen[: len(self._places)]

    @property
    def counts(self) -> IdArray:
        """Return how often each of `seen_ids` was generated."""
        return self._counts[: len(self._places)].copy()


def _grown(numbers: IdArray) -> IdArray:
    """Return them with half as many zeros behind them, and a few more."""
    return np.concatenate([numbers, np.zeros(len(numbers) // 2 + _ROOM, dtype=np.int64)])
