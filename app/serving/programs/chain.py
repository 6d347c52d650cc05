"""Chains: each step reads what the steps before it wrote, as the version's chain renders it.

A step is a request of its own, rendered and tokenized anew, which ends where the model ends it or with the
chain's end of a step. So its tokens are those of the same request sent by hand, with the same seed. What a
step and the one before it read alike isn't computed again, if the same task made both: keys and values depend
on the learned prompt before them, and in an encoder-decoder on the source.

Stop strings end the answer and are text in steps; EOS and stop ids end a step.
"""

from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace
from typing import Any

from app.errors import InvalidRequest, NotFound, NotServable, RequestTooLong
from app.prompt import TaskVersion
from app.request import FinishReason, Request, RequestTimings
from app.serving.admitted import Admitted
from app.serving.generation_request import (
    GenerationRequest,
    GenerationResult,
    OutputToken,
    Reasoning,
    TextDelta,
)
from app.serving.output_processor import OutputProcessor
from app.serving.parameters import GenerationParameters
from app.serving.program_settings import ChainSettings
from app.serving.programs.reasoning import sampling_after
from app.serving.programs.split_output import SplitOutput
from app.serving.session import Session
from app.text.marked_text import MarkedText
from app.text.stop_strings import StopStringMatcher

_LINE_END = "\n"  # behind steps that the model ends, where they are shown as one text


async def chained(
    session: Session, admitted: Admitted, settings: ChainSettings
) -> AsyncGenerator[TextDelta, None]:
    """Yield the deltas of all steps; the last one carries the result. Raise what the session's methods raise.

    Where no text marks the answer, the last step is yielded once more, as the answer.
    """
    chain = _Chain(session, admitted, settings)
    step: Admitted | None = await chain.first_step()
    while step is not None:
        output = StepOutput(session, step, settings, admitted.parameters)
        async with aclosing(session.generate(step, output)) as deltas:
            async for delta in deltas:
                if delta.result is None:
                    yield delta
        assert delta.result is not None
        last = chain.take(output, delta)
        if chain.finish is not None and chain.answer == output.text:
            yield last._replace(result=chain.result())
            return
        yield last
        step = await chain.next_step()
    yield TextDelta(text=chain.answer, result=chain.result())


class StepOutput(SplitOutput):
    """Reads one step, or the answer behind the text that marks it."""

    def __init__(
        self, session: Session, step: Admitted, settings: ChainSettings, parameters: GenerationParameters
    ) -> None:
        """`parameters` are the chain's: their stop strings end the answer."""
        end = settings.step_ends
        marked = MarkedText(
            settings.done, None, parameters.stop, shows_stop=parameters.include_stop_str_in_output
        )
        super().__init__(
            session,
            step,
            marked,
            literal_ids=frozenset(session.ids_after("", (settings.done or "") + (end or ""))),
            stop=() if end is None else (end,),
        )

    @property
    def is_answered(self) -> bool:
        """Return whether it is marked as having the answer."""
        return self._marked.is_found

    @property
    def is_ended(self) -> bool:
        """Return whether the chain's end of a step ended it."""
        return self._stop_strings.stopped is not None

    def finish(self, reported: FinishReason | None, eos_ids: frozenset[int]) -> FinishReason:
        """Return why the step ended."""
        return OutputProcessor.finish(self, reported, eos_ids)


class _Chain:
    """The steps of one answer, one after the other."""

    def __init__(self, session: Session, admitted: Admitted, settings: ChainSettings) -> None:
        self._session = session
        self._admitted = admitted
        self._settings = settings
        self._written: list[str] = []  # each step with its end, as later ones read them
        self._words: set[str] = set()  # of each step
        self._last = ""  # of the steps that have words
        self._shown = Reasoning(text="", steps=(), num_tokens=0)
        self._tokens: list[OutputToken] = []
        self._prompt_scores: tuple[OutputToken, ...] = ()
        self._timings: list[RequestTimings] = []
        self._held: dict[str, str] = {}  # the last request of each version, by its digest
        self.answer = ""
        self.finish: FinishReason | None = None  # None: the next step follows

    async def first_step(self) -> Admitted:
        """Return the first step, the admitted request itself unless another task makes it."""
        return await self._admit() if self._settings.steps else self._prepared(self._admitted)

    async def next_step(self) -> Admitted | None:
        """Return the step that follows; None: the chain has ended, or has no room for one."""
        if self.finish is not None:
            return None
        try:
            return await self._admit()
        except RequestTooLong:
            self.finish = FinishReason.LENGTH
            return None

    async def _admit(self) -> Admitted:
        asked, tasks = self._admitted.asked, [step.task for step in self._settings.steps]
        request = replace(
            asked,
            task=tasks[min(len(self._written), len(tasks) - 1)] if tasks else asked.task,
            chain=self._admitted.version,
            steps=tuple(self._written),
            num_samples=1,
            best_of=None,
            parameters={**asked.parameters, **self._parameters()},
        )
        step = await self._made_by(request, None if tasks else self._admitted.version)
        if step.members:
            raise InvalidRequest(
                f"The chain has a step of {request.task}, which is an ensemble, but one version makes a "
                "step; the chain's author must name one.",
                param="task_id",
            )
        return self._prepared(step)

    async def _made_by(self, request: GenerationRequest, version: TaskVersion | None) -> Admitted:
        """Admit a step. Where its task is missing, the error names the step, since the client didn't."""
        try:
            return await self._session.admit(request, version)
        except (NotFound, NotServable) as error:
            reason = error.message.rstrip(".")
            raise type(error)(
                f"The chain has a step of {request.task}, which can't be had: {reason}. The chain's author "
                "must name a task that is served, or publish it."
            ) from error

    def _parameters(self) -> dict[str, Any]:
        """Return what isn't the same for every step, or not what its task's defaults may say."""
        given = self._admitted.parameters
        return {
            "max_new_tokens": self._num_left,
            "seed": self._admitted.request.sampling.seed,
            "num_beams": 1,
            "include_reasoning": given.include_reasoning,
            "decoder_input_details": given.decoder_input_details and not self._written,
        }

    @property
    def _num_left(self) -> int:
        return self._admitted.request.max_new_tokens - len(self._tokens)

    def _prepared(self, step: Admitted) -> Admitted:
        """Return the step within its bounds, of the sample that the chain is, with what it continues."""
        request = step.request
        count = min(request.max_new_tokens, self._settings.max_step_tokens or request.max_new_tokens)
        sampling = replace(
            sampling_after(request.sampling, 0, count),
            sample_index=self._admitted.request.sampling.sample_index,
        )
        request = replace(request, max_new_tokens=count, sampling=sampling)
        return replace(step, request=self._continuing(step, request))

    def _continuing(self, step: Admitted, request: Request) -> Request:
        if request.source is not None:
            return request
        digest = "" if step.version is None else step.version.digest
        before, self._held[digest] = self._held.get(digest), request.id
        return replace(request, is_held=True, continues=before)

    def take(self, output: StepOutput, last: TextDelta) -> TextDelta:
        """Take a step that has ended with this delta; return the delta as it is shown."""
        result, before = last.result, output.reasoning
        assert result is not None
        end = self._settings.step_ends
        self._written.append(output.raw_text + (end or ""))
        self._timings.append(result.timings)
        self._prompt_scores = self._prompt_scores or result.prompt_scores
        num_before, self._tokens = len(self._tokens), [*self._tokens, *result.tokens]
        self.finish = self._end(output, result.finish)
        shown_end = (end or _LINE_END) if self.finish is None and before.is_shown else ""
        self._shown = replace(
            before,
            text=self._shown.text + before.text + shown_end,
            steps=self._shown.steps + before.steps,
            num_tokens=num_before + before.num_tokens,
        )
        return last._replace(result=None, text=last.text + shown_end)

    def _end(self, output: StepOutput, finish: FinishReason) -> FinishReason | None:
        """Return why the chain ends with this step, and note its answer, if it has one."""
        if output.is_answered:
            self.answer = output.text
            return finish
        if finish is FinishReason.LENGTH:
            return finish
        words = " ".join(output.raw_text.split())
        is_final = self._settings.done is None and self._is_last(output)
        if words in self._words:
            return FinishReason.LOOP
        if words:
            self._words.add(words)
            self._last = output.raw_text.strip()
        if is_final and self._last:
            self.answer = _up_to_stop(self._last, self._admitted.parameters)
            return finish
        return self._bound() if words else FinishReason.NO_ANSWER

    def _is_last(self, output: StepOutput) -> bool:
        """Return whether none follows: there are no more, or the model wrote no end of the step."""
        model_ended = self._settings.step_ends is not None and not output.is_ended
        return model_ended or len(self._written) == self._settings.max_steps

    def _bound(self) -> FinishReason | None:
        if len(self._written) == self._settings.max_steps:
            return FinishReason.MAX_STEPS
        return FinishReason.LENGTH if self._num_left < 1 else None

    def result(self) -> GenerationResult:
        """Return the finished answer."""
        assert self.finish is not None
        return self._admitted.result(
            text=self.answer,
            tokens=self._tokens,
            finish=self.finish,
            timings=RequestTimings(
                queue=sum(each.queue for each in self._timings),
                prefill=sum(each.prefill for each in self._timings),
                decode=sum(each.decode for each in self._timings),
            ),
            prompt_scores=self._prompt_scores,
            reasoning=self._shown,
        )


def _up_to_stop(text: str, parameters: GenerationParameters) -> str:
    stops = StopStringMatcher(parameters.stop, is_shown=parameters.include_stop_str_in_output)
    return stops.push(text) + stops.flush()
