"""Publishing: import -> validate -> store -> trial run -> release.

An upload that is refused on the way to the store leaves nothing behind. A version that fails its trial run
is stored (it had to be, to run), but no alias points at it unless it passes later.
"""

import asyncio
import contextlib
import uuid
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from typing import TypeVar

from app.concurrency import Workers
from app.errors import (
    InvalidRequest,
    NotFound,
    Overloaded,
    PromptplexError,
    PromptRejected,
    RequestTooLong,
    Unavailable,
)
from app.prompt import Prompt, TaskVersion, VersionDraft
from app.serving.compatibility import vouched_base
from app.serving.generation import GenerationService
from app.serving.generation_request import GenerationRequest
from app.serving.program_settings import ProgramSettings
from app.serving.publishing.own_embeddings import OwnEmbeddings
from app.serving.publishing.program_checks import check_markers
from app.serving.publishing.trial_run import ExampleReport, TrialRun, fixed_inputs, trial_request
from app.serving.publishing.upload import Upload, draft_version, needs_release, release_version
from app.store.manifests import version_of
from app.store.prompt_store import PromptStore
from app.store.references import check_task_id
from app.store.releases import Release

_T = TypeVar("_T")

_THREADS = 2  # uploads that are worked on at once
_MAX_WAITING = 8  # uploads that wait for them, each with its bytes on disk


@dataclass(frozen=True, slots=True, kw_only=True)
class UploadResult:
    """The outcome of an upload."""

    version: TaskVersion
    created: bool  # False: the same bytes and settings were a version already
    release: Release | None  # None: no alias was moved
    examples: tuple[ExampleReport, ...]
    warnings: tuple[str, ...] = ()  # tensors that were left out, another base, steps of no task


class PublishingService:
    """Makes versions of uploads, and points aliases at them."""

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
        self._builder = generation.request_builder
        self._trial = TrialRun(generation)
        self._threads = Workers(_THREADS, "publishing")
        self._movers = Workers(1, "releasing")  # an alias moves at once, however long uploads take
        self.slot = asyncio.Semaphore(_THREADS)  # to be held while an upload's bytes are in memory
        self._num_places = 0

    @contextlib.contextmanager
    def place(self) -> Iterator[None]:
        """Hold this from before an upload's bytes are received to its end. Raise Overloaded."""
        if self._num_places >= _THREADS + _MAX_WAITING:
            raise Overloaded("Too many uploads at once; try again shortly.", retry_after=5.0)
        self._num_places += 1
        try:
            yield
        finally:
            self._num_places -= 1

    async def upload(
        self,
        task_id: str,
        upload: Upload,
        *,
        tenant: str = "",
        require: Callable[[str], None] = lambda reference: None,
    ) -> UploadResult:
        """Publish a version, try it as `tenant`, and point the upload's alias at it.

        `require` raises Forbidden for a task that a chain may have no step of. Raise that, InvalidRequest,
        PromptRejected (UnsafeFile), StoreFull, Unavailable.
        """
        self.check_task_id(task_id)
        own = OwnEmbeddings(self._generation.engine)
        draft = await self._in_thread(lambda: self._draft(upload, own))
        steps = ProgramSettings.of(draft.program).step_tasks
        for task in steps:
            require(task)
        version, created = await self._in_thread(lambda: self._store.publish(task_id, draft))
        if draft.prompt is not None:
            self._on_stored(draft.prompt)
        is_released = await self._in_thread(
            lambda: needs_release(self._store, upload, version, created=created)
        )
        examples = await self._try(version, tenant) if created or is_released else ()
        release = None
        if is_released:
            release = await self.change(lambda store: release_version(store, upload, version))
        warnings = (
            *own.warnings,
            *_of_another_base(draft, self._generation.engine.geometry.fingerprint),
            *await self._in_thread(lambda: self._of_missing_steps(steps)),
        )
        return UploadResult(
            version=version, created=created, release=release, examples=examples, warnings=warnings
        )

    def _of_missing_steps(self, tasks: Iterable[str]) -> list[str]:
        """Return a warning of each task that a chain has a step of, and that isn't there yet."""
        found = []
        for task in tasks:
            try:
                if task != self._generation.base_name:
                    self._store.resolve(task)
            except NotFound as error:
                reason = error.message.rstrip(".")
                found.append(f"the chain has a step of {task}, and is refused until that is there: {reason}")
        return found

    async def change(self, work: Callable[[PromptStore], Release]) -> Release:
        """Move an alias, roll back, retire, restore: do it on the store, and let other replicas know."""
        release = await self._in_thread(lambda: work(self._store), self._movers)
        self._on_release(release.task_id)
        return release

    def close(self) -> None:
        """End the threads; uploads that wait for one are cancelled, and were not acknowledged."""
        self._threads.shutdown(cancel_futures=True)
        self._movers.shutdown(cancel_futures=True)

    async def _in_thread(self, work: Callable[[], _T], threads: Executor | None = None) -> _T:
        return await asyncio.get_running_loop().run_in_executor(threads or self._threads, work)

    def check_task_id(self, task_id: str) -> None:
        """Raise InvalidRequest unless a task may be called so."""
        if check_task_id(task_id) == self._generation.base_name:
            raise InvalidRequest(
                f"{task_id!r} is the name of the base model; choose another task id.", param="task_id"
            )

    def _draft(self, upload: Upload, own: OwnEmbeddings) -> VersionDraft:
        """Return the draft, after every check that needs nothing stored."""
        geometry = self._generation.engine.geometry
        draft = draft_version(upload, own.check, geometry)
        if draft.prompt is not None:
            self._builder.compatibility.validate(draft.prompt)
        self._check_room(draft)
        vouched = vouched_base(geometry)
        return replace(draft, provenance={**draft.provenance, **vouched})

    def _check_room(self, draft: VersionDraft) -> None:
        """Raise RequestTooLong unless each text with some input, and every example, fit the base.

        Raise InvalidRequest where the defaults ask for what it can't do, or a marker is what it can't write.
        """
        version = replace(version_of("draft", 1, draft), digest=f"draft:{uuid.uuid4().hex}")  # names nothing
        for param, request in _trials(version):
            try:
                self._builder.build(request, version)
            except RequestTooLong as error:
                raise RequestTooLong(f"{param} doesn't fit: {error.message}", param=param) from None
            except InvalidRequest as error:
                field = (error.param or param).replace("parameters.", "task.defaults.")
                raise InvalidRequest(error.message, param=field) from None
        check_markers(ProgramSettings.of(draft.program), self._builder.prompts.tokenizer)

    async def _try(self, version: TaskVersion, tenant: str) -> tuple[ExampleReport, ...]:
        try:
            return await self._trial.run(version, tenant)
        except PromptplexError as error:
            note = (
                f"Version {version.version} of {version.task_id} is stored but not released, since its trial "
                f"run failed: {error.message}"
            )
            if isinstance(error, Unavailable):
                raise Unavailable(note, retry_after=error.retry_after) from error
            raise PromptRejected(note) from error


def _trials(version: TaskVersion) -> Iterator[tuple[str, GenerationRequest]]:
    """Yield a request for each text of a version, with the field that is at fault where it doesn't fit."""
    request, program = trial_request(fixed_inputs(version, "a")), ProgramSettings.of(version.program)
    if program.chain is None:
        yield "task.few_shot" if program.few_shot else "task.template", request
    else:
        yield "task.chain.template", replace(request, steps=("a" + (program.chain.step_ends or ""),))
    for index in range(len(program.paraphrases)):
        parameters = {**request.parameters, "paraphrase": index}
        yield f"task.paraphrases[{index}]", replace(request, parameters=parameters)
    for index, example in enumerate(version.examples):
        yield f"task.examples[{index}]", trial_request(example["inputs"])


def _of_another_base(draft: VersionDraft, fingerprint: str) -> list[str]:
    """Return a warning where the upload states that the prompt was trained on another base."""
    stated = draft.provenance.get("training", {}).get("base_fingerprint", fingerprint)
    if stated in (None, fingerprint):
        return []
    return [
        f"The prompt was trained on another base ({stated[:12]}) than the one that serves it "
        f"({fingerprint[:12]}); its answers may be of no use."
    ]
