"""Generation parameters over HTTP, by the names of TGI's, LoRAX's, vLLM's and OpenAI's clients."""

import inspect
import json
from itertools import pairwise
from typing import Any

import httpx
import pytest
from openai.resources.chat.completions import Completions as ChatCompletions
from openai.resources.completions import Completions

from tests.api.server import client_of
from tests.api.test_generate import publish_text
from tests.serving.stack import BASE_NAME, POSITIONS, Stack

CHAT = "parameters-chat"  # the base has no chat template


@pytest.fixture(scope="module", autouse=True)
def chat_task(url: str) -> None:
    with client_of(url) as http:
        publish_text(http, CHAT, "{text}")


def generate(client: httpx.Client, **parameters: Any) -> dict[str, Any]:
    body = {"inputs": "the film", "parameters": {"max_new_tokens": 12} | parameters}
    response = client.post("/generate", json=body)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def complete(client: httpx.Client, **parameters: Any) -> dict[str, Any]:
    body = {"model": BASE_NAME, "prompt": "the film", "max_tokens": 12, "temperature": 0} | parameters
    response = client.post("/v1/completions", json=body)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def ids(answer: dict[str, Any]) -> list[int]:
    return [token["id"] for token in answer["details"]["tokens"]]


def test_both_routes_know_the_same_parameters(client: httpx.Client) -> None:
    free = ids(generate(client))
    banned: dict[str, Any] = {"suppress_tokens": [free[2]], "no_repeat_ngram_size": 1}
    bound = generate(client, **banned)
    assert ids(bound) != free
    assert free[2] not in ids(bound)
    assert len(set(ids(bound))) == 12, "no id comes twice"
    assert complete(client, **banned)["choices"][0]["text"] == bound["generated_text"]
    first = generate(client, begin_suppress_tokens=[free[0]])
    assert ids(first)[0] != free[0]


def test_bad_words_never_come(client: httpx.Client, stack: Stack) -> None:
    free = generate(client, max_new_tokens=40)
    pairs = pairwise(ids(free))
    word = next(pair for pair in pairs if spelled(stack, stack.tokenizer.decode(pair)) == pair)
    banned = stack.tokenizer.decode(word)
    answer = ids(generate(client, max_new_tokens=40, bad_words=[banned]))
    assert answer != ids(free)
    assert word not in pairwise(answer)
    text = complete(client, max_tokens=40, bad_words=[banned])["choices"][0]["text"]
    assert text == stack.tokenizer.decode(answer, skip_special_tokens=True)


def spelled(stack: Stack, text: str) -> tuple[int, ...]:
    return tuple(stack.tokenizer(text, add_special_tokens=False)["input_ids"])


def test_a_stop_id_ends_the_answer_and_is_shown_only_where_asked(client: httpx.Client, stack: Stack) -> None:
    free = generate(client)
    stop = ids(free)[4]
    count = ids(free).index(stop) + 1
    before, through = (stack.tokenizer.decode(ids(free)[:end]) for end in (count - 1, count))
    ended = generate(client, stop_token_ids=[stop])
    assert ids(ended) == ids(free)[:count]
    assert ended["details"]["finish_reason"] == "stop_sequence"
    assert ended["generated_text"] == before
    shown = generate(client, stop_token_ids=[stop], include_stop_str_in_output=True)
    assert shown["generated_text"] == through
    choice = complete(client, stop_token_ids=[stop])["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == (before, "stop")


def test_a_stop_string_is_shown_where_asked(client: httpx.Client) -> None:
    text = generate(client)["generated_text"]
    stop = text[3:6]
    before = text[: text.index(stop)]
    assert generate(client, stop=[stop])["generated_text"] == before
    assert generate(client, stop=[stop], include_stop_str_in_output=True)["generated_text"] == before + stop


def test_nothing_ends_an_answer_before_its_least_length(client: httpx.Client, stack: Stack) -> None:
    eos = stack.tokenizer.eos_token_id
    text = generate(client)["generated_text"]
    early = {"stop": [text[:2]], "stop_token_ids": [ids(generate(client))[1]]}
    for name in ("min_new_tokens", "min_tokens"):
        answer = generate(client, **early, **{name: 9})
        assert len(ids(answer)) > 9
        assert not {eos, *early["stop_token_ids"]} & set(ids(answer)[:9])
    assert len(ids(generate(client, **early))) <= 2
    assert complete(client, **early, min_tokens=9)["usage"]["completion_tokens"] > 9


def test_eos_can_be_ignored(client: httpx.Client, stack: Stack) -> None:
    """A bias makes EOS the most probable token; it ends nothing, and has no text unless asked for."""
    eos = stack.tokenizer.eos_token_id
    bias = {"logit_bias": {str(eos): 100}}
    assert complete(client, **bias)["usage"]["completion_tokens"] == 1
    whole = complete(client, **bias, ignore_eos=True)
    assert whole["usage"]["completion_tokens"] == 12
    assert (whole["choices"][0]["text"], whole["choices"][0]["finish_reason"]) == ("", "length")
    told = complete(client, **bias, ignore_eos=True, skip_special_tokens=False)
    assert told["choices"][0]["text"] == 12 * stack.tokenizer.eos_token
    assert complete(client, **bias, skip_special_tokens=False)["choices"][0]["text"] == ""
    shown = complete(client, **bias, skip_special_tokens=False, include_stop_str_in_output=True)
    assert shown["choices"][0]["text"] == stack.tokenizer.eos_token


def test_lorax_and_vllm_have_names_of_their_own(client: httpx.Client) -> None:
    assert ids(generate(client, ignore_eos_token=True, top_k=-1)) == ids(generate(client, ignore_eos=True))
    body = {"inputs": "a", "parameters": {"min_tokens": 1, "min_new_tokens": 1}}
    response = client.post("/generate", json=body)
    assert response.status_code == 422
    assert "mean the same" in response.json()["error"]["message"]


def test_shaped_samples_are_seeded(client: httpx.Client) -> None:
    shape: dict[str, Any] = {"do_sample": True, "temperature": 2.0, "typical_p": 0.95, "seed": 4}
    first = generate(client, **shape)
    assert ids(generate(client, **shape)) == ids(first)
    del shape["do_sample"]
    assert complete(client, **shape)["choices"][0]["text"] == first["generated_text"]
    assert ids(generate(client, do_sample=True, epsilon_cutoff=1.0)) == ids(generate(client))


@pytest.mark.parametrize("route", ["/generate", "/v1/completions"])
def test_ignore_eos_and_a_grammar_exclude_each_other(client: httpx.Client, route: str) -> None:
    regex = {"type": "regex", "value": "[a-z]{3}"}
    bodies = {
        "/generate": {"inputs": "a", "parameters": {"ignore_eos": True, "grammar": regex}},
        "/v1/completions": {
            "model": BASE_NAME,
            "prompt": "a",
            "ignore_eos": True,
            "structured_outputs": {"regex": "[a-z]{3}"},
        },
    }
    response = client.post(route, json=bodies[route])
    assert response.status_code == 422
    assert response.json()["error"]["param"] == "ignore_eos"


def test_the_bases_own_defaults_are_told(client: httpx.Client) -> None:
    info = client.get("/info").json()
    assert info["generation_defaults"] == {}
    assert info["generation_not_honoured"] == []


# -- what is known, at the values that change nothing --------------------------------------------

LORAX: dict[str, Any] = {  # what lorax-client sends, whatever it was asked for
    "adapter_id": None,
    "adapter_source": None,
    "merged_adapters": None,
    "api_token": None,
    "do_sample": False,
    "max_new_tokens": 12,
    "ignore_eos_token": False,
    "repetition_penalty": None,
    "return_full_text": False,
    "stop": [],
    "seed": None,
    "temperature": None,
    "top_k": None,
    "top_p": None,
    "truncate": None,
    "typical_p": None,
    "best_of": None,
    "watermark": False,
    "details": True,
    "decoder_input_details": False,
    "return_k_alternatives": None,
    "response_format": None,
    "apply_chat_template": False,
}
VLLM: dict[str, Any] = {
    "use_beam_search": False,
    "top_k": -1,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "length_penalty": 1.0,
    "early_stopping": False,
    "stop_token_ids": [],
    "include_stop_str_in_output": False,
    "ignore_eos": False,
    "min_tokens": 0,
    "skip_special_tokens": True,
    "spaces_between_special_tokens": True,
    "truncate_prompt_tokens": None,
    "prompt_logprobs": None,
    "allowed_token_ids": None,
    "bad_words": [],
    "priority": 0,
    "logits_processors": None,
    "guided_json": None,
    "request_id": "r-1",
    "return_tokens_as_token_ids": False,
    "best_of": 1,
}
OPENAI: dict[str, Any] = {
    "safety_identifier": "u",
    "prompt_cache_key": "k",
    "prompt_cache_retention": "24h",
    "verbosity": "low",
    "service_tier": "auto",
    "store": False,
    "reasoning_effort": "none",
    "metadata": {"a": "b"},
    "user": "u",
    "tools": [],
    "modalities": ["text"],
}


def test_whole_sets_at_neutral_values_are_taken_by_all_routes(client: httpx.Client) -> None:
    free = generate(client)
    assert ids(generate(client, **LORAX)) == ids(free)
    assert ids(generate(client, **VLLM, add_special_tokens=True)) == ids(free)
    assert complete(client, **VLLM, add_special_tokens=True)["choices"][0]["text"] == free["generated_text"]
    assert complete(client, **OPENAI)["choices"][0]["text"] == free["generated_text"]
    tgi = {"watermark": False, "decoder_input_details": False, "adapter_id": None, "typical_p": 1.0}
    assert complete(client, **tgi)["choices"][0]["text"] == free["generated_text"]
    body = {"model": BASE_NAME, "messages": [{"role": "user", "content": "a"}], "max_tokens": 2}
    body["model"] = CHAT
    chat = body | VLLM | OPENAI | {"echo": False, "add_special_tokens": False, "chat_template_kwargs": {}}
    assert client.post("/v1/chat/completions", json=chat).status_code == 200


def test_null_is_taken_for_every_field(client: httpx.Client) -> None:
    names = client.get("/openapi.json").json()["components"]["schemas"]["Parameters"]["properties"]
    free = generate(client)
    answer = generate(client, **(dict.fromkeys(names) | {"max_new_tokens": 12}))
    assert ids(answer) == ids(free)
    body = dict.fromkeys(LORAX | VLLM | OPENAI) | {"model": BASE_NAME, "prompt": "a", "max_tokens": 1}
    assert client.post("/v1/completions", json=body).status_code == 200


@pytest.mark.parametrize("route", [Completions, ChatCompletions])
def test_every_parameter_of_openais_package_is_known(client: httpx.Client, route: type) -> None:
    """At null, as where a caller passes its own defaults on."""
    own = {"self", "extra_headers", "extra_query", "extra_body", "timeout"}
    names = set(inspect.signature(route.create).parameters) - own
    path, rest = (
        ("/v1/completions", {"prompt": "a"})
        if route is Completions
        else ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}]})
    )
    body = dict.fromkeys(names) | {"model": CHAT, "max_tokens": 1} | rest
    response = client.post(path, json=body)
    assert response.status_code == 200, response.text


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("use_beam_search", True),
        ("prompt_logprobs", 3),
        ("allowed_token_ids", [1]),
        ("watermark", True),
        ("watermark", 0),
        ("merged_adapters", {"ids": ["a"]}),
        ("api_token", "secret"),
        ("return_k_alternatives", 2),
        ("priority", 1),
        ("apply_chat_template", True),
        ("web_search_options", {}),
        ("reasoning_effort", "high"),
        ("moderation", {"model": "m"}),
    ],
)
def test_other_values_are_refused_by_name(client: httpx.Client, name: str, value: Any) -> None:
    bodies: dict[str, tuple[dict[str, Any], str]] = {
        "/generate": ({"inputs": "a", "parameters": {name: value}}, f"parameters.{name}"),
        "/v1/completions": ({"model": BASE_NAME, "prompt": "a", name: value}, name),
        "/v1/chat/completions": (
            {"model": BASE_NAME, "messages": [{"role": "user", "content": "a"}], name: value},
            name,
        ),
    }
    for route, (body, param) in bodies.items():
        response = client.post(route, json=body)
        error = response.json()["error"]
        assert (response.status_code, error["param"]) == (422, param), response.text
        assert error["message"].removeprefix("parameters.").startswith(name)
        assert "leave it out" in error["message"]
        assert "secret" not in response.text


def test_best_of_may_be_n(client: httpx.Client) -> None:
    assert len(complete(client, n=2, best_of=2, temperature=1)["choices"]) == 2


# -- lengths -------------------------------------------------------------------------------------


@pytest.mark.parametrize("prompt", ["the film was great", [5], [5, 6, 7]])
def test_no_new_tokens_score_the_prompt(client: httpx.Client, stack: Stack, prompt: Any) -> None:
    scored = complete(client, prompt=prompt, max_tokens=0, echo=True, logprobs=2)
    longer = complete(client, prompt=prompt, max_tokens=1, echo=True, logprobs=2)
    choice, other = scored["choices"][0], longer["choices"][0]
    count = longer["usage"]["prompt_tokens"]
    assert scored["usage"] == {
        "prompt_tokens": count, "completion_tokens": 0, "total_tokens": count
    }  # fmt: skip
    assert other["text"].startswith(choice["text"])
    assert choice["finish_reason"] == "length"
    for name in ("tokens", "text_offset"):
        assert choice["logprobs"][name] == other["logprobs"][name][:count]
    for one, two in zip(
        choice["logprobs"]["token_logprobs"], other["logprobs"]["token_logprobs"], strict=False
    ):
        assert one == two or abs(one - two) < 1e-4
    assert choice["logprobs"]["token_logprobs"][0] is None


def test_no_new_tokens_are_an_empty_answer(client: httpx.Client) -> None:
    assert complete(client, max_tokens=0)["choices"][0]["text"] == ""
    assert complete(client, max_tokens=0, echo=True)["choices"][0]["text"] == "the film"
    body = {"model": BASE_NAME, "prompt": ["the film", "a"], "max_tokens": 0, "echo": True, "logprobs": 0}
    lines = client.post("/v1/completions", json=body | {"stream": True}).text.split("\n\n")
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines if "{" in line]
    assert {chunk["choices"][0]["text"] for chunk in chunks} == {"the film", "a"}
    assert all(chunk["choices"][0]["logprobs"]["tokens"] for chunk in chunks)
    chat = {"model": BASE_NAME, "messages": [{"role": "user", "content": "a"}], "max_tokens": 0}
    assert client.post("/v1/chat/completions", json=chat).status_code == 422


def test_a_prompt_of_all_positions_can_be_scored(client: httpx.Client) -> None:
    whole = complete(client, prompt=[5] * POSITIONS, max_tokens=0, echo=True, logprobs=0)
    assert len(whole["choices"][0]["logprobs"]["tokens"]) == POSITIONS


@pytest.mark.parametrize(
    ("body", "param", "says"),
    [
        ({"prompt": [5] * 250, "max_tokens": 20}, "max_tokens", "270 tokens"),
        ({"prompt": [5] * 300}, "prompt", "300 tokens"),
        ({"prompt": "food " * 300, "max_tokens": 5}, "prompt", "tokens"),
        ({"prompt": "food " * 100_000}, "prompt", "more than that"),
        ({"messages": [{"role": "user", "content": "food " * 300}]}, "messages", "tokens"),
        ({"messages": [{"role": "user", "content": "a"}], "max_tokens": 300}, "max_tokens", "tokens"),
        (
            {"messages": [{"role": "user", "content": "a"}], "max_tokens": 300, "stream": True},
            "max_tokens",
            "",
        ),
    ],
)
def test_what_is_too_long_is_told_in_openais_words(
    client: httpx.Client, body: dict[str, Any], param: str, says: str
) -> None:
    route = "/v1/chat/completions" if "messages" in body else "/v1/completions"
    response = client.post(route, json={"model": CHAT} | body)
    error = response.json()["error"]
    assert (response.status_code, error["code"]) == (400, "context_length_exceeded")
    assert error["param"] == param
    assert f"This model's maximum context length is {POSITIONS} tokens" in error["message"]
    assert says in error["message"]
    assert "max_new_tokens" not in response.text
    assert "truncate" not in response.text


def test_every_chunk_tells_the_usage_so_far_where_asked(client: httpx.Client) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    bodies = {
        "/v1/completions": {"prompt": ["the film", "a"]},
        "/v1/chat/completions": {"messages": [{"role": "user", "content": "a"}]},
    }
    for route, words in bodies.items():
        body = {"model": CHAT, "max_tokens": 5, "temperature": 0, "ignore_eos": True, "stream": True}
        text = client.post(route, json=body | words | {"stream_options": options}).text
        chunks = [json.loads(line[6:]) for line in text.split("\n\n") if line.startswith("data: {")]
        answers = len(words.get("prompt", ["one"]))
        for index in range(answers):
            told = [
                chunk["usage"]
                for chunk in chunks
                if chunk["choices"] and chunk["choices"][0]["index"] == index
            ]
            counts = [each["completion_tokens"] for each in told]
            assert counts == sorted(counts)
            assert set(counts) >= {1, 5}
            assert all(
                each["total_tokens"] == each["prompt_tokens"] + each["completion_tokens"] for each in told
            )
        assert chunks[-1]["choices"] == []
        assert chunks[-1]["usage"]["completion_tokens"] == 5 * answers
    body = {"model": BASE_NAME, "prompt": "a", "stream": True, "stream_options": {"include_usage": True}}
    chunks = [
        json.loads(line[6:])
        for line in client.post("/v1/completions", json=body).text.split("\n\n")
        if "{" in line
    ]
    assert {chunk["usage"] is None for chunk in chunks[:-1]} == {True}


def test_a_streams_details_have_tgis_and_loraxs_names(client: httpx.Client) -> None:
    body = {"inputs": "the film", "parameters": {"max_new_tokens": 2}}
    events = client.post("/generate_stream", json=body).text.strip().split("\n\n")
    details = json.loads(events[-1].removeprefix("data:"))["details"]
    counted = generate(client)["details"]["prompt_tokens"]
    assert details["input_length"] == details["prompt_tokens"] == counted
