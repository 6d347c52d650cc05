"""Tiers in front of the store: latency may change, answers may not."""

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.errors import CorruptData, EngineStopped, PromptplexError, Unavailable
from app.prompt import Prompt, VersionDraft
from app.store.prompt_store import open_store
from app.store.sources import BlobCache, HostCache, TieredPromptSource
from tests.store.builders import prefix, soft

SOFT, OTHER = soft(seed=1), prefix(seed=2)
PROMPTS = [soft(p=p, seed=p) for p in range(1, 7)]
WAIT = 10.0


class GatedStore:
    """A store of its own that can be held, counted, and broken."""

    def __init__(self, *prompts: Prompt) -> None:
        self.blobs = {prompt.digest: prompt.data for prompt in prompts}
        self.gate = threading.Event()
        self.gate.set()
        self.reads: list[str] = []
        self.error: Exception | None = None

    def read_blob(self, digest: str) -> bytes:
        self.reads.append(digest)
        assert self.gate.wait(WAIT)
        if self.error is not None:
            raise self.error
        return self.blobs[digest]


class Remote:
    """A remote cache in memory; it may lie or fail."""

    def __init__(self) -> None:
        self.blobs: dict[str, bytes] = {}
        self.fails = False

    def get(self, digest: str) -> bytes | None:
        if self.fails:
            raise ConnectionError
        return self.blobs.get(digest)

    def put(self, digest: str, data: bytes) -> None:
        if self.fails:
            raise ConnectionError
        self.blobs[digest] = data


@pytest.fixture
def gated() -> GatedStore:
    return GatedStore(SOFT, OTHER, *PROMPTS)


@pytest.fixture
def sources() -> Iterator[list[TieredPromptSource]]:
    made: list[TieredPromptSource] = []
    yield made
    for source in made:
        source.check_integrity()
        source.close()


@pytest.fixture
def source(gated: GatedStore, sources: list[TieredPromptSource]) -> TieredPromptSource:
    sources.append(TieredPromptSource(gated, host_bytes=1 << 20))
    return sources[0]


def test_a_miss_loads_and_a_hit_is_done_at_once(gated: GatedStore, source: TieredPromptSource) -> None:
    assert source.load(SOFT.digest).result(WAIT) == SOFT
    hit = source.load(SOFT.digest)
    assert hit.done()
    assert hit.result() == SOFT
    assert gated.reads == [SOFT.digest]
    stats = source.stats()
    assert stats.hits == {"host": 1, "store": 1}
    assert stats.misses == {"host": 1}
    assert (stats.host_prompts, stats.host_bytes) == (1, len(SOFT.data))
    assert (stats.load_failures, stats.num_loading) == (0, 0)
    assert stats.load_seconds > 0


def test_load_never_waits_and_each_digest_loads_once(gated: GatedStore, source: TieredPromptSource) -> None:
    gated.gate.clear()
    futures = [source.load(SOFT.digest) for _ in range(10)]
    other = source.load(OTHER.digest)
    assert not any(future.done() for future in futures)
    assert source.stats().num_loading == 2
    assert not futures[0].cancel(), "the others still want it"
    gated.gate.set()
    assert [future.result(WAIT) for future in futures] == [SOFT] * 10
    assert other.result(WAIT) == OTHER
    assert sorted(gated.reads) == sorted([SOFT.digest, OTHER.digest])


@pytest.mark.parametrize(
    ("error", "kind"), [(CorruptData("x"), CorruptData), (RuntimeError("secret"), Unavailable)]
)
def test_failures_are_typed_and_not_remembered(
    error: Exception, kind: type[PromptplexError], gated: GatedStore, source: TieredPromptSource
) -> None:
    gated.error = error
    with pytest.raises(kind) as caught:
        source.load(SOFT.digest).result(WAIT)
    assert "secret" not in caught.value.message
    assert source.stats().load_failures == 1
    gated.error = None
    assert source.load(SOFT.digest).result(WAIT) == SOFT


def test_over_a_real_store(root: Path, sources: list[TieredPromptSource]) -> None:
    store = open_store(root)
    store.publish("t", VersionDraft(prompt=SOFT))
    sources.append(TieredPromptSource(store, host_bytes=0))
    for _ in range(2):
        assert sources[0].load(SOFT.digest).result(WAIT) == SOFT
    assert sources[0].stats().hits == {"store": 2}, "nothing fits the host tier"
    with pytest.raises(CorruptData):
        sources[0].load(OTHER.digest).result(WAIT)
    blob = root / "blobs" / f"{SOFT.digest}.safetensors"
    blob.write_bytes(OTHER.data)
    with pytest.raises(CorruptData):
        sources[0].load(SOFT.digest).result(WAIT)


def test_the_remote_tier(gated: GatedStore, sources: list[TieredPromptSource]) -> None:
    remote: BlobCache = Remote()
    assert isinstance(remote, Remote)
    sources += [TieredPromptSource(gated, host_bytes=1 << 20, remote=remote) for _ in range(2)]
    first, second = sources
    assert first.load(SOFT.digest).result(WAIT) == SOFT
    assert remote.blobs == {SOFT.digest: SOFT.data}
    assert second.load(SOFT.digest).result(WAIT) == SOFT
    assert len(gated.reads) == 1
    assert second.stats().hits == {"remote": 1}


@pytest.mark.parametrize("lie", [OTHER.data, b"", SOFT.data[:-1], SOFT.data + b"x"])
def test_a_lying_remote_changes_nothing(
    lie: bytes, gated: GatedStore, sources: list[TieredPromptSource]
) -> None:
    remote = Remote()
    remote.blobs[SOFT.digest] = lie
    sources.append(TieredPromptSource(gated, host_bytes=0, remote=remote))
    assert sources[0].load(SOFT.digest).result(WAIT) == SOFT
    assert sources[0].stats().remote_failures == 1
    assert remote.blobs[SOFT.digest] == SOFT.data, "healed"
    remote.fails = True
    assert sources[0].load(SOFT.digest).result(WAIT) == SOFT
    assert sources[0].stats().remote_failures == 3, "a failed get and a failed put"


def test_closing_ends_every_future(gated: GatedStore) -> None:
    source = TieredPromptSource(gated, host_bytes=1 << 20)
    gated.gate.clear()
    futures = [source.load(prompt.digest) for prompt in PROMPTS]  # four loaders, six prompts
    threading.Timer(0.05, gated.gate.set).start()
    source.close()
    assert all(future.done() for future in futures)
    assert {type(future.exception()) for future in futures} <= {type(None), EngineStopped}
    with pytest.raises(EngineStopped):
        source.load(SOFT.digest).result(0)
    source.check_integrity()


@settings(max_examples=100, deadline=None)
@given(
    st.integers(0, 3000), st.lists(st.tuples(st.booleans(), st.integers(0, len(PROMPTS) - 1)), max_size=40)
)
def test_host_cache_is_lru_by_bytes(capacity: int, steps: list[tuple[bool, int]]) -> None:
    cache = HostCache(capacity)
    model: list[Prompt] = []  # the least recently used first
    for is_put, index in steps:
        prompt = PROMPTS[index]
        if is_put:
            cache.put(prompt)
            if prompt not in model and len(prompt.data) <= capacity:
                model.append(prompt)
                while sum(len(held.data) for held in model) > capacity:
                    model.pop(0)
        else:
            assert cache.get(prompt.digest) == (prompt if prompt in model else None)
            if prompt in model:
                model.remove(prompt)
                model.append(prompt)
        cache.check_integrity()
        assert len(cache) == len(model)
        assert cache.num_bytes == sum(len(held.data) for held in model)


def test_many_threads(gated: GatedStore, sources: list[TieredPromptSource]) -> None:
    sources.append(TieredPromptSource(gated, host_bytes=3 * len(PROMPTS[0].data)))

    def work(seed: int) -> None:
        for step in range(50):
            prompt = PROMPTS[(seed * step) % len(PROMPTS)]
            assert sources[0].load(prompt.digest).result(WAIT) == prompt
            sources[0].check_integrity()

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(1, 6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    stats = sources[0].stats()
    assert stats.hits["host"] + stats.misses["host"] == 250
