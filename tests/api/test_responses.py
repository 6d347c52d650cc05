"""`/v1/responses` by OpenAI's own client: answers, items sent back, structured output, refusals, streams."""

import json
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import BaseModel, TypeAdapter

from app.api.schemas.responses import ResponseRequest
from tests.api.server import client_of
from tests.api.test_generate import error_of, publish_text
from tests.serving.stack import BASE_NAME, POSITIONS, Stack
from tests.waiting import PATIENCE, wait_until

MODEL = "responses-review"
ASKED: dict[str, Any] = {"model": MODEL, "input": "the film", "max_output_tokens": 6, "temperature": 0}
EVENTS = TypeAdapter(ResponseStreamEvent)


class Review(BaseModel):
    """What a review must have."""

    liked: bool


@pytest.fixture(scope="module")
def api(url: str) -> Iterator[openai.OpenAI]:
    """Without the environment's proxies."""
    with client_of(url) as http:
        publish_text(http, MODEL, "Review: {text}\n")
    with (
        httpx.Client(trust_env=False, timeout=PATIENCE) as http,
        openai.OpenAI(base_url=f"{url}/v1", api_key="none", http_client=http, max_retries=0) as made,
    ):
        yield made


@pytest.fixture(scope="module")
def text(api: openai.OpenAI) -> str:
    """What the task says of ASKED, by the route for chats."""
    answer = api.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": "the film"}], max_tokens=6, temperature=0
    )
    assert answer.choices[0].message.content
    return answer.choices[0].message.content


def post(client: httpx.Client, **more: Any) -> httpx.Response:
    return client.post("/v1/responses", json=ASKED | more)


def test_a_response_is_the_tasks_answer(api: openai.OpenAI, client: httpx.Client, text: str) -> None:
    response = api.responses.create(**ASKED, metadata={"a": "b"}, user="u")
    assert response.output_text == text
    assert (response.status, response.model, response.store) == ("incomplete", MODEL, False)
    assert response.incomplete_details is not None
    assert response.incomplete_details.reason == "max_output_tokens"
    assert (response.metadata, response.max_output_tokens) == ({"a": "b"}, 6)
    assert [item.type for item in response.output] == ["message"]
    assert response.usage is not None
    assert response.usage.output_tokens == 6
    assert response.usage.output_tokens_details.reasoning_tokens == 0
    assert response.usage.total_tokens == response.usage.input_tokens + 6
    raw = post(client)
    assert {"x-total-time", "x-generated-tokens"} <= raw.headers.keys()
    assert Response.model_validate(raw.json()).output_text == text, "strictly what the client's types say"


def test_items_of_every_kind_are_read(api: openai.OpenAI, text: str) -> None:
    """As clients write messages, and as responses come back from them."""
    first = api.responses.create(**ASKED)
    steps = {"type": "reasoning", "id": "rs_1", "summary": [], "content": None, "encrypted_content": None}
    for items in (
        [{"role": "user", "content": "the film"}],
        [{"type": "message", "role": "user", "content": [{"type": "input_text", "text": "the film"}]}],
        [
            {"role": "developer", "content": "be brief"},
            {"role": "user", "content": "before"},
            steps,
            *[item.model_dump() for item in first.output],
            {"role": "user", "content": [{"type": "text", "text": "the "}, {"type": "text", "text": "film"}]},
        ],
    ):
        asked = ASKED | {"input": items, "instructions": "be brief"}
        assert api.responses.create(**asked).output_text == text


def test_steps_of_earlier_answers_go_to_the_chat_template() -> None:
    def messages(*items: Any, **more: Any) -> list[tuple[str, str, Any]]:
        body = ResponseRequest.model_validate({"model": "m", "input": list(items), **more})
        return [(each.role, each.content, dict(each.others)) for each in body.messages()]

    steps = {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "4 + 5;"}]}
    short = {"type": "reasoning", "summary": [{"type": "summary_text", "text": each} for each in "ab"]}
    said, asked = {"role": "assistant", "content": "9"}, {"role": "user", "content": "and 2?"}
    assert messages(steps, said, asked, instructions="Add.") == [
        ("system", "Add.", {}),
        ("assistant", "9", {"reasoning_content": "4 + 5;"}),
        ("user", "and 2?", {}),
    ]
    assert messages(short, said)[0][2] == {"reasoning_content": "a\nb"}
    assert messages(steps, asked)[0] == ("assistant", "", {"reasoning_content": "4 + 5;"})
    assert messages(steps, asked, steps)[2] == ("assistant", "", {"reasoning_content": "4 + 5;"})


def test_log_probabilities_are_those_of_the_chat(api: openai.OpenAI) -> None:
    response = api.responses.create(**ASKED, include=["message.output_text.logprobs"], top_logprobs=2)
    chat = api.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": "the film"}],
        max_tokens=6,
        temperature=0,
        logprobs=True,
        top_logprobs=2,
    )
    message, expected = response.output[0], chat.choices[0].logprobs
    assert message.type == "message"
    assert message.content[0].type == "output_text"
    assert expected is not None
    found = message.content[0].logprobs or []
    assert [each.token for each in found] == [each.token for each in expected.content or []]
    assert [each.logprob for each in found] == pytest.approx(
        [each.logprob for each in expected.content or []], abs=1e-4
    )
    assert [len(each.top_logprobs) for each in found] == [2] * 6


def test_structured_output_is_parsed(api: openai.OpenAI) -> None:
    parsed = api.responses.parse(
        model=MODEL,
        input="the film",
        text_format=Review,
        max_output_tokens=60,
        extra_body={"seed": 3},
    )
    assert isinstance(parsed.output_parsed, Review)
    with api.responses.stream(
        model=MODEL, input="the film", text_format=Review, max_output_tokens=60, extra_body={"seed": 3}
    ) as stream:
        assert stream.get_final_response().output_parsed == parsed.output_parsed
    free = api.responses.create(
        **ASKED | {"max_output_tokens": 60}, text={"format": {"type": "json_object"}, "verbosity": "low"}
    )
    assert free.text is not None
    assert free.text.format is not None
    assert free.text.format.type == "json_object"
    assert free.output_text.startswith("{")


def test_a_streams_events_are_the_response(api: openai.OpenAI, client: httpx.Client) -> None:
    """In OpenAI's order, each with its number; the last one has all that the whole response has."""
    more = ASKED | {"include": ["message.output_text.logprobs"], "stop": ["e"], "max_output_tokens": 12}
    whole = Response.model_validate(post(client, **more).json())
    lines = client.post("/v1/responses", json=more | {"stream": True}).text.strip().split("\n\n")
    events = []
    for line in lines:
        kind, data = line.split("\n")
        found = json.loads(data.removeprefix("data: "))
        assert kind == f"event: {found['type']}"
        EVENTS.validate_python(found)
        events.append(found)
    assert [each["sequence_number"] for each in events] == list(range(len(events)))
    kinds = [each["type"].removeprefix("response.") for each in events]
    assert kinds[:4] == ["created", "in_progress", "output_item.added", "content_part.added"]
    assert kinds[-4:-1] == ["output_text.done", "content_part.done", "output_item.done"]
    assert set(kinds[4:-4]) <= {"output_text.delta"}
    deltas = [each for each in events if each["type"].endswith("text.delta")]
    assert "".join(each["delta"] for each in deltas) == whole.output_text == events[-4]["text"]
    scored = [each["token"] for delta in deltas for each in delta["logprobs"]]
    last = Response.model_validate(events[-1]["response"])
    assert (last.status, last.usage) == (whole.status, whole.usage)
    assert last.output[0].type == whole.output[0].type == "message"
    for item in (last.output[0], whole.output[0]):
        assert item.content[0].type == "output_text"
        assert [each.token for each in item.content[0].logprobs or []] == scored
    assert events[-2]["item"] == events[-1]["response"]["output"][0]


REFUSED: list[tuple[dict[str, Any], str, str]] = [
    ({"store": True}, "store", "not kept"),
    ({"previous_response_id": "resp_1"}, "previous_response_id", "earlier input and output items"),
    ({"conversation": "conv_1"}, "conversation", "earlier input and output items"),
    ({"background": True}, "background", "wait for the answer"),
    ({"truncation": "auto"}, "truncation", "oldest items"),
    ({"tools": [{"type": "web_search"}]}, "tools", "text.format"),
    ({"tool_choice": "required"}, "tool_choice", "text.format"),
    ({"max_tokens": 3}, "max_tokens", "max_output_tokens"),
    ({"response_format": {"type": "json_object"}}, "response_format", "send text"),
    ({"prompt": {"id": "pmpt_1"}}, "prompt", "not supported"),
    ({"inputs": "a"}, "inputs", "no field"),
    ({"top_logprobs": 2}, "", "include"),
    ({"include": ["nothing"]}, "include.0", "message.output_text.logprobs"),
    ({"reasoning": {"effort": "low"}, "reasoning_effort": "low"}, "", "send one of them"),
    ({"reasoning": {"effort": "some"}}, "reasoning.effort", "minimal"),
    ({"text": {"format": {"type": "regex"}}}, "text.format", "json_schema"),
    ({"input": []}, "input", "at least 1"),
    ({"input": 3}, "input", "must be a string, or a list"),
    ({"input": [3]}, "input.0", "must be a message"),
    ({"input": [{"type": "function_call_output", "call_id": "c", "output": "4"}]}, "input.0", "no tools"),
    ({"input": [{"type": "item_reference", "id": "msg_1"}]}, "input.0", "keeps no items"),
    ({"input": [{"role": "tool", "content": "4"}]}, "input.0.role", "calls no tools"),
    ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input.0.content.0", "only text"),
    (
        {"input": [{"type": "reasoning", "summary": [], "encrypted_content": "x"}]},
        "input.0.encrypted_content",
        "only the server that made it",
    ),
]


@pytest.mark.parametrize(("more", "place", "why"), REFUSED, ids=[f"{p}-{w}" for _, p, w in REFUSED])
def test_what_cant_be_done_is_refused_in_plain_words(
    client: httpx.Client, api: openai.OpenAI, more: dict[str, Any], place: str, why: str
) -> None:
    error = error_of(post(client, **more), 422)
    assert (error["param"] or "") == place
    assert why in error["message"]


def test_habits_change_nothing(client: httpx.Client, api: openai.OpenAI, text: str) -> None:
    habits: dict[str, Any] = {
        "store": False,
        "background": False,
        "previous_response_id": None,
        "conversation": None,
        "tools": [],
        "tool_choice": "auto",
        "parallel_tool_calls": True,
        "truncation": "disabled",
        "service_tier": "auto",
        "prompt_cache_key": "k",
        "safety_identifier": "s",
        "include": ["reasoning.encrypted_content"],
        "reasoning": {"effort": "none", "summary": "auto"},
        "text": {"format": {"type": "text"}},
        "max_tool_calls": None,
        "n": 1,
    }
    response = post(client, **habits)
    assert response.status_code == 200, response.text
    assert Response.model_validate(response.json()).output_text == text


def test_errors_are_the_clients_own(api: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        api.responses.create(model="nothing", input="a")
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.BadRequestError) as long:
        api.responses.create(model=MODEL, input="a " * (2 * POSITIONS))
    assert (long.value.code, long.value.param) == ("context_length_exceeded", "input")
    with pytest.raises(openai.BadRequestError) as most:
        api.responses.create(**ASKED | {"max_output_tokens": 5000})
    assert most.value.param == "max_output_tokens"
    with pytest.raises(openai.UnprocessableEntityError, match="no chat template"):
        api.responses.create(model=BASE_NAME, input="a")


def test_a_client_that_leaves_is_let_go(client: httpx.Client, api: openai.OpenAI, stack: Stack) -> None:
    more = ASKED | {"max_output_tokens": 150, "stream": True, "ignore_eos": True}
    with client.stream("POST", "/v1/responses", json=more) as response:
        assert next(response.iter_lines()).startswith("event: response.created")
    wait_until(stack.is_idle)


def test_a_votes_ballots_are_events(client: httpx.Client, api: openai.OpenAI) -> None:
    """As they come in, before the winner; with the response as a field that OpenAI's client takes."""
    more = {"vote": {"n": 3}, "seed": 5, "include": ["message.output_text.logprobs"]}
    whole = post(client, **more | {"temperature": 1.0}).json()
    assert whole["vote"]["winner"] == Response.model_validate(whole).output_text
    assert len(whole["vote"]["ballots"]) == 3
    assert whole["usage"]["output_tokens"] == sum(
        each["generated_tokens"] for each in whole["vote"]["ballots"]
    )
    with api.responses.stream(
        model=MODEL, input="the film", max_output_tokens=6, temperature=1.0, extra_body=more
    ) as stream:
        events = [json.loads(each.model_dump_json()) for each in stream]
    ballots = [each["ballot"] for each in events if each["type"] == "response.vote.ballot"]
    assert sorted(ballots, key=lambda each: int(each["index"])) == whole["vote"]["ballots"]
    assert events[-1]["response"]["vote"] == whole["vote"]
    scored = [each["logprobs"] for each in events if each["type"] == "response.output_text.delta"]
    told = whole["output"][0]["content"][0]["logprobs"]
    assert [[part["token"] for part in each] for each in scored] == [[part["token"] for part in told]]


def test_a_deadline_is_504(client: httpx.Client, api: openai.OpenAI) -> None:
    body = ASKED | {"max_output_tokens": 200, "ignore_eos": True}
    error = error_of(client.post("/v1/responses", json=body, headers={"x-request-deadline-ms": "1"}), 504)
    assert error["code"] == "deadline_exceeded"
