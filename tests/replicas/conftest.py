"""Three server processes on one store and one Redis."""

import contextlib
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest

from app.prompt import Prompt, PromptKind
from app.store.prompt_file import make_prompt
from app.store.safetensors_file import RawTensor
from tests.bases import save_tiny_llama
from tests.cli.conftest import Server
from tests.store.fault_proxy import FaultProxy
from tests.store.redis_server import RedisServer
from tests.waiting import wait_until

HIDDEN = 32
NUM_REPLICAS = 3


@dataclass
class Cluster:
    """The servers, and a client that uploads to one and asks all."""

    store: Path
    redis: RedisServer
    proxy: FaultProxy
    flags: tuple[str, ...]  # of every replica
    client: httpx2.Client
    urls: list[str]
    dice: random.Random = field(default_factory=lambda: random.Random(0))

    def health(self, index: int) -> dict[str, Any]:
        summary: dict[str, Any] = self.client.get(f"{self.urls[index]}/health").json()
        return summary

    def wait_for_redis(self, state: str) -> None:
        """Until every replica's breaker has noticed."""
        wait_until(
            lambda: all(self.health(index)["redis"] == state for index in range(NUM_REPLICAS)),
            f"Redis isn't {state}",
        )

    def upload(self, task_id: str, prompt: Prompt) -> dict[str, Any]:
        """To a replica at random; the answer to a 2xx."""
        url = self.dice.choice(self.urls)
        answer = self.client.post(f"{url}/tasks/{task_id}/versions", files={"prompt": ("p", prompt.data)})
        assert answer.status_code == 201, answer.text
        body: dict[str, Any] = answer.json()
        return body

    def ask(self, url: str, reference: str) -> dict[str, Any]:
        body = {"task_id": reference, "inputs": "the film", "parameters": {"max_new_tokens": 4}}
        answer = self.client.post(f"{url}/generate", json=body)
        assert answer.status_code == 200, answer.text
        answered: dict[str, Any] = answer.json()
        return answered

    def all_serve(self, uploaded: dict[str, Any], *more_urls: str) -> bool:
        """Whether the next request on every replica is served by it. Other numbers are an error at once."""
        answers = [self.ask(url, uploaded["task_id"]) for url in (*self.urls, *more_urls)]
        first, *others = ([token["logprob"] for token in each["details"]["tokens"]] for each in answers)
        for other in others:
            assert np.allclose(first, other, atol=1e-4), "other numbers: not the same prompt"
        return {answer["version_digest"] for answer in answers} == {uploaded["version_digest"]}


def soft_prompt(seed: int, virtual_tokens: int = 8) -> Prompt:
    rows = np.random.default_rng(seed).standard_normal((virtual_tokens, HIDDEN)).astype("<f4")
    tensor = RawTensor("F32", rows.shape, rows.tobytes())
    return make_prompt(PromptKind.SOFT, {"dec.embeds": tensor})


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("cluster")
    base, store = save_tiny_llama(folder / "tiny"), folder / "store"
    with contextlib.ExitStack() as stack:
        redis = RedisServer(folder)
        stack.callback(redis.kill)
        proxy = FaultProxy(redis.port)
        stack.callback(proxy.close)
        flags = ("--model", str(base), "--store", str(store), "--dtype", "float32", "--threads", "1")
        flags += ("--kv-cache-bytes", "8MiB", "--max-context", "256", "--redis-url", proxy.url)
        servers = [stack.enter_context(Server.running(*flags)) for _ in range(NUM_REPLICAS)]
        client = stack.enter_context(httpx2.Client(trust_env=False, timeout=60))
        urls = [server.wait_until_ready() for server in servers]
        yield Cluster(store, redis, proxy, flags, client, urls)
