"""Bodies as clients of OpenAI's and TGI's send them: fields of answers come back, and refusals are plain."""

import json
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from jsonschema import validate

from app.api.schemas.messages import ChatMessage
from app.api.schemas.openai import ChatRequest
from tests.api.server import client_of
from tests.api.test_generate import error_of, publish_text
from tests.serving.stack import BASE_NAME

SCHEMA = {
    "type": "object",
    "properties": {"liked": {"type": "boolean"}, "stars": {"type": "integer", "minimum": 1, "maximum": 5}},
    "required": ["liked", "stars"],
}
USER = {"role": "user", "content": "the film"}
NULLABLE = [
    "content",
    "refusal",
    "annotations",
    "audio",
    "tool_calls",
    "function_call",
    "tool_call_id",
    "name",
]
NULLABLE += ["reasoning", "reasoning_content", "parsed"]
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": SCHEMA}}]
ANYTHING = ("pydantic", "Input should", "union", "ctx", "str.", "list[", "<")


@pytest.fixture(scope="module")
def model(url: str) -> str:
    with client_of(url) as http:
        publish_text(http, "messages-review", "Review: {text}\n")
    return "messages-review"


@pytest.fixture(scope="module")
def openai_client(url: str) -> Iterator[openai.OpenAI]:
    with (
        httpx.Client(trust_env=False, timeout=30) as http,
        openai.OpenAI(base_url=f"{url}/v1", api_key="none", http_client=http, max_retries=0) as made,
    ):
        yield made


def chat(client: httpx.Client, model: str, **more: Any) -> httpx.Response:
    body = {"model": model, "messages": [USER], "max_tokens": 4, "temperature": 0}
    return client.post("/v1/chat/completions", json=body | more)


def text_of(response: httpx.Response) -> str:
    assert response.status_code == 200, response.text
    return str(response.json()["choices"][0]["message"]["content"])


def test_an_answer_is_the_next_requests_message(openai_client: openai.OpenAI, model: str) -> None:
    """As the object that the client made of it, and as the dictionary that it makes of the object."""
    messages: list[Any] = [USER]
    for _ in range(2):
        reply = openai_client.chat.completions.create(model=model, messages=messages, max_tokens=3)
        message = reply.choices[0].message
        messages += [message, {"role": "user", "content": "and then?"}, message.model_dump(), USER]
    parsed = openai_client.chat.completions.parse(
        model=model,
        messages=messages,
        max_tokens=60,
        response_format={"type": "json_object", "schema": SCHEMA},  # type: ignore[arg-type]
    )
    assert parsed.choices[0].message.content


@pytest.mark.parametrize("field", NULLABLE)
def test_any_field_of_a_message_may_be_null(client: httpx.Client, model: str, field: str) -> None:
    said = {"role": "assistant", "content": "yes"}
    plain = text_of(chat(client, model, messages=[USER, said, USER]))
    assert text_of(chat(client, model, messages=[USER, said | {field: None}, USER])) == plain
    assert text_of(chat(client, model, messages=[USER, {"role": "assistant"}, USER])) == plain


def test_empty_values_of_fields_change_nothing(client: httpx.Client, model: str) -> None:
    said = {"role": "assistant", "content": "", "refusal": "", "annotations": [], "tool_calls": []}
    text_of(chat(client, model, messages=[USER, said | {"reasoning_content": ""}, USER | {"name": "Ann"}]))
    parts = [
        {"type": "text", "text": "the ", "cache_control": {"type": "ephemeral"}},
        {"type": "text", "text": "film"},
    ]
    together = chat(client, model, messages=[{"role": "user", "content": parts}])
    assert text_of(together) == text_of(chat(client, model))


@pytest.mark.parametrize(
    "names", [("reasoning",), ("reasoning_content",), ("reasoning", "reasoning_content")]
)
def test_reasoning_of_earlier_answers_goes_to_the_chat_template(
    client: httpx.Client, model: str, names: tuple[str, ...]
) -> None:
    """As vLLM and SGLang write it, and as our own answers have it: under both names."""
    said = {"role": "assistant", "content": "yes", **dict.fromkeys(names, "it was good")}
    assert ChatMessage.model_validate(said).message().others == {"reasoning_content": "it was good"}
    assert text_of(chat(client, model, messages=[USER, said, USER])) == text_of(chat(client, model))


def test_reasoning_that_means_nothing_is_refused(client: httpx.Client, model: str) -> None:
    said = {"role": "assistant", "content": "yes", "reasoning": "a", "reasoning_content": "b"}
    for message, why in ((said, "send one of them"), (USER | {"reasoning": "a"}, "only the assistant's")):
        error = error_of(chat(client, model, messages=[message, USER]), 422)
        assert error["param"] == "messages.0"
        assert why in error["message"]


REFUSED: list[tuple[dict[str, Any], str, str]] = [
    ({"role": "tool", "content": "4", "tool_call_id": "c"}, "role", "calls no tools"),
    ({"role": "function", "name": "f", "content": "4"}, "role", "calls no tools"),
    ({"role": "assistant", "content": None, "tool_calls": [{"id": "c"}]}, "tool_calls", "calls no tools"),
    (
        {"role": "assistant", "content": "a", "function_call": {"name": "f"}},
        "function_call",
        "calls no tools",
    ),
    ({"role": "assistant", "content": "a", "audio": {"id": "x"}}, "audio", "transcript"),
    ({"role": "assistant", "content": "a", "reasoning": 3}, "reasoning", "must be a string"),
    ({"role": "user", "content": None}, "content", "must be given"),
    ({"role": "user"}, "content", "must be given"),
    ({"role": "user", "content": 3}, "content", "must be a string"),
    ({"role": "user", "content": {"type": "text"}}, "content", "must be a string"),
    (
        {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]},
        "content.0",
        "'image_url'",
    ),
    (
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "input_audio"}]},
        "content.1",
        "'input_audio'",
    ),
    ({"role": "user", "content": ["a"]}, "content.0", 'must be {"type": "text"'),
    ({"role": "user", "content": [{"type": 3}]}, "content.0", 'must be {"type": "text"'),
]


@pytest.mark.parametrize(("message", "place", "why"), REFUSED, ids=[f"{p}-{w}" for _, p, w in REFUSED])
def test_what_cant_be_read_is_refused_in_plain_words(
    client: httpx.Client, model: str, message: dict[str, Any], place: str, why: str
) -> None:
    error = error_of(chat(client, model, messages=[USER, message]), 422)
    assert error["param"] == f"messages.1.{place}"
    assert why in error["message"]
    assert error["message"].count("messages.1") == 1, "one problem is told once"
    assert not any(word in error["message"] for word in ANYTHING)


@pytest.mark.parametrize("prompt", ["", [], [""], {}, None, 3, True, [True], [None]])
def test_a_prompt_that_is_none(client: httpx.Client, model: str, prompt: Any) -> None:
    response = client.post("/v1/completions", json={"model": model, "prompt": prompt, "max_tokens": 1})
    if prompt in ("", [""]):  # the template has a text of its own
        assert response.status_code == 200
        return
    error = error_of(response, 422)
    assert error["param"] == "prompt"
    assert "must be a text or a list of token ids" in error["message"]


@pytest.mark.parametrize("name", ["tools", "functions"])
def test_tools_are_taken_where_none_is_to_be_called(client: httpx.Client, model: str, name: str) -> None:
    choice = {"tools": "tool_choice", "functions": "function_call"}[name]
    plain = text_of(chat(client, model))
    for more in (
        {name: TOOLS, choice: "none"},
        {choice: "none"},
        {choice: "auto"},
        {name: []},
        {name: None, choice: None},
    ):
        assert text_of(chat(client, model, parallel_tool_calls=True, **more)) == plain
    for more in ({name: TOOLS}, {name: TOOLS, choice: "auto"}, {name: TOOLS, choice: None}):
        error = error_of(chat(client, model, **more), 422)
        assert error["param"] == name
        assert "response_format" in error["message"]
    for called in ("required", {"type": "function", "function": {"name": "f"}}):
        error = error_of(chat(client, model, **{choice: called}), 422)
        assert error["param"] == choice


@pytest.mark.parametrize(
    "name", ["gpt-4o", "meta-llama/Llama-3.1-8B", "a@9", "messages-review@9", "messages-review@No!"]
)
def test_a_model_that_there_is_not(
    client: httpx.Client, openai_client: openai.OpenAI, model: str, name: str
) -> None:
    prompt = client.post("/v1/completions", json={"model": name, "prompt": "a", "stream": True})
    for response in (prompt, chat(client, name), client.get(f"/v1/models/{name}")):
        error = error_of(response, 404)
        assert (error["param"], error["code"]) == ("model", "model_not_found")
        assert "GET /v1/models" in error["message"]
        assert "task_id" not in error["message"]
    with pytest.raises(openai.NotFoundError):
        openai_client.models.retrieve(name)


FORMATS: list[dict[str, Any]] = [
    {"type": "json_object", "value": SCHEMA},
    {"type": "json_object", "schema": SCHEMA},
    {"type": "json_object", "value": json.dumps(SCHEMA)},
    {"type": "json", "value": SCHEMA},
    {"type": "json", "value": json.dumps(SCHEMA)},
    {"type": "json_schema", "value": {"name": "review", "schema": SCHEMA}},
    {
        "type": "json_schema",
        "json_schema": {"name": "review", "schema": SCHEMA, "strict": None, "description": None},
    },
    {"type": "json_schema", "json_schema": {"schema": SCHEMA}},
]


@pytest.mark.parametrize("given", FORMATS, ids=str)
def test_a_schema_in_every_clients_words(client: httpx.Client, model: str, given: dict[str, Any]) -> None:
    text = text_of(chat(client, model, response_format=given, max_tokens=60, temperature=2.0, seed=4))
    validate(json.loads(text), SCHEMA | {"additionalProperties": False})


def test_a_regex_as_tgi_has_it(client: httpx.Client, model: str) -> None:
    given = {"type": "regex", "value": "[0-9]{3}"}
    assert text_of(chat(client, model, response_format=given, max_tokens=8)).isdecimal()
    bad = error_of(chat(client, model, response_format={"type": "regex", "value": "("}), 422)
    assert bad["param"] == "response_format"
    twice = {"type": "json_object", "value": SCHEMA, "schema": SCHEMA}
    assert "send one of them" in error_of(chat(client, model, response_format=twice), 422)["message"]
    odd = error_of(chat(client, model, response_format={"type": "json", "value": 3}), 422)
    assert "must be a JSON schema: an object, or its text" in odd["message"]


def test_a_schema_as_lorax_has_it(client: httpx.Client) -> None:
    given = {"type": "json_object", "schema": SCHEMA}
    parameters = {"max_new_tokens": 60, "response_format": given}
    (answer,) = client.post("/", json={"inputs": "the film", "parameters": parameters}).json()
    validate(json.loads(answer["generated_text"]), SCHEMA)
    both = parameters | {"grammar": {"type": "regex", "value": "a"}}
    assert "send one" in error_of(client.post("/", json={"inputs": "a", "parameters": both}), 422)["message"]


def test_the_root_answers_a_list_as_tgi_does(client: httpx.Client) -> None:
    body = {"inputs": "what a film", "parameters": {"max_new_tokens": 3, "seed": 1}}
    answer = client.post("/generate", json=body)
    listed = client.post("/", json=body)
    assert listed.json() == [answer.json()]
    assert "x-total-time" in listed.headers
    (choice,) = client.post("/", json={"inputs": "a", "parameters": {"choices": ["a", "b"]}}).json()
    assert choice["choice"]["value"] in ("a", "b")


def test_errors_carry_tgis_word(client: httpx.Client) -> None:
    cases = [
        (client.post("/", json={"inputs": 3}), "validation"),
        (client.post("/generate", json={"inputs": "a " * 5000}), "validation"),
        (client.post("/v1/completions", json={"model": BASE_NAME, "prompt": 3}), "validation"),
        (client.post("/", json={"inputs": "a", "task_id": "nothing"}), None),
    ]
    for response, word in cases:
        assert response.json().get("error_type") == word


def test_a_streams_last_event_has_the_counts_by_tgis_and_loraxs_names(client: httpx.Client) -> None:
    body = {"inputs": "what a film", "parameters": {"max_new_tokens": 3}}
    whole = client.post("/generate", json=body).json()["details"]
    *_, last = client.post("/generate_stream", json=body).text.strip().splitlines()
    details = json.loads(last.removeprefix("data: "))["details"]
    assert details["input_length"] == details["prompt_tokens"] == whole["prompt_tokens"]


def test_reasoning_in_openrouters_form() -> None:
    """An object of its own; what it says may not be said twice."""

    def parameters(**given: Any) -> dict[str, Any]:
        body = {"model": "m", "messages": [USER], "reasoning": given}
        return ChatRequest.model_validate(body).generation()

    assert parameters(effort="high", exclude=True) == {
        "reasoning_effort": "high",
        "include_reasoning": False,
    }
    assert parameters(max_tokens=9, exclude=False) == {"thinking_token_budget": 9, "include_reasoning": True}
    assert parameters(enabled=False) == {"reasoning_effort": "none"}
    assert parameters(enabled=True) == {}
    for contradicting in ({"effort": "high"}, {"max_tokens": 9}):
        with pytest.raises(ValueError, match="there is no reasoning"):
            parameters(enabled=False, **contradicting)
    twice = {"model": "m", "messages": [USER], "reasoning": {"effort": "low"}, "reasoning_effort": "low"}
    with pytest.raises(ValueError, match="send one of them"):
        ChatRequest.model_validate(twice)
