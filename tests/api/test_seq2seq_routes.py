"""What routes say of an encoder-decoder: one encoder pass for all answers, the source where prompts are."""

import json
import re
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import torch

from app.sites import Site
from tests.api.test_seq2seq import NEW_TOKENS, Task, ask, canonical_file, difference, push, server_of
from tests.seq2seq import (
    BOS,
    EOS,
    POSITIONS,
    greedy_seq2seq,
    random_decoder_rows,
    random_prefix,
    source_tokenizer,
)
from tests.serving.stack import BASE_NAME, Stack

TEXT = "what a film, the food was cold"
SOURCE = source_tokenizer("bart")(TEXT)["input_ids"]
SITES = {Site.ENCODER_SELF: 3, Site.DECODER_SELF: 6, Site.DECODER_CROSS: 2}


@pytest.fixture(scope="module")
def bart(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Stack, httpx.Client]]:
    with server_of("bart", tmp_path_factory.mktemp("store"), token_budget=256) as (stack, client):
        for name, learned in (
            ("three-sites", random_prefix(stack.base, SITES, seed=9)),
            ("rows", random_decoder_rows(stack.base, 5, seed=7)),
        ):
            push(client, Task(name, {"prompt": canonical_file(learned)}, lambda *_: None))  # type: ignore[arg-type]
        yield stack, client


@pytest.fixture
def stack(bart: tuple[Stack, httpx.Client]) -> Stack:
    return bart[0]


@pytest.fixture
def client(bart: tuple[Stack, httpx.Client]) -> httpx.Client:
    return bart[1]


def encoder_tokens(client: httpx.Client) -> float:
    text = client.get("/metrics").text
    (found,) = re.findall(r"^promptplex_encoder_tokens_total (\S+)$", text, re.MULTILINE)
    return float(found)


def refused(client: httpx.Client, path: str, body: dict[str, Any]) -> tuple[str, str]:
    answer = client.post(path, json=body)
    assert answer.status_code in (400, 422), answer.text
    error = answer.json()["error"]
    return error["param"], error["message"]


@pytest.mark.parametrize("task", [None, "three-sites", "rows"])
def test_samples_and_choices_share_one_encoder_pass(client: httpx.Client, task: str | None) -> None:
    for more in (
        {"n": 4, "do_sample": True},
        {"choices": ["cold", "great", "food", "film", "Thai"]},
        {"choices": ["cold", "great"], "score_eos": False},
    ):
        before = encoder_tokens(client)
        found = ask(client, task, TEXT, **more)
        assert encoder_tokens(client) - before == len(SOURCE)
        assert found["details"]["prompt_tokens"] == len(SOURCE)


def test_choices_follow_what_every_answer_begins_with(stack: Stack, client: httpx.Client) -> None:
    """The start token, and the one that the base forces to be the first."""
    labels = ["cold", " great food", "Thai"]
    totals = []
    for label in labels:
        ids = [*stack.tokenizer(label, add_special_tokens=False)["input_ids"], EOS]
        decoder_ids = torch.tensor([[EOS, BOS, *ids]])  # BART starts with EOS
        logits = stack.base(input_ids=torch.tensor([SOURCE]), decoder_input_ids=decoder_ids).logits[0]
        logprobs = logits.log_softmax(-1)[1:-1]
        totals.append(float(logprobs[range(len(ids)), ids].sum()))
    expected = torch.tensor(totals).softmax(0).tolist()
    found = ask(client, None, TEXT, choices=labels)["choice"]
    assert [each["probability"] for each in found["probabilities"]] == pytest.approx(expected, abs=1e-4)
    assert found["value"] == labels[expected.index(max(expected))]


def test_a_source_is_truncated_as_its_tokenizer_does(stack: Stack, client: httpx.Client) -> None:
    text = f"{TEXT} " * 40
    param, message = refused(client, "/generate", {"inputs": text})
    assert param == "inputs"
    assert f"the encoder takes {POSITIONS}" in message
    assert "truncate" in message
    ids = stack.tokenizer(text, truncation=True, max_length=50)["input_ids"]
    found = ask(client, None, text, truncate=50)
    assert found["details"]["prompt_tokens"] == len(ids) == 50
    assert difference(found, greedy_seq2seq(stack.base, ids, NEW_TOKENS)) is None
    param, message = refused(
        client, "/generate", {"inputs": TEXT, "parameters": {"max_new_tokens": POSITIONS}}
    )
    assert param == "parameters.max_new_tokens"
    assert f"the decoder has {POSITIONS} positions" in message


def test_what_a_request_reads_is_shown(client: httpx.Client) -> None:
    tokens = client.post("/tokenize", json={"inputs": TEXT, "task_id": "three-sites"}).json()
    assert [token["id"] for token in tokens["tokens"]] == SOURCE
    assert (tokens["prompt_tokens"], tokens["virtual_tokens"], tokens["text"]) == (len(SOURCE), 6, TEXT)
    details = ask(client, None, TEXT, decoder_input_details=True)["details"]
    assert details["prefill"] == [{"id": EOS, "text": "</s>", "logprob": None}]


def test_info_and_models_show_both_stacks(client: httpx.Client) -> None:
    info = client.get("/info").json()
    assert (info["num_layers"], info["num_encoder_layers"]) == (2, 3)
    assert (info["max_source_tokens"], info["decoder_start_token_id"]) == (POSITIONS, EOS)
    assert info["generation_defaults"]["forced_bos_token_id"] == BOS
    cards = {card["id"]: card for card in client.get("/v1/models").json()["data"]}
    lengths = {name: (card["max_model_len"], card["max_source_len"]) for name, card in cards.items()}
    assert lengths == {
        BASE_NAME: (POSITIONS, POSITIONS),
        "three-sites": (POSITIONS - 6, POSITIONS),
        "rows": (POSITIONS - 5, POSITIONS),
    }


def test_clients_of_openai(stack: Stack, client: httpx.Client) -> None:
    body = {"model": BASE_NAME, "prompt": SOURCE, "max_tokens": NEW_TOKENS, "temperature": 0, "logprobs": 1}
    expected = greedy_seq2seq(stack.base, SOURCE, NEW_TOKENS)
    found = client.post("/v1/completions", json=body).json()
    assert found["choices"][0]["logprobs"]["token_logprobs"] == pytest.approx(expected.logprobs, abs=1e-4)
    assert found["usage"] == {
        "prompt_tokens": len(SOURCE),
        "completion_tokens": len(expected.tokens),
        "total_tokens": len(SOURCE) + len(expected.tokens),
    }
    chat = {"model": "rows", "max_tokens": NEW_TOKENS, "temperature": 0}
    messages = [{"role": "user", "content": "1"}, {"role": "user", "content": TEXT}]
    answered = client.post("/v1/chat/completions", json=chat | {"messages": messages}).json()
    assert answered["choices"][0]["message"]["content"] == ask(client, "rows", TEXT)["generated_text"]
    assert (
        "no chat template"
        in refused(client, "/v1/chat/completions", chat | {"model": BASE_NAME, "messages": messages})[1]
    )
    echoed = client.post("/v1/completions", json=body | {"prompt": TEXT, "echo": True, "logprobs": None})
    assert echoed.json()["choices"][0]["text"] == TEXT + found["choices"][0]["text"]
    param, message = refused(client, "/v1/completions", body | {"echo": True})
    assert param == "echo"
    assert "An encoder reads" in message


def test_a_stream_has_the_same_tokens(client: httpx.Client) -> None:
    body = {"task_id": "rows", "inputs": TEXT, "parameters": {"max_new_tokens": NEW_TOKENS}}
    text = client.post("/generate_stream", json=body).text
    events = [json.loads(line.removeprefix("data:")) for line in text.splitlines() if line]
    whole = ask(client, "rows", TEXT)
    assert [event["token"]["id"] for event in events] == [each["id"] for each in whole["details"]["tokens"]]
    assert events[-1]["generated_text"] == whole["generated_text"]
    assert events[-1]["details"]["input_length"] == len(SOURCE)


def test_a_grammar_holds_the_answer_after_the_forced_token(client: httpx.Client) -> None:
    found = ask(client, "three-sites", TEXT, grammar={"type": "regex", "value": "(cold|great) film"})
    assert found["generated_text"] in ("cold film", "great film")


def test_a_template_renders_the_source(stack: Stack, client: httpx.Client) -> None:
    task = json.dumps(
        {"template": "{text} was {how}", "examples": [{"inputs": {"text": "a", "how": "b"}, "expected": "c"}]}
    )
    answer = client.post("/tasks/templated/versions", files={"task": ("task", task.encode())})
    assert answer.status_code == 201, answer.text
    assert [example["matches"] for example in answer.json()["examples"]] == [False]
    body = {
        "task_id": "templated",
        "inputs": {"text": "the food", "how": "cold"},
        "parameters": {"max_new_tokens": NEW_TOKENS},
    }
    found = client.post("/generate", json=body).json()
    ids = stack.tokenizer("the food was cold")["input_ids"]
    assert difference(found, greedy_seq2seq(stack.base, ids, NEW_TOKENS)) is None
