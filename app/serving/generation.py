"""The generation service: a task and text in, text out, over one engine."""

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager, closing
from dataclasses import replace

from transformers import PreTrainedTokenizerFast

from app.concurrency import gather_or_cancel, interleave
from app.engine.client import EngineClient
from app.errors import DeadlineExceeded
from app.prompt import ModelGeometry, TaskVersion
from app.request import Outcome, ProgramOutcome
from app.serving.admitted import Admitted
from app.serving.base_defaults import BaseDefaults
from app.serving.concurrency_limiter import ConcurrencyLimiter
from app.serving.decisions import DecisionRequest, Decisions
from app.serving.generation_request import GenerationRequest, GenerationResult, TextDelta
from app.serving.lanes import Lanes
from app.serving.outcomes import OutcomeRecorder
from app.serving.output_processor import scored_tokens
from app.serving.program_watch import ProgramWatch
from app.serving.programs import program_for
from app.serving.programs.decide import Decide
from app.serving.request_builder import RequestBuilder
from app.serving.session import Resources, Session
from app.serving.structured_output.grammars import Grammars
from app.store.prompt_store import PromptStore
from app.text.detokenizer import detokenizer_tables
from app.text.prompt_encoder import PromptEncoder
from app.text.truncation import TruncationSide

_GRACE_SECONDS = 0.25


class GenerationService:
    """Runs the programs of requests. For one event loop; `compatibility` may be called from any thread."""

    def __init__(
        self,
        engine: EngineClient,
        store: PromptStore,
        tokenizer: PreTrainedTokenizerFast,
        *,
        eos_ids: frozenset[int],
        base_name: str,
        grammars: Grammars,
        defaults: BaseDefaults,
        decoder_start_id: int | None = None,
        on_outcome: Callable[[Outcome], None],
        on_program: Callable[[ProgramOutcome], None] = lambda outcome: None,
        timeout: float = 600.0,
        prefetch: Callable[[str], object] = lambda digest: None,
    ) -> None:
        """`timeout` bounds every request, in seconds; `on_outcome` gets every sequence's end,
        `on_program` every request's.

        `prefetch` gets the digest of a prompt that a request will need soon; it must return at once.
        `grammars` are the engine's own, `defaults` the base's; an encoder-decoder has a `decoder_start_id`.
        """
        self.engine = engine
        self.request_builder = RequestBuilder(
            engine,
            store,
            _prompt_encoder(tokenizer, engine.geometry),
            eos_ids=eos_ids,
            base_name=base_name,
            timeout=timeout,
            prefetch=prefetch,
            grammars=grammars,
            defaults=defaults,
            decoder_start_id=decoder_start_id,
        )
        self.decoder_start_id = decoder_start_id
        self.defaults = defaults
        self.base_name = base_name
        self.limiter = ConcurrencyLimiter(engine.max_open)
        self._resources = Resources(
            engine=engine,
            builder=self.request_builder,
            tables=detokenizer_tables(tokenizer),
            limiter=self.limiter,
            lanes=Lanes(),
            outcomes=OutcomeRecorder(on_outcome),
            on_program=on_program,
        )

    def close(self) -> None:
        """End the threads; what waits for one is cancelled."""
        self._resources.lanes.close()

    @property
    def requests_served(self) -> Mapping[str, int]:
        """Return the finished requests by task id, since the start."""
        return self._resources.outcomes.served

    def compatibility(self, version: TaskVersion) -> str | None:
        """Return why the loaded base can't serve the version; None: it can."""
        return self.request_builder.compatibility.why_not(version)

    async def generate(self, request: GenerationRequest) -> GenerationResult:
        """Return the first answer of one request. Cancelling this frees its sequences."""
        return (await self.generate_all([request]))[0]

    async def generate_all(self, requests: Sequence[GenerationRequest]) -> list[GenerationResult]:
        """Run all to their ends, at once and on one version; return the answers in order, samples adjacent.

        An error of one ends all. Raise NotFound, NotServable, InvalidRequest, Unavailable, DeadlineExceeded,
        NonFiniteLogits, RequestFailed, ConstraintFailed.
        """
        async with self._in_time(requests[0]) as deadline:
            return await (await self._admit(requests, deadline, is_stream=False)).results()

    async def start(self, requests: Sequence[GenerationRequest]) -> "AnswerStream":
        """Wait for the first delta of each answer, so that what fails early is raised here, as above."""
        async with self._in_time(requests[0]) as deadline:
            stream = await self._admit(requests, deadline, is_stream=True)
            await stream.begin()
            return stream

    async def decide(self, request: DecisionRequest) -> Decisions:
        """Answer questions about one input, on one version. Raise as `generate_all`."""
        async with self._in_time(request.asked) as deadline:
            with closing(Session(self._resources)) as session:
                asked = replace(request.asked, deadline=deadline)
                return await Decide(replace(request, asked=asked)).run(session)

    async def try_version(self, version: TaskVersion, request: GenerationRequest) -> GenerationResult:
        """Run a request on this version, released or not: charged, but no request of its task."""
        session, build = Session(self._resources, is_trial=True), self.request_builder.build
        admitted = await session.on_thread(lambda: build(request, version), request.size)
        return (await AnswerStream(session, [request], [admitted]).results())[0]

    async def tokenize(self, request: GenerationRequest) -> tuple[Admitted, list[str]]:
        """Return the request as the engine would get it, and the text of each of its ids."""
        with closing(Session(self._resources, num_sequences=1)) as session:
            async with self._in_time(request):
                admitted = await session.admit(request)
            ids, tables = admitted.prompt_ids, self._resources.tables
            tokens = await session.on_thread(lambda: scored_tokens(tables, ids, ()), 4 * len(ids))
            return admitted, [token.text for token in tokens]

    async def detokenize(self, ids: Sequence[int]) -> str:
        """Return the text of as many ids as a request may hold; special tokens have none."""
        with closing(Session(self._resources, num_sequences=1)) as session:
            return await session.on_thread(
                lambda: self.request_builder.prompts.text_of(ids, "ids"), 4 * len(ids)
            )

    @asynccontextmanager
    async def _in_time(self, request: GenerationRequest) -> AsyncGenerator[float, None]:
        """Yield the call's deadline. Raise DeadlineExceeded soon after it.

        The engine ends late sequences by itself; this ends work that never reaches it, or finds it stuck.
        """
        deadline = self.request_builder.deadline(request)
        try:
            async with asyncio.timeout(deadline - time.monotonic() + _GRACE_SECONDS) as limit:
                yield deadline
        except TimeoutError:
            if not limit.expired():
                raise
            raise DeadlineExceeded("The deadline passed while the request waited; allow more time.") from None

    async def _admit(
        self, requests: Sequence[GenerationRequest], deadline: float, *, is_stream: bool
    ) -> "AnswerStream":
        session = Session(self._resources, num_sequences=sum(each.num_sequences for each in requests))
        # The deadline is also that of every later part.
        requests = [
            replace(request, deadline=deadline, is_stream=is_stream or request.is_stream)
            for request in requests
        ]
        try:
            admitted = await gather_or_cancel([session.admit(request) for request in requests])
            return AnswerStream(session, requests, admitted)
        except BaseException:
            session.close()
            raise


def _prompt_encoder(tokenizer: PreTrainedTokenizerFast, geometry: ModelGeometry) -> PromptEncoder:
    """Return what encodes texts for the encoder, if there is one, else for the decoder."""
    return PromptEncoder(
        tokenizer,
        max_positions=geometry.max_source_positions or geometry.max_positions,
        vocab_size=geometry.vocab_size,
        side=TruncationSide.RIGHT if geometry.has_encoder else TruncationSide.LEFT,
    )


class AnswerStream:
    """The answers to the requests of one call, under way. `close` ends what still runs."""

    def __init__(
        self, session: Session, requests: Sequence[GenerationRequest], admitted: Sequence[Admitted]
    ) -> None:
        """All requests have the same number of samples."""
        samples = requests[0].num_samples
        self.admitted = [each for each in admitted for _ in range(samples)]  # of each answer
        self._session = session
        programs = [program_for(*each) for each in zip(requests, admitted, strict=True)]
        self._watch = ProgramWatch(session, [program.kind for program in programs], admitted, samples)
        runs = [program.run(session, each) for program, each in zip(programs, admitted, strict=True)]
        self._deltas = runs[0] if len(runs) == 1 else _numbered(runs, samples)
        self._first: tuple[int, TextDelta] | None = None

    async def begin(self) -> None:
        """Wait until each answer has its first delta. Where one fails instead, all end with its error."""
        try:
            with self._watch:
                self._first = self._watch.seen(await anext(self._deltas))
        except BaseException:
            await self.close()
            raise

    async def __aiter__(self) -> AsyncGenerator[tuple[int, TextDelta], None]:
        """Yield the deltas of all answers as they come, each with the number of its answer; once."""
        with self._watch:
            if self._first is not None:
                yield self._first
            async for item in self._deltas:
                yield self._watch.seen(item)

    async def results(self) -> list[GenerationResult]:
        """Read all to their ends; return the results in the order of the answers."""
        try:
            with self._watch:
                async for item in self._deltas:
                    self._watch.seen(item)
        finally:
            await self.close()
        return [self._watch.results[index] for index in range(len(self.admitted))]

    async def close(self) -> None:
        """End what still runs, give its room back, and count the programs."""
        try:
            await self._deltas.aclose()
        finally:
            self._session.close()
            self._watch.report()


async def _numbered(
    runs: Sequence[AsyncGenerator[tuple[int, TextDelta], None]], samples: int
) -> AsyncGenerator[tuple[int, TextDelta], None]:
    async with aclosing(interleave(runs)) as deltas:
        async for number, (sample, delta) in deltas:
            yield number * samples + sample, delta
