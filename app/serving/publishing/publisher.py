"""Publishing: import -> validate -> store -> trial run -> release.

What is refused on the way to the store leaves nothing behind. A version that fails its trial run
is stored (it had to be, to run), but no alias ever means it unless it passes later.
"""

import asyncio
import contextlib
import uuid
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Any, TypeVar

from app.concurrency import Workers
from app.errors import (
    InvalidRequest,
    Overloaded,
    PromptplexError,
    PromptRejected,
    RequestTooLong,
    Unavailable,
)
from app.prompt import Prompt, PromptKind, TaskVersion, VersionDraft
from app.serving.compatibility import vouched_base
from app.serving.generation import GenerationService
from app.serving.publishing.own_embeddings import OwnEmbeddings
from app.serving.publishing.task_settings import TaskSettings, parse_task
from app.serving.publishing.trial_run import ExampleReport, TrialRun, fixed_inputs, trial_ask
from app.store.importers import import_prompt
from app.store.prompt_store import PromptStore, Release
from app.store.references import DEFAULT_ALIAS, check_alias, check_task_id

_T = TypeVar("_T")

MAX_CONFIG_BYTES = 1 << 20
_THREADS = 2  # uploads that are worked on at once
_MAX_WAITING = 8  # uploads that wait for them, each with its bytes on disk


@dataclass(frozen=True, slots=True, kw_only=True)
class UploadResult:
    """What an upload came to."""

    version: TaskVersion
    created: bool  # False: the same bytes and settings were a version already
    release: Release | None  # None: no alias was moved
    examples: tuple[ExampleReport, ...]
    warnings: tuple[str, ...] = ()  # what was left out of the upload


class PublishingService:
    """Makes uploads versions and lets aliases mean them."""

    def __init__(
        self,
        store: PromptStore,
        generation: GenerationService,
        *,
        on_stored: Callable[[Prompt], None] = lambda prompt: None,
        on_release: Callable[[str], None] = lambda task_id: None,
    ) -> None:
        """`on_stored` gets a prompt that is durable now, `on_release` the id of a task that changed."""
        self._store = store
        self._on_stored = on_stored
        self._on_release = on_release
        self._generation = generation
        self._admission = generation.request_builder
        self._smoke = TrialRun(generation)
        self._threads = Workers(_THREADS, "publishing")
        self._movers = Workers(1, "releasing")  # an alias moves at once, however long uploads take
        self._slots = asyncio.Semaphore(_THREADS)
        self._num_places = 0

    @contextlib.contextmanager
    def place(self) -> Iterator[None]:
        """Hold this from before an upload's bytes are taken to its end. Raises Overloaded."""
        if self._num_places >= _THREADS + _MAX_WAITING:
            raise Overloaded("Too many uploads at once; try again shortly.", retry_after=5.0)
        self._num_places += 1
        try:
            yield
        finally:
            self._num_places -= 1

    @contextlib.asynccontextmanager
    async def slot(self) -> AsyncIterator[None]:
        """Hold this while an upload's bytes are in memory."""
        async with self._slots:
            yield

    async def upload(
        self,
        task_id: str,
        *,
        prompt: bytes | None,
        config: bytes | None,
        task: Mapping[str, Any] | None,
        alias: str | None = DEFAULT_ALIAS,
        alias_given: bool = False,
        who: str = "",
        tenant: str = "",
    ) -> UploadResult:
        """Publish a version and point `alias` at it (None: at nothing). The trial runs as `tenant`.

        An existing version's alias moves only where `alias_given`, or where no release has named
        the version yet, as after a crash between storing and releasing.
        Raises InvalidRequest, PromptRejected (UnsafeFile), StoreFull, Unavailable.
        """
        self._check_names(task_id, alias)
        beside = OwnEmbeddings(self._generation.engine.backbone)
        draft = await self._in_thread(lambda: self._draft(prompt, config, task, who, alias, beside))
        version, created = await self._in_thread(lambda: self._store.publish(task_id, draft))
        if draft.prompt is not None:
            self._on_stored(draft.prompt)
        wanted = alias is not None and (
            created or alias_given or await self._in_thread(lambda: self._is_new(version))
        )
        if not created and not wanted:
            return UploadResult(
                version=version, created=False, release=None, examples=(), warnings=tuple(beside.warnings)
            )
        examples = await self._try(version, tenant)
        release = None
        if wanted and alias is not None:
            release = await self.change(
                lambda store: store.move_alias(task_id, alias, version.version, who=who, why="upload")
            )
        return UploadResult(
            version=version,
            created=created,
            release=release,
            examples=examples,
            warnings=tuple(beside.warnings),
        )

    async def change(self, work: Callable[[PromptStore], Release]) -> Release:
        """Move an alias, roll back, retire, restore: do it on the store, and let other replicas know."""
        release = await self._in_thread(lambda: work(self._store), self._movers)
        self._on_release(release.task_id)
        return release

    def close(self) -> None:
        """End the threads; what waits for one is cancelled, and was not acknowledged."""
        self._threads.shutdown(cancel_futures=True)
        self._movers.shutdown(cancel_futures=True)

    async def _in_thread(self, work: Callable[[], _T], threads: Executor | None = None) -> _T:
        return await asyncio.get_running_loop().run_in_executor(threads or self._threads, work)

    def _check_names(self, task_id: str, alias: str | None) -> None:
        check_task_id(task_id)
        if alias is not None:
            check_alias(alias)
        if task_id == self._generation.base_name:
            raise InvalidRequest(
                f"{task_id!r} is the name of the base model; choose another task id.", param="task_id"
            )

    def _is_new(self, version: TaskVersion) -> bool:
        """Whether its upload ended before the release that was wanted."""
        if version.provenance.get("meant_for") is None:
            return False
        releases = self._store.history(version.task_id).releases
        return all(version.version not in release.manifest_digests for release in releases)

    # -- before anything is stored ----------------------------------------------------------

    def _draft(
        self,
        prompt: bytes | None,
        config: bytes | None,
        task: Mapping[str, Any] | None,
        who: str,
        alias: str | None,
        beside: OwnEmbeddings,
    ) -> VersionDraft:
        settings = parse_task(task)
        learned, provenance = self._learned(prompt, config, settings, beside)
        draft = VersionDraft(
            prompt=learned,
            template=settings.template,
            defaults=settings.defaults,
            choices=settings.choices,
            examples=settings.examples,
            notes=settings.notes,
            base=settings.base,
            provenance={
                **provenance,
                **vouched_base(self._generation.engine.geometry),
                "uploader": who,
                "meant_for": alias,  # None: uploaded so that no alias would mean it
                "metrics": dict(settings.metrics),
            },
        )
        self._check_room(draft)
        return draft

    def _learned(
        self, prompt: bytes | None, config: bytes | None, settings: TaskSettings, beside: OwnEmbeddings
    ) -> tuple[Prompt | None, Mapping[str, Any]]:
        if prompt is None:
            if config is not None:
                raise InvalidRequest(
                    "There is a config without a prompt: send adapter_model.safetensors as part 'prompt'.",
                    param="prompt",
                )
            if settings.template is None:
                raise InvalidRequest(
                    "There is nothing to publish: send a prompt, or a task with a template, or both.",
                    param="prompt",
                )
            return None, {"source_format": "template"}
        if config is not None and len(config) > MAX_CONFIG_BYTES:
            raise InvalidRequest(f"The config exceeds {MAX_CONFIG_BYTES} bytes.", param="config")
        learned, provenance = import_prompt(prompt, config, beside.check)
        self._admission.compatibility.validate(learned)
        return learned, provenance

    def _check_room(self, draft: VersionDraft) -> None:
        """The template with some text, and every example, must fit the base beside the prompt."""
        version = _provisional(draft)
        for param, inputs in [
            ("task.template", fixed_inputs(version, "a")),
            *((f"task.examples[{index}]", example["inputs"]) for index, example in enumerate(draft.examples)),
        ]:
            try:
                self._admission.admit_version(version, trial_ask(inputs))
            except RequestTooLong as error:
                raise RequestTooLong(f"{param} doesn't fit: {error.message}", param=param) from None

    # -- after it is stored -----------------------------------------------------------------

    async def _try(self, version: TaskVersion, tenant: str) -> tuple[ExampleReport, ...]:
        try:
            return await self._smoke.run(version, tenant)
        except PromptplexError as error:
            note = (
                f"Version {version.version} of {version.task_id} is stored but not released, since its trial "
                f"run failed: {error.message}"
            )
            if isinstance(error, Unavailable):
                raise Unavailable(note, retry_after=error.retry_after) from error
            raise PromptRejected(note) from error


def _provisional(draft: VersionDraft) -> TaskVersion:
    """The version that the draft would become, for checks; its digest names nothing."""
    prompt = draft.prompt
    return TaskVersion(
        task_id="draft",
        version=0,
        digest=f"draft:{uuid.uuid4().hex}",
        kind=PromptKind.TEXT if prompt is None else prompt.kind,
        prompt_digest=None if prompt is None else prompt.digest,
        num_virtual_tokens=0 if prompt is None else prompt.num_virtual_tokens,
        position_offset=0 if prompt is None else prompt.position_offset,
        template=draft.template,
        defaults=draft.defaults or {},
        choices=draft.choices,
        examples=draft.examples,
        notes=draft.notes,
        base=draft.base or {},
        provenance={},
    )
