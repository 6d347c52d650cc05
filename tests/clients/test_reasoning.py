"""Clients of others with a task that reasons, unchanged: each has the steps where it looks for them."""

import json
from collections.abc import Callable
from typing import Any

import pytest

from tests.api.server import client_of
from tests.api.test_reasoning import LENGTH, thinking
from tests.clients.conftest import Served
from tests.clients.environments import node_program, python_program, run

pytestmark = pytest.mark.soak
TASK = "client-thinks"


@pytest.fixture(scope="module")
def asked(served: Served) -> dict[str, Any]:
    with client_of(served.url) as client:
        return thinking(client, served.stack, TASK)


def said(served: Served, asked: dict[str, Any], **more: Any) -> tuple[str, dict[str, Any]]:
    """Return the answer and the steps as /generate has them."""
    answer = served.post("/generate", asked | {"parameters": asked["parameters"] | more}).json()
    return answer["generated_text"], answer["reasoning"]


def findings(
    served: Served, asked: dict[str, Any], command: Callable[..., list[str]], *where: str
) -> dict[str, Any]:
    done = run(command(*where, served.url, TASK, asked["inputs"], "[]", str(LENGTH)))
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_openai_for_python(served: Served, asked: dict[str, Any]) -> None:
    found = findings(served, asked, python_program, "openai", "openai_reasoning")
    text, steps = said(served, asked)
    assert found["chat"] == [text, steps["text"], steps["text"]]
    assert found["deltas"] == [text, steps["text"]]
    assert found["counts"] == [LENGTH, steps["tokens"]]
    text, steps = said(served, asked, reasoning_effort="low")
    assert found["low"] == [text, steps["text"]]
    assert found["response"] == [text, steps, "incomplete"]
    assert found["streamed"] == [text, steps]
    assert found["sent_back"] == text
    assert found["parsed"] == ["Review", "Review"]
    assert found["error"][0] == "NotFoundError"
    for kind in ("reasoning_text", "reasoning_summary_text", "output_text"):
        assert f"response.{kind}.delta" in found["events"]


def test_openai_for_node(served: Served, asked: dict[str, Any]) -> None:
    found = findings(served, asked, node_program, "openai_reasoning.mjs")
    text, steps = said(served, asked)
    assert found["chat"] == [text, steps["text"], steps["text"]]
    text, steps = said(served, asked, reasoning_effort="low")
    assert found["response"] == [text, steps]
    assert found["streamed"][1] == steps
    assert found["events"][-1] == "response.incomplete"


def test_langchain_openai(served: Served, asked: dict[str, Any]) -> None:
    """From chats it takes no steps; its authors point to responses, where summaries are what it reads."""
    found = findings(served, asked, python_program, "langchain_openai", "langchain_chat")
    text, steps = said(served, asked)
    assert found["chat"] == [text, steps["tokens"]]
    assert found["chat_stream"] == text
    text, steps = said(served, asked, reasoning_effort="low")
    assert found["response"] == [text, steps["steps"], steps["tokens"]]
    assert found["stream"] == found["response"]
    assert found["sent_back"] == found["response"]
    assert [set(each) for each in found["schemas"]] == [{"liked"}, {"liked"}]
    assert "nothing" in found["error"][1]


def test_litellm(served: Served, asked: dict[str, Any]) -> None:
    found = findings(served, asked, python_program, "litellm", "litellm_reasoning")
    text, steps = said(served, asked)
    assert found["chat"] == found["stream"] == found["response"] == [text, steps["text"]]
    assert found["tokens"] == steps["tokens"]
    text, steps = said(served, asked, reasoning_effort="low")
    assert found["low"] == [text, steps["text"]]
