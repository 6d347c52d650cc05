"""OpenAI's own client, unchanged, against a server on a socket."""

import json
import math
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from tests.api.server import client_of
from tests.api.test_generate import error_of, publish_text
from tests.serving.stack import BASE_NAME, POSITIONS, Stack
from tests.waiting import PATIENCE


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[openai.OpenAI]:
    """Without the environment's proxies."""
    with (
        httpx.Client(trust_env=False, timeout=PATIENCE) as http,
        openai.OpenAI(base_url=f"{url}/v1", api_key="none", http_client=http, max_retries=0) as made,
    ):
        yield made


@pytest.fixture(scope="module")
def review(url: str) -> str:
    with client_of(url) as http:
        publish_text(http, "openai-review", "Review: {text}\n")
    return "openai-review"


def generated(url: str, body: dict[str, Any]) -> dict[str, Any]:
    with client_of(url) as http:
        answer: dict[str, Any] = http.post("/generate", json=body).json()
    return answer


def test_a_completion_is_the_tasks_answer(client: openai.OpenAI, url: str, review: str) -> None:
    answer = client.completions.create(model=review, prompt="the film", max_tokens=6, temperature=0)
    expected = generated(url, {"task_id": review, "inputs": "the film", "parameters": {"max_new_tokens": 6}})
    assert answer.choices[0].text == expected["generated_text"]
    assert (answer.object, answer.model) == ("text_completion", review)
    assert answer.usage is not None
    assert answer.usage.completion_tokens == expected["details"]["generated_tokens"]
    assert answer.usage.prompt_tokens == expected["details"]["prompt_tokens"]
    assert answer.system_fingerprint is not None
    assert answer.system_fingerprint.endswith(f"{review}@1")


def test_lists_of_prompts_and_token_ids(client: openai.OpenAI, stack: Stack) -> None:
    texts = ["the film", "food", "what a"]
    ids = [stack.tokenizer(text)["input_ids"] for text in texts]
    for prompts in (texts, ids):
        answer = client.completions.create(model=BASE_NAME, prompt=prompts, max_tokens=5, temperature=0, n=2)
        assert [choice.index for choice in answer.choices] == list(range(6))
        pairs = [choice.text for choice in answer.choices]
        assert pairs[::2] == pairs[1::2], "greedy answers are the same"
        alone = [
            client.completions.create(model=BASE_NAME, prompt=text, max_tokens=5, temperature=0)
            .choices[0]
            .text
            for text in texts
        ]
        assert pairs[::2] == alone
        assert answer.usage is not None
        assert answer.usage.prompt_tokens == sum(map(len, ids))
    one = client.completions.create(model=BASE_NAME, prompt=ids[0], max_tokens=5, temperature=0, echo=True)
    assert one.choices[0].text.startswith("the film")


def test_samples_differ_and_a_seed_repeats_them(client: openai.OpenAI) -> None:
    def samples(**more: Any) -> list[str]:
        answer = client.completions.create(model=BASE_NAME, prompt="a", max_tokens=12, n=4, **more)
        return [choice.text for choice in answer.choices]

    assert len(set(samples(seed=5))) > 1, "the default of /v1 is to sample"
    assert samples(seed=5) == samples(seed=5)
    assert samples() != samples()


def test_log_probabilities(client: openai.OpenAI, url: str) -> None:
    answer = client.completions.create(
        model=BASE_NAME, prompt="the film", max_tokens=4, temperature=0, logprobs=3
    )
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    tokens = generated(url, {"inputs": "the film", "parameters": {"max_new_tokens": 4, "top_n_tokens": 3}})
    assert logprobs.token_logprobs == pytest.approx(
        [token["logprob"] for token in tokens["details"]["tokens"]], abs=1e-4
    )
    assert logprobs.top_logprobs is not None
    assert logprobs.tokens is not None
    for row, chosen, theirs in zip(
        tokens["details"]["top_tokens"], logprobs.token_logprobs, logprobs.top_logprobs, strict=True
    ):
        assert [token["logprob"] for token in row] == sorted((t["logprob"] for t in row), reverse=True)
        assert row[0]["logprob"] == pytest.approx(chosen, abs=1e-4), "greedy takes the most probable"
        assert sum(math.exp(token["logprob"]) for token in row) <= 1.0001
        assert max(theirs.values()) == pytest.approx(chosen, abs=1e-4)
    chat = client.chat.completions.create(
        model="openai-review",
        messages=[{"role": "user", "content": "the film"}],
        max_tokens=4,
        temperature=0,
        logprobs=True,
        top_logprobs=2,
    )
    content = chat.choices[0].logprobs
    assert content is not None
    assert content.content is not None
    assert [len(token.top_logprobs) for token in content.content] == [2] * 4
    assert all(token.logprob == token.top_logprobs[0].logprob for token in content.content)


def test_a_chat_with_a_task(client: openai.OpenAI, url: str, review: str) -> None:
    messages: Any = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "before"},
        {"role": "assistant", "content": "yes"},
        {"role": "user", "content": [{"type": "text", "text": "the "}, {"type": "text", "text": "film"}]},
    ]
    answer = client.chat.completions.create(
        model=review, messages=messages, max_completion_tokens=6, temperature=0
    )
    expected = generated(url, {"task_id": review, "inputs": "the film", "parameters": {"max_new_tokens": 6}})
    assert answer.choices[0].message.content == expected["generated_text"]
    assert answer.choices[0].message.role == "assistant"
    with pytest.raises(openai.UnprocessableEntityError, match="no chat template"):
        client.chat.completions.create(model=BASE_NAME, messages=messages)


@pytest.mark.parametrize("n", [1, 3])
def test_streams_joined_are_the_answers(client: openai.OpenAI, review: str, n: int) -> None:
    asked: dict[str, Any] = {"model": review, "max_tokens": 10, "n": n, "seed": 3, "stop": ["e"]}
    usage = {"include_usage": True}
    whole = client.completions.create(prompt="the film", **asked)
    texts = [""] * n
    reasons: dict[int, str] = {}
    last = None
    for chunk in client.completions.create(prompt="the film", stream=True, stream_options=usage, **asked):
        last = chunk
        for choice in chunk.choices:
            texts[choice.index] += choice.text
            if choice.finish_reason:
                reasons[choice.index] = choice.finish_reason
    assert texts == [choice.text for choice in whole.choices]
    assert reasons == {choice.index: choice.finish_reason for choice in whole.choices}
    assert last is not None
    assert last.usage == whole.usage

    chat: Any = {"messages": [{"role": "user", "content": "the film"}], **asked}
    said = [""] * n
    for piece in client.chat.completions.create(stream=True, **chat):
        for part in piece.choices:
            said[part.index] += part.delta.content or ""
    assert said == texts


def test_a_raw_stream_ends_with_done(url: str, review: str) -> None:
    body = {"model": review, "prompt": "a", "max_tokens": 2, "stream": True}
    with client_of(url) as http, http.stream("POST", "/v1/completions", json=body) as response:
        lines = [line for line in response.iter_lines() if line]
    assert lines[-1] == "data: [DONE]"
    assert all(json.loads(line.removeprefix("data: "))["id"] for line in lines[:-1])


def test_models(client: openai.OpenAI, review: str) -> None:
    models = {model.id: model for model in client.models.list()}
    assert {BASE_NAME, review} <= models.keys()
    card = client.models.retrieve(f"{review}@1")
    assert card.model_extra is not None
    assert (card.model_extra["parent"], card.model_extra["max_model_len"]) == (BASE_NAME, POSITIONS)
    assert card.created > 0
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("nobody")


def test_errors_are_the_clients_own(client: openai.OpenAI, review: str) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        client.completions.create(model="nobody", prompt="a")
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")
    for more in ({"temperature": 3000}, {"n": 0}, {"logprobs": 100}):
        with pytest.raises(openai.UnprocessableEntityError):
            client.completions.create(model=review, prompt="a", **more)  # type: ignore[call-overload]
    with pytest.raises(openai.UnprocessableEntityError, match="tools is not supported"):
        client.chat.completions.create(
            model=review,
            messages=[{"role": "user", "content": "a"}],
            tools=[{"type": "function", "function": {"name": "f"}}],
        )


def test_habits_change_nothing(url: str, review: str) -> None:
    habits = {"service_tier": "auto", "store": False, "logit_bias": {}, "metadata": {"a": "b"}, "user": "u"}
    body = {"model": review, "prompt": "a", "max_tokens": 2, "temperature": 0}
    with client_of(url) as http:
        plain = http.post("/v1/completions", json=body).json()["choices"]
        assert http.post("/v1/completions", json=body | habits).json()["choices"] == plain
        error_of(http.post("/v1/completions", json=body | {"suffix": "b"}), 422)
        error_of(http.post("/v1/completions", json=body | {"prompts": "a"}), 422)
        error_of(http.post("/v1/completions", json=body | {"prompt": ["a"] * 64, "n": 16}), 422)
        error_of(http.post("/v1/completions", json=body | {"prompt": [10**9]}), 422)


def test_an_echoed_stream_says_what_the_whole_answer_says(client: openai.OpenAI, review: str) -> None:
    """The rendered prompt, its log-probabilities, and one fingerprint from the first chunk to the last."""
    asked: dict[str, Any] = {"model": review, "max_tokens": 4, "temperature": 0, "echo": True, "logprobs": 1}
    whole = client.completions.create(prompt="the film", **asked)
    assert whole.choices[0].text.startswith("Review: the film\n")
    chunks = list(client.completions.create(prompt="the film", stream=True, **asked))
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text
    assert {chunk.system_fingerprint for chunk in chunks} == {whole.system_fingerprint}
    scored, expected = [chunk.choices[0].logprobs for chunk in chunks], whole.choices[0].logprobs
    assert expected is not None
    joined = [score for each in scored if each is not None for score in each.token_logprobs or []]
    assert joined[0] is None
    assert joined[1:] == pytest.approx((expected.token_logprobs or [])[1:], abs=1e-4)
    offsets = [offset for each in scored if each is not None for offset in each.text_offset or []]
    assert offsets == expected.text_offset


def test_a_tasks_own_seed_counts(client: openai.OpenAI, url: str) -> None:
    with client_of(url) as http:
        defaults = {"seed": 7, "do_sample": True, "max_new_tokens": 12}
        publish_text(http, "seeded", "{text}", defaults=defaults)
    for n in (1, 3):
        one, two = (client.completions.create(model="seeded", prompt="a", n=n) for _ in range(2))
        assert [choice.text for choice in one.choices] == [choice.text for choice in two.choices]


def test_an_alias_that_moves_meanwhile_splits_no_answer(
    client: openai.OpenAI, url: str, stack: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    with client_of(url) as http:
        for number in (1, 2):
            publish_text(http, "moving", f"{number}: {{text}}")
    find = stack.store.meaning
    seen: set[int] = set()

    def move_and_find(reference: str, asker: str = "") -> Any:
        meaning = find(reference, asker)
        stack.store.move_alias("moving", "live", 3 - find("moving").version.version)
        seen.add(meaning.version.version)
        return meaning

    monkeypatch.setattr(stack.store, "meaning", move_and_find)
    answer = client.completions.create(
        model="moving", prompt=["a", "b"], n=2, max_tokens=2, temperature=0, echo=True
    )
    assert len({choice.text[0] for choice in answer.choices}) == 1
    assert len(seen) == 1
