"""What routes say of an encoder-decoder: one encoder pass for all answers, the source where prompts are."""

import copy
import json
import re
from collections.abc import Iterator
from pathlib import Path
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
    tiny_seq2seq,
)
from tests.serving.stack import BASE_NAME, Stack
from tests.waiting import wait_until

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


def settle(client: httpx.Client) -> None:
    """Let steps of earlier requests be recorded: a step is, after its answers, and before the next one's.

    What may still come then is this request's only row, and it is like that of any other request for a token.
    """
    ask(client, None, TEXT, max_new_tokens=1)


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
        wait_until(
            lambda before=before: encoder_tokens(client) > before
        )  # a step is counted after its answers
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


def test_padding_is_no_input(stack: Stack, client: httpx.Client) -> None:
    """`generate` hides it from the encoder: its answers would be others."""
    body = {"model": BASE_NAME, "prompt": [*SOURCE[:3], stack.tokenizer.pad_token_id, *SOURCE[3:]]}
    param, message = refused(client, "/v1/completions", body)
    assert param in ("inputs", "prompt")
    assert "padding token" in message


def test_a_source_is_truncated_as_its_tokenizer_does(stack: Stack, client: httpx.Client) -> None:
    text = f"{TEXT} " * 40
    param, message = refused(client, "/generate", {"inputs": text})
    assert param == "inputs"
    assert f"the encoder takes {POSITIONS}" in message
    assert "truncate" in message
    own = copy.deepcopy(stack.tokenizer)  # it goes on truncating
    ids = own(text, truncation=True, max_length=50)["input_ids"]
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


RULES = {
    "encoder_no_repeat_ngram_size": 2,
    "encoder_repetition_penalty": 1.6,
    "repetition_penalty": 1.4,
    "no_repeat_ngram_size": 3,
    "min_length": 7,
    "max_length": 11,
    "begin_suppress_tokens": [40, 41, 42],
}


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_a_bases_rules_are_those_of_generate(family: str, tmp_path: Path) -> None:
    """Lengths count the start token, the encoder's rules see the source, all others the decoder's ids."""
    with server_of(family, tmp_path, generation=RULES) as (stack, client):
        changed = 0
        for text in ("the film was great", TEXT, "1 2 3 Thai Blue Door", "cold"):
            source = stack.tokenizer(text)["input_ids"]
            found = client.post("/generate", json={"inputs": text}).json()
            expected = greedy_seq2seq(stack.base, source, None)
            assert difference(found, expected) is None
            assert len(expected.tokens) <= RULES["max_length"] - 1
            changed += expected.tokens != greedy_seq2seq(tiny_seq2seq(family), source, 10).tokens
        assert changed > 2, "the rules change what is said"


def test_a_prefix_is_resident_once(stack: Stack, client: httpx.Client) -> None:
    ask(client, "three-sites", TEXT)
    stack.steps.clear()
    for text in ("a", TEXT, "film"):
        ask(client, "three-sites", text, n=2, do_sample=True)
    assert sum(step.prefix_misses for step in stack.steps) == 0


def test_the_live_rows_show_the_encoders_pass(stack: Stack, client: httpx.Client) -> None:
    settle(client)
    stack.engine.take_rows()
    ask(client, None, TEXT, max_new_tokens=1)
    (row,) = wait_until(stack.engine.take_rows) or ()
    assert (row.source_length, row.is_encoding, row.num_generated) == (len(SOURCE), True, 1)


def test_a_request_names_the_token_that_its_answer_begins_with(stack: Stack, client: httpx.Client) -> None:
    ids = torch.tensor([SOURCE])
    tokens = stack.base.generate(input_ids=ids, max_new_tokens=NEW_TOKENS, forced_bos_token_id=2)[0, 1:]
    found = ask(client, None, TEXT, forced_bos_token="<turn>")
    assert [token["id"] for token in found["details"]["tokens"]] == tokens.tolist()
    body = {"inputs": TEXT, "parameters": {"forced_bos_token": "fr_XX"}}
    param, message = refused(client, "/generate", body)
    assert (param, "no token like this" in message) == ("parameters.forced_bos_token", True)


def test_beams_share_one_encoder_pass(stack: Stack, client: httpx.Client) -> None:
    before = encoder_tokens(client)
    found = ask(client, None, TEXT, num_beams=4, n=2)
    assert encoder_tokens(client) - before == len(SOURCE)
    output = stack.base.generate(
        input_ids=torch.tensor([SOURCE]),
        max_new_tokens=NEW_TOKENS,
        num_beams=4,
        num_return_sequences=2,
        return_dict_in_generate=True,
        output_scores=True,
    )
    for sample, row, score in zip(found["samples"], output.sequences, output.sequences_scores, strict=True):
        ids = [token["id"] for token in sample["details"]["tokens"]]
        assert ids == row[1 : len(ids) + 1].tolist()
        assert sample["score"] == pytest.approx(float(score), abs=1e-4)
