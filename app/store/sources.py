"""Where the engine's prompts come from: host memory, then a remote cache, then the store.

    load(digest): HostCache --miss--> (a loader thread) BlobCache --miss--> store.read_blob

A tier can change latency, never an answer: bytes of the remote cache are hashed before use, and
one that fails counts as a miss. Each digest is loaded by one thread at a time.
"""

import hashlib
import logging
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

from app.errors import EngineStopped, PromptplexError, Unavailable
from app.prompt import Prompt
from app.store.canonical import read_prompt

_log = logging.getLogger(__name__)
_NUM_LOADERS = 4


class BlobReader(Protocol):
    """The last tier: what is not here is nowhere."""

    def read_blob(self, digest: str) -> bytes:
        """Verified bytes. Raises PromptplexError."""
        ...


class BlobCache(Protocol):
    """A cache between host memory and the store, called from loader threads. Never trusted."""

    def get(self, digest: str) -> bytes | None:
        """The bytes, perhaps wrong ones, or None. Any exception is a miss."""
        ...

    def put(self, digest: str, data: bytes) -> None:
        """Keep them if it can. Any exception is ignored."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceStats:
    """Counters since the start. Tiers are "host", "remote" and "store"."""

    hits: Mapping[str, int]
    misses: Mapping[str, int]
    load_failures: int  # loads that ended with an error
    remote_failures: int  # errors and wrong bytes of the remote cache
    load_seconds: float  # summed over loads, failed ones too
    num_loading: int
    host_prompts: int
    host_bytes: int
    host_capacity: int


class HostCache:
    """Prompts in host memory, the least recently used dropped first, bounded by bytes.

    Prompts are immutable: dropping one here takes nothing from those who hold it. Not
    thread-safe; its owner locks.
    """

    def __init__(self, capacity: int) -> None:
        self._prompts: OrderedDict[str, Prompt] = OrderedDict()
        self._capacity = capacity
        self._num_bytes = 0

    @property
    def num_bytes(self) -> int:
        """Bytes held; never more than the capacity."""
        return self._num_bytes

    def __len__(self) -> int:
        return len(self._prompts)

    def get(self, digest: str) -> Prompt | None:
        """The prompt, now the most recently used one."""
        prompt = self._prompts.get(digest)
        if prompt is not None:
            self._prompts.move_to_end(digest)
        return prompt

    def put(self, prompt: Prompt) -> None:
        """Keep it, dropping others; one that is larger than the whole cache is not kept."""
        if prompt.digest in self._prompts or len(prompt.data) > self._capacity:
            return
        self._prompts[prompt.digest] = prompt
        self._num_bytes += len(prompt.data)
        while self._num_bytes > self._capacity:
            _, dropped = self._prompts.popitem(last=False)
            self._num_bytes -= len(dropped.data)

    def check_integrity(self) -> None:
        """Assert that the accounts agree with what is held."""
        assert self._num_bytes == sum(len(prompt.data) for prompt in self._prompts.values())
        assert self._num_bytes <= self._capacity
        assert all(digest == prompt.digest for digest, prompt in self._prompts.items())


class TieredPromptSource:
    """A PromptSource over the tiers. Thread-safe."""

    def __init__(self, store: BlobReader, *, host_bytes: int, remote: BlobCache | None = None) -> None:
        self._store = store
        self._remote = remote
        self._cache = HostCache(host_bytes)
        self._capacity = host_bytes
        self._loading: dict[str, Future[Prompt]] = {}
        self._loaders = ThreadPoolExecutor(_NUM_LOADERS, thread_name_prefix="prompt-loader")
        self._hits: Counter[str] = Counter()
        self._misses: Counter[str] = Counter()
        self._load_failures = 0
        self._remote_failures = 0
        self._load_seconds = 0.0
        self._lock = threading.Lock()  # guards all of the above; never held across I/O

    def load(self, digest: str) -> "Future[Prompt]":
        """Return at once. Done already on a hit in host memory; callers share one load of a digest."""
        with self._lock:
            if (prompt := self._cache.get(digest)) is not None:
                self._hits["host"] += 1
                return _completed(prompt)
            self._misses["host"] += 1
            if (loading := self._loading.get(digest)) is not None:
                return loading
            future: Future[Prompt] = Future()
            future.set_running_or_notify_cancel()  # it is shared: nobody can cancel it for the others
            try:
                self._loaders.submit(self._load, digest, future)
            except RuntimeError:  # closed
                future.set_exception(EngineStopped("The server is shutting down"))
                return future
            self._loading[digest] = future
            return future

    def stats(self) -> SourceStats:
        """A consistent snapshot."""
        with self._lock:
            return SourceStats(
                hits=dict(self._hits),
                misses=dict(self._misses),
                load_failures=self._load_failures,
                remote_failures=self._remote_failures,
                load_seconds=self._load_seconds,
                num_loading=len(self._loading),
                host_prompts=len(self._cache),
                host_bytes=self._cache.num_bytes,
                host_capacity=self._capacity,
            )

    def check_integrity(self) -> None:
        """Assert what must hold at any time."""
        with self._lock:
            self._cache.check_integrity()
            assert not any(future.done() for future in self._loading.values())

    def close(self) -> None:
        """Finish the loads that run, fail those that wait."""
        self._loaders.shutdown(wait=True, cancel_futures=True)
        with self._lock:
            waiting = list(self._loading.values())
            self._loading.clear()
        for future in waiting:
            future.set_exception(EngineStopped("The server is shutting down"))

    def _load(self, digest: str, future: "Future[Prompt]") -> None:
        """On a loader thread; ends the future whatever happens."""
        started = time.monotonic()
        prompt: Prompt | None = None
        error: PromptplexError | None = None
        try:
            prompt = read_prompt(self._fetch(digest))
        except PromptplexError as known:
            error = known
        except Exception:
            _log.exception("Loading prompt %s failed", digest)
            error = Unavailable("The prompt could not be loaded")
        with self._lock:
            self._loading.pop(digest, None)
            self._load_seconds += time.monotonic() - started
            self._load_failures += prompt is None
            if prompt is not None:
                self._cache.put(prompt)
        # Outside the lock: callbacks of the future may call load().
        if prompt is not None:
            future.set_result(prompt)
        else:
            future.set_exception(error)

    def _fetch(self, digest: str) -> bytes:
        if self._remote is not None:
            data = self._ask_remote(self._remote, digest)
            self._count("remote", hit=data is not None)
            if data is not None:
                return data
        try:
            data = self._store.read_blob(digest)
        except PromptplexError:
            self._count("store", hit=False)
            raise
        self._count("store", hit=True)
        if self._remote is not None:
            self._tell_remote(self._remote, digest, data)
        return data

    def _ask_remote(self, remote: BlobCache, digest: str) -> bytes | None:
        try:
            data = remote.get(digest)
        except Exception:
            data = None
            self._count_remote_failure()
        if data is not None and hashlib.sha256(data).hexdigest() != digest:
            _log.warning("The remote cache holds wrong bytes for prompt %s", digest)
            self._count_remote_failure()
            data = None
        return data

    def _tell_remote(self, remote: BlobCache, digest: str, data: bytes) -> None:
        try:
            remote.put(digest, data)
        except Exception:
            self._count_remote_failure()

    def _count(self, tier: str, *, hit: bool) -> None:
        with self._lock:
            (self._hits if hit else self._misses)[tier] += 1

    def _count_remote_failure(self) -> None:
        with self._lock:
            self._remote_failures += 1


def _completed(prompt: Prompt) -> "Future[Prompt]":
    future: Future[Prompt] = Future()
    future.set_result(prompt)
    return future
