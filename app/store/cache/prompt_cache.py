"""The cache that the engine's prompts come from: host memory, then the tiers below it.

    load(digest): host memory --miss--> (the loader's event loop) PromptTiers: remote cache, store

Loads are tasks of one event loop, on a thread of its own; what blocks or takes long runs on
further threads. Each digest is loaded once at a time, for all callers.
"""

import asyncio
import logging
import threading
import time
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial

from app.caching import LruCache
from app.concurrency import Workers
from app.errors import EngineStopped, PromptplexError, Unavailable
from app.prompt import Prompt
from app.store.cache.tiers import BlobStore, PromptTiers, RemoteTier
from app.store.releases import TaskHistory

_log = logging.getLogger(__name__)
_HOST = "host"
_NUM_READERS = 4  # threads that read the store
_NUM_CHECKERS = 2  # threads that verify what the remote cache gave, look names up and take hints


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptCacheStats:
    """Counters since the start. Tiers are "host", "redis" and "store"; the last two have times and bytes.

    A read that is let go, because another tier was faster, is neither a hit nor a miss.
    """

    hits: Mapping[str, int]
    misses: Mapping[str, int]
    tier_seconds: Mapping[str, float]  # summed over answers, misses too
    tier_bytes: Mapping[str, int]  # of hits
    load_failures: int  # loads that ended with an error
    remote_failures: int  # errors and wrong bytes of the remote cache
    heals: int  # prompts that the remote cache gave back to the store
    hedged: int  # loads in which the store was asked while the remote cache was silent
    load_seconds: float  # summed over loads, failed ones too
    num_loading: int
    host_prompts: int
    host_bytes: int


@dataclass(slots=True)
class _Loading:
    """A load that runs; callers share it, so none can cancel it."""

    future: "Future[Prompt]"
    is_wanted: bool = False  # by a caller that waits; otherwise it is only prefetched
    started: float = field(default_factory=time.monotonic)


class PromptCache:
    """A PromptSource over the tiers. Thread-safe."""

    def __init__(self, store: BlobStore, *, host_bytes: int, remote: RemoteTier | None = None) -> None:
        self._host: LruCache[str, Prompt] = LruCache(host_bytes, lambda prompt: len(prompt.data))
        self._capacity = host_bytes
        self._loading: dict[str, _Loading] = {}
        self._host_hits = 0
        self._host_misses = 0
        self._load_failures = 0
        self._load_seconds = 0.0
        self._closed = False
        self._lock = threading.Lock()  # guards all of the above; never held across I/O
        self._readers = Workers(_NUM_READERS, "prompt-reader")
        self._tiers = PromptTiers(store, remote, self._readers)
        self._tasks: set[asyncio.Task[Prompt]] = set()  # of the loop's thread
        self._loop = asyncio.new_event_loop()
        self._loop.set_default_executor(Workers(_NUM_CHECKERS, "prompt-checker"))
        self._thread = threading.Thread(target=self._loop.run_forever, name="prompt-loader", daemon=True)
        self._thread.start()
        self._loop.call_soon_threadsafe(self._tiers.start)

    def load(self, digest: str) -> "Future[Prompt]":
        """Return at once. Done already on a hit in host memory; callers share one load of a digest."""
        with self._lock:
            if (prompt := self._host.get(digest)) is not None:
                self._host_hits += 1
                return _completed(prompt)
            self._host_misses += 1
            if self._closed:
                return _failed(_stopped())
            loading = self._loading.get(digest) or self._begin(digest)
            loading.is_wanted = True
            return loading.future

    def prefetch(self, digest: str) -> None:
        """Load the prompt into host memory, as it will soon be needed. Errors stay unreported until then."""
        with self._lock:
            if not self._closed and digest not in self._loading and self._host.get(digest) is None:
                self._begin(digest)

    def prefetch_released(self, history: TaskHistory) -> None:
        """Prefetch the prompts that the newest release names; another replica may have made it."""
        for number in history.releases[-1].manifest_digests if history.releases else ():
            version = history.version(number)
            if version is not None and version.prompt_digest is not None:
                self.prefetch(version.prompt_digest)

    def offer(self, prompt: Prompt) -> None:
        """Keep a prompt that was just made, and let the remote cache have it in the background."""
        with self._lock:
            if not self._closed:
                self._keep(prompt)
                self._loop.call_soon_threadsafe(self._tiers.offer_remote, prompt)

    def stats(self) -> PromptCacheStats:
        """Return a consistent snapshot."""
        tiers = self._tiers.counters
        with self._lock, tiers.lock:
            return PromptCacheStats(
                hits=_with_host(self._host_hits, tiers.hits),
                misses=_with_host(self._host_misses, tiers.misses),
                tier_seconds=dict(tiers.seconds),
                tier_bytes=dict(tiers.num_bytes),
                load_failures=self._load_failures,
                remote_failures=tiers.remote_failures,
                heals=tiers.heals,
                hedged=tiers.hedged,
                load_seconds=self._load_seconds,
                num_loading=len(self._loading),
                host_prompts=len(self._host),
                host_bytes=self._host.weight,
            )

    def check_integrity(self) -> None:
        """Assert what must hold at any time."""
        with self._lock:
            self._host.check_integrity()
            assert self._host.weight <= self._capacity
            assert not any(loading.future.done() for loading in self._loading.values())

    def close(self) -> None:
        """Fail the loads that run, and let go of the remote cache and the threads."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        asyncio.run_coroutine_threadsafe(self._stop(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        self._readers.shutdown(wait=True, cancel_futures=True)

    def _keep(self, prompt: Prompt) -> None:
        """Keep a prompt, with the lock held; not one that is larger than the whole cache."""
        if len(prompt.data) <= self._capacity:
            self._host.put(prompt.digest, prompt)

    def _begin(self, digest: str) -> _Loading:
        """Begin a load, with the lock held, while not closed."""
        loading = self._loading[digest] = _Loading(_running())
        self._loop.call_soon_threadsafe(self._start, digest, loading)
        return loading

    def _start(self, digest: str, loading: _Loading) -> None:
        """Start the load's task, on the loop."""
        task = self._loop.create_task(self._tiers.fetch(digest))
        self._tasks.add(task)
        task.add_done_callback(partial(self._end, digest, loading))

    def _end(self, digest: str, loading: _Loading, task: "asyncio.Task[Prompt]") -> None:
        """End the future, whatever has happened, on the loop."""
        self._tasks.discard(task)
        error = None if task.cancelled() else task.exception()
        with self._lock:
            del self._loading[digest]
            self._load_seconds += time.monotonic() - loading.started
            self._load_failures += error is not None
            if not task.cancelled() and error is None:
                self._keep(task.result())
        # Outside the lock: callbacks of the future may call load().
        if task.cancelled():
            loading.future.set_exception(_stopped())
        elif error is not None:
            loading.future.set_exception(_known(error, digest, is_wanted=loading.is_wanted))
        else:
            loading.future.set_result(task.result())

    async def _stop(self) -> None:
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._tiers.close()
        await self._loop.shutdown_default_executor()


def _with_host(count: int, tiers: Mapping[str, int]) -> dict[str, int]:
    return {**({_HOST: count} if count else {}), **tiers}


def _known(error: BaseException, digest: str, *, is_wanted: bool) -> PromptplexError:
    """Return the error as the caller may see it."""
    if isinstance(error, PromptplexError):
        return error
    _log.log(
        logging.ERROR if is_wanted else logging.DEBUG, "Loading prompt %s failed", digest, exc_info=error
    )
    return Unavailable("The prompt could not be loaded")


def _stopped() -> EngineStopped:
    return EngineStopped("The server is shutting down")


def _running() -> "Future[Prompt]":
    future: Future[Prompt] = Future()
    future.set_running_or_notify_cancel()  # no caller can cancel it for the others
    return future


def _completed(prompt: Prompt) -> "Future[Prompt]":
    future: Future[Prompt] = Future()
    future.set_result(prompt)
    return future


def _failed(error: PromptplexError) -> "Future[Prompt]":
    future: Future[Prompt] = Future()
    future.set_exception(error)
    return future
