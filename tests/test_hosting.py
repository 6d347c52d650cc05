"""The app under ASGI hosts that know nothing of it, mounted in another app, and the examples of both."""

import asyncio
import contextlib
import json
import os
import runpy
import signal
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from pydantic import ByteSize
from starlette.applications import Starlette
from starlette.routing import Mount

from app.api.state import ApiConfig, Phase
from app.errors import UnsupportedModel
from app.main import Replica, asgi_app
from app.settings import Settings
from examples.mount_in_another_app import create_app
from tests.api.server import serving_app
from tests.bases import save_tiny_llama
from tests.waiting import PATIENCE

ROOT = Path(__file__).parent.parent
ASK = {"inputs": "the film", "parameters": {"max_new_tokens": 3}}
DATE = {"task_id": "date-iso", "inputs": "the 22nd of November 1963"}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("base") / "tiny", positions=256)


@pytest.fixture
def settings(base: Path, tmp_path: Path) -> Settings:
    return Settings(
        model=str(base), store=tmp_path, dtype="float32", device="cpu", kv_cache_bytes=ByteSize(1 << 20)
    )


class Host:
    """What the ASGI specification asks of a host, and not a key more in a scope."""

    def __init__(self, app: Any) -> None:
        self._app = app
        self._events: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self._said: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self.life: asyncio.Task[None] | None = None

    async def start(self) -> dict[str, Any]:
        scope = {"type": "lifespan", "asgi": {"version": "3.0"}}
        self.life = asyncio.create_task(self._app(scope, self._events.get, self._said.put))
        await self._events.put({"type": "lifespan.startup"})
        return await self._said.get()

    async def stop(self) -> dict[str, Any]:
        await self._events.put({"type": "lifespan.shutdown"})
        said = await self._said.get()
        assert self.life is not None
        await self.life
        return said

    async def post(self, path: str, body: object) -> tuple[int, Any]:
        scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": "POST",
            "path": path,
            "query_string": b"",
            "headers": [(b"host", b"localhost"), (b"content-type", b"application/json")],
        }
        asked: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        await asked.put({"type": "http.request", "body": json.dumps(body).encode()})
        answer: list[dict[str, Any]] = []

        async def send(message: dict[str, Any]) -> None:
            answer.append(message)

        await self._app(scope, asked.get, send)
        return answer[0]["status"], json.loads(b"".join(each["body"] for each in answer[1:]))


def test_any_host_loads_serves_and_closes_it(settings: Settings) -> None:
    replica = Replica(settings)

    async def scenario() -> None:
        host = Host(replica.app)
        assert await host.start() == {"type": "lifespan.startup.complete"}
        assert replica.state.phase is Phase.READY
        status, answer = await host.post("/generate", ASK)
        assert (status, answer["details"]["generated_tokens"]) == (200, 3)
        assert await host.stop() == {"type": "lifespan.shutdown.complete"}

    before = set(threading.enumerate())
    asyncio.run(scenario())
    assert not replica.is_busy
    assert not [each for each in set(threading.enumerate()) - before if not each.daemon]


def test_a_base_that_cannot_be_served_fails_the_hosts_startup(settings: Settings, tmp_path: Path) -> None:
    app = asgi_app(settings.model_copy(update={"model": str(tmp_path / "nothing")}))

    async def scenario() -> None:
        host = Host(app)
        assert (await host.start())["type"] == "lifespan.startup.failed"
        assert host.life is not None
        with pytest.raises(UnsupportedModel, match="nothing"):
            await host.life

    asyncio.run(scenario())


@contextlib.asynccontextmanager
async def mounted(settings: Settings) -> AsyncIterator[httpx.AsyncClient]:
    app = asgi_app(settings)
    outer = Starlette(routes=[Mount("/llm", app)], lifespan=lambda _: app.router.lifespan_context(app))
    transport = httpx.ASGITransport(outer)
    async with (
        outer.router.lifespan_context(outer),
        httpx.AsyncClient(transport=transport, base_url="http://localhost/llm") as client,
    ):
        yield client


def test_a_mounted_app_knows_its_routes(settings: Settings, caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> None:
        async with mounted(settings.model_copy(update={"max_body_bytes": ByteSize(2048)})) as client:
            assert (await client.post("/generate", json=ASK)).status_code == 200
            assert (await client.get("/health/ready")).status_code == 200
            large = {"inputs": "x" * 4096}
            assert (await client.post("/generate", json=large)).status_code == 413
            task = {"task": json.dumps({"template": "{text}"}) + " " * 4096}  # bounded as an upload
            assert (await client.post("/tasks/long/versions", files=task)).status_code == 201

    with caplog.at_level("INFO", logger="promptplex.access"):
        asyncio.run(scenario())
    paths = [record.fields["path"] for record in caplog.records if record.message == "request"]  # type: ignore[attr-defined]
    assert paths == ["/llm/generate", "/llm/generate", "/llm/tasks/long/versions"], "and no probe"


@contextlib.contextmanager
def uvicorn(app: str, **environment: str) -> Iterator[str]:
    """The URL of a plain `uvicorn`, on which what is named here runs."""
    command = [sys.executable, "-m", "uvicorn", "--factory", app, "--port", "0"]
    with subprocess.Popen(
        command, cwd=ROOT, stderr=subprocess.PIPE, text=True, env=os.environ | environment
    ) as process:
        assert process.stderr is not None
        try:
            line = next(line for line in process.stderr if "running on" in line)
            yield line.partition("running on ")[2].split()[0]
            process.send_signal(signal.SIGTERM)
            rest = process.stderr.read()
            assert "Application shutdown complete" in rest, rest
            assert "Traceback" not in rest, rest
        finally:
            process.kill()


def test_it_runs_under_a_server_that_is_not_ours(base: Path, tmp_path: Path) -> None:
    environment = {"PROMPTPLEX_MODEL": str(base), "PROMPTPLEX_STORE": str(tmp_path)}
    with uvicorn("app.main:asgi_app", **environment) as url:
        answer = httpx.post(f"{url}/generate", json=ASK, timeout=PATIENCE, trust_env=False)
        assert (answer.status_code, answer.headers["x-generated-tokens"]) == (200, "3")


def test_the_example_of_a_mount() -> None:
    with serving_app(create_app(), ApiConfig(), lifespan="on") as url:
        assert "Promptplex" in httpx.get(url, trust_env=False).text
        answer = httpx.post(f"{url}/llm/generate", json=DATE, timeout=PATIENCE, trust_env=False)
        assert answer.json()["generated_text"] == "1963-11-22"


def test_the_example_without_http(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_module("examples.engine_without_http", run_name="__main__")
    assert capsys.readouterr().out == "1963-11-22\n"
