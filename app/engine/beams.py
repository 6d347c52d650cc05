"""Beam search over one request, as `transformers` has it: which beams go on, and which answers end.

Scores are sums of processed log-probabilities, and natural logarithms. An answer that ends is scored by the
sum divided by its number of tokens to the power of the length penalty.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from app.engine.sampling.inputs import Candidate, SampledToken
from app.request import FinishReason, Hypothesis, Request, TokenScore


@dataclass(frozen=True, slots=True)
class _Node:
    """A token of a beam and the one before it, which beams share as far as they are equal."""

    token: TokenScore
    before: "_Node | None"

    def line(self) -> tuple[TokenScore, ...]:
        """Return all tokens, the first one first."""
        tokens = []
        node: _Node | None = self
        while node is not None:
            tokens.append(node.token)
            node = node.before
        return tuple(reversed(tokens))


class _Beam(NamedTuple):
    score: float
    node: _Node | None  # None: nothing was generated yet


class _Ended(NamedTuple):
    score: float  # after the length penalty
    node: _Node
    finish: FinishReason


class Extension(NamedTuple):
    """A beam that goes on: the number of the beam that it continues, and its next token."""

    parent: int
    token_id: int


class BeamSearch:
    """The beams of one request and its answers so far."""

    def __init__(self, request: Request) -> None:
        self.num_beams = request.sampling.num_beams
        self._length_penalty = request.sampling.length_penalty
        self._early_stopping = request.sampling.early_stopping
        self._stop_ids = request.stop_ids
        self._max_new_tokens = request.max_new_tokens
        self._num_generated = 0
        self._beams = [_Beam(0.0, None)]
        self._ended: list[_Ended] = []  # best first, no more than there are beams

    def advance(self, rows: Sequence[SampledToken]) -> list[Extension]:
        """Take the candidates of every beam; return the beams that go on, best first; none: it is over.

        Each row has at least as many candidates as there are beams and stop ids, or all that may come.
        """
        self._num_generated += 1
        ranked = sorted(
            (
                (beam.score + candidate.score, parent, candidate)
                for parent, (beam, row) in enumerate(zip(self._beams, rows, strict=True))
                for candidate in row.candidates
            ),
            key=lambda each: -each[0],
        )
        extensions: list[Extension] = []
        beams: list[_Beam] = []
        for rank, (score, parent, candidate) in enumerate(ranked):
            finish = self._finish(candidate.token_id)
            if finish is None:
                if len(beams) < self.num_beams:
                    beams.append(_Beam(score, self._node(parent, candidate, rows[parent])))
                    extensions.append(Extension(parent, candidate.token_id))
            elif rank < self.num_beams:
                self._end(score, self._node(parent, candidate, rows[parent]), finish)
        self._beams = beams
        return extensions if beams and self._may_improve() else []

    def hypotheses(self) -> tuple[Hypothesis, ...]:
        """Return the answers that ended, best first."""
        return tuple(
            Hypothesis(tokens=each.node.line(), score=each.score, finish=each.finish) for each in self._ended
        )

    def _finish(self, token_id: int) -> FinishReason | None:
        if token_id in self._stop_ids:
            return FinishReason.EOS
        return FinishReason.LENGTH if self._num_generated >= self._max_new_tokens else None

    def _node(self, parent: int, candidate: Candidate, row: SampledToken) -> _Node:
        token = TokenScore(candidate.token_id, candidate.logprob, row.top)
        return _Node(token, self._beams[parent].node)

    def _end(self, score: float, node: _Node, finish: FinishReason) -> None:
        self._ended.append(_Ended(self._penalised(score, self._num_generated), node, finish))
        self._ended.sort(key=lambda each: -each.score)
        del self._ended[self.num_beams :]

    def _penalised(self, score: float, length: int) -> float:
        return score / math.pow(length, self._length_penalty)

    def _may_improve(self) -> bool:
        """Return whether the best beam may still become an answer better than the worst one there is.

        Unless early stopping is "never", it is compared as if it ended now, which is a heuristic of
        `transformers`: with a positive length penalty it might become better yet.
        """
        if len(self._ended) < self.num_beams:
            return True
        if self._early_stopping is True:
            return False
        is_longest_best = self._early_stopping == "never" and self._length_penalty > 0
        length = self._max_new_tokens if is_longest_best else self._num_generated
        return self._penalised(self._beams[0].score, length) > self._ended[-1].score
