"""A request that was admitted: what the engine runs, and how its answer is written."""

from collections.abc import Sequence
from dataclasses import dataclass

from app.prompt import TaskVersion
from app.request import FinishReason, Request, RequestTimings
from app.serving.generation_request import (
    Classification,
    GenerationRequest,
    GenerationResult,
    OutputToken,
    Reasoning,
)
from app.serving.parameters import GenerationParameters
from app.serving.program_settings import PLAIN_PROGRAM, ProgramSettings


@dataclass(frozen=True, slots=True, kw_only=True)
class Admitted:
    """A request that the engine may take, of a version that stays the same to its end."""

    request: Request
    version: TaskVersion | None  # None: the base model
    prompt_text: str
    parameters: GenerationParameters  # resolved: the request's, the task's, the base's
    begin: float  # time.monotonic() at admission
    asked: GenerationRequest  # from which its parts are made
    program: ProgramSettings = PLAIN_PROGRAM  # the version's own
    members: tuple[tuple[TaskVersion, int], ...] = ()  # of an ensemble, each with its weight

    @property
    def versions(self) -> tuple[TaskVersion, ...]:
        """Return all versions that answer: of an ensemble its members, of the base model none."""
        if self.members:
            return tuple(version for version, _ in self.members)
        return () if self.version is None else (self.version,)

    @property
    def prompt_ids(self) -> tuple[int, ...]:
        """Return all ids of the rendered text, which an encoder reads if there is one."""
        return self.request.input_ids

    @property
    def decoder_ids(self) -> tuple[int, ...]:
        """Return the ids that the answer goes on after: the rendered text's, or the decoder's beginning."""
        return self.request.prompt_ids

    @property
    def virtual_tokens(self) -> int:
        """Return the positions that the learned prompt takes, at the place where it has most."""
        return 0 if self.version is None else self.version.num_virtual_tokens

    def result(
        self,
        *,
        text: str,
        tokens: Sequence[OutputToken],
        finish: FinishReason,
        timings: RequestTimings,
        score: float | None = None,
        prompt_scores: tuple[OutputToken, ...] = (),
        classification: Classification | None = None,
        reasoning: Reasoning | None = None,
    ) -> GenerationResult:
        """Return the finished answer."""
        return GenerationResult(
            text=text,
            prompt_text=self.prompt_text,
            return_full_text=self.parameters.return_full_text and classification is None,
            version=self.version,
            finish=finish,
            tokens=tuple(tokens),
            prompt_tokens=len(self.prompt_ids),
            virtual_tokens=self.virtual_tokens,
            seed=self.request.sampling.seed,
            timings=timings,
            score=score,
            prompt_scores=prompt_scores,
            classification=classification,
            reasoning=reasoning,
        )
