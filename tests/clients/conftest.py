"""One server for all clients: a base with a chat template, a task of text, and one with a learned prompt."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
from peft import PeftModel

from app.api.state import ServerState
from tests.api.server import client_of, services_of, serving
from tests.api.test_generate import publish_text
from tests.oracle import soft_config
from tests.serving.stack import Stack, running_stack

CHAT = (
    "{% for message in messages %}[{{ message.role }}]{{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
TEXT_TASK, SOFT_TASK = "client-review", "client-soft"


@dataclass(frozen=True)
class Served:
    """A running server, and what stands behind it."""

    url: str
    stack: Stack
    soft: PeftModel  # the model that the task SOFT_TASK is made of
    tokenizer: Path  # as clients load it

    def post(self, path: str, body: object) -> httpx.Response:
        with client_of(self.url) as client:
            return client.post(path, json=body)


@pytest.fixture(scope="session")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    root = tmp_path_factory.mktemp("clients")
    with running_stack(root / "store", chat_template=CHAT) as stack:
        model, data, config = stack.adapter(soft_config(4), root / "adapter")
        stack.tokenizer.save_pretrained(root / "tokenizer")
        with serving(ServerState(services=services_of(stack))) as url:
            with client_of(url) as client:
                publish_text(client, TEXT_TASK, "Review: {text}\n")
                files = {"prompt": data, "config": config, "task": json.dumps({}).encode()}
                assert client.post(f"/tasks/{SOFT_TASK}/versions", files=files).status_code == 201
            yield Served(url, stack, model, root / "tokenizer")
