"""A task with reasoning through the routes of OpenAI: what /generate says, in their words."""

import json
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from openai.types.responses import Response

from tests.api.server import client_of
from tests.api.test_generate import error_of, publish_text
from tests.api.test_reasoning import LENGTH, thinking
from tests.serving.stack import BASE_NAME, Stack
from tests.waiting import PATIENCE

MODEL = "thinks-aloud"
GIVEN: list[dict[str, Any]] = [
    {},
    {"thinking_token_budget": 7},
    {"reasoning_effort": "low"},
    {"reasoning_effort": "none"},
    {"max_new_tokens": 9},
]
CHAIN = {"template": "{x}\n{so_far}", "step_ends": "i"}  # with which the base ends many of its steps
CHAINS: dict[str, dict[str, Any]] = {
    "steps-end": CHAIN | {"max_steps": 4},
    "steps-lead-nowhere": CHAIN | {"max_steps": 3, "done": "@#"},
    "steps-by-halves": CHAIN | {"max_steps": 8, "max_step_tokens": 20},
}
CASES = [*((MODEL, given) for given in GIVEN), *((name, {"max_new_tokens": 120}) for name in CHAINS)]


@pytest.fixture(scope="module")
def asked(url: str, stack: Stack) -> dict[str, Any]:
    with client_of(url) as http:
        for name, chain in CHAINS.items():
            publish_text(http, name, "{x}", chain=chain)
        return thinking(http, stack, MODEL)


def request_to(asked: dict[str, Any], model: str) -> dict[str, Any]:
    return asked if model == MODEL else asked | {"task_id": model, "inputs": "name"}


@pytest.fixture(scope="module")
def api(url: str) -> Iterator[openai.OpenAI]:
    """Without the environment's proxies."""
    with (
        httpx.Client(trust_env=False, timeout=PATIENCE) as http,
        openai.OpenAI(base_url=f"{url}/v1", api_key="none", http_client=http, max_retries=0) as made,
    ):
        yield made


def expected(client: httpx.Client, asked: dict[str, Any], **more: Any) -> dict[str, Any]:
    answer = client.post("/generate", json=asked | {"parameters": asked["parameters"] | more})
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def body_of(asked: dict[str, Any], limit: str = "max_tokens", **more: Any) -> dict[str, Any]:
    """The same request for OpenAI's routes."""
    length = more.pop("max_new_tokens", LENGTH)
    return {"model": asked["task_id"], limit: length, "temperature": 0, **more}


def chat_of(asked: dict[str, Any], **more: Any) -> dict[str, Any]:
    return body_of(asked, **more) | {"messages": [{"role": "user", "content": asked["inputs"]}]}


@pytest.mark.parametrize(("model", "given"), CASES, ids=str)
def test_every_route_says_the_same(
    client: httpx.Client, asked: dict[str, Any], model: str, given: dict[str, Any]
) -> None:
    """Whole and as streams: the text, the steps, and how many tokens they took."""
    asked = request_to(asked, model)
    answer = expected(client, asked, **given)
    text, steps = answer["generated_text"], answer["reasoning"]["text"]
    counts = (answer["details"]["generated_tokens"], answer["reasoning"]["tokens"])

    chat = client.post("/v1/chat/completions", json=chat_of(asked, **given)).json()
    message = chat["choices"][0]["message"]
    assert (message["content"], message.get("reasoning", "")) == (text, steps)
    ended = answer["details"]["finish_reason"]
    assert chat["choices"][0]["finish_reason"] == ("length" if ended in ("length", "max_steps") else "stop")
    if ended in ("max_steps", "loop", "no_answer"):
        assert (chat["choices"][0]["stop_reason"], text) == (ended, "")
    assert message.get("reasoning_content", "") == steps
    completion = client.post("/v1/completions", json=body_of(asked, **given) | {"prompt": asked["inputs"]})
    choice = completion.json()["choices"][0]
    assert (choice["text"], choice.get("reasoning", "")) == (text, steps)
    for usage in (chat["usage"], completion.json()["usage"]):
        found = (usage["completion_tokens"], usage["completion_tokens_details"]["reasoning_tokens"])
        assert found == counts

    body = body_of(asked, "max_output_tokens", **given) | {"input": asked["inputs"]}
    response = Response.model_validate(client.post("/v1/responses", json=body).json())
    assert response.output_text == text
    told = [part.text for item in response.output if item.type == "reasoning" for part in item.content or []]
    assert "".join(told) == steps
    assert response.usage is not None
    used = response.usage
    assert (used.output_tokens, used.output_tokens_details.reasoning_tokens) == counts


@pytest.mark.parametrize(("model", "given"), CASES, ids=str)
def test_streams_joined_are_the_answers(
    client: httpx.Client, asked: dict[str, Any], model: str, given: dict[str, Any]
) -> None:
    asked = request_to(asked, model)
    answer = expected(client, asked, **given)
    texts = (answer["generated_text"], answer["reasoning"]["text"])
    chat = chat_of(asked, **given) | {"stream": True, "stream_options": {"include_usage": True}}
    lines = client.post("/v1/chat/completions", json=chat).text.strip().split("\n\n")
    *chunks, last = [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert tuple("".join(each.get(name, "") for each in deltas) for name in ("content", "reasoning")) == texts
    assert last["usage"]["completion_tokens_details"]["reasoning_tokens"] == answer["reasoning"]["tokens"]

    body = body_of(asked, "max_output_tokens", **given, reasoning={"summary": "auto"})
    body |= {"input": asked["inputs"]}
    whole = client.post("/v1/responses", json=body).json()
    lines = client.post("/v1/responses", json=body | {"stream": True}).text.strip().split("\n\n")
    events = [json.loads(line.split("data: ")[1]) for line in lines]
    done = [event["item"] for event in events if event["type"] == "response.output_item.done"]
    assert done == events[-1]["response"]["output"]

    def shown(response: dict[str, Any]) -> list[Any]:
        return [[item["type"], item["content"], item.get("summary")] for item in response["output"]]

    assert shown(events[-1]["response"]) == shown(whole)
    steps = [part["text"] for item in whole["output"] for part in item.get("summary") or []]
    assert steps == answer["reasoning"]["steps"]


def test_log_probabilities_are_the_answers(client: httpx.Client, asked: dict[str, Any]) -> None:
    answer = expected(client, asked)
    tokens = answer["details"]["tokens"][answer["reasoning"]["tokens"] :]
    chat = client.post("/v1/chat/completions", json=chat_of(asked, logprobs=True)).json()
    found = chat["choices"][0]["logprobs"]["content"]
    assert [each["token"] for each in found] == [token["text"] for token in tokens]
    assert [each["logprob"] for each in found] == pytest.approx([t["logprob"] for t in tokens], abs=1e-4)


def test_steps_are_left_out_where_the_client_says_so(client: httpx.Client, asked: dict[str, Any]) -> None:
    answer = expected(client, asked)
    for given in ({"include_reasoning": False}, {"reasoning": {"exclude": True}}):
        body = chat_of(asked, **given)
        chat = client.post("/v1/chat/completions", json=body).json()
        assert chat["choices"][0]["message"] == {
            "role": "assistant",
            "content": answer["generated_text"],
            "refusal": None,
        }
        details = chat["usage"]["completion_tokens_details"]
        assert details["reasoning_tokens"] == answer["reasoning"]["tokens"]
        stream = client.post("/v1/chat/completions", json=body | {"stream": True}).text
        assert "reasoning" not in stream
    body = body_of(asked, "max_output_tokens", include_reasoning=False) | {"input": asked["inputs"]}
    response = client.post("/v1/responses", json=body).json()
    assert [item["type"] for item in response["output"]] == ["message"]
    assert "reasoning_text" not in client.post("/v1/responses", json=body | {"stream": True}).text


def test_an_answer_with_steps_is_the_next_requests_input(api: openai.OpenAI, asked: dict[str, Any]) -> None:
    """As the objects that OpenAI's client made of it."""
    messages: list[Any] = [{"role": "user", "content": asked["inputs"]}]
    reply = api.chat.completions.create(**body_of(asked), messages=messages)
    message = reply.choices[0].message
    assert (message.model_extra or {})["reasoning"]
    again = api.chat.completions.create(
        **body_of(asked), messages=[*messages, message, message.model_dump(), *messages]
    )
    assert again.choices[0].message == message

    items: list[Any] = list(messages)
    body = body_of(asked, "max_output_tokens")
    first = api.responses.create(**body, input=items, reasoning={"effort": "low", "summary": "auto"})
    assert [item.type for item in first.output] == ["reasoning", "message"]
    items += [*first.output, *[item.model_dump() for item in first.output], *messages]
    second = api.responses.create(**body, input=items, reasoning={"effort": "low"})
    assert second.output_text == first.output_text


def test_a_format_holds_the_answer_and_not_the_steps(
    api: openai.OpenAI, client: httpx.Client, asked: dict[str, Any]
) -> None:
    schema = {"type": "object", "properties": {"liked": {"type": "boolean"}}, "required": ["liked"]}
    steps = expected(client, asked)["reasoning"]["text"]
    body = body_of(asked, "max_output_tokens", max_new_tokens=120)
    given: Any = {"format": {"type": "json_schema", "name": "review", "schema": schema, "strict": True}}
    with api.responses.stream(**body, input=asked["inputs"], text=given) as stream:
        response = stream.get_final_response()
    assert set(json.loads(response.output_text)) == {"liked"}
    (item,) = [item for item in response.output if item.type == "reasoning"]
    assert "".join(part.text for part in item.content or []) == steps


def test_a_vote_over_answers_with_steps(client: httpx.Client, asked: dict[str, Any]) -> None:
    more = {"vote": {"n": 3}, "seed": 4, "temperature": 1.0, "reasoning_effort": "low"}
    chat = client.post("/v1/chat/completions", json=chat_of(asked, **more))
    assert chat.status_code == 200, chat.text
    answer = chat.json()
    (choice,) = answer["choices"]
    ballots = choice["vote"]["ballots"]
    assert choice["message"]["content"] == choice["vote"]["winner"]
    assert choice["message"]["reasoning"]
    assert answer["usage"]["completion_tokens"] == sum(each["generated_tokens"] for each in ballots)
    assert answer["usage"]["completion_tokens_details"]["reasoning_tokens"] == 15
    separate = client.post("/v1/chat/completions", json=chat_of(asked, **more | {"vote": None, "n": 3}))
    assert [each["answer"] for each in ballots] == [
        each["message"]["content"] for each in separate.json()["choices"]
    ]
    body = chat_of(asked, **more, stream=True)
    lines = client.post("/v1/chat/completions", json=body).text.strip().split("\n\n")
    found = [json.loads(line.removeprefix("data: "))["choices"][0] for line in lines[:-1]]
    assert len([each for each in found if "ballot" in each]) == 3
    assert "".join(each["delta"].get("content", "") for each in found) == choice["vote"]["winner"]
    assert found[-1]["vote"] == choice["vote"]


@pytest.mark.parametrize(
    ("given", "neutral"),
    [
        ({"reasoning_effort": "high"}, {"reasoning_effort": "none"}),
        ({"thinking_token_budget": 4}, {"thinking_token_budget": -1}),
        ({"include_reasoning": False}, {"include_reasoning": True}),
        ({"reasoning": {"effort": "low"}}, {"reasoning": {"enabled": False}, "separate_reasoning": True}),
        ({"reasoning": {"exclude": True}}, {"reasoning": {"exclude": False, "enabled": True}}),
    ],
    ids=str,
)
def test_what_would_have_no_effect_is_refused_by_name(
    client: httpx.Client, given: dict[str, Any], neutral: dict[str, Any]
) -> None:
    body = {"model": BASE_NAME, "prompt": "a", "max_tokens": 2}
    error = error_of(client.post("/v1/completions", json=body | given), 422)
    assert error["param"] in ("reasoning_effort", "thinking_token_budget", "include_reasoning")
    assert "the task has no reasoning" in error["message"]
    assert client.post("/v1/completions", json=body | neutral).status_code == 200
