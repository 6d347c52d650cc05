"""Beams and best_of over HTTP."""

from typing import Any

import httpx
import pytest

from tests.serving.stack import BASE_NAME

BEAMS = {"num_beams": 3, "length_penalty": 0.5, "early_stopping": "never", "no_repeat_ngram_size": 2}


def post(client: httpx.Client, route: str, body: dict[str, Any], status: int = 200) -> dict[str, Any]:
    response = client.post(route, json=body)
    assert response.status_code == status, response.text
    answer: dict[str, Any] = response.json()
    return answer


def test_every_route_searches_and_tells_scores(client: httpx.Client) -> None:
    parameters = BEAMS | {"max_new_tokens": 8, "num_return_sequences": 3}
    whole = post(client, "/generate", {"inputs": "the film", "parameters": parameters})
    scores = [sample["score"] for sample in whole["samples"]]
    texts = [sample["generated_text"] for sample in whole["samples"]]
    assert scores == sorted(scores, reverse=True)
    ids = [[token["id"] for token in sample["details"]["tokens"]] for sample in whole["samples"]]
    assert len(set(map(tuple, ids))) == 3
    assert (whole["score"], whole["generated_text"]) == (scores[0], texts[0])
    assert whole["samples"][1]["details"]["generated_tokens"] == 8
    body = {"model": BASE_NAME, "prompt": "the film", "max_tokens": 8, "n": 3} | BEAMS
    found = post(client, "/v1/completions", body)
    assert [choice["text"] for choice in found["choices"]] == texts
    assert [choice["score"] for choice in found["choices"]] == pytest.approx(scores)
    assert found["usage"]["completion_tokens"] == 24
    single = post(client, "/generate", {"inputs": "the film", "parameters": parameters | {"details": False}})
    assert single["samples"][2]["score"] == pytest.approx(scores[2])


def test_greedy_answers_have_no_score(client: httpx.Client) -> None:
    answer = post(client, "/generate", {"inputs": "the film", "parameters": {"max_new_tokens": 4}})
    assert "score" not in answer


@pytest.mark.parametrize(
    ("parameters", "field"),
    [
        ({"num_beams": 0}, "num_beams"),
        ({"num_beams": 17}, "num_beams"),
        ({"num_beams": 2, "do_sample": True}, "num_beams"),
        ({"num_beams": 2, "n": 3}, "num_beams"),
        ({"num_beams": 2, "grammar": {"type": "regex", "value": "[a-z]+"}}, "num_beams"),
        ({"num_beams": 2, "length_penalty": 11}, "length_penalty"),
        ({"num_beams": 2, "early_stopping": "ever"}, "early_stopping"),
    ],
)
def test_what_can_t_be_had_is_refused(client: httpx.Client, parameters: dict[str, Any], field: str) -> None:
    error = post(client, "/generate", {"inputs": "a", "parameters": parameters}, 422)["error"]
    assert error["param"] == f"parameters.{field}"
    if field == "early_stopping":
        assert 'must be true, false or "never"' in error["message"]


def test_streams_of_beams_are_refused(client: httpx.Client) -> None:
    error = post(client, "/generate_stream", {"inputs": "a", "parameters": {"num_beams": 2}}, 422)["error"]
    assert "stream" in error["message"]
    body = {"model": BASE_NAME, "prompt": "a", "num_beams": 2, "stream": True}
    assert "num_beams" in post(client, "/v1/completions", body, 422)["error"]["message"]
    sampled = body | {"stream": False, "temperature": 0.5}
    assert "temperature" in post(client, "/v1/completions", sampled, 422)["error"]["message"]


def test_best_of_chooses_among_samples(client: httpx.Client) -> None:
    body: dict[str, Any] = {
        "model": BASE_NAME,
        "prompt": "the film",
        "max_tokens": 6,
        "temperature": 1.4,
        "seed": 7,
        "logprobs": 0,
    }
    choices = post(client, "/v1/completions", body | {"n": 5})["choices"]
    best = max(choices, key=lambda choice: sum(choice["logprobs"]["token_logprobs"]) / 6)
    (chosen,) = post(client, "/v1/completions", body | {"best_of": 5})["choices"]
    assert (chosen["index"], chosen["text"]) == (0, best["text"])
    assert post(client, "/v1/completions", body | {"n": 2, "best_of": 1}, 422)["error"]["param"] == "best_of"
    streamed = body | {"best_of": 2, "stream": True}
    assert post(client, "/v1/completions", streamed, 422)["error"]["param"] == "best_of"
