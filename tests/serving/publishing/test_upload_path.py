"""What an upload costs: through HTTP, each of its files is parsed once and hashed once."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

from app.api.state import ServerState
from app.store.importers import import_prompt
from app.store.source_files import CONFIG, PROMPT
from tests.api.server import client_of, services_of, serving
from tests.oracle import prefix_config, soft_config
from tests.serving.stack import Stack, running_stack

Adapter = tuple[bytes, bytes, bytes]  # weights, config, and the canonical file that comes of them
TASK = json.dumps({"template": "Review: {text}", "notes": "parsed once"}).encode()


@dataclass
class Work:
    """How often each text was parsed as JSON, and each content hashed."""

    parsed: Counter[str] = field(default_factory=Counter)
    hashed: Counter[bytes] = field(default_factory=Counter)


@pytest.fixture
def work(monkeypatch: pytest.MonkeyPatch) -> Work:
    """Of the whole process, from now on."""
    done, loads, sha256 = Work(), json.loads, hashlib.sha256

    def count_loads(text: str | bytes, **options: Any) -> Any:
        done.parsed[text if isinstance(text, str) else text.decode()] += 1
        return loads(text, **options)

    def count_sha256(data: bytes = b"", **options: Any) -> Any:
        done.hashed[bytes(data)] += 1
        return sha256(data, **options)

    monkeypatch.setattr(json, "loads", count_loads)
    monkeypatch.setattr(hashlib, "sha256", count_sha256)
    return done


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Stack, httpx.Client]]:
    with (
        running_stack(tmp_path_factory.mktemp("store")) as stack,
        serving(ServerState(services=services_of(stack))) as url,
        client_of(url) as client,
    ):
        yield stack, client


@pytest.fixture(params=[soft_config, prefix_config])
def adapter(request: pytest.FixtureRequest, served: tuple[Stack, httpx.Client], tmp_path: Path) -> Adapter:
    """Of other numbers for each test: what the store has already is read again to compare it."""
    seed = len(request.node.name)
    _, weights, config = served[0].adapter(request.param(4), tmp_path, seed=seed)
    return weights, config, import_prompt({PROMPT: weights, CONFIG: config}).prompt.data


def test_an_adapter_is_parsed_once(served: tuple[Stack, httpx.Client], adapter: Adapter, work: Work) -> None:
    weights, config, canonical = adapter
    publish(served[1], prompt=weights, config=config, task=TASK)
    for text in (header_of(weights), config.decode(), TASK.decode()):
        assert work.parsed[text] == 1
    assert (work.hashed[weights], work.hashed[config], work.hashed[canonical]) == (1, 1, 1)
    assert work.parsed[header_of(canonical)] == 0, "it was written here, and its trial run has it in memory"


def test_a_native_file_is_parsed_once(
    served: tuple[Stack, httpx.Client], adapter: Adapter, work: Work
) -> None:
    canonical = adapter[2]
    publish(served[1], prompt=canonical, task=TASK)
    assert (work.parsed[header_of(canonical)], work.parsed[TASK.decode()]) == (1, 1)
    assert work.hashed[canonical] == 1


def publish(client: httpx.Client, **parts: bytes) -> None:
    response = client.post("/tasks/counted/versions", files=parts)
    assert response.status_code == 201, response.text
    assert response.json()["release"], "it was tried and released"


def header_of(data: bytes) -> str:
    """The JSON of a safetensors file's header."""
    return data[8 : 8 + int.from_bytes(data[:8], "little")].rstrip().decode()
