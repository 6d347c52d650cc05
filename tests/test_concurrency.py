"""Threads are there before a request needs one, and gone when their owner is closed."""

import asyncio
import json
import threading
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from pathlib import Path

import httpx
import pytest

from app.concurrency import Workers, interleave, map_bounded
from app.main import assemble
from app.prompt import TaskVersion
from app.server.process import PromptplexServer
from app.serving.admitted import Admitted
from app.serving.generation_request import GenerationRequest
from app.settings import Settings
from tests.bases import save_tiny_llama
from tests.serving.stack import upload_of
from tests.waiting import PATIENCE, wait_until


def settings_of(directory: Path) -> Settings:
    base = save_tiny_llama(directory / "base", positions=256)
    return Settings(model=str(base), port=0, store=directory / "store", dtype="float32", device="cpu")


@pytest.fixture
def url(tmp_path: Path) -> Iterator[str]:
    """A whole server, on a thread of this process."""
    server = PromptplexServer(settings_of(tmp_path))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        wait_until(lambda: server.state.services is not None or not thread.is_alive())
        host, port = server.servers[0].sockets[0].getsockname()
        yield f"http://{host}:{port}"
    finally:
        server.should_exit = True
        thread.join()


def refuse_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """What Python says at the limit of threads, of a container or a user."""

    def start(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", start)


def test_a_ready_server_needs_no_new_thread(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse_threads(monkeypatch)
    task = {"task": (None, json.dumps({"template": "say {text}"}))}
    with httpx.Client(base_url=url, timeout=PATIENCE, trust_env=False) as client:
        answers = [
            client.post("/generate", json={"inputs": "a", "parameters": {"max_new_tokens": 2}}),
            client.post("/tasks/said/versions", files=task),
            client.post("/tasks/said/versions", files=task | {"notes": (None, "2")}),
            client.post("/generate", json={"inputs": {"text": "a"}, "task_id": "said"}),
            client.post("/v1/chat/completions", json={"model": "said", "messages": [], "prompt": "a"}),
            client.post("/tokenize", json={"inputs": "a"}),
            *(client.get(path) for path in ("/tasks", "/tasks/said", "/health", "/metrics", "/v1/models")),
            client.get("/v1/models/said"),
        ]
        assert not [answer.text for answer in answers if answer.status_code >= 500]
        assert sum(answer.is_success for answer in answers) >= 9


def test_two_that_are_assembled_leave_no_thread_behind(tmp_path: Path) -> None:
    settings = settings_of(tmp_path)
    before = set(threading.enumerate())
    for _ in range(2):
        services = assemble(settings, progress=lambda _: None, on_failure=lambda _: None)
        assert len(set(threading.enumerate()) - before) > 8
        services.close()
        assert set(threading.enumerate()) - before == set()


def test_an_assembly_that_fails_leaves_no_thread_behind(tmp_path: Path) -> None:
    settings = settings_of(tmp_path)
    before = set(threading.enumerate())
    with pytest.raises(ValueError, match="don't hold one block"):
        assemble(
            settings.model_copy(update={"kv_cache_bytes": 100}),
            progress=lambda _: None,
            on_failure=lambda _: None,
        )
    assert set(threading.enumerate()) - before == set()


def test_a_pool_that_gets_too_few_threads_fails_at_once_and_keeps_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = set(threading.enumerate())
    start, left = threading.Thread.start, [3]

    def start_three(thread: threading.Thread) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", start_three)
    with pytest.raises(RuntimeError, match="can't start new thread"):
        Workers(5, "few")
    assert set(threading.enumerate()) == before


def test_a_pool_works_as_any_other() -> None:
    with Workers(3, "three") as workers:
        names = {thread.name for thread in threading.enumerate()}
        assert {f"three_{number}" for number in range(3)} <= names
        assert list(workers.map(abs, range(-9, 0))) == list(range(9, 0, -1))


def test_an_alias_moves_while_uploads_are_checked(tmp_path: Path) -> None:
    """A rollback is for emergencies: it waits for no upload, here as many as fill every thread."""
    services = assemble(settings_of(tmp_path), progress=lambda _: None, on_failure=lambda _: None)
    publishing, go_on = services.publishing, threading.Event()
    build = services.generation.request_builder.build

    async def run() -> None:
        for text in ("a {x}", "b {x}"):
            await publishing.upload("task", upload_of(task={"template": text}, alias="live"))
        held = [
            asyncio.ensure_future(publishing.upload(f"slow{number}", upload_of(task={"template": "c {x}"})))
            for number in range(4)
        ]
        release = await asyncio.wait_for(
            publishing.change(lambda store: store.rollback("task")), timeout=PATIENCE / 2
        )
        assert release.action == "rollback"
        assert not any(each.done() for each in held)
        go_on.set()
        await asyncio.gather(*held)

    def slow_build(request: GenerationRequest, version: TaskVersion | None) -> Admitted:
        if version is not None and "c {x}" in str(version.template):
            go_on.wait(PATIENCE)
        return build(request, version)

    services.generation.request_builder.build = slow_build  # type: ignore[method-assign]
    try:
        asyncio.run(run())
    finally:
        go_on.set()
        services.close()


async def counting(number: int, ended: list[int], *, fails: bool = False) -> AsyncGenerator[int, None]:
    try:
        for item in range(number):
            await asyncio.sleep(0.001 * number)
            yield item
        if fails:
            raise ZeroDivisionError
    finally:
        ended.append(number)


def test_streams_are_interleaved_once_each_has_begun() -> None:
    async def read() -> list[tuple[int, int]]:
        return [each async for each in interleave([counting(number, ended) for number in (5, 1, 3)])]

    ended = list[int]()
    items = asyncio.run(read())
    assert {number for number, _ in items[:4]} == {0, 1, 2}, "the slowest begins after a few of the fastest"
    for number, count in enumerate((5, 1, 3)):
        assert [item for place, item in items if place == number] == list(range(count))
    assert sorted(ended) == [1, 3, 5]


@pytest.mark.parametrize("others", [(), (5, 7)])
def test_a_stream_that_fails_or_is_left_closes_all(others: tuple[int, ...]) -> None:
    async def read(*, is_left: bool) -> None:
        streams = [counting(9, ended, fails=True), *(counting(number, ended) for number in others)]
        async with aclosing(interleave(streams)) as items:
            async for _ in items:
                if is_left:
                    break
        assert len(ended) == len(streams)

    ended = list[int]()
    with pytest.raises(ZeroDivisionError):
        asyncio.run(read(is_left=False))
    assert len(ended) == 1 + len(others)
    ended.clear()
    asyncio.run(read(is_left=True))


def test_streams_that_need_not_wait_for_all_yield_what_comes_first() -> None:
    """The last one never has an item, as a ballot that waits for a row."""

    async def stream(number: int) -> AsyncGenerator[int, None]:
        if number == 2:
            await asyncio.Event().wait()
        yield number

    async def read() -> list[int]:
        async with aclosing(interleave([stream(i) for i in range(3)], waits_for_all=False)) as items:
            return [(await anext(items))[1], (await anext(items))[1]]

    assert sorted(asyncio.run(read())) == [0, 1]


def test_bounded_work_keeps_its_order_and_its_width() -> None:
    running, most = 0, 0

    async def work(number: int) -> int:
        nonlocal running, most
        running += 1
        most = max(most, running)
        for _ in range(10 - number % 10):
            await asyncio.sleep(0)
        running -= 1
        return number

    assert asyncio.run(map_bounded(work, range(30), 4)) == list(range(30))
    assert most == 4
    assert asyncio.run(map_bounded(work, [], 4)) == []


def test_bounded_work_ends_with_its_first_error() -> None:
    begun: list[int] = []

    async def work(number: int) -> None:
        begun.append(number)
        await asyncio.sleep(0)
        if number == 2:
            raise ValueError("two")
        await asyncio.Event().wait()

    with pytest.raises(ValueError, match="two"):
        asyncio.run(map_bounded(work, range(30), 3))
    assert begun == [0, 1, 2]
