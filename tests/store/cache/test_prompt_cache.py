"""Tiers in front of the store: latency may change, answers may not."""

import asyncio
import logging
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from app.errors import CorruptData, EngineStopped, PromptplexError, Unavailable
from app.prompt import Prompt, VersionDraft
from app.store.cache import tiers
from app.store.cache.prompt_cache import PromptCache
from app.store.cache.tiers import BlobStore, RemoteTier
from app.store.prompt_store import open_store
from tests.store.builders import prefix, soft
from tests.waiting import PATIENCE, wait_until

SOFT, OTHER = soft(seed=1), prefix(seed=2)
LARGE = soft(p=2000, hidden=256, seed=3)  # 2 MB: hashed on a thread
PROMPTS = [soft(p=p, seed=p) for p in range(1, 7)]


class GatedStore:
    """A store of its own that can be held, counted, broken, and healed."""

    def __init__(self, *prompts: Prompt) -> None:
        self.blobs = {prompt.digest: prompt.data for prompt in prompts}
        self.gate = threading.Event()
        self.gate.set()
        self.reads: list[str] = []
        self.error: Exception | None = None

    def read_blob(self, digest: str) -> bytes:
        self.reads.append(digest)
        assert self.gate.wait(PATIENCE)
        if self.error is not None:
            raise self.error
        if digest not in self.blobs:
            raise CorruptData("The blob is missing")
        return self.blobs[digest]

    def heal_blob(self, digest: str, data: bytes) -> bool:
        if self.error is not None:
            raise self.error
        lost = digest not in self.blobs
        self.blobs[digest] = data
        return lost


class Remote:
    """A remote cache in memory; it may lie, fail, be slow, or be down."""

    def __init__(self, *prompts: Prompt) -> None:
        self.blobs = {prompt.digest: prompt.data for prompt in prompts}
        self.is_up = True
        self.fails = False
        self.seconds = 0.0
        self.num_gets = 0
        self.num_cancelled = 0
        self.gate: asyncio.Event | None = None  # puts wait for it
        self.calls: list[str] = []

    async def start(self) -> None:
        self.calls.append("start")

    async def close(self) -> None:
        self.calls.append("close")

    async def get(self, digest: str) -> bytes | None:
        self.num_gets += 1
        try:
            await asyncio.sleep(self.seconds)
        except asyncio.CancelledError:
            self.num_cancelled += 1
            raise
        if self.fails:
            raise ConnectionError
        return self.blobs.get(digest)

    async def put(self, digest: str, data: bytes) -> None:
        if self.gate is not None:
            await self.gate.wait()
        if self.fails:
            raise ConnectionError
        self.blobs[digest] = data


Make = Callable[..., PromptCache]


@pytest.fixture
def gated() -> GatedStore:
    return GatedStore(SOFT, OTHER, LARGE, *PROMPTS)


@pytest.fixture
def make() -> Iterator[Make]:
    made: list[PromptCache] = []

    def build(store: BlobStore, *, host_bytes: int = 1 << 20, remote: RemoteTier | None = None):
        made.append(PromptCache(store, host_bytes=host_bytes, remote=remote))
        return made[-1]

    yield build
    for source in made:
        source.check_integrity()
        source.close()
        source.check_integrity()


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """No hedging, however busy this machine is."""
    monkeypatch.setattr(tiers, "HEDGE_SECONDS", PATIENCE)


@pytest.fixture
def source(gated: GatedStore, make: Make) -> PromptCache:
    return make(gated)


def test_a_miss_loads_and_a_hit_is_done_at_once(gated: GatedStore, source: PromptCache) -> None:
    assert source.load(SOFT.digest).result(PATIENCE) == SOFT
    hit = source.load(SOFT.digest)
    assert hit.done()
    assert hit.result() == SOFT
    assert gated.reads == [SOFT.digest]
    stats = source.stats()
    assert stats.hits == {"host": 1, "store": 1}
    assert stats.misses == {"host": 1}
    assert (stats.host_prompts, stats.host_bytes) == (1, len(SOFT.data))
    assert (stats.load_failures, stats.num_loading) == (0, 0)
    assert stats.load_seconds >= stats.tier_seconds["store"] > 0
    assert stats.tier_bytes == {"store": len(SOFT.data)}


def test_load_never_waits_and_each_digest_loads_once(gated: GatedStore, source: PromptCache) -> None:
    gated.gate.clear()
    futures = [source.load(SOFT.digest) for _ in range(10)]
    other = source.load(OTHER.digest)
    assert not any(future.done() for future in futures)
    assert source.stats().num_loading == 2
    assert not futures[0].cancel(), "the others still want it"
    gated.gate.set()
    assert [future.result(PATIENCE) for future in futures] == [SOFT] * 10
    assert other.result(PATIENCE) == OTHER
    assert sorted(gated.reads) == sorted([SOFT.digest, OTHER.digest])


def test_callbacks_may_load_again(source: PromptCache) -> None:
    chained: list[Prompt] = []
    loaded = threading.Event()

    def load_again(_: object) -> None:
        chained.append(source.load(SOFT.digest).result(0))
        loaded.set()

    source.load(SOFT.digest).add_done_callback(load_again)
    assert loaded.wait(PATIENCE)
    assert chained == [SOFT]


@pytest.mark.parametrize(
    ("error", "kind"), [(CorruptData("x"), CorruptData), (RuntimeError("secret"), Unavailable)]
)
def test_failures_are_typed_and_not_remembered(
    error: Exception, kind: type[PromptplexError], gated: GatedStore, source: PromptCache
) -> None:
    gated.error = error
    with pytest.raises(kind) as caught:
        source.load(SOFT.digest).result(PATIENCE)
    assert "secret" not in caught.value.message
    assert source.stats().load_failures == 1
    gated.error = None
    assert source.load(SOFT.digest).result(PATIENCE) == SOFT


def test_over_a_real_store(root: Path, make: Make) -> None:
    store = open_store(root)
    store.publish("t", VersionDraft(prompt=SOFT))
    source = make(store, host_bytes=0)
    for _ in range(2):
        assert source.load(SOFT.digest).result(PATIENCE) == SOFT
    assert source.stats().hits == {"store": 2}, "nothing fits the host tier"
    with pytest.raises(CorruptData):
        source.load(OTHER.digest).result(PATIENCE)
    blob = root / "blobs" / f"{SOFT.digest}.safetensors"
    blob.write_bytes(OTHER.data)
    with pytest.raises(CorruptData):
        source.load(SOFT.digest).result(PATIENCE)


def test_a_store_that_gives_another_prompt_is_not_believed(gated: GatedStore, make: Make) -> None:
    gated.blobs[SOFT.digest] = OTHER.data
    with pytest.raises(CorruptData):
        make(gated).load(SOFT.digest).result(PATIENCE)


@pytest.mark.usefixtures("patient")
@pytest.mark.parametrize("prompt", [SOFT, LARGE], ids=["small", "large"])
def test_the_remote_tier(prompt: Prompt, gated: GatedStore, make: Make) -> None:
    remote = Remote()
    first, second = (make(gated, remote=remote) for _ in range(2))
    assert first.load(prompt.digest).result(PATIENCE) == prompt
    wait_until(lambda: remote.blobs == {prompt.digest: prompt.data})
    assert second.load(prompt.digest).result(PATIENCE) == prompt
    assert gated.reads == [prompt.digest]
    stats = second.stats()
    assert stats.hits == {"redis": 1}
    assert stats.tier_bytes == {"redis": len(prompt.data)}
    assert first.stats().misses == {"host": 1, "redis": 1}


def test_a_remote_tier_that_is_down_is_not_asked(gated: GatedStore, make: Make) -> None:
    remote = Remote()
    remote.is_up = False
    source = make(gated, remote=remote)
    assert source.load(SOFT.digest).result(PATIENCE) == SOFT
    assert (remote.num_gets, remote.blobs) == (0, {})
    assert source.stats().misses == {"host": 1}


@pytest.mark.parametrize("lie", [OTHER.data, b"", SOFT.data[:-1], SOFT.data + b"x", LARGE.data])
@pytest.mark.usefixtures("patient")
def test_a_lying_remote_changes_nothing(lie: bytes, gated: GatedStore, make: Make) -> None:
    remote = Remote()
    remote.blobs[SOFT.digest] = lie
    source = make(gated, host_bytes=0, remote=remote)
    assert source.load(SOFT.digest).result(PATIENCE) == SOFT
    assert source.stats().remote_failures == 1
    wait_until(lambda: remote.blobs[SOFT.digest] == SOFT.data)
    remote.fails = True
    assert source.load(SOFT.digest).result(PATIENCE) == SOFT
    wait_until(lambda: source.stats().remote_failures == 3)  # wrong bytes, a failed get and a failed put
    assert source.stats().load_failures == 0


def test_a_slow_remote_is_overtaken_and_let_go(gated: GatedStore, make: Make) -> None:
    remote = Remote(SOFT)
    remote.seconds = 3600.0
    source = make(gated, remote=remote)
    assert source.load(SOFT.digest).result(PATIENCE) == SOFT
    wait_until(lambda: remote.num_cancelled == 1)
    stats = source.stats()
    assert (stats.hedged, stats.hits) == (1, {"store": 1})


def test_a_slow_store_is_not_waited_for(gated: GatedStore, make: Make) -> None:
    remote = Remote(SOFT)
    remote.seconds = 0.5  # long enough for the store to be asked, too
    source = make(gated, remote=remote)
    gated.gate.clear()
    assert source.load(SOFT.digest).result(PATIENCE) == SOFT
    gated.gate.set()
    stats = source.stats()
    assert (stats.hedged, stats.hits) == (1, {"redis": 1})


def test_a_late_remote_miss_waits_for_the_store(gated: GatedStore, make: Make) -> None:
    remote = Remote()
    remote.seconds = 0.05
    source = make(gated, remote=remote)
    gated.gate.clear()
    future = source.load(SOFT.digest)
    wait_until(lambda: source.stats().misses == {"host": 1, "redis": 1})
    assert not future.done()
    gated.gate.set()
    assert future.result(PATIENCE) == SOFT
    wait_until(lambda: remote.blobs == {SOFT.digest: SOFT.data})


def test_what_the_store_lost_is_given_back(gated: GatedStore, make: Make) -> None:
    remote = Remote(SOFT)
    remote.seconds = 1.0  # long enough for the store to be asked, too, however busy the machine
    source = make(gated, remote=remote)
    del gated.blobs[SOFT.digest]
    assert source.load(SOFT.digest).result(PATIENCE) == SOFT
    wait_until(lambda: source.stats().heals == 1)
    assert gated.blobs[SOFT.digest] == SOFT.data


def test_a_loss_is_remembered_until_the_remote_can_heal_it(gated: GatedStore, make: Make) -> None:
    remote = Remote(SOFT)
    remote.is_up = False
    source = make(gated, remote=remote)
    del gated.blobs[SOFT.digest]
    with pytest.raises(CorruptData):
        source.load(SOFT.digest).result(PATIENCE)
    remote.is_up = True
    assert source.load(SOFT.digest).result(PATIENCE) == SOFT
    wait_until(lambda: SOFT.digest in gated.blobs)


def test_a_real_store_is_healed(root: Path, make: Make) -> None:
    store = open_store(root)
    store.publish("t", VersionDraft(prompt=SOFT))
    blob = root / "blobs" / f"{SOFT.digest}.safetensors"
    blob.chmod(0o600)
    blob.write_bytes(OTHER.data)
    remote = Remote(SOFT)
    remote.seconds = 1.0  # long enough for the store to be asked, too, however busy the machine
    source = make(store, remote=remote)
    assert source.load(SOFT.digest).result(PATIENCE) == SOFT
    wait_until(lambda: source.stats().heals == 1)
    assert blob.read_bytes() == SOFT.data
    assert open_store(root).read_blob(SOFT.digest) == SOFT.data


def test_healing_may_fail(gated: GatedStore, make: Make, caplog: pytest.LogCaptureFixture) -> None:
    remote = Remote(SOFT)
    remote.seconds = 0.5  # long enough for the store to be asked, too
    source = make(gated, host_bytes=0, remote=remote)
    gated.error = CorruptData("damaged for good")
    with caplog.at_level(logging.WARNING, logger=tiers.__name__):
        for _ in range(2):
            assert source.load(SOFT.digest).result(PATIENCE) == SOFT
        wait_until(lambda: "could not be put back" in caplog.text)
    assert source.stats().heals == 0


def test_damage_that_no_tier_can_repair_is_told(gated: GatedStore, make: Make) -> None:
    remote = Remote()
    remote.blobs[SOFT.digest] = OTHER.data
    remote.seconds = 0.05
    source = make(gated, remote=remote)
    del gated.blobs[SOFT.digest]
    with pytest.raises(CorruptData):
        source.load(SOFT.digest).result(PATIENCE)


def test_bytes_under_way_to_the_remote_are_bounded(
    gated: GatedStore, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiers, "MAX_BYTES_UNDER_WAY", 2 * len(PROMPTS[-1].data))
    remote = Remote()
    remote.gate = asyncio.Event()
    source = make(gated, remote=remote)
    for prompt in PROMPTS:
        assert source.load(prompt.digest).result(PATIENCE) == prompt
    source._loop.call_soon_threadsafe(remote.gate.set)
    wait_until(lambda: len(remote.blobs) >= 2)
    assert len(remote.blobs) < len(PROMPTS)
    wait_until(lambda: source._tiers._bytes_under_way == 0)


def test_an_upload_is_offered(gated: GatedStore, make: Make) -> None:
    remote = Remote()
    source = make(gated, remote=remote)
    source.offer(SOFT)
    assert source.load(SOFT.digest).done()
    wait_until(lambda: remote.blobs == {SOFT.digest: SOFT.data})
    assert gated.reads == []


def test_prefetching_counts_nothing_twice(gated: GatedStore, make: Make) -> None:
    source = make(gated)
    gated.gate.clear()
    for _ in range(3):
        source.prefetch(SOFT.digest)
    future = source.load(SOFT.digest)
    gated.gate.set()
    assert future.result(PATIENCE) == SOFT
    source.prefetch(SOFT.digest)
    assert gated.reads == [SOFT.digest]
    stats = source.stats()
    assert (stats.hits, stats.misses) == ({"store": 1}, {"host": 1})


def test_prefetching_fails_in_silence(
    gated: GatedStore, make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    source = make(gated)
    gated.error = RuntimeError("the disk is on fire")
    with caplog.at_level(logging.INFO):
        source.prefetch(SOFT.digest)
        wait_until(lambda: source.stats().load_failures == 1)
        assert caplog.records == []
        with pytest.raises(Unavailable):
            source.load(SOFT.digest).result(PATIENCE)
        assert "the disk is on fire" in caplog.text


def test_closing_ends_every_future(gated: GatedStore, make: Make) -> None:
    remote = Remote()
    remote.seconds = 0.001
    source = make(gated, remote=remote)
    gated.gate.clear()
    futures = [source.load(prompt.digest) for prompt in PROMPTS]  # four readers, six prompts
    threading.Timer(0.05, gated.gate.set).start()
    source.close()
    assert all(future.done() for future in futures)
    assert {type(future.exception()) for future in futures} <= {type(None), EngineStopped}
    with pytest.raises(EngineStopped):
        source.load(SOFT.digest).result(0)
    source.prefetch(SOFT.digest)
    source.offer(SOFT)
    assert remote.calls == ["start", "close"]


def test_a_source_that_nobody_closes_does_not_keep_the_process() -> None:
    program = (
        "from app.store.cache.prompt_cache import PromptCache\n"
        "source = PromptCache(None, host_bytes=0)\n"
        "print(source.load('0' * 64).exception(10))\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, timeout=60, check=True
    )
    assert "could not be loaded" in done.stdout


def test_a_prompt_larger_than_host_memory_drops_no_other(gated: GatedStore, make: Make) -> None:
    small, large = soft(p=1), soft(p=6)
    source = make(gated, host_bytes=len(large.data) - 1)
    for prompt in (small, large):
        source.offer(prompt)
        source.check_integrity()
    assert source.stats().host_bytes == len(small.data)


@pytest.mark.parametrize("with_remote", [False, True])
def test_many_threads(with_remote: bool, gated: GatedStore, make: Make) -> None:
    remote = Remote() if with_remote else None
    source = make(gated, host_bytes=3 * len(PROMPTS[0].data), remote=remote)

    def work(seed: int) -> None:
        for step in range(50):
            prompt = PROMPTS[(seed * step) % len(PROMPTS)]
            assert source.load(prompt.digest).result(PATIENCE) == prompt
            source.check_integrity()

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(1, 6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    stats = source.stats()
    assert stats.hits["host"] + stats.misses["host"] == 250
