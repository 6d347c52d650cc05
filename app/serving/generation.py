"""The generation service: a task and text in, text out, over one shared engine."""

import asyncio
import time
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing
from typing import TypeVar

from transformers import PreTrainedTokenizerFast

from app.concurrency import gather_or_cancel
from app.engine.client import EngineClient
from app.errors import Cancelled, ConstraintFailed, DeadlineExceeded
from app.prompt import TaskVersion
from app.request import FinishReason, Request, RequestTimings, TokenDelta, TokenScore
from app.serving.base_defaults import BaseDefaults
from app.serving.concurrency_limiter import ConcurrencyLimiter
from app.serving.generation_request import (
    GenerationRequest,
    GenerationResult,
    Outcome,
    OutputToken,
    TextDelta,
)
from app.serving.lanes import Lanes
from app.serving.output_processor import OutputProcessor, scored_tokens
from app.serving.request_builder import Admitted, RequestBuilder
from app.serving.structured_output.grammars import Grammars
from app.store.prompt_store import PromptStore
from app.text.chat import ChatTemplate
from app.text.detokenizer import detokenizer_tables
from app.text.tokenization import PromptTokenizer

_T = TypeVar("_T")

_GRACE_SECONDS = 0.25
_NO_DEFAULTS = BaseDefaults()


class GenerationService:
    """Answers asks. One event loop uses it; `compatibility` may be called from any thread."""

    def __init__(
        self,
        engine: EngineClient,
        store: PromptStore,
        tokenizer: PreTrainedTokenizerFast,
        *,
        eos_ids: frozenset[int],
        base_name: str,
        grammars: Grammars | None = None,
        defaults: BaseDefaults = _NO_DEFAULTS,
        timeout: float = 600.0,
        prefetch: Callable[[str], object] = lambda digest: None,
        on_outcome: Callable[[Outcome], None] = lambda outcome: None,
    ) -> None:
        """`timeout` bounds every request, in seconds; `on_outcome` hears how each one ended.

        `prefetch` is told the digest of a prompt that a request will need soon; it must return at once.
        `grammars` are the engine's own; without them constrained requests are refused. `defaults` are the
        base's own.
        """
        self.engine = engine
        chat = ChatTemplate(tokenizer)
        self.request_builder = RequestBuilder(
            engine,
            store,
            PromptTokenizer(tokenizer, control=chat.control_tokens()),
            eos_ids=eos_ids,
            base_name=base_name,
            timeout=timeout,
            prefetch=prefetch,
            chat=chat,
            grammars=grammars,
            defaults=defaults,
        )
        self.defaults = defaults
        self.base_name = base_name
        self.timeout = timeout
        self.limiter = ConcurrencyLimiter(engine.max_open)
        self._tables = detokenizer_tables(tokenizer)
        self._eos_ids = eos_ids
        self._on_outcome = on_outcome
        self._served: Counter[str] = Counter()
        self._lanes = Lanes()

    def close(self) -> None:
        """End the threads; what waits for one is cancelled."""
        self._lanes.close()

    @property
    def requests_served(self) -> Mapping[str, int]:
        """Finished requests by task id, since the start."""
        return self._served

    def compatibility(self, version: TaskVersion) -> str | None:
        """Why the loaded base can't serve the version; None: it can."""
        return self.request_builder.compatibility.why_not(version)

    async def generate(self, ask: GenerationRequest) -> GenerationResult:
        """Run one ask to its end. Cancelling this frees its row.

        Raises NotFound, NotServable, InvalidRequest, Unavailable, DeadlineExceeded, NonFiniteLogits,
        RequestFailed, ConstraintFailed.
        """
        return await self._in_time(ask, _result_of(self.stream(ask)))

    async def start(self, ask: GenerationRequest) -> "StartedStream":
        """Wait for the first piece, so that whatever fails early is raised here."""
        admitted = await self.admit(ask)
        pieces = self.run(admitted)
        try:
            return StartedStream(admitted, await self._in_time(ask, anext(pieces)), pieces)
        except BaseException:
            await pieces.aclose()
            raise

    async def pin(self, ask: GenerationRequest) -> str | None:
        """A reference to the very version that the ask is answered by now; None: the base model."""
        version = await self._in_time(ask, self.on_thread(lambda: self.request_builder.find(ask)))
        return None if version is None else f"{version.task_id}@sha256:{version.digest}"

    async def _in_time(self, ask: GenerationRequest, work: Awaitable[_T]) -> _T:
        """The engine ends what is late; this is for what never reaches it, or finds it stuck."""
        seconds = self.timeout if ask.deadline is None else ask.deadline - time.monotonic()
        try:
            async with asyncio.timeout(seconds + _GRACE_SECONDS) as limit:
                return await work
        except TimeoutError:
            if not limit.expired():
                raise
            raise DeadlineExceeded("The deadline passed while the request waited; allow more time.") from None

    async def stream(self, ask: GenerationRequest) -> AsyncGenerator[TextDelta, None]:
        """The same, piece by piece; the pieces' texts joined are the result's text."""
        admitted = await self._admit_told(ask)
        async with aclosing(self.run(admitted)) as deltas:
            async for delta in deltas:
                yield delta

    async def generate_with(self, version: TaskVersion, ask: GenerationRequest) -> GenerationResult:
        """Run an ask on a version at hand, released or not: charged, but no request of its task."""
        admitted = await self.on_thread(lambda: self.request_builder.admit_version(version, ask), ask.size)
        return await _result_of(self.run(admitted, is_trial=True))

    async def admit(self, ask: GenerationRequest) -> Admitted:
        """Pin the version and prepare the request, without running it; in time."""
        return await self._in_time(ask, self._admit_told(ask))

    async def score(self, admitted: Admitted, requests: Sequence[Request]) -> list[TokenDelta]:
        """Run requests for the log-probabilities of their last tokens alone, as one for the statistics.

        Returns the one delta of each, with `scores` and `timings`.
        """
        reason = "error"
        try:
            scored = await gather_or_cancel([self._only_delta(request) for request in requests])
            reason = str(FinishReason.EOS)
            return scored
        except BaseException as error:
            reason = _failure(error, admitted.request.deadline)
            raise
        finally:
            self._tell(
                admitted.version,
                reason,
                admitted.begin,
                tenant=admitted.request.tenant,
                prompt_tokens=len(admitted.prompt_ids),
                generated_tokens=sum(request.num_scored for request in requests),
            )

    async def _only_delta(self, request: Request) -> TokenDelta:
        async with aclosing(self.engine.generate(request)) as deltas:
            return await anext(deltas)

    def texts_of(self, ids: Sequence[int]) -> list[str]:
        """What each id completes of the text; a special token as the vocabulary writes it."""
        return [token.text for token in scored_tokens(self._tables, ids, ())]

    def scored_tokens(self, prompt: Sequence[int], scores: Sequence[TokenScore]) -> tuple[OutputToken, ...]:
        """Scored ids as they read after the prompt."""
        ids = [*prompt, *(score.token_id for score in scores)]
        return scored_tokens(self._tables, ids, scores)[len(prompt) :]

    async def _admit_told(self, ask: GenerationRequest) -> Admitted:
        """Admit, and tell the statistics of a failure, unless it is that there is no such task."""
        begin = time.monotonic()
        deadline = begin + self.timeout if ask.deadline is None else ask.deadline
        found: list[TaskVersion | None] = []  # a thread that nobody waits for any more may still add to it
        try:
            return await self.on_thread(lambda: self.request_builder.admit(ask, found.append), ask.size)
        except (Exception, asyncio.CancelledError) as error:
            reason = _failure(error, deadline)
            if found or reason == "deadline":
                self._tell(found[0] if found else None, reason, begin, tenant=ask.tenant)
            raise

    async def on_thread(self, work: Callable[[], _T], size: int = 0) -> _T:
        """What may wait for the store or works at `size` characters, and must not hold up the event loop."""
        return await self._lanes.run(work, size)

    async def run(self, admitted: Admitted, *, is_trial: bool = False) -> AsyncGenerator[TextDelta, None]:
        """Run what was admitted, and tell the statistics how it ended."""
        last: TextDelta | None = None
        num_tokens = 0
        reason: str | None = None
        try:
            async with aclosing(self._write(admitted)) as deltas:
                async for last in deltas:
                    num_tokens += last.token is not None
                    if last.result is not None:
                        reason = str(last.result.finish)
                    yield last
        except BaseException as error:
            # A caller that has its result may well leave before the end.
            reason = reason or _failure(error, admitted.request.deadline)
            raise
        finally:
            self._tell(
                admitted.version,
                reason or "error",
                admitted.begin,
                tenant=admitted.request.tenant,
                prompt_tokens=len(admitted.prompt_ids),
                generated_tokens=num_tokens,
                timings=last.result.timings if last is not None and last.result is not None else None,
                is_trial=is_trial,
            )

    async def _write(self, admitted: Admitted) -> AsyncGenerator[TextDelta, None]:
        writer = OutputProcessor(
            self._tables, admitted.prompt_ids, admitted.style, tells_context=admitted.tells_prompt
        )
        first = 0.0
        async with aclosing(self.engine.generate(admitted.request)) as deltas:
            async for delta in deltas:
                first = first or time.monotonic()
                written = writer.take(delta)
                if delta.is_last or writer.is_stopped:
                    break
                yield written
        yield TextDelta(
            text=written.text,
            token=written.token,
            prompt_scores=written.prompt_scores,
            result=self._result(admitted, writer, delta, first),
        )

    def _result(
        self, admitted: Admitted, writer: OutputProcessor, last: TokenDelta, first: float
    ) -> GenerationResult:
        # A row that a stop string cancelled never hears the engine's own times.
        timings = last.timings or RequestTimings(
            queue=0.0, prefill=first - admitted.begin, decode=time.monotonic() - first
        )
        return GenerationResult(
            text=writer.text,
            prompt_text=admitted.prompt_text,
            return_full_text=admitted.return_full_text,
            version=admitted.version,
            finish=writer.finish(last.finish, self._eos_ids),
            tokens=tuple(writer.tokens),
            prompt_tokens=len(admitted.prompt_ids),
            virtual_tokens=admitted.request.num_virtual_tokens,
            seed=admitted.request.sampling.seed,
            timings=timings,
            prompt_scores=writer.prompt_scores,
        )

    def _tell(
        self,
        version: TaskVersion | None,
        reason: str,
        begin: float,
        *,
        tenant: str,
        prompt_tokens: int = 0,
        generated_tokens: int = 0,
        timings: RequestTimings | None = None,
        is_trial: bool = False,
    ) -> None:
        if version is not None and reason in tuple(FinishReason) and not is_trial:
            self._served[version.task_id] += 1
        self._on_outcome(
            Outcome(
                task="" if version is None else version.task_id,
                version=0 if version is None else version.version,
                reason=reason,
                prompt_tokens=prompt_tokens,
                generated_tokens=generated_tokens,
                seconds=time.monotonic() - begin,
                timings=timings,
                tenant=tenant,
                is_trial=is_trial,
            )
        )


class StartedStream:
    """The pieces of an answer, of which the first is there. `close` frees the row, however far it came."""

    def __init__(self, admitted: Admitted, first: TextDelta, rest: AsyncGenerator[TextDelta, None]) -> None:
        self.admitted = admitted
        self.first = first
        self._rest = rest

    async def __aiter__(self) -> AsyncGenerator[TextDelta, None]:
        """All pieces, the first included; once."""
        yield self.first
        async for piece in self._rest:
            yield piece

    async def close(self) -> None:
        """Cancel what still runs."""
        await self._rest.aclose()


async def _result_of(deltas: AsyncGenerator[TextDelta, None]) -> GenerationResult:
    async with aclosing(deltas):
        async for delta in deltas:
            if delta.result is not None:
                return delta.result
    raise AssertionError("a stream ends with a result or an error")


def _failure(error: BaseException, deadline: float | None) -> str:
    """The reason, for statistics. Whoever is cancelled past the deadline is cancelled because of it."""
    if isinstance(error, DeadlineExceeded):
        return "deadline"
    if isinstance(error, Cancelled | asyncio.CancelledError | GeneratorExit):
        is_late = deadline is not None and deadline <= time.monotonic()
        return "deadline" if is_late else "cancelled"
    if isinstance(error, ConstraintFailed):  # what the client asked for led nowhere; the work was done
        return "constraint"
    return "error"
