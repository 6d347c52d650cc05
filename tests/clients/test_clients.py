"""Clients of others, unchanged, in environments of their own, against one server."""

import json
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest

from tests.clients.conftest import TEXT_TASK, Served
from tests.clients.environments import java_program, node_program, python_program, run
from tests.serving.stack import BASE_NAME

PROMPT = "the film"
TURNS = ["what a film", "and the food"]
NUM_TOKENS = 8


class Client(NamedTuple):
    """How its program is run, for which model, and what its error holds."""

    command: Callable[..., list[str]]
    where: tuple[str, ...]
    model: str
    chats: bool  # else several turns are one text that grows
    error: tuple[str, str]


CLIENTS = {
    "openai for Python": Client(
        python_program, ("openai", "openai_package"), BASE_NAME, True, ("NotFoundError", "no model 'nothing'")
    ),
    "openai for Node": Client(
        node_program, ("openai_package.mjs",), BASE_NAME, True, ("NotFoundError", "no model 'nothing'")
    ),
    "lorax-client": Client(
        python_program, ("tgi", "lorax_client"), TEXT_TASK, False, ("NotFoundError", "no task 'nothing'")
    ),
    "text-generation": Client(
        python_program,
        ("tgi", "text_generation_client"),
        BASE_NAME,
        False,
        ("ValidationError", "positions"),
    ),
    "huggingface_hub": Client(
        python_program, ("huggingface", "huggingface"), BASE_NAME, True, ("HfHubHTTPError", "404")
    ),
    "langchain-huggingface": Client(
        python_program, ("huggingface", "langchain"), TEXT_TASK, False, ("HfHubHTTPError", "404")
    ),
    "litellm": Client(
        python_program, ("litellm", "litellm_package"), BASE_NAME, True, ("ContextWindowExceededError", "256")
    ),
}


class Findings(NamedTuple):
    """What a client's program printed."""

    client: Client
    found: dict[str, Any]


@pytest.fixture(scope="session")
def remembered() -> dict[str, Findings]:
    return {}


@pytest.fixture(params=CLIENTS)
def findings(request: pytest.FixtureRequest, served: Served, remembered: dict[str, Findings]) -> Findings:
    """Each program runs once."""
    return findings_of(request.param, served, remembered)


def findings_of(name: str, served: Served, remembered: dict[str, Findings]) -> Findings:
    if name not in remembered:
        client = CLIENTS[name]
        arguments = (served.url, client.model, PROMPT, json.dumps(TURNS))
        done = run(client.command(*client.where, *arguments))
        assert done.returncode == 0, done.stderr
        remembered[name] = Findings(client, json.loads(done.stdout.splitlines()[-1]))
    return remembered[name]


def generated(served: Served, model: str, text: str) -> str:
    body = {"task_id": model, "inputs": text, "parameters": {"max_new_tokens": NUM_TOKENS}}
    return str(served.post("/generate", body).json()["generated_text"])


def expected_turns(served: Served, client: Client) -> list[str]:
    said: list[str] = []
    text, messages = "", list[dict[str, str]]()
    for turn in TURNS:
        if client.chats:
            messages.append({"role": "user", "content": turn})
            body = {"model": client.model, "messages": messages, "max_tokens": NUM_TOKENS, "temperature": 0}
            answer = served.post("/v1/chat/completions", body).json()["choices"][0]["message"]["content"]
            messages.append({"role": "assistant", "content": answer})
        else:
            answer = generated(served, client.model, text + turn)
            text += turn + answer
        said.append(answer)
    return said


@pytest.mark.soak
class TestEveryClient:
    def test_generates(self, findings: Findings, served: Served) -> None:
        assert findings.found["generate"] == generated(served, findings.client.model, PROMPT)

    def test_streams(self, findings: Findings, served: Served) -> None:
        assert findings.found["stream"] == generated(served, findings.client.model, PROMPT)

    def test_raises_its_own_error(self, findings: Findings) -> None:
        kind, message = findings.found["error"]
        assert kind == findings.client.error[0]
        assert findings.client.error[1] in message

    def test_goes_on_for_several_turns(self, findings: Findings, served: Served) -> None:
        assert findings.found["turns"] == expected_turns(served, findings.client)
        assert len(set(findings.found["turns"])) == len(TURNS), "what was said before counts"


@pytest.mark.soak
def test_lorax_client_beside_the_usual(served: Served, remembered: dict[str, Findings]) -> None:
    found = findings_of("lorax-client", served, remembered).found
    assert found["asynchronous"] == found["generate"]
    assert found["invalid"][0] == "ValidationError"
    assert set(json.loads(found["schema"])) == {"liked"}


@pytest.mark.soak
def test_text_generation_with_a_grammar(served: Served, remembered: dict[str, Findings]) -> None:
    found = findings_of("text-generation", served, remembered).found
    assert len(found["regex"]) == 3
    assert found["regex"].isdecimal()


@pytest.mark.soak
def test_huggingface_hub_with_schemas(served: Served, remembered: dict[str, Findings]) -> None:
    found = findings_of("huggingface_hub", served, remembered).found
    assert [set(json.loads(text)) for text in found["schemas"]] == [{"liked"}] * 3
    assert found["regex"].isdecimal()


@pytest.mark.soak
def test_langchain_samples_as_it_likes_to(served: Served, remembered: dict[str, Findings]) -> None:
    assert findings_of("langchain-huggingface", served, remembered).found["sampled"]


def test_the_jdks_client_asks_for_an_upgrade_and_is_answered(served: Served) -> None:
    done = run(java_program("HttpClientProgram.java", served.url, BASE_NAME, PROMPT, *TURNS))
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    expected = generated(served, BASE_NAME, PROMPT)
    assert found["generate"]["choices"][0]["text"] == expected
    assert "".join(chunk["choices"][0]["text"] for chunk in found["stream"]) == expected
    assert (found["status"], found["error"]["error"]["code"]) == (404, "model_not_found")
    said = [answer["choices"][0]["message"]["content"] for answer in found["turns"]]
    assert said == expected_turns(served, Client(java_program, (), BASE_NAME, True, ("", "")))
