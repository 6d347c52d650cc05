"""Timing headers on every whole answer; streams begin before anybody knows them."""

from typing import Any

import httpx
import pytest

TIMES = ("x-queue-time", "x-prefill-time", "x-decode-time", "x-total-time")
FEW = {"max_new_tokens": 3}
CHAT = [{"role": "user", "content": "the film"}]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/generate", {"inputs": "the film", "parameters": FEW}),
        ("/generate", {"inputs": "the film", "parameters": FEW | {"n": 3, "do_sample": True}}),
        ("/generate", {"inputs": "the film", "parameters": {"choices": ["good", "bad"]}}),
        (
            "/v1/completions",
            {"model": "tiny-base", "prompt": ["the film", "the food"], "max_tokens": 3, "n": 2},
        ),
        ("/v1/completions", {"model": "tiny-base", "prompt": "the film", "max_tokens": 3}),
    ],
)
def test_whole_answers_tell_their_times(client: httpx.Client, path: str, body: dict[str, Any]) -> None:
    answer = client.post(path, json=body)
    assert answer.status_code == 200, answer.text
    times = [int(answer.headers[name]) for name in TIMES]
    assert all(time >= 0 for time in times)
    assert (int(answer.headers["x-prompt-tokens"]), int(answer.headers["x-generated-tokens"])) == tokens(
        answer.json()
    )


def tokens(answer: dict[str, Any]) -> tuple[int, int]:
    """As the answer itself counts them."""
    if "usage" in answer:
        return answer["usage"]["prompt_tokens"], answer["usage"]["completion_tokens"]
    details = [sample["details"] for sample in answer.get("samples", [answer])]
    return details[0]["prompt_tokens"], sum(each["generated_tokens"] for each in details)


def test_streams_and_refusals_have_none(client: httpx.Client) -> None:
    stream = client.post("/generate_stream", json={"inputs": "the film", "parameters": FEW})
    refused = client.post("/generate", json={"inputs": 1})
    assert not {*TIMES} & {*stream.headers, *refused.headers}
