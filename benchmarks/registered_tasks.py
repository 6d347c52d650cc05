"""Tasks in a real store, each with a soft prompt of its own.

Shapes: p virtual tokens, d hidden size.
"""

import itertools
from collections.abc import Sequence
from pathlib import Path

from app.prompt import Prompt, PromptKind, VersionDraft
from app.request import Request, Segment, segments_of
from app.sites import Embedding
from app.store.cache.prompt_cache import PromptCache
from app.store.prompt_file import make_prompt
from app.store.prompt_store import PromptStore, open_store
from app.store.references import DEFAULT_ALIAS
from app.store.safetensors_file import RawTensor
from benchmarks.work import Ask

_LOAD_SECONDS = 60.0


def soft_prompt(shape: tuple[int, int], data: bytes) -> Prompt:
    """`[p, d]` in bf16, from its little-endian bytes."""
    return make_prompt(PromptKind.SOFT, {Embedding.DECODER: RawTensor("BF16", shape, data)})


def publish_task(store: PromptStore, task_id: str, draft: VersionDraft) -> int:
    """Durable and live, as an upload leaves it; the version's number."""
    version, _ = store.publish(task_id, draft)
    store.move_alias(task_id, DEFAULT_ALIAS, version.version)
    return version.version


def task_id(number: int) -> str:
    """What task number n is called."""
    return f"task-{number}"


class RegisteredTasks:
    """Numbered tasks in a store of their own, served through a source with all prompts in host memory."""

    def __init__(self, folder: Path, prompts: Sequence[Prompt]) -> None:
        self._store = open_store(folder)
        self._digests = [prompt.digest for prompt in prompts]
        for number, prompt in enumerate(prompts):
            publish_task(self._store, task_id(number), VersionDraft(prompt=prompt))
        self.source = PromptCache(self._store, host_bytes=sum(len(prompt.data) for prompt in prompts))
        for digest in self._digests:
            self.source.load(digest).result(_LOAD_SECONDS)
        assert self.source.stats().host_prompts == len(prompts)
        self._numbers = itertools.count()

    def request(self, ask: Ask, new_tokens: int) -> Request:
        """As admission makes one: of the task's live version, pinned by its digest."""
        version = self._store.resolve(task_id(ask.task))
        return Request(
            id=f"request-{next(self._numbers)}",
            token_ids=ask.token_ids,
            segments=segments_of(
                Segment(prompt_digest=version.prompt_digest, num_virtual_tokens=version.num_virtual_tokens)
            ),
            max_new_tokens=new_tokens,
            task=version.task_id,
        )

    def outside(self, digests: frozenset[str]) -> list[int]:
        """Numbers of the tasks whose prompts aren't among these."""
        return [number for number, digest in enumerate(self._digests) if digest not in digests]

    def close(self) -> None:
        """End the loader threads."""
        self.source.close()
