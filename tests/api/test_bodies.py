"""Bodies: no two readings of one, and no more work for a bad one than for a good one."""

import json
import time
import types
from collections.abc import Iterator
from typing import Annotated, Any, Union, get_args, get_origin

import httpx
import pytest
from fastapi.routing import APIRoute
from pydantic import BaseModel, ValidationError

from app.api.routes import generate, openai, tasks, tokens
from app.api.schemas.bodies import MAX_ITEMS
from app.validation import StrictModel
from tests.api.test_generate import error_of
from tests.serving.stack import BASE_NAME, Stack

JSON = {"content-type": "application/json"}
ROUTES = ["/generate", "/", "/generate_stream", "/tokenize", "/detokenize", "/v1/completions"]
ROUTES += ["/v1/chat/completions", "/v1/responses", "/tasks/a/rollback", "/tasks/a/restore"]
INTERNAL = ("[", "function-", "literal", "list", "TextPart", "ChatMessage", "Format", "Grammar", "Labelled")


@pytest.mark.parametrize("path", ROUTES)
@pytest.mark.parametrize(
    "body",
    [
        b'{"inputs": "a", "inputs": "b"}',
        b'{"a": {"b": [{"c": 1, "c": 1}]}}',
        b'{"\\u0061": 1, "a": 2}',
        b'{"a": {"x": 1, "x": 2}, "b": "' + b"x" * 100_000 + b'"}',
    ],
)
def test_a_key_that_appears_twice_is_refused(client: httpx.Client, path: str, body: bytes) -> None:
    error = error_of(client.post(path, content=body, headers=JSON), 400)
    assert "appears twice" in error["message"]


def test_a_key_that_appears_twice_moves_no_alias(client: httpx.Client) -> None:
    body = b'{"version": 1, "version": 2}'
    error = error_of(client.put("/tasks/a/aliases/live", content=body, headers=JSON), 400)
    assert "'version'" in error["message"]


@pytest.mark.parametrize(
    ("body", "status", "reason"),
    [
        (b'{"inputs": "a", "parameters": {"seed": ' + b"1" * 1_000_000 + b"}}", 400, "4300 digits"),
        (b'{"inputs": ' + b"[" * 100_000, 400, "nests too deeply"),
        (b'{"a":' * 100_000, 400, "nests too deeply"),
        ('{"inputs": "a"}'.encode("utf-16"), 400, "not UTF-8"),
        (b'{"ids": [' + b"0," * MAX_ITEMS + b"0]}", 413, "send fewer"),
        (b'{"inputs": [' + b"{}," * (MAX_ITEMS - 10) + b"{}]}", 413, "send fewer"),
        (b"[" * MAX_ITEMS * 2, 413, "send fewer"),
    ],
)
def test_what_would_cost_much_is_refused_as_it_is_read(
    client: httpx.Client, body: bytes, status: int, reason: str
) -> None:
    assert reason in error_of(client.post("/generate", content=body, headers=JSON), status)["message"]


def test_a_mark_of_utf8_is_no_fault(client: httpx.Client) -> None:
    body = b'\xef\xbb\xbf{"inputs": "a", "parameters": {"max_new_tokens": 1}}'
    assert client.post("/generate", content=body, headers=JSON).status_code == 200


def body_models() -> set[type[BaseModel]]:
    """Every model that a route's JSON body may hold."""
    routers = (generate.router, openai.router, tasks.router, tokens.router)
    routes = [route for router in routers for route in router.routes if isinstance(route, APIRoute)]
    found: set[type[BaseModel]] = set()
    pending: list[Any] = [route.body_field.field_info.annotation for route in routes if route.body_field]
    while pending:
        annotation = pending.pop()
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            if annotation not in found:
                found.add(annotation)
                pending += [field.annotation for field in annotation.model_fields.values()]
        else:
            pending += get_args(annotation)
    return found


MODELS = sorted(body_models(), key=lambda model: model.__name__)


def containers_in(annotation: Any) -> Iterator[Any]:
    """The lists and objects that an annotation allows, from the outside in."""
    origin = get_origin(annotation)
    if origin in (list, dict, tuple):
        yield annotation
    if origin is Annotated:
        yield from containers_in(get_args(annotation)[0])
    elif origin in (Union, types.UnionType, list, dict):
        for part in get_args(annotation):
            yield from containers_in(part)


FIELDS = [
    (model, field.alias or name)
    for model in MODELS
    for name, field in model.model_fields.items()
    if any(containers_in(field.annotation))
]


def test_all_bodies_fail_fast() -> None:
    assert len(MODELS) >= 20
    assert len(FIELDS) >= 14, "such as messages, prompt, stop, logit_bias, choices, metadata, weights, ids"
    assert all(issubclass(model, StrictModel) for model in MODELS), "a body's models are strict"


class Odd:
    """Nothing that JSON can express, so it fits nowhere."""


WORST: dict[str, Any] = {
    "items": [Odd()] * 100_000,
    "numbers": [-1] * 100_000,
    "texts": ["a"] * 99_999 + [Odd()],
    "lists": [[Odd()] * 1000] * 100,
    "objects": [{"type": Odd(), "role": Odd(), "x": Odd()}] * 100_000,
    "names": {f"{number}": Odd() for number in range(100_000)},
    "nested": {f"{number}": {"a": Odd()} for number in range(100_000)},
}


@pytest.mark.parametrize("worst", WORST)
@pytest.mark.parametrize(("model", "name"), FIELDS, ids=lambda value: getattr(value, "__name__", value))
def test_one_fault_of_a_list_is_enough(model: type[BaseModel], name: str, worst: str) -> None:
    begin = time.process_time()
    with pytest.raises(ValidationError) as caught:
        model.model_validate({name: WORST[worst], "unknown": 1})
    assert caught.value.error_count() <= 24, "few, however long the list is"
    assert time.process_time() - begin < 1


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.__name__)
def test_a_few_unknown_fields_are_enough(model: type[BaseModel]) -> None:
    with pytest.raises(ValidationError) as caught:
        model.model_validate({f"unknown{number}": 1 for number in range(100_000)})
    assert caught.value.error_count() <= len(model.model_fields) + 8


CHAT = {"model": "tiny-base", "messages": [{"role": "user", "content": "a"}]}
COMPLETION = {"model": "tiny-base", "prompt": "a"}
ASK = {"inputs": "a"}
BAD: list[tuple[str, dict[str, Any]]] = [
    ("/v1/completions", COMPLETION | {"prompt": [-1] * 200_000}),
    ("/v1/completions", COMPLETION | {"prompt": [[-1] * 1000] * 200}),
    ("/v1/completions", COMPLETION | {"prompt": [["a"] * 1000] * 200}),
    ("/v1/completions", COMPLETION | {"prompt": []}),
    ("/v1/completions", COMPLETION | {"prompt": None}),
    ("/v1/completions", COMPLETION | {"prompt": {"a": 1}}),
    ("/v1/completions", COMPLETION | {"stop": [1] * 100_000}),
    ("/v1/completions", COMPLETION | {"stop": ["a"] * 100_000}),
    ("/v1/completions", COMPLETION | {"logit_bias": {f"x{n}": 1 for n in range(50_000)}}),
    ("/v1/completions", COMPLETION | {"logit_bias": {f"{n}": 1000 for n in range(50_000)}}),
    ("/v1/completions", COMPLETION | {"metadata": {f"x{n}": 1 for n in range(50_000)}}),
    ("/v1/completions", COMPLETION | {"structured_outputs": {"choice": [1] * 100_000}}),
    ("/v1/completions", COMPLETION | {"response_format": {"type": "grammar"}}),
    ("/v1/completions", COMPLETION | {"response_format": {}}),
    ("/v1/completions", COMPLETION | {f"x{n}": n for n in range(50_000)}),
    ("/v1/chat/completions", CHAT | {"messages": [1] * 100_000}),
    ("/v1/chat/completions", CHAT | {"messages": [{}] * 100_000}),
    ("/v1/chat/completions", CHAT | {"messages": [{"role": "x", "content": "a"}] * 20_000}),
    ("/v1/chat/completions", CHAT | {"messages": [{"role": "user", "content": [{}] * 100_000}]}),
    ("/v1/chat/completions", CHAT | {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}),
    ("/v1/chat/completions", CHAT | {"messages": []}),
    ("/v1/chat/completions", CHAT | {"messages": [{f"x{n}": n for n in range(50_000)}]}),
    ("/v1/chat/completions", CHAT | {"tools": [{"type": "function"}] * 10_000}),
    ("/v1/responses", {"model": BASE_NAME, "input": [1] * 100_000}),
    ("/v1/responses", {"model": BASE_NAME, "input": [{"role": "x", "content": "a"}] * 20_000}),
    ("/v1/responses", {"model": BASE_NAME, "input": [{"type": "reasoning", "summary": [{}] * 100_000}]}),
    ("/v1/responses", {"model": BASE_NAME, "input": [{"role": "user", "content": [{}] * 100_000}]}),
    ("/v1/responses", {"model": BASE_NAME, "input": "a", "include": [1] * 100_000}),
    ("/generate", {"inputs": {f"x{n}": n for n in range(50_000)}}),
    ("/generate", {"inputs": {f"x{n}": "" for n in range(50_000)}}),
    ("/generate", ASK | {"parameters": {f"x{n}": n for n in range(50_000)}}),
    ("/generate", ASK | {"parameters": {"choices": [1] * 100_000}}),
    ("/generate", ASK | {"parameters": {"choices": [{}] * 100_000}}),
    ("/generate", ASK | {"parameters": {"stop": [1] * 100_000}}),
    ("/generate", ASK | {"parameters": {"grammar": {"type": "x"}}}),
    ("/tokenize", {"inputs": [1] * 100_000}),
    ("/detokenize", {"ids": [-1] * 200_000}),
    ("/detokenize", {"ids": ["a"] * 200_000}),
    ("/tasks/a/rollback", {f"x{n}": n for n in range(50_000)}),
]


@pytest.mark.parametrize(("path", "body"), BAD)
def test_answers_to_bad_bodies_are_short_and_plain(
    client: httpx.Client, stack: Stack, path: str, body: dict[str, Any]
) -> None:
    begin = time.process_time()  # the server is in this process
    answer = client.post(path, json=body)
    assert time.process_time() - begin < 3
    error = error_of(answer, 422)
    assert 0 < len(error["message"]) < 1500
    for word in INTERNAL:
        assert word not in str(error["param"])
        assert word == "list" or word not in error["message"]


@pytest.mark.parametrize(
    ("path", "body", "message"),
    [
        (
            "/v1/completions",
            COMPLETION | {"prompt": [[-1]]},
            "prompt.0.0: Input should be greater than or equal to 0.",
        ),
        (
            "/generate",
            ASK | {"parameters": {"choices": [5]}},
            "parameters.choices.0 must be a string of 1 to 1024 characters, or an object of value and text.",
        ),
        (
            "/v1/completions",
            COMPLETION | {"response_format": {"type": "x"}},
            "response_format: 'type' should be 'text' or 'json_object' or 'json_schema' or 'json' or 'regex'.",  # noqa: E501
        ),
        (
            "/v1/completions",
            COMPLETION | {"response_format": {}},
            "response_format: the field 'type' is required.",
        ),
        ("/v1/chat/completions", CHAT | {"messages": [5]}, "messages.0: Input should be an object."),
        (
            "/v1/chat/completions",
            CHAT | {"parameters": {}},
            "There is no field parameters; send its fields in the body itself.",
        ),
        ("/v1/completions", COMPLETION | {"stop": ""}, "stop: String should have at least 1 character."),
        (
            "/v1/completions",
            COMPLETION | {"stop": ["a"] * 17},
            "stop: List should have at most 16 items, not 17.",
        ),
        (
            "/v1/completions",
            COMPLETION | {"logit_bias": {"abc": 5}},
            "logit_bias.abc: Input should be a whole number in decimal digits.",
        ),
    ],
)
def test_alternatives_are_told_in_a_sentence(
    client: httpx.Client, path: str, body: dict[str, Any], message: str
) -> None:
    assert error_of(client.post(path, json=body), 422)["message"] == message


def test_no_habit_hides_behind_unknown_fields(client: httpx.Client) -> None:
    many = {f"x{number}": 1 for number in range(100)}
    error = error_of(client.post("/v1/completions", json=COMPLETION | many | {"audio": {"voice": "a"}}), 422)
    assert "audio" in error["message"] or "x0" in error["message"]


PART = b'Content-Disposition: form-data; name="task"\r\n\r\n{"template": "say {x}"}\r\n'
OTHER = b'Content-Disposition: form-data; name="config"\r\n\r\n{}\r\n'
BROKEN = {
    "no end": b"--b\r\n" + PART,
    "an end without its hyphens": b"--b\r\n" + PART + b"--b\r\n",
    "half an end": b"--b\r\n" + PART + b"--b-",
    "the last part cut": b"--b\r\n" + PART + b"--b\r\n" + OTHER[:-5],
    "its headers cut": b"--b\r\n" + PART + b"--b\r\nContent-Disp",
    "another boundary": b"--c\r\n" + PART + b"--c--\r\n",
    "an end within the data": b"--b\r\n" + PART[:-2] + b"--b--",
    "parts after the end": b"--b\r\n" + PART + b"--b--\r\n--b\r\n" + OTHER + b"--b--\r\n",
    "text after the end": b"--b\r\n" + PART + b"--b--\r\nmore",
    "text before the begin": b"hello\r\n--b\r\n" + PART + b"--b--\r\n",
    "no name": b"--b\r\nContent-Disposition: form-data\r\n\r\n{}\r\n--b--\r\n",
    "no headers": b"--b\r\n\r\n{}\r\n--b--\r\n",
    "two names": b"--b\r\nContent-Disposition: form-data; name=x\r\n" + PART + b"--b--\r\n",
    "large headers": b"--b\r\nX: " + b"x" * 100_000 + b"\r\n" + PART + b"--b--\r\n",
    "many headers": b"--b\r\n" + b"X: x\r\n" * 1000 + PART + b"--b--\r\n",
    "many parts": (b"--b\r\n" + PART) * 100 + b"--b--\r\n",
    "nothing": b"",
}


@pytest.mark.parametrize("fault", BROKEN)
def test_an_upload_that_is_not_whole_publishes_nothing(
    client: httpx.Client, stack: Stack, fault: str
) -> None:
    before = stack.files()
    headers = {"content-type": "multipart/form-data; boundary=b"}
    error = error_of(client.post("/tasks/cut/versions", content=BROKEN[fault], headers=headers), 400)
    assert error["message"].startswith("The multipart body")
    assert stack.files() == before


def test_an_upload_that_comes_in_pieces_is_whole(client: httpx.Client) -> None:
    body = b"--b\r\n" + PART + b"--b--\r\n"
    headers = {"content-type": "multipart/form-data; boundary=b; charset=latin-1"}
    pieces = (bytes([byte]) for byte in body)
    assert client.post("/tasks/pieces/versions", content=pieces, headers=headers).status_code == 201
    whole = client.post("/tasks/pieces/versions", content=body.rstrip(), headers=headers)
    assert whole.status_code == 200, "the line break after the end may be missing"


def test_the_bytes_of_a_part_without_a_file_name_stay(client: httpx.Client) -> None:
    task = json.dumps({"template": "say {x}"}).encode()[:-1] + b', "notes": "\xe9"}'
    part = b'--b\r\nContent-Disposition: form-data; name="task"\r\n\r\n' + task + b"\r\n--b--\r\n"
    headers = {"content-type": "multipart/form-data; boundary=b"}
    error = error_of(client.post("/tasks/latin/versions", content=part, headers=headers), 422)
    assert "not UTF-8" in error["message"]


HALF = "\ud83d"
CHAT = [{"role": "user", "content": "a"}]
WITH_HALVES: list[tuple[str, str | None, dict[str, Any]]] = [
    ("/generate", "inputs", {"inputs": HALF}),
    ("/generate", "inputs.text", {"inputs": {"text": "a" + HALF}}),
    ("/generate", "inputs", {"inputs": {HALF: "a"}}),
    ("/generate", None, {"inputs": "a", HALF: 1}),
    ("/generate", "task_id", {"inputs": "a", "task_id": HALF}),
    ("/generate", "user", {"inputs": "a", "user": HALF}),
    ("/generate", "parameters.stop.1", {"inputs": "a", "parameters": {"stop": ["b", HALF]}}),
    ("/generate", "parameters.choices.0", {"inputs": "a", "parameters": {"choices": [HALF, "b"]}}),
    (
        "/generate",
        "parameters.choices.1.text",
        {"inputs": "a", "parameters": {"choices": ["a", {"value": "b", "text": HALF}]}},
    ),
    (
        "/generate",
        "parameters.grammar.value",
        {"inputs": "a", "parameters": {"grammar": {"type": "regex", "value": HALF}}},
    ),
    (
        "/generate",
        "parameters.grammar.value.properties",
        {"inputs": "a", "parameters": {"grammar": {"type": "json", "value": {"properties": {HALF: {}}}}}},
    ),
    ("/", "inputs", {"inputs": HALF}),
    ("/generate_stream", "inputs", {"inputs": HALF}),
    ("/tokenize", "inputs", {"inputs": HALF}),
    ("/v1/completions", "prompt", {"model": BASE_NAME, "prompt": HALF}),
    ("/v1/completions", "prompt.1", {"model": BASE_NAME, "prompt": ["a", HALF]}),
    ("/v1/completions", "metadata.a", {"model": BASE_NAME, "prompt": "a", "metadata": {"a": HALF}}),
    ("/v1/chat/completions", "model", {"model": HALF, "messages": CHAT}),
    (
        "/v1/chat/completions",
        "messages.0.content",
        {"model": BASE_NAME, "messages": [{"role": "user", "content": HALF}]},
    ),
    ("/v1/chat/completions", "messages.0.name", {"model": BASE_NAME, "messages": [CHAT[0] | {"name": HALF}]}),
    (
        "/v1/chat/completions",
        "messages.0.content.0.text",
        {"model": BASE_NAME, "messages": [{"role": "user", "content": [{"type": "text", "text": HALF}]}]},
    ),
    ("/tasks/a/rollback", "why", {"why": HALF}),
    ("/tasks/a/restore", "why", {"why": HALF}),
    ("/tasks/a/rollback", "alias", {"alias": HALF}),
]


@pytest.mark.parametrize(("path", "param", "body"), WITH_HALVES)
def test_half_a_character_is_refused_wherever_it_stands(
    client: httpx.Client, path: str, param: str | None, body: dict[str, Any]
) -> None:
    padding = " " * 40_000  # large bodies are read elsewhere
    for text in (json.dumps(body), json.dumps(body) + padding):
        error = error_of(client.post(path, content=text.encode(), headers=JSON), 422)
        assert "half of a surrogate pair" in error["message"]
        assert error["param"] == param


TASKS = [
    {"template": "{a}" + HALF},
    {"template": "{a}", "notes": HALF},
    {"template": "{a}", "choices": [HALF]},
    {"template": "{a}", "examples": [{"inputs": HALF, "expected": "a"}]},
    {"template": "{a}", "defaults": {"stop": [HALF]}},
    {"template": "{a}", HALF: 1},
]


@pytest.mark.parametrize("task", TASKS)
def test_half_a_character_is_refused_in_an_upload(client: httpx.Client, task: dict[str, Any]) -> None:
    response = client.post("/tasks/half/versions", files={"task": (None, json.dumps(task))})
    assert "half of a surrogate pair" in error_of(response, 422)["message"]


def test_both_halves_are_a_character(client: httpx.Client) -> None:
    body = json.dumps({"inputs": "\U0001f642"}).encode()
    assert b"\\ud83d\\ude42" in body
    assert client.post("/tokenize", content=body, headers=JSON).json()["text"] == "\U0001f642"


@pytest.mark.parametrize("path", ["/tasks?limit=%ED%A0%BD", "/tasks/%ED%A0%BD", "/v1/models/%ED%A0%BD"])
def test_half_a_character_in_an_address_is_no_fault_of_the_server(client: httpx.Client, path: str) -> None:
    assert client.get(path).status_code in (404, 422)
