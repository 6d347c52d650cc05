"""The tiers below host memory: a remote cache, then the store. One event loop, many loads at a time.

    fetch(digest): remote --miss, or silent for 10 ms--> store

A tier can change latency, never an answer: bytes of the remote cache are hashed before use, and
wrong ones count as a miss. Prompts that the store has lost and the remote cache still has are put back.
"""

import asyncio
import hashlib
import logging
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Coroutine
from concurrent.futures import Executor
from typing import Any, Protocol

from app.errors import CorruptData
from app.prompt import Prompt
from app.store.prompt_file import read_prompt

_log = logging.getLogger(__name__)

REMOTE, STORE = "redis", "store"
HEDGE_SECONDS = 0.010  # then the store is asked too
MAX_BYTES_UNDER_WAY = 64 << 20  # to the remote cache; what comes on top is not sent
_LARGE_BYTES = 1 << 20  # hashing that much takes longer than other loads should wait


class BlobStore(Protocol):
    """The last tier, which has every prompt. Called from threads."""

    def read_blob(self, digest: str) -> bytes:
        """Return verified bytes. Raise PromptplexError; CorruptData where they are missing or damaged."""
        ...

    def heal_blob(self, digest: str, data: bytes) -> bool:
        """Put good bytes back where the store has lost them. Return whether it had. Raise PromptplexError."""
        ...


class RemoteTier(Protocol):
    """A cache between host memory and the store. Runs on its owner's event loop. Never trusted."""

    @property
    def is_up(self) -> bool:
        """Return whether a read may be worth its time."""
        ...

    async def start(self) -> None:
        """Connect in the background; called once, and does not wait for a server."""
        ...

    async def get(self, digest: str) -> bytes | None:
        """Return the bytes, perhaps wrong ones, or None. Any exception is a miss. It may be cancelled."""
        ...

    async def put(self, digest: str, data: bytes) -> None:
        """Keep them if it can. Any exception is ignored."""
        ...

    async def close(self) -> None:
        """Close all connections."""
        ...


class TierCounters:
    """Counts since the start. Written by one event loop, read from any thread."""

    def __init__(self) -> None:
        self.hits: Counter[str] = Counter()
        self.misses: Counter[str] = Counter()
        self.num_bytes: Counter[str] = Counter()
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.remote_failures = 0
        self.heals = 0
        self.hedged = 0
        self.lock = threading.Lock()  # for a snapshot that is of one moment

    def answered(self, tier: str, started: float, *, num_bytes: int | None) -> None:
        """Count an answer of a tier: so many bytes, or nothing (None)."""
        with self.lock:
            (self.misses if num_bytes is None else self.hits)[tier] += 1
            self.num_bytes[tier] += num_bytes or 0
            self.seconds[tier] += time.monotonic() - started

    def count(self, *, remote_failures: int = 0, heals: int = 0, hedged: int = 0) -> None:
        """Add to the other counters."""
        with self.lock:
            self.remote_failures += remote_failures
            self.heals += heals
            self.hedged += hedged


class PromptTiers:
    """Fetches prompts, and keeps the remote cache and the store supplied in the background."""

    def __init__(self, store: BlobStore, remote: RemoteTier | None, threads: Executor) -> None:
        """`threads` run the store's reads and writes."""
        self._store = store
        self._remote = remote
        self._threads = threads
        self._background: set[asyncio.Task[Any]] = set()
        self._bytes_under_way = 0
        self._damaged: set[str] = set()  # digests that the store should have good bytes of
        self.counters = TierCounters()

    def start(self) -> None:
        """Start the remote cache; on the loop."""
        if self._remote is not None:
            self._in_background(self._remote.start())

    async def close(self) -> None:
        """Cancel background work, and close the remote cache."""
        for task in self._background:
            task.cancel()
        await asyncio.gather(*self._background, return_exceptions=True)
        if self._remote is not None:
            await self._remote.close()

    async def fetch(self, digest: str) -> Prompt:
        """Return the prompt, from the first tier that answers. Raise the store's errors."""
        if self._remote is None or not self._remote.is_up:
            return await self._ask_store(digest)
        remote_read = asyncio.create_task(self._ask_remote(self._remote, digest))
        try:
            await asyncio.wait({remote_read}, timeout=HEDGE_SECONDS)
            if not remote_read.done():
                return await self._race(digest, remote_read)
            found = remote_read.result()
            return await self._ask_store(digest) if found is None else found
        finally:
            self._cancel(remote_read)

    def offer_remote(self, prompt: Prompt) -> None:
        """Let the remote cache keep the prompt, in the background; not where it is down or too busy."""
        size = len(prompt.data)
        if self._remote is None or not self._remote.is_up:
            return
        if self._bytes_under_way + size <= MAX_BYTES_UNDER_WAY:
            self._bytes_under_way += size
            self._in_background(self._put(self._remote, prompt))

    async def _race(self, digest: str, remote_read: "asyncio.Task[Prompt | None]") -> Prompt:
        """Return the first good answer; where the store has none, the remote cache's, however late."""
        self.counters.count(hedged=1)
        store_read = asyncio.create_task(self._ask_store(digest))
        try:
            await asyncio.wait({remote_read, store_read}, return_when=asyncio.FIRST_COMPLETED)
            if remote_read.done() and (prompt := remote_read.result()) is not None:
                return prompt
            try:
                return await store_read
            except Exception:
                if (prompt := await remote_read) is None:
                    raise
                return prompt
        finally:
            self._cancel(store_read)

    async def _ask_store(self, digest: str) -> Prompt:
        started = time.monotonic()
        loop = asyncio.get_running_loop()
        try:
            prompt = await loop.run_in_executor(self._threads, self._read_store, digest)
        except Exception:
            self.counters.answered(STORE, started, num_bytes=None)
            raise
        self.counters.answered(STORE, started, num_bytes=len(prompt.data))
        self.offer_remote(prompt)
        return prompt

    def _read_store(self, digest: str) -> Prompt:
        """Read on a thread; note damage also where no caller waits for the answer any more."""
        try:
            prompt = read_prompt(self._store.read_blob(digest))
            if prompt.digest != digest:
                raise CorruptData(f"Prompt {digest} does not hash to its name")
        except CorruptData:
            self._damaged.add(digest)
            raise
        self._damaged.discard(digest)
        return prompt

    async def _ask_remote(self, remote: RemoteTier, digest: str) -> Prompt | None:
        started = time.monotonic()
        prompt = None
        try:
            data = await remote.get(digest)
            if data is not None:
                prompt = await _verified(data, digest)
        except Exception as error:
            _log.debug("The remote cache failed for prompt %s: %s", digest, error)
            self.counters.count(remote_failures=1)
        self.counters.answered(REMOTE, started, num_bytes=None if prompt is None else len(prompt.data))
        if prompt is not None:
            self._heal_if_damaged(prompt)
        return prompt

    def _heal_if_damaged(self, prompt: Prompt) -> None:
        if prompt.digest in self._damaged:
            self._damaged.discard(prompt.digest)
            self._in_background(self._heal(prompt))

    async def _heal(self, prompt: Prompt) -> None:
        heal, loop = self._store.heal_blob, asyncio.get_running_loop()
        try:
            healed = await loop.run_in_executor(self._threads, heal, prompt.digest, prompt.data)
        except Exception as error:
            self._damaged.add(prompt.digest)
            _log.warning("Prompt %s could not be put back into the store: %s", prompt.digest, error)
            return
        if healed:
            _log.warning("Prompt %s was damaged in the store; the remote cache had it", prompt.digest)
            self.counters.count(heals=1)

    async def _put(self, remote: RemoteTier, prompt: Prompt) -> None:
        try:
            await remote.put(prompt.digest, prompt.data)
        except Exception as error:
            _log.debug("The remote cache did not take prompt %s: %s", prompt.digest, error)
            self.counters.count(remote_failures=1)
        finally:
            self._bytes_under_way -= len(prompt.data)

    def _in_background(self, work: Coroutine[Any, Any, None]) -> None:
        self._keep_until_done(asyncio.get_running_loop().create_task(work))

    def _cancel(self, task: "asyncio.Task[Any]") -> None:
        task.cancel()
        self._keep_until_done(task)

    def _keep_until_done(self, task: "asyncio.Task[Any]") -> None:
        self._background.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: "asyncio.Task[Any]") -> None:
        self._background.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            _log.debug("A read in the background failed: %s", error)


async def _verified(data: bytes, digest: str) -> Prompt:
    if len(data) > _LARGE_BYTES:
        return await asyncio.to_thread(_verify, data, digest)
    return _verify(data, digest)


def _verify(data: bytes, digest: str) -> Prompt:
    """Hash first: the parser sees no other bytes than the prompt's."""
    if hashlib.sha256(data).hexdigest() != digest:
        _log.warning("The remote cache holds wrong bytes for prompt %s", digest)
        raise CorruptData("The remote cache holds wrong bytes")
    return read_prompt(data, digest)
