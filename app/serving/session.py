"""A session: what a program may do with the engine for one call of a client."""

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import ExitStack, aclosing
from dataclasses import dataclass
from typing import TypeVar

from app.caching import SingleFlightCache
from app.concurrency import map_bounded
from app.engine.client import EngineClient
from app.errors import ConstraintFailed, NonFiniteLogits, RequestTooLong
from app.prompt import TaskVersion
from app.request import (
    FinishReason,
    Hypothesis,
    ProgramOutcome,
    Request,
    RequestTimings,
    TokenDelta,
    TokenScore,
)
from app.serving.admitted import Admitted
from app.serving.concurrency_limiter import ConcurrencyLimiter
from app.serving.generation_request import GenerationRequest, GenerationResult, OutputToken, TextDelta
from app.serving.lanes import Lanes
from app.serving.outcomes import Attempt, OutcomeRecorder
from app.serving.output_processor import OutputProcessor, scored_tokens
from app.serving.request_builder import PreparedVersion, RequestBuilder
from app.store.releases import Meaning
from app.text.detokenizer import DetokenizerTables
from app.text.prompt_encoder import PromptEncoder

_T = TypeVar("_T")
_TOKENS_AT_ONCE = 256  # that are turned into text before the event loop goes on with others
_MAX_TASKS = 1024  # that one call uses: members of an ensemble, times steps of their chains


@dataclass(frozen=True, slots=True, kw_only=True)
class Resources:
    """What all sessions share."""

    engine: EngineClient
    builder: RequestBuilder
    tables: DetokenizerTables
    limiter: ConcurrencyLimiter
    lanes: Lanes
    outcomes: OutcomeRecorder
    on_program: Callable[[ProgramOutcome], None]


class Session:
    """Admit, generate, score: every part of a call uses one version of each task, and is counted and charged.

    Closing a generator, or cancelling a coroutine, ends its sequences.
    """

    def __init__(self, resources: Resources, *, num_sequences: int = 0, is_trial: bool = False) -> None:
        """Hold room for this many sequences. `is_trial`: they are charged, but are no requests of their task.

        Raise Overloaded, InvalidRequest.
        """
        self._resources = resources
        self._is_trial = is_trial
        self._meanings: SingleFlightCache[str | None, Meaning | None] = SingleFlightCache(_MAX_TASKS)
        self._held: list[str] = []  # ids of requests that the engine keeps something of
        self._room = ExitStack()
        self._num_reserved = 0
        self.reserve(num_sequences)

    def reserve(self, count: int) -> None:
        """Hold room for more sequences until the session is closed. Raise Overloaded, InvalidRequest."""
        self._room.enter_context(self._resources.limiter.hold(count, self._num_reserved))
        self._num_reserved += count

    def program_ended(self, outcome: ProgramOutcome) -> None:
        """Count a program, unless it was a trial's."""
        if not self._is_trial:
            self._resources.on_program(outcome)

    def close(self) -> None:
        """Give the room back, and what the engine holds of the call's requests."""
        for request_id in self._held:
            self._resources.engine.release(request_id)
        self._held.clear()
        self._room.close()

    async def on_thread(self, work: Callable[[], _T], size: int) -> _T:
        """Run what may wait for the store, or takes long for `size` characters, beside the event loop."""
        return await self._resources.lanes.run(work, size)

    async def admit(self, request: GenerationRequest, version: TaskVersion | None = None) -> Admitted:
        """Find what the task means, or take `version`; check the request, render and tokenize it.

        A failure counts as the task's, once the task is known.
        Raise NotFound, NotServable, InvalidRequest (RequestTooLong), DeadlineExceeded.
        """
        builder = self._resources.builder
        attempt = self._attempt(request.tenant, builder.deadline(request))
        found: list[Meaning | None] = []  # a thread that outlives this call may still add to it

        def admit() -> Admitted:
            found.append(Meaning(version) if version else self._meaning(request))
            return builder.admit(request, found[0])

        try:
            return await self.on_thread(admit, request.size)
        except BaseException as error:
            attempt.version = found[0].version if found and found[0] is not None else None
            attempt.reason = attempt.failure(error)
            if found or attempt.reason == "deadline":
                self._resources.outcomes.record(attempt)
            raise

    def _meaning(self, request: GenerationRequest) -> Meaning | None:
        """Return what the task means for all parts of the call."""
        return self._meanings.get(request.task, lambda: self._resources.builder.find(request))

    async def look_up(
        self, request: GenerationRequest
    ) -> list[tuple[TaskVersion | None, PreparedVersion, int]]:
        """Return the versions that answer, how each renders, and its weight; one, unless it is an ensemble.

        None stands for the base model. Raise NotFound, InvalidRequest.
        """
        builder = self._resources.builder

        def look_up() -> list[tuple[TaskVersion | None, PreparedVersion, int]]:
            meaning = self._meaning(request)
            if meaning is None:
                return [(None, builder.prepared(None), 1)]
            members = meaning.members or ((meaning.version, 1),)
            return [(version, builder.prepared(version), weight) for version, weight in members]

        return await self.on_thread(look_up, 0)

    async def generate(
        self, admitted: Admitted, output: OutputProcessor | None = None, first: Request | None = None
    ) -> AsyncGenerator[TextDelta, None]:
        """Yield the answer; the texts joined are the result's, which the last delta carries.

        `output` reads the answer, and may have it go on in other sequences; `first` is the one that it begins
        in, where that isn't the admitted one. Where a sequence `is_held`, the engine keeps what it computed,
        also of one that is closed before its end, for a later one that `continues` it, until the session is
        closed. An answer that isn't streamed comes as one delta, unless its text may end it. Raise what
        `EngineClient.generate` raises.
        """
        output = output or OutputProcessor(self.tables, admitted.decoder_ids, admitted.parameters)
        if not (admitted.asked.is_stream or output.may_end_early):
            yield await self._whole(admitted, output)
            return
        sequence, begin = first or admitted.request, 0.0
        with self._attempt_of(admitted) as attempt:
            while True:
                if sequence.is_held:
                    self._held.append(sequence.id)
                async with aclosing(self._resources.engine.generate(sequence)) as deltas:
                    async for delta in deltas:
                        begin = begin or time.monotonic()
                        *early, written = output.take(delta)
                        attempt.generated_tokens += delta.token_id is not None
                        for each in early:
                            yield each
                        if delta.is_last or output.is_stopped:
                            break
                        yield written
                following = output.go_on()
                if following is None:
                    break
                yield written
                sequence = following
            timings = delta.timings if sequence is admitted.request else None
            timings = timings or _cut_short(attempt.begin, begin)
            result = self._result(admitted, output, delta.finish, timings, attempt)
            yield written._replace(result=result)

    async def _whole(self, admitted: Admitted, output: OutputProcessor) -> TextDelta:
        """Return the whole answer, which the engine ends."""
        deltas: list[TokenDelta] = []
        with self._attempt_of(admitted) as attempt:
            try:
                await self._resources.engine.collect(admitted.request, deltas)
            finally:
                attempt.generated_tokens = sum(delta.token_id is not None for delta in deltas)
            for number, delta in enumerate(deltas, 1):
                output.take(delta)
                if number % _TOKENS_AT_ONCE == 0:
                    await asyncio.sleep(0)
            assert delta.timings is not None
            result = self._result(admitted, output, delta.finish, delta.timings, attempt)
        return TextDelta(text=result.text, prompt_scores=result.prompt_scores, result=result)

    def _result(
        self,
        admitted: Admitted,
        output: OutputProcessor,
        finish: FinishReason | None,
        timings: RequestTimings,
        attempt: Attempt,
    ) -> GenerationResult:
        """Return what `output` has collected, and note on the attempt how it ended."""
        result = admitted.result(
            text=output.text,
            tokens=output.tokens,
            finish=output.finish(finish, self._resources.builder.eos_ids),
            timings=timings,
            prompt_scores=output.prompt_scores,
            reasoning=output.reasoning,
        )
        attempt.reason, attempt.timings = str(result.finish), result.timings
        return result

    @property
    def tables(self) -> DetokenizerTables:
        """What detokenizing needs."""
        return self._resources.tables

    def ids_after(self, before: str, text: str) -> tuple[int, ...]:
        """Return the ids of a short text of the task's own that goes on after another one."""
        return self._resources.builder.prompts.tokenizer.ids_after(before, text)

    def num_left(self, request: Request) -> int:
        """Return how many tokens can be generated after its prompt before the base's positions end."""
        limit = self._resources.engine.geometry.max_positions
        return limit - request.num_virtual_tokens - len(request.prompt_ids)

    def has_room(self, request: Request) -> bool:
        """Return whether K/V memory holds its prompt and all that it may generate."""
        try:
            self._resources.engine.check_admissible(request)
        except RequestTooLong:
            return False
        return True

    async def search(self, admitted: Admitted, num_answers: int) -> list[GenerationResult]:
        """Return the best answers of beam search, best first; the tokens of all are charged.

        A search that ends early is charged a token of each beam for every step that it took.
        Raise what `EngineClient.generate` raises, and ConstraintFailed where there are fewer answers.
        """
        with self._attempt_of(admitted) as attempt:
            async with aclosing(self._resources.engine.generate(admitted.request)) as deltas:
                async for delta in deltas:
                    if not delta.is_last:
                        attempt.generated_tokens += admitted.parameters.num_beams
            found = delta.hypotheses
            attempt.generated_tokens = sum(len(each.tokens) for each in found)
            if len(found) < num_answers:
                raise ConstraintFailed(
                    f"only {len(found)} of {num_answers} answers are possible under the request's rules and "
                    "length; ask for fewer, or loosen the rules"
                )
            results = await self.on_thread(
                lambda: [self._written(admitted, each, delta) for each in found[:num_answers]],
                4 * attempt.generated_tokens,
            )
            attempt.reason, attempt.timings = str(results[0].finish), delta.timings
            return results

    def _written(self, admitted: Admitted, found: Hypothesis, delta: TokenDelta) -> GenerationResult:
        """Return an answer of beam search in text, up to a stop string."""
        output = OutputProcessor(self.tables, admitted.decoder_ids, admitted.parameters)
        for number, token in enumerate(found.tokens, 1):
            finish = found.finish if number == len(found.tokens) else None
            output.take(
                TokenDelta(
                    token_id=token.token_id,
                    logprob=token.logprob,
                    top=token.top,
                    scores=delta.scores,
                    finish=finish,
                )
            )
            if output.is_stopped:
                break
        assert delta.timings is not None
        return admitted.result(
            text=output.text,
            tokens=output.tokens,
            finish=output.finish(found.finish, self._resources.builder.eos_ids),
            timings=delta.timings,
            score=found.score,
            prompt_scores=output.prompt_scores,
        )

    async def score(
        self, admitted: Admitted, requests: Sequence[Request], prompt_tokens: int
    ) -> list[TokenDelta | NonFiniteLogits]:
        """Run requests that are only scored, as one outcome; return the delta of each, or why it has none.

        They run at once, as far as there is room: each that ends makes way for the next one, so that a large
        set doesn't fill the queue. Raise what else `EngineClient.generate` raises.
        """
        with self._attempt_of(admitted) as attempt:
            self._held += [request.id for request in requests if request.is_held]
            attempt.prompt_tokens = prompt_tokens
            attempt.generated_tokens = sum(request.num_scored for request in requests)
            scored = await map_bounded(self._only_delta, requests, self.num_scored_at_once)
            is_any = any(isinstance(each, TokenDelta) for each in scored)
            attempt.reason = str(FinishReason.EOS) if is_any else "error"
            return scored

    @property
    def num_scored_at_once(self) -> int:
        """Return how many sequences `score` runs at a time: enough for one step, and for the next one."""
        return min(2 * self._resources.engine.max_rows, self._resources.limiter.bound)

    async def _only_delta(self, request: Request) -> TokenDelta | NonFiniteLogits:
        deltas: list[TokenDelta] = []
        try:
            await self._resources.engine.collect(request, deltas)
        except NonFiniteLogits as error:
            return error
        return deltas[0]

    def scored_tokens(self, admitted: Admitted, scores: Sequence[TokenScore]) -> tuple[OutputToken, ...]:
        """Return scored ids as they read after the prompt."""
        prompt = admitted.decoder_ids
        ids = [*prompt, *(score.token_id for score in scores)]
        return scored_tokens(self._resources.tables, ids, scores)[len(prompt) :]

    async def label_ids(self, labels: Sequence[str], *, with_eos: bool) -> list[tuple[int, ...]]:
        """Return the ids of each text alone, with what ends an answer after them."""
        builder = self._resources.builder
        return await self.on_thread(
            lambda: [builder.label_ids(label, with_eos=with_eos) for label in labels], sum(map(len, labels))
        )

    @property
    def prompts(self) -> PromptEncoder:
        """What renders and tokenizes for the base."""
        return self._resources.builder.prompts

    @property
    def space_before_labels(self) -> str:
        """Return what a label needs before it to be a word of its own in a text that it goes on with."""
        has_encoder = self._resources.engine.geometry.has_encoder
        return "" if has_encoder or self.prompts.tokenizer.puts_spaces else " "

    def _attempt(self, tenant: str, deadline: float | None) -> Attempt:
        recorder = self._resources.outcomes
        return Attempt(recorder=recorder, tenant=tenant, deadline=deadline, is_trial=self._is_trial)

    def _attempt_of(self, admitted: Admitted) -> Attempt:
        attempt = self._attempt(admitted.request.tenant, admitted.request.deadline)
        attempt.begin, attempt.version = admitted.begin, admitted.version
        attempt.sample, attempt.step = admitted.request.sampling.sample_index, len(admitted.asked.steps)
        attempt.prompt_tokens = len(admitted.prompt_ids)
        return attempt


def _cut_short(begin: float, first: float) -> RequestTimings:
    """Return the times of a sequence that a stop string ended, for which the engine reports none."""
    return RequestTimings(queue=0.0, prefill=first - begin, decode=time.monotonic() - first)
