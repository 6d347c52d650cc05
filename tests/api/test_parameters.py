"""Generation parameters over HTTP, by the names of TGI's, LoRAX's, vLLM's and OpenAI's clients."""

from itertools import pairwise
from typing import Any

import httpx
import pytest

from tests.serving.stack import BASE_NAME, Stack


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
