"""A request that was admitted: what the engine runs, and how its answer is written."""

from collections.abc import Sequence
from dataclasses import dataclass

from app.prompt import TaskVersion
from app.request import FinishReason, Request, RequestTimings
from app.serving.generation_request import Classification, GenerationResult, OutputToken


@dataclass(frozen=True, slots=True, kw_only=True)
class TextStyle:
    """Which of an answer's tokens are its text, and what ends it."""

    stops: tuple[str, ...] = ()
    shows_stop: bool = False  # the stop string or id that ends the answer is a part of it
    shows_special: bool = False  # special tokens are written out
    min_tokens: int = 0  # stop strings within the first so many tokens don't count
    shows_prompt_tokens: bool = False  # with their scores; the first one has none
    shows_prompt: bool = False  # the prompt's text stands before the answer's


@dataclass(frozen=True, slots=True, kw_only=True)
class Admitted:
    """A request that the engine may take, of a version that stays the same to its end."""

    request: Request
    version: TaskVersion | None  # None: the base model
    prompt_text: str
    style: TextStyle
    begin: float  # time.monotonic() at admission

    @property
    def prompt_ids(self) -> tuple[int, ...]:
        """Return all ids of the rendered text."""
        return self.request.prompt_ids

    def result(
        self,
        *,
        text: str,
        tokens: Sequence[OutputToken],
        finish: FinishReason,
        timings: RequestTimings,
        prompt_scores: tuple[OutputToken, ...] = (),
        classification: Classification | None = None,
    ) -> GenerationResult:
        """Return the finished answer."""
        return GenerationResult(
            text=text,
            prompt_text=self.prompt_text,
            return_full_text=self.style.shows_prompt and classification is None,
            version=self.version,
            finish=finish,
            tokens=tuple(tokens),
            prompt_tokens=len(self.prompt_ids),
            virtual_tokens=self.request.num_virtual_tokens,
            seed=self.request.sampling.seed,
            timings=timings,
            prompt_scores=prompt_scores,
            classification=classification,
        )
