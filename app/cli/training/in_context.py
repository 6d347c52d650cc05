"""A document in context beside its cartridge, by the engine that serves both: answers, time, memory."""

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

from app.cli.training.answerer import GREEDY, LocalServer
from app.prompt import Prompt, TaskVersion
from app.serving.generation_request import GenerationRequest
from app.text.template import parse_template
from app.training.base import TrainingBase
from app.training.document import Document
from app.training.encoding import source_of
from app.training.examples import Example


@dataclass(frozen=True, slots=True, kw_only=True)
class FirstToken:
    """Seconds to the first token of lone requests that take turns: medians, and that of the pairs' ratios."""

    cartridge: float
    in_context: float
    ratio: float


@dataclass(frozen=True, slots=True, kw_only=True)
class InContext:
    """Answers with the whole document before each question, as an `Answerer`."""

    server: LocalServer
    base: TrainingBase
    document: Document
    template: str | None  # the task's
    max_new_tokens: int

    def fits(self, examples: Sequence[Example]) -> bool:
        """Return whether the base has positions for the document, each question and an answer."""
        longest = max(len(self._ids(example)) for example in examples)
        return longest + self.max_new_tokens <= self.base.geometry.max_positions

    def answers(self, prompt: Prompt | None, examples: Sequence[Example]) -> list[str]:
        """Return the answer to each question; there is no prompt but the document."""
        assert prompt is None, "the document stands in its place"
        requests = [self._request(example, self.max_new_tokens) for example in examples]
        return [result.text for result in self.server.results(None, requests)]

    def first_token(self, cartridge: TaskVersion | None, examples: Sequence[Example]) -> FirstToken:
        """Measure a request of each kind by turns, for each of two or more questions.

        The first pair isn't counted: it makes the cartridge resident.
        """
        pairs = [
            (
                self._seconds(cartridge, self._behind_cartridge(example)),
                self._seconds(None, self._request(example, 1)),
            )
            for example in examples
        ][1:]
        return FirstToken(
            cartridge=statistics.median(pair[0] for pair in pairs),
            in_context=statistics.median(pair[1] for pair in pairs),
            ratio=statistics.median(resident / whole for resident, whole in pairs),
        )

    def _seconds(self, version: TaskVersion | None, request: GenerationRequest) -> float:
        began = time.perf_counter()
        self.server.results(version, [request])
        return time.perf_counter() - began

    def _behind_cartridge(self, example: Example) -> GenerationRequest:
        return GenerationRequest(
            inputs=example.inputs,
            messages=example.messages or None,
            parameters={**GREEDY, "max_new_tokens": 1},
        )

    def _request(self, example: Example, max_new_tokens: int) -> GenerationRequest:
        return GenerationRequest(
            token_ids=self._ids(example), parameters={**GREEDY, "max_new_tokens": max_new_tokens}
        )

    def _ids(self, example: Example) -> tuple[int, ...]:
        source = source_of(example, self.base, parse_template(self.template))
        return (*self.document.ids, *self.document.without_beginning(source))
