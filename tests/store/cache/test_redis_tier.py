"""Redis as a tier, with a real Redis: whatever it does, prompts are right or not from it."""

import asyncio
import json
import logging
import os
import random
import ssl
import subprocess
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import redis

from app.prompt import Prompt
from app.store.cache import breaker, redis_tier
from app.store.cache.prompt_cache import PromptCache
from app.store.cache.redis_tier import CHUNK_BYTES, KEY_PREFIX, MAX_BLOB_BYTES, TTL_SECONDS, RedisTier
from app.store.cache.release_hints import CHANNEL
from tests.store.builders import prefix, soft
from tests.store.fault_proxy import Fault, FaultProxy
from tests.store.redis_server import RedisSentinel, RedisServer, free_port
from tests.waiting import PATIENCE, eventually, wait_until

PROMPTS = [soft(p=p, seed=p) for p in range(1, 9)] + [prefix(p=p, seed=p) for p in range(1, 9)]
DIGEST = "d" * 64
KEY = KEY_PREFIX + DIGEST


class MemoryStore:
    """The last tier, in memory."""

    def __init__(self, *prompts: Prompt) -> None:
        self.blobs = {prompt.digest: prompt.data for prompt in prompts}
        self.reads: list[str] = []

    def read_blob(self, digest: str) -> bytes:
        self.reads.append(digest)
        return self.blobs[digest]

    def heal_blob(self, digest: str, data: bytes) -> bool:
        raise AssertionError("nothing is lost here")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    server = RedisServer(tmp_path_factory.mktemp("redis"))
    yield server
    server.kill()


@pytest.fixture
def fragile(tmp_path: Path) -> Iterator[RedisServer]:
    """A server of the test's own, to be killed."""
    server = RedisServer(tmp_path)
    yield server
    server.kill()


@pytest.fixture
def direct(server: RedisServer) -> Iterator[redis.Redis]:
    """Another client of the same, empty Redis."""
    with redis.Redis(port=server.port) as client:
        client.flushall()
        yield client


@pytest.fixture
def proxy(server: RedisServer) -> Iterator[FaultProxy]:
    proxy = FaultProxy(server.port)
    yield proxy
    proxy.close()


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Megabytes take their time on a busy machine; what is tested is not the timeout."""
    monkeypatch.setattr(redis_tier, "READ_SECONDS", PATIENCE)
    monkeypatch.setattr(redis_tier, "WRITE_SECONDS", PATIENCE)


@asynccontextmanager
async def started(url: str, **options: Callable[[str], None]) -> AsyncIterator[RedisTier]:
    tier = RedisTier(url, **options)
    await tier.start()
    try:
        yield tier
    finally:
        await tier.close()


@asynccontextmanager
async def connected(url: str, **options: Callable[[str], None]) -> AsyncIterator[RedisTier]:
    async with started(url, **options) as tier:
        await eventually(lambda: tier.is_up)
        yield tier


@pytest.mark.parametrize("size", [0, 1, 1000, CHUNK_BYTES - 1, CHUNK_BYTES, CHUNK_BYTES + 1, 20_000_000])
@pytest.mark.usefixtures("patient")
def test_bytes_come_back_whole(size: int, server: RedisServer, direct: redis.Redis) -> None:
    data = random.Random(size).randbytes(size)

    async def scenario() -> None:
        async with connected(server.url) as tier:
            assert await tier.get(DIGEST) is None
            await tier.put(DIGEST, data)
            assert await tier.get(DIGEST) == data
            assert tier.state() == "up"

    asyncio.run(scenario())
    keys = direct.keys("*")
    assert len(keys) == max(1, -(-size // CHUNK_BYTES))
    assert all(TTL_SECONDS - 60 < direct.ttl(key) <= TTL_SECONDS for key in keys)


def spoil_type(client: redis.Redis) -> None:
    client.delete(KEY)
    client.lpush(KEY, "no", "string")


def spoil_chunk_type(client: redis.Redis) -> None:
    client.delete(f"{KEY}:1")
    client.lpush(f"{KEY}:1", "no", "string")


def spoil_length(client: redis.Redis) -> None:
    client.setrange(KEY, 0, (10).to_bytes(8, "little"))


def spoil_huge(client: redis.Redis) -> None:
    client.setrange(KEY, 0, (MAX_BLOB_BYTES + 1).to_bytes(8, "little"))


def spoil_growth(client: redis.Redis) -> None:
    client.append(f"{KEY}:1", "x")


SPOILERS: dict[str, Callable[[redis.Redis], object]] = {
    "another type": spoil_type,
    "a chunk of another type": spoil_chunk_type,
    "no header": lambda client: client.set(KEY, "short"),
    "a wrong length": spoil_length,
    "a huge length": spoil_huge,
    "a short chunk": lambda client: client.set(f"{KEY}:1", "short"),
    "a long chunk": spoil_growth,
    "an evicted chunk": lambda client: client.delete(f"{KEY}:2"),
}


@pytest.mark.usefixtures("patient")
@pytest.mark.parametrize("spoil", SPOILERS.values(), ids=SPOILERS.keys())
def test_spoiled_blobs_are_misses_and_writing_repairs_them(
    spoil: Callable[[redis.Redis], object],
    server: RedisServer,
    direct: redis.Redis,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(redis_tier, "CHUNK_BYTES", 1000)
    data = random.Random(0).randbytes(2500)

    async def scenario() -> None:
        async with connected(server.url) as tier:
            await tier.put(DIGEST, data)
            assert await tier.get(DIGEST) == data
            spoil(direct)
            assert await tier.get(DIGEST) is None
            assert tier.is_up, "one bad blob is no reason to give up Redis"
            await tier.put(DIGEST, data)
            assert await tier.get(DIGEST) == data

    asyncio.run(scenario())


def test_blobs_that_are_too_large_are_not_sent(
    server: RedisServer, direct: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(redis_tier, "MAX_BLOB_BYTES", 100)

    async def scenario() -> None:
        async with connected(server.url) as tier:
            await tier.put(DIGEST, bytes(101))
            await tier.put("e" * 64, bytes(100))

    asyncio.run(scenario())
    assert direct.keys("*") == [f"{KEY_PREFIX}{'e' * 64}".encode()]


@pytest.mark.usefixtures("patient")
def test_a_full_redis_still_gives_what_it_has(
    server: RedisServer, direct: redis.Redis, caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario() -> None:
        async with connected(server.url) as tier:
            await tier.put(DIGEST, b"kept")
            direct.config_set("maxmemory", "1")
            for _ in range(2 * breaker.MAX_FAILURES):
                await tier.put("e" * 64, b"no room")
            assert tier.is_up
            assert await tier.get(DIGEST) == b"kept"

    try:
        with caplog.at_level(logging.WARNING, logger=redis_tier.__name__):
            asyncio.run(scenario())
    finally:
        direct.config_set("maxmemory", "0")
    assert len(caplog.records) == 1, "said once"


def test_the_server_starts_with_redis_down_and_finds_it_later(fragile: RedisServer) -> None:
    fragile.kill()
    source = PromptCache(MemoryStore(*PROMPTS), host_bytes=0, remote=(tier := RedisTier(fragile.url)))
    try:
        assert source.load(PROMPTS[0].digest).result(PATIENCE) == PROMPTS[0]
        assert (tier.state(), tier.is_up, source.stats().hits) == ("down", False, {"store": 1})
        tier.publish_hint("nobody.hears-this")
        for _ in range(2):  # comes, goes, and comes back
            fragile.start()
            wait_until(lambda: tier.state() == "up")
            assert source.load(PROMPTS[0].digest).result(PATIENCE) == PROMPTS[0]
            fragile.kill()
            wait_until(lambda: not tier.is_up)
            assert source.load(PROMPTS[0].digest).result(PATIENCE) == PROMPTS[0]
    finally:
        source.close()


@pytest.mark.usefixtures("patient")
def test_a_restart_breaks_pooled_connections_and_nobody_notices(fragile: RedisServer) -> None:
    async def scenario() -> None:
        async with connected(fragile.url) as tier:
            await tier.put(DIGEST, b"before")
            fragile.kill()
            fragile.start()
            await tier.put(DIGEST, b"after")
            assert await tier.get(DIGEST) == b"after"
            assert tier.is_up

    asyncio.run(scenario())


FAULTS = [fault for fault in Fault if fault is not Fault.NONE]


@pytest.mark.parametrize("fault", FAULTS)
def test_no_fault_changes_an_answer(fault: Fault, direct: redis.Redis, proxy: FaultProxy) -> None:
    store = MemoryStore(*PROMPTS)
    tier = RedisTier(proxy.url)
    source = PromptCache(store, host_bytes=0, remote=tier)
    try:
        wait_until(lambda: tier.is_up)
        load_all(source)
        wait_until(lambda: direct.dbsize() == len(PROMPTS))
        for _ in range(2):
            proxy.set(fault)
            for _ in range(4):
                load_all(source)
            proxy.set(Fault.NONE)
            wait_until(lambda: tier.is_up)
            load_all(source)
        wait_until(lambda: answers_from_redis(source))
        assert source.stats().load_failures == 0
    finally:
        source.close()


def load_all(source: PromptCache) -> None:
    futures = [source.load(prompt.digest) for prompt in PROMPTS]
    assert [future.result(PATIENCE) for future in futures] == PROMPTS


def answers_from_redis(source: PromptCache) -> bool:
    before = source.stats().hits.get("redis", 0)
    load_all(source)
    return source.stats().hits.get("redis", 0) > before


@pytest.mark.parametrize("fault", [Fault.BLACK_HOLE, Fault.REFUSE, Fault.CORRUPT, Fault.CUT])
def test_faults_open_the_breaker_although_nobody_waits_for_answers(
    fault: Fault, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(breaker, "HEALTH_SECONDS", 3600.0)  # it is the loads that find out
    tier = RedisTier(proxy.url)
    source = PromptCache(MemoryStore(*PROMPTS), host_bytes=0, remote=tier)
    try:
        wait_until(lambda: tier.is_up)
        proxy.set(fault)

        def load_until_open() -> bool:
            load_all(source)
            return not tier.is_up

        wait_until(load_until_open)
        proxy.set(Fault.NONE)
        wait_until(lambda: tier.is_up)
        load_all(source)  # the store answers where Redis has to be filled first
        assert source.stats().load_failures == 0
    finally:
        source.close()


def test_a_slow_redis_is_overtaken_but_stays_up(proxy: FaultProxy) -> None:
    store = MemoryStore(*PROMPTS)
    tier = RedisTier(proxy.url)
    source = PromptCache(store, host_bytes=0, remote=tier)
    try:
        wait_until(lambda: tier.is_up)
        proxy.set(Fault.DELAY)
        load_all(source)
        stats = source.stats()
        assert (stats.hedged, stats.hits["store"]) == (len(PROMPTS), len(PROMPTS))
        assert tier.is_up
    finally:
        source.close()


@pytest.mark.usefixtures("patient")
def test_a_read_that_is_let_go_leaves_no_answer_for_the_next(server: RedisServer, proxy: FaultProxy) -> None:
    async def scenario() -> None:
        async with connected(proxy.url) as tier:
            for index in range(20):
                await tier.put(f"{index:064}", str(index).encode())
            proxy.set(Fault.DELAY)
            for index in range(20):
                reading = asyncio.create_task(tier.get(f"{index:064}"))
                await asyncio.sleep(index * 0.002)
                reading.cancel()
            proxy.set(Fault.NONE)
            for index in range(20):
                assert await tier.get(f"{index:064}") == str(index).encode()

    asyncio.run(scenario())


def test_reads_that_nobody_waits_for_open_the_breaker(
    proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(breaker, "HEALTH_SECONDS", 3600.0)

    async def scenario() -> None:
        async with connected(proxy.url) as tier:
            proxy.set(Fault.BLACK_HOLE)
            reading = asyncio.create_task(tier.get(DIGEST))
            await asyncio.sleep(0.01)
            reading.cancel()
            assert tier.is_up, "one read that was let go is no proof"
            await eventually(lambda: not tier.is_up)

    asyncio.run(scenario())


@pytest.mark.usefixtures("patient")
def test_an_odd_reply_closes_its_connection(server: RedisServer, direct: redis.Redis) -> None:
    def num_accepted() -> int:
        return int(direct.info("stats")["total_connections_received"])

    async def scenario() -> None:
        async with connected(server.url) as tier:
            await listening(direct, 1)
            await tier.put(DIGEST, b"data")
            direct.set(KEY, "odd")
            before = num_accepted()
            for _ in range(2):
                assert await tier.get(DIGEST) is None
            assert num_accepted() == before + 1, "the second read has a new one"

    asyncio.run(scenario())


@pytest.mark.usefixtures("patient")
def test_a_user_with_a_password(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    password = "s3cret@/:?#"
    server = RedisServer(tmp_path, user="promptplex", password=password)
    quoted = "s3cret%40%2F%3A%3F%23"
    places = [f"{server.port}/3", f"{server.port}"]
    urls = [f"redis://promptplex:{quoted}@127.0.0.1:{place}" for place in places]
    urls.append(f"unix://promptplex:{quoted}@{server.socket_path}?db=2")

    async def scenario() -> None:
        for url in urls:
            async with connected(url) as tier:
                assert await tier.get(DIGEST) is None, "each in a database of its own"
                await tier.put(DIGEST, b"data")
                assert await tier.get(DIGEST) == b"data"
        for login in ("", "promptplex:s3cretwrong@", "promptplex@", ":s3cretwrong@"):
            async with started(f"redis://{login}127.0.0.1:{server.port}") as tier:
                await asyncio.sleep(0.1)
                assert not tier.is_up

    with caplog.at_level(logging.DEBUG):
        asyncio.run(scenario())
    server.kill()
    assert "can't be reached" in caplog.text
    assert "s3cret" not in caplog.text


@pytest.mark.usefixtures("patient")
def test_sentinels_lead_to_the_master(server: RedisServer, direct: redis.Redis, tmp_path: Path) -> None:
    sentinel = RedisSentinel(tmp_path, server)
    dead = free_port()

    async def scenario() -> None:
        url = f"redis+sentinel://127.0.0.1:{dead},127.0.0.1:{sentinel.port}"
        async with connected(f"{url}/prompts") as tier:
            await tier.put(DIGEST, b"data")
            assert await tier.get(DIGEST) == b"data"
        async with started(f"{url}/another") as tier:
            await asyncio.sleep(0.2)
            assert not tier.is_up

    try:
        asyncio.run(scenario())
    finally:
        sentinel.kill()
    assert direct.exists(KEY)


@pytest.mark.usefixtures("patient")
def test_over_tls(proxy: FaultProxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    certificate = self_signed(tmp_path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, tmp_path / "key.pem")

    async def scenario() -> None:
        async with tls_front(context, proxy.port) as port:
            async with started(f"rediss://localhost:{port}") as tier:
                await asyncio.sleep(0.3)
                assert not tier.is_up, "nobody vouches for its certificate"
            monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
            async with connected(f"rediss://localhost:{port}") as tier:
                await tier.put(DIGEST, b"data")
                assert await tier.get(DIGEST) == b"data"

    asyncio.run(scenario())


def self_signed(directory: Path) -> Path:
    certificate = directory / "certificate.pem"
    request = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"]
    request += ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost", "-days", "1"]
    request += ["-keyout", str(directory / "key.pem"), "-out", str(certificate)]
    try:
        subprocess.run(request, check=True, capture_output=True)
    except FileNotFoundError:
        pytest.skip("openssl is not installed")
    return certificate


@asynccontextmanager
async def tls_front(context: ssl.SSLContext, target_port: int) -> AsyncIterator[int]:
    """TLS in front of a plain port."""

    async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(1 << 16):
            writer.write(data)
        writer.close()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        inner_reader, inner_writer = await asyncio.open_connection("127.0.0.1", target_port)
        await asyncio.gather(pump(reader, inner_writer), pump(inner_reader, writer), return_exceptions=True)

    front = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=context)
    async with front:
        yield front.sockets[0].getsockname()[1]


class Heard:
    """What `on_hint` was called with."""

    def __init__(self) -> None:
        self.tasks: list[str] = []
        self.threads: set[int] = set()

    def __call__(self, task_id: str) -> None:
        self.tasks.append(task_id)
        self.threads.add(threading.get_ident())


async def listening(client: redis.Redis, count: int) -> None:
    await eventually(lambda: client.pubsub_numsub(CHANNEL)[0][1] == count)


def test_hints_arrive_on_a_thread_of_their_own(server: RedisServer, direct: redis.Redis) -> None:
    heard = Heard()

    async def scenario() -> None:
        async with connected(server.url) as sender, connected(server.url, on_hint=heard):
            await listening(direct, 2)
            await asyncio.to_thread(sender.publish_hint, "some.task")
            await eventually(lambda: heard.tasks == ["some.task"])
        sender.publish_hint("after.closing")

    asyncio.run(scenario())
    assert heard.threads != {threading.get_ident()}
    assert heard.tasks == ["some.task"]


JUNK = [
    b"",
    b"\xff",
    b"[]",
    b"null",
    b'{"task": 3}',
    b'{"task": "../../etc"}',
    b'{"task": "UPPER"}',
    b'{"other": "task"}',
    b'{"task": "twice", "task": "twice"}',
    b"[" * 1000,
    json.dumps({"task": "long", "padding": "x" * 2000}).encode(),
]


def test_junk_is_ignored_and_a_failing_listener_hears_the_next(
    server: RedisServer, direct: redis.Redis
) -> None:
    heard = Heard()

    def fail_then_hear(task_id: str) -> None:
        if task_id == "bad":
            raise RuntimeError("the store is not readable")
        heard(task_id)

    async def scenario() -> None:
        async with connected(server.url, on_hint=fail_then_hear):
            await listening(direct, 1)
            for payload in [*JUNK, b'{"task": "bad"}', b'{"task": "good", "extra": 1}']:
                direct.publish(CHANNEL, payload)
            await eventually(lambda: heard.tasks)

    asyncio.run(scenario())
    assert heard.tasks == ["good"]


def test_hints_of_one_task_become_fewer_and_the_last_is_never_lost(
    server: RedisServer, direct: redis.Redis
) -> None:
    heard = Heard()

    async def scenario() -> None:
        async with connected(server.url, on_hint=heard):
            await listening(direct, 1)
            pipeline = direct.pipeline()
            for _ in range(2000):
                pipeline.publish(CHANNEL, b'{"task": "busy"}')
            pipeline.publish(CHANNEL, b'{"task": "last"}')
            pipeline.execute()
            await eventually(lambda: "last" in heard.tasks)

    asyncio.run(scenario())
    assert 1 <= heard.tasks.count("busy") < 200


def test_the_listener_comes_back(fragile: RedisServer) -> None:
    heard = Heard()

    async def scenario() -> None:
        async with connected(fragile.url, on_hint=heard) as tier:
            fragile.kill()
            await eventually(lambda: not tier.is_up)
            fragile.start()
            with redis.Redis(port=fragile.port) as client:
                await listening(client, 1)
            tier.publish_hint("back")
            await eventually(lambda: bool(heard.tasks))

    asyncio.run(scenario())
    assert heard.tasks == ["back"]


def test_nothing_stays_behind(server: RedisServer, direct: redis.Redis) -> None:
    descriptors = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    before = set(threading.enumerate())  # other tests' servers may live as long as the session
    for _ in range(3):
        source = PromptCache(MemoryStore(*PROMPTS), host_bytes=0, remote=(tier := RedisTier(server.url)))
        wait_until(lambda tier=tier: tier.is_up)
        load_all(source)
        source.close()
    new = set(threading.enumerate()) - before
    assert not [thread for thread in new if thread.name.startswith("prompt-")]
    if descriptors:
        assert len(os.listdir("/proc/self/fd")) <= descriptors
    wait_until(lambda: len(direct.client_list()) == 1)
