"""The trial run of a new version, on that very version, before it is released."""

import asyncio
import time
from collections.abc import Mapping
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Any

from app.errors import PromptplexError, PromptRejected, RequestTooLong
from app.prompt import TaskVersion
from app.request import FinishReason, Request, SamplingParams, Source
from app.serving.generation import GenerationService
from app.serving.generation_request import GenerationRequest
from app.serving.program_settings import ProgramSettings
from app.serving.renderings import rendering_of

FIXED_TEXT = "The quick brown fox jumps over the lazy dog."
_OTHER_TEXTS = ("Once upon a time", "1 2 3", "?")
_NUM_NEW_TOKENS = 8
_MAX_EXAMPLES_RUN = 16
_SECONDS = 120.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ExampleReport:
    """The answer of a version to one example of its manifest."""

    inputs: str | Mapping[str, str]
    expected: str
    generated: str
    matches: bool


def fixed_inputs(version: TaskVersion, text: str) -> str | Mapping[str, str]:
    """Return inputs for any version."""
    fields = rendering_of(version, ProgramSettings.of(version.program)).asked.fields
    return text if len(fields) == 1 else dict.fromkeys(fields, text)


def trial_request(inputs: str | Mapping[str, str], tenant: str = "") -> GenerationRequest:
    """Return a request that fits wherever anything fits."""
    return GenerationRequest(
        inputs=inputs, request_id="trial", parameters={"max_new_tokens": 1}, tenant=tenant
    )


class TrialRun:
    """Runs a version before its release. Raises where it can't generate or its prompt has no effect."""

    def __init__(self, service: GenerationService) -> None:
        self._service = service
        self._engine = service.engine
        # Rows differ in their last bits with what runs beside them; a prompt that counts does more.
        self._noise = 1e-4 if self._engine.geometry.dtype == "float32" else 1e-2

    async def run(self, version: TaskVersion, tenant: str = "") -> tuple[ExampleReport, ...]:
        """Generate a little, compare with the bare base, and run the manifest's examples.

        Only the examples' answers are reported, so only they are counted, as `tenant`'s requests. Raise
        PromptplexError.
        """
        await self._check_effect(version, tenant)
        examples = version.examples[:_MAX_EXAMPLES_RUN]
        num_ballots = ProgramSettings.of(version.program).num_ballots
        room = asyncio.Semaphore(max(1, _MAX_EXAMPLES_RUN // num_ballots))

        async def run(example: Mapping[str, Any]) -> ExampleReport:
            async with room:
                return await self._run_example(version, example, tenant)

        return tuple(await asyncio.gather(*map(run, examples)))

    async def _check_effect(self, version: TaskVersion, tenant: str) -> None:
        """Raise PromptRejected unless the prompt changes some answer, if only its log-probabilities."""
        for text in (FIXED_TEXT, *_OTHER_TEXTS):
            request = await asyncio.to_thread(self._request, version, text, tenant)
            with_prompt = await self._tokens(request)
            if version.prompt_digest is None or self._differ(with_prompt, await self._tokens(_bare(request))):
                return
        raise PromptRejected("The prompt has no effect: the base model answers the same without it")

    def _request(self, version: TaskVersion, text: str, tenant: str) -> Request:
        """Return a request with as much of the text as fits beside the prompt and the template."""
        try:
            request = trial_request(fixed_inputs(version, text), tenant)
            admitted = self._service.request_builder.build(request, version)
        except RequestTooLong:
            if len(text) == 1:
                raise
            return self._request(version, text[: len(text) // 2], tenant)
        used = admitted.request.num_virtual_tokens + len(admitted.decoder_ids)
        return replace(
            admitted.request,
            max_new_tokens=min(_NUM_NEW_TOKENS, self._engine.geometry.max_positions - used),
            sampling=SamplingParams(),  # the manifest's penalties would hide what the prompt does
            stop_ids=frozenset(),  # an early EOS would leave little to compare
            deadline=time.monotonic() + _SECONDS,
        )

    async def _tokens(self, request: Request) -> list[tuple[int, float]]:
        tokens: list[tuple[int, float]] = []
        async with aclosing(self._engine.generate(request)) as deltas:
            async for delta in deltas:
                assert delta.token_id is not None
                tokens.append((delta.token_id, delta.logprob))
        return tokens

    def _differ(self, one: list[tuple[int, float]], other: list[tuple[int, float]]) -> bool:
        return any(a[0] != b[0] or abs(a[1] - b[1]) > self._noise for a, b in zip(one, other, strict=True))

    async def _run_example(
        self, version: TaskVersion, example: Mapping[str, Any], tenant: str
    ) -> ExampleReport:
        deadline = time.monotonic() + _SECONDS
        request = GenerationRequest(
            inputs=example["inputs"], request_id="example", deadline=deadline, tenant=tenant
        )
        expected = str(example["expected"])
        try:
            result = await self._service.try_version(version, request)
            generated = result.text or (_why_empty(result.finish, version) if expected.strip() else "")
        except PromptplexError as error:
            generated = f"({error.message})"
        return ExampleReport(
            inputs=example["inputs"],
            expected=expected,
            generated=generated,
            matches=generated.strip() == expected.strip(),
        )


def _why_empty(finish: FinishReason, version: TaskVersion) -> str:
    """Return why steps led to no answer, in brackets; an answer may be empty otherwise."""
    program = ProgramSettings.of(version.program)
    if program.reasoning is not None:
        return f"({finish}: nothing after the marker {program.reasoning.answer_after!r})"
    return f"({finish})" if program.chain is not None else ""


def _bare(request: Request) -> Request:
    """Return a request of the same token ids without the learned prompt."""
    id_, source = f"{request.id}-bare", request.source
    return replace(
        request,
        id=id_,
        segments=(),
        token_ids=request.prompt_ids,
        source=None if source is None else Source(id=id_, token_ids=source.token_ids),
    )
