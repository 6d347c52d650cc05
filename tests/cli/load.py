"""Clients of all kinds that go on until nobody listens any more, and what became of their requests."""

import asyncio
import contextlib
import json
import random
from collections import Counter
from collections.abc import AsyncIterator, Callable
from typing import Any
from urllib.parse import urlsplit

import httpx

CHOICES = {"choices": ["good", "bad", "cold"]}
UPLOAD_HEAD = (
    "POST /tasks/slow/versions HTTP/1.1\r\nHost: localhost\r\n"
    "Content-Type: multipart/form-data; boundary=b\r\nContent-Length: {length}\r\n\r\n"
)
UPLOAD = b'--b\r\nContent-Disposition: form-data; name="task"\r\n\r\n{"template": "say {x}"}\r\n--b--\r\n'


class Load:
    """Clients of all kinds, each with one request after the other until nobody listens any more."""

    def __init__(self, url: str, seed: int, new_tokens: int) -> None:
        self.outcomes: Counter[str] = Counter()
        self._url = url
        self._dice = random.Random(seed)
        self._new_tokens = new_tokens
        self._has_begun = asyncio.Event()

    async def run(self, then: Callable[[], None]) -> None:
        """Call `then` at a random moment under load; return when nobody listens any more."""
        limits = httpx.Limits(max_connections=100)
        async with httpx.AsyncClient(
            base_url=self._url, limits=limits, timeout=90, trust_env=False
        ) as client:
            kinds = [self._whole, self._stream, self._openai, self._openai_stream, self._choices]
            clients = [asyncio.ensure_future(self._repeat(kind, client)) for kind in kinds * 4]
            clients += [asyncio.ensure_future(self._slow_upload()) for _ in range(2)]
            await self._has_begun.wait()  # a machine that is busy takes long
            await asyncio.sleep(self._dice.uniform(0, 0.6))
            then()
            await asyncio.gather(*clients)

    async def _repeat(self, ask: Callable[..., Any], client: httpx.AsyncClient) -> None:
        while True:
            try:
                outcome = await ask(client)
            except httpx.ConnectError:
                return
            self.outcomes[outcome] += 1
            self._has_begun.set()
            if outcome == "refused":
                await asyncio.sleep(0.05)

    def _body(self, **more: Any) -> dict[str, Any]:
        return {"max_tokens": self._dice.randint(1, self._new_tokens), "temperature": 0} | more

    def _parameters(self) -> dict[str, Any]:
        parameters = {
            "max_new_tokens": self._dice.randint(1, self._new_tokens),
            "n": self._dice.randint(1, 3),
        }
        return {"inputs": "the film", "parameters": parameters}

    async def _whole(self, client: httpx.AsyncClient) -> str:
        return outcome_of(await client.post("/generate", json=self._parameters()))

    async def _choices(self, client: httpx.AsyncClient) -> str:
        return outcome_of(await client.post("/generate", json={"inputs": "food", "parameters": CHOICES}))

    async def _openai(self, client: httpx.AsyncClient) -> str:
        body = self._body(model="tiny", prompt=["the", "food was"], n=2)
        return outcome_of(await client.post("/v1/completions", json=body))

    async def _stream(self, client: httpx.AsyncClient) -> str:
        body = self._parameters()
        del body["parameters"]["n"]
        async with client.stream("POST", "/generate_stream", json=body) as response:
            *_, last = ["", *[line async for line in response.aiter_lines() if line]]
            if response.status_code != 200:
                return refusal(response, last)
        return stream_end(last, done='"details":{')

    async def _openai_stream(self, client: httpx.AsyncClient) -> str:
        body = self._body(model="tiny", prompt="the film", n=2, stream=True)
        async with client.stream("POST", "/v1/completions", json=body) as response:
            *_, last = ["", *[line async for line in response.aiter_lines() if line]]
            if response.status_code != 200:
                return refusal(response, last)
        return stream_end(last, done="data: [DONE]")

    async def _slow_upload(self) -> None:
        """A body that has come half when the signal comes, and whose rest comes late."""
        where = urlsplit(self._url)
        async with connection(where.hostname, where.port) as (reader, writer):
            writer.write(UPLOAD_HEAD.format(length=len(UPLOAD)).encode() + UPLOAD[:40])
            answer = asyncio.ensure_future(reader.read())
            await asyncio.wait({answer}, timeout=1.5)
            if not answer.done():
                writer.write(UPLOAD[40:])
            status = (await answer).partition(b"\r\n")[0].split()[1]
            self.outcomes["finished" if status in (b"200", b"201") else f"upload {status!r}"] += 1


@contextlib.asynccontextmanager
async def connection(
    host: str | None, port: int | None
) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    reader, writer = await asyncio.open_connection(host, port)
    try:
        yield reader, writer
    finally:
        writer.close()
        await writer.wait_closed()


def outcome_of(response: httpx.Response) -> str:
    return "finished" if response.status_code == 200 else refusal(response, response.text)


def refusal(response: httpx.Response, text: str) -> str:
    """The only other answer is a 503 that says when to come again."""
    assert response.status_code == 503, text
    assert int(response.headers["retry-after"]) >= 1
    assert response.headers["connection"] == "close"
    error = json.loads(text)["error"]
    assert error["code"] == "not_ready"
    is_late = error["message"].startswith(("The server is shutting down", "The engine has stopped"))
    return "refused" if is_late else ended(error["message"])


def stream_end(last: str, done: str) -> str:
    if done in last:
        return "finished"
    error = json.loads(last.removeprefix("data: "))["error"]
    assert error["code"] == "not_ready", last
    return ended(error["message"])


def ended(message: str) -> str:
    """Why is said: the drain took too long, or the engine died."""
    assert "send it again" in message or "the engine" in message, message
    return "ended"
