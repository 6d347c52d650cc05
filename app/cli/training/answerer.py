"""Answers while a prompt is trained, by the engine and the services that will serve it, in this process."""

import asyncio
from collections.abc import Callable, Coroutine, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from app.concurrency import gather_or_cancel
from app.engine.engine import Engine
from app.errors import StoreFull
from app.main import assemble
from app.models.packed_model import PackedModel
from app.prompt import Prompt, TaskVersion
from app.serving.generation_request import ClassificationRequest, GenerationRequest, GenerationResult
from app.serving.publishing.task_settings import LabelledChoice, parse_task
from app.settings import Settings, load_settings
from app.training.examples import Example

_T = TypeVar("_T")
_TASK = "in-training"
_MAX_OPEN = 256  # sequences at once, which is more than the engine runs
GREEDY = {"do_sample": False}
_KV_CACHE_BYTES = 1 << 30  # the model that is trained needs memory too
_HOST_CACHE_BYTES = 64 << 20  # for the newest prompts


class LocalServer:
    """What `promptplex serve` runs, without HTTP, over a store of this run alone. Ends with its block.

    For one thread. Its store's folder is the caller's to remove.
    """

    def __init__(
        self,
        model: str,
        store: Path,
        *,
        progress: Callable[[str], None],
        **settings: Any,
    ) -> None:
        """Load the base; `settings` are a server's. Raise UnsupportedModel, ValueError."""
        checked = _settings(model=model, store=store, **settings)
        with ExitStack() as undo:
            self._services = undo.enter_context(closing(assemble(checked, progress=progress)))
            self._loop = undo.enter_context(asyncio.Runner())
            self._life = undo.pop_all()
        engine = self._services.engine
        assert isinstance(engine, Engine)
        assert isinstance(engine.backbone, PackedModel)
        self.geometry = engine.geometry
        self.model = engine.backbone.model

    def __enter__(self) -> "LocalServer":
        return self

    def __exit__(self, *_: object) -> None:
        self._life.close()

    def publish(self, task: Mapping[str, Any], prompt: Prompt | None) -> TaskVersion | None:
        """Return a version of these settings; None where there are neither a prompt nor a template.

        Raise InvalidRequest for settings that push would refuse too; StoreFull, in words of the run.
        """
        draft = parse_task(task)
        if prompt is None and draft.template is None:
            return None
        try:
            version, _ = self._services.store.publish(_TASK, replace(draft, prompt=prompt))
        except StoreFull as error:
            raise StoreFull(
                "can't write a prompt that is to be tried into the run's directory; make room or choose "
                "another --out"
            ) from error
        if prompt is not None:
            self._services.generation.request_builder.compatibility.validate(prompt)
            self._services.source.offer(prompt)
        return version

    def results(
        self, version: TaskVersion | None, requests: Sequence[GenerationRequest]
    ) -> list[GenerationResult]:
        """Return the result of each request to a version, or to the base. Raise PromptplexError."""
        return self._loop.run(self._all(version, requests))

    async def _all(
        self, version: TaskVersion | None, requests: Sequence[GenerationRequest]
    ) -> list[GenerationResult]:
        service = self._services.generation
        most = max((request.num_sequences for request in requests), default=1)
        room = asyncio.Semaphore(max(1, _MAX_OPEN // most))

        async def run(request: GenerationRequest) -> GenerationResult:
            async with room:
                if version is None:
                    return await service.generate(request)
                return await service.try_version(version, replace(request, task=_TASK))

        work: list[Coroutine[Any, Any, GenerationResult]] = [run(request) for request in requests]
        return await gather_or_cancel(work)


class TaskAnswerer:
    """Answers greedily for one task's settings: the `Answerer` of a run."""

    def __init__(self, server: LocalServer, task: Mapping[str, Any]) -> None:
        """`task` is the `task` part of an upload: template, defaults, choices."""
        self._server = server
        self._task = task

    def answers(self, prompt: Prompt | None, examples: Sequence[Example]) -> list[str]:
        """Return the answer to each example's inputs; `prompt` None: of the bare base."""
        return [result.text for result in self._run(prompt, examples, None)]

    def probabilities(
        self, prompt: Prompt | None, examples: Sequence[Example], choices: Sequence[LabelledChoice]
    ) -> list[dict[str, float]]:
        """Return the probability of each of the choices, for each example."""
        classification = ClassificationRequest(choices=tuple(choice.model_dump() for choice in choices))
        results = self._run(prompt, examples, classification)
        return [dict(result.classification.probabilities) for result in results if result.classification]

    def _run(
        self,
        prompt: Prompt | None,
        examples: Sequence[Example],
        classification: ClassificationRequest | None,
    ) -> list[GenerationResult]:
        version = self._server.publish(self._task, prompt)
        defaults = {} if version is not None else self._task.get("defaults", {})
        requests = [
            GenerationRequest(
                inputs=example.inputs,
                messages=example.messages or None,
                parameters=GREEDY,
                fallbacks=defaults,
                classification=classification,
                request_id="train",
            )
            for example in examples
        ]
        return self._server.results(version, requests) if requests else []


def _settings(**given: Any) -> Settings:
    """Return a server's settings without those of the environment, such as a Redis that others use.

    Raise ValueError, which names the one that is wrong.
    """
    defaults = {name: field.default for name, field in Settings.model_fields.items()}
    memory = {"kv_cache_bytes": _KV_CACHE_BYTES, "host_cache_bytes": _HOST_CACHE_BYTES}
    return load_settings({**defaults, **memory, **given})
