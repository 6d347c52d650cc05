"""Constrained answers and `logit_bias` as OpenAI's, vLLM's and TGI's clients ask for them, over a socket."""

import json
import re
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from huggingface_hub import InferenceClient
from jsonschema import validate
from pydantic import BaseModel

from app.api.schemas.openai_body import MAX_BIASES
from tests.api.server import client_of
from tests.api.test_generate import error_of, publish_text
from tests.serving.stack import BASE_NAME, Stack
from tests.waiting import PATIENCE, wait_until

SCHEMA = {
    "type": "object",
    "properties": {
        "dish": {"type": "string", "pattern": "^[a-z]{2,8}$"},
        "stars": {"type": "integer", "minimum": 1, "maximum": 5},
        "tags": {"type": "array", "items": {"enum": ["漢字", "🙂", "hot"]}, "maxItems": 2},
    },
    "required": ["dish", "stars", "tags"],
    "additionalProperties": False,
}


class Review(BaseModel):
    """What `chat.completions.parse` asks for."""

    model_config = {"extra": "forbid"}

    liked: bool
    stars: int


@pytest.fixture(scope="module")
def review(url: str) -> str:
    with client_of(url) as http:
        publish_text(http, "constraint-review", "Review: {text}\n")
    return "constraint-review"


@pytest.fixture(scope="module")
def openai_client(url: str) -> Iterator[openai.OpenAI]:
    with (
        httpx.Client(trust_env=False, timeout=PATIENCE) as http,
        openai.OpenAI(base_url=f"{url}/v1", api_key="none", http_client=http, max_retries=0) as made,
    ):
        yield made


def json_schema(schema: Any, **more: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, **more}}


CHAT: list[Any] = [{"role": "user", "content": "the film"}]


def test_openais_client_with_a_response_format(openai_client: openai.OpenAI, review: str) -> None:
    answer = openai_client.chat.completions.create(
        model=review,
        messages=CHAT,
        max_tokens=120,
        n=4,
        seed=1,
        temperature=1.5,
        response_format=json_schema(SCHEMA, strict=True),  # type: ignore[arg-type]
    )
    texts = [choice.message.content or "" for choice in answer.choices]
    for text in texts:
        validate(json.loads(text), SCHEMA)
    assert len(set(texts)) > 1
    assert {choice.finish_reason for choice in answer.choices} == {"stop"}
    free = openai_client.chat.completions.create(
        model=review, messages=CHAT, max_tokens=5, temperature=0, response_format={"type": "text"}
    )
    plain = openai_client.chat.completions.create(model=review, messages=CHAT, max_tokens=5, temperature=0)
    assert free.choices[0].message.content == plain.choices[0].message.content


def test_openais_client_parses_into_a_model_of_pydantics(openai_client: openai.OpenAI, review: str) -> None:
    """`parse` sends the model's schema and reads the answer with it."""
    answer = openai_client.chat.completions.parse(
        model=review,
        messages=CHAT,
        max_tokens=200,
        seed=4,
        temperature=2.0,
        response_format=Review,
        logit_bias={},
    )
    assert isinstance(answer.choices[0].message.parsed, Review)


def test_any_json_object(openai_client: openai.OpenAI, review: str) -> None:
    answer = openai_client.chat.completions.create(
        model=review,
        messages=CHAT,
        max_tokens=200,
        seed=2,
        n=8,
        temperature=3.0,
        response_format={"type": "json_object"},
    )
    ended = [choice for choice in answer.choices if choice.finish_reason == "stop"]
    assert ended
    assert all(isinstance(json.loads(choice.message.content or ""), dict) for choice in ended)
    assert all((choice.message.content or "").startswith("{") for choice in answer.choices)


def test_streams_joined_are_the_whole_answer(openai_client: openai.OpenAI, review: str) -> None:
    asked: dict[str, Any] = {
        "model": review,
        "prompt": ["a", "b"],
        "max_tokens": 120,
        "seed": 3,
        "n": 2,
        "response_format": json_schema(SCHEMA),
    }
    extra = {"response_format": asked.pop("response_format")}
    whole = openai_client.completions.create(**asked, extra_body=extra)
    pieces: dict[int, str] = {}
    for chunk in openai_client.completions.create(**asked, extra_body=extra, stream=True):
        for choice in chunk.choices:
            pieces[choice.index] = pieces.get(choice.index, "") + choice.text
    assert [pieces[choice.index] for choice in whole.choices] == [choice.text for choice in whole.choices]
    for choice in whole.choices:
        validate(json.loads(choice.text), SCHEMA)


@pytest.mark.parametrize(
    ("outputs", "matches"),
    [
        ({"choice": ["positive", "negative"]}, lambda text: text in ("positive", "negative")),
        ({"regex": "[0-9]{3}-[a-z]{2}"}, lambda text: re.fullmatch("[0-9]{3}-[a-z]{2}", text)),
        ({"json": SCHEMA}, lambda text: validate(json.loads(text), SCHEMA) is None),
        ({"json": json.dumps(SCHEMA)}, lambda text: validate(json.loads(text), SCHEMA) is None),
    ],
    ids=["choice", "regex", "json", "json text"],
)
def test_structured_outputs_in_vllms_shape(
    openai_client: openai.OpenAI, review: str, outputs: dict[str, Any], matches: Any
) -> None:
    extra = {"structured_outputs": outputs}
    echoed = openai_client.completions.create(
        model=review, prompt="the film", max_tokens=120, echo=True, logprobs=1, extra_body=extra
    ).choices[0]
    assert echoed.text.startswith("Review: the film\n")
    assert matches(echoed.text.removeprefix("Review: the film\n"))
    chat = openai_client.chat.completions.create(
        model=review, messages=CHAT, max_tokens=120, extra_body=extra
    ).choices[0]
    assert matches(chat.message.content)


def test_tgis_client_with_a_grammar(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)  # this server is no hub
    hub = InferenceClient(model=url)
    grammars: list[tuple[Any, Any]] = [
        ({"type": "regex", "value": "(cold|great) food"}, lambda text: text in ("cold food", "great food")),
        ({"type": "json", "value": SCHEMA}, lambda text: validate(json.loads(text), SCHEMA) is None),
        ({"type": "json", "value": json.dumps(SCHEMA)}, lambda text: json.loads(text)["stars"] <= 5),
        (
            {"type": "json_schema", "value": {"name": "dish", "schema": SCHEMA}},
            lambda text: validate(json.loads(text), SCHEMA) is None,
        ),
    ]
    for grammar, matches in grammars:
        whole = hub.text_generation("the", grammar=grammar, max_new_tokens=120, seed=3, do_sample=True)
        assert matches(whole)
        pieces = hub.text_generation(
            "the", grammar=grammar, max_new_tokens=120, seed=3, do_sample=True, stream=True
        )
        assert "".join(pieces) == whole


def test_samples_and_details_of_generate(client: httpx.Client) -> None:
    grammar = {"type": "regex", "value": "[a-c]{4}"}
    parameters = {"grammar": grammar, "n": 5, "do_sample": True, "temperature": 5.0, "seed": 1}
    body = client.post("/generate", json={"inputs": "a", "parameters": parameters}).json()
    texts = [sample["generated_text"] for sample in body["samples"]]
    assert all(re.fullmatch("[a-c]{4}", text) for text in texts)
    assert len(set(texts)) > 1
    assert {sample["details"]["finish_reason"] for sample in body["samples"]} == {"eos_token"}


V1 = {"model": BASE_NAME, "prompt": "a", "max_tokens": 4}
REFUSED: list[tuple[str, dict[str, Any], str | None, str]] = [
    ("/v1/completions", {"response_format": {"type": "xml"}}, "response_format", "json_object"),
    ("/v1/completions", {"response_format": {"type": "json_schema"}}, None, "required"),
    ("/v1/completions", {"response_format": json_schema(7)}, None, "should be an object"),
    (
        "/v1/completions",
        {"response_format": json_schema({"type": "array", "contains": {}})},
        "response_format.json_schema.schema",
        "Unimplemented keys",
    ),
    ("/v1/completions", {"structured_outputs": {}}, "structured_outputs", "exactly one"),
    ("/v1/completions", {"structured_outputs": {"regex": "a", "choice": ["a"]}}, None, "exactly one"),
    ("/v1/completions", {"structured_outputs": {"grammar": "x"}}, None, "no field"),
    (
        "/v1/completions",
        {"structured_outputs": {"regex": "(a"}},
        "structured_outputs.regex",
        "unclosed group",
    ),
    ("/v1/completions", {"structured_outputs": {"choice": []}}, "structured_outputs.choice", "list of 1 to"),
    ("/v1/completions", {"structured_outputs": {"json": "{"}}, "structured_outputs.json", "JSON schema"),
    ("/v1/completions", {"guided_regex": "a"}, "guided_regex", "send structured_outputs"),
    (
        "/v1/completions",
        {"structured_outputs": {"regex": "a"}, "response_format": {"type": "json_object"}},
        None,
        "send one",
    ),
    ("/v1/completions", {"logit_bias": {"x": 1}}, None, "a whole number in decimal digits"),
    ("/v1/completions", {"logit_bias": {"-1": 1}}, None, "a whole number in decimal digits"),
    ("/v1/completions", {"logit_bias": {"5": 100.5}}, "logit_bias.5", "less than or equal to 100"),
    ("/v1/completions", {"logit_bias": {"5": "1"}}, "logit_bias.5", "number"),
    ("/v1/completions", {"logit_bias": {"999999": 1}}, "logit_bias", "from 0 to"),
    ("/v1/completions", {"logit_bias": {str(i): 1 for i in range(MAX_BIASES + 1)}}, "logit_bias", "at most"),
    ("/generate", {"grammar": {"type": "regex", "value": "(a"}}, "parameters.grammar", "unclosed group"),
    (
        "/generate",
        {"grammar": {"type": "json", "value": {"type": "x"}}},
        "parameters.grammar",
        "Invalid type",
    ),
    ("/generate", {"grammar": {"type": "lark", "value": "x"}}, "parameters.grammar", "json_schema"),
    ("/generate", {"grammar": {"type": "regex", "value": "a"}, "choices": ["a", "b"]}, None, "grammar"),
    ("/generate_stream", {"grammar": {"type": "regex", "value": "(a"}}, "parameters.grammar", "unclosed"),
]


def settle(client: httpx.Client, stack: Stack) -> None:
    """Let all steps so far be counted: one is, after its answers. The first of two shows a row that runs."""
    client.post("/generate", json={"inputs": "a", "parameters": {"max_new_tokens": 2, "ignore_eos": True}})
    wait_until(lambda: not stack.engine.stats().num_running)


@pytest.mark.parametrize(("route", "more", "param", "reason"), REFUSED)
def test_what_cant_be_followed_is_a_422_that_says_why(
    client: httpx.Client, stack: Stack, route: str, more: dict[str, Any], param: str | None, reason: str
) -> None:
    settle(client, stack)
    steps = stack.engine.stats().steps
    body = V1 | more if route.startswith("/v1") else {"inputs": "a", "parameters": more}
    error = error_of(client.post(route, json=body), 422)
    assert reason in error["message"]
    assert param is None or error["param"] == param
    assert stack.engine.stats().steps == steps, "the engine never heard of it"


def test_a_schema_that_is_nested_beyond_all_reason_is_an_error_of_the_clients(client: httpx.Client) -> None:
    deep = '{"items":' * 900 + "{}" + "}" * 900
    body = f'{{"model": "{BASE_NAME}", "prompt": "a", "structured_outputs": {{"json": {deep}}}}}'
    response = client.post("/v1/completions", content=body, headers={"content-type": "application/json"})
    assert response.status_code == 422
    assert "nested too deeply" in response.text


def test_a_grammar_that_grows_too_complex_is_the_requests_own_error(client: httpx.Client) -> None:
    body = {"inputs": "a", "parameters": {"grammar": {"type": "regex", "value": "[b-f]{30}a{4000000000}"}}}
    error = error_of(client.post("/generate", json=body), 422)
    assert error["code"] == "constraint_failed"
    assert "too complex" in error["message"]
    with client.stream("POST", "/generate_stream", json=body) as response:
        response.read()
    assert "constraint_failed" in response.text
    assert client.post("/generate", json={"inputs": "a", "parameters": {"max_new_tokens": 2}}).is_success


def test_logit_bias_as_openai_defines_it(
    openai_client: openai.OpenAI, client: httpx.Client, stack: Stack
) -> None:
    asked: dict[str, Any] = {"model": BASE_NAME, "prompt": "the film", "max_tokens": 6, "temperature": 0}
    free = openai_client.completions.create(**asked).choices[0]
    body = {"inputs": "the film", "parameters": {"max_new_tokens": 6}}
    first = client.post("/generate", json=body).json()["details"]["tokens"][0]["id"]
    banned = openai_client.completions.create(**asked, logit_bias={str(first): -100}).choices[0]
    assert banned.text != free.text
    wanted = stack.tokenizer.convert_tokens_to_ids("a")
    chosen = openai_client.completions.create(**asked, logit_bias={str(wanted): 100}, logprobs=0).choices[0]
    assert chosen.text == "aaaaaa"
    assert chosen.logprobs is not None
    assert chosen.logprobs.token_logprobs is not None
    assert all(logprob is not None and logprob < 0 for logprob in chosen.logprobs.token_logprobs)
    neither = openai_client.completions.create(
        **asked,
        logit_bias={str(wanted): -100},
        extra_body={"structured_outputs": {"choice": ["b", "c"]}},
    ).choices[0]
    assert neither.text in ("b", "c")
