"""Log-probabilities of prompts and of labels, against transformers' own."""

import random
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import PreTrainedModel

from tests.api.server import client_of
from tests.api.test_generate import error_of, publish_text
from tests.oracle import prefix_config, soft_config
from tests.serving.stack import BASE_NAME, Stack

WORDS = ("the", "film", "food", "was", "cold", "great", "name", "Thai", "area", "é", "漢", "1 2 3", "\n")


def own_logprobs(model: PreTrainedModel | PeftModel, ids: list[int]) -> np.ndarray:
    """Of each id but the first, by the model itself, alone."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids])).logits[0].float()
    logits = logits[-len(ids) :]  # PEFT puts its virtual tokens before
    logprobs = logits.log_softmax(-1)[:-1]
    return logprobs.gather(1, torch.tensor(ids[1:])[:, None]).squeeze(1).numpy()


@pytest.fixture(scope="module")
def models(stack: Stack, url: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """By name: the base, and two tasks that PEFT itself saved."""
    made: dict[str, Any] = {BASE_NAME: stack.base}
    for seed, make in enumerate((soft_config, prefix_config)):
        folder: Path = tmp_path_factory.mktemp("peft")
        model, weights, config = stack.adapter(make(5), folder, seed=seed + 1)
        name = f"scored-{seed}"
        with client_of(url) as http:
            files = {"prompt": ("p", weights), "config": ("c", config)}
            assert http.post(f"/tasks/{name}/versions", files=files).status_code == 201
        made[name] = model
    return made


@pytest.mark.parametrize("samples", [1, 2])
def test_a_prompt_of_one_token_is_told_too(client: httpx.Client, samples: int) -> None:
    body = {"model": BASE_NAME, "prompt": [40], "max_tokens": 2, "n": samples, "temperature": 0}
    choices = client.post("/v1/completions", json=body | {"echo": True, "logprobs": 1}).json()["choices"]
    for choice in choices:
        assert choice["logprobs"]["token_logprobs"][0] is None
        assert len(choice["logprobs"]["tokens"]) == 3
        assert choice["text"].startswith(choice["logprobs"]["tokens"][0])
    body = {"inputs": "", "parameters": {"max_new_tokens": 1, "decoder_input_details": True, "details": True}}
    details = client.post("/generate", json=body).json()["details"]  # the BOS token alone
    assert details["prompt_tokens"] == 1
    assert [(token["text"], token["logprob"]) for token in details["prefill"]] == [("<s>", None)]


def test_echoed_prompts_have_the_models_own_log_probabilities(
    client: httpx.Client, stack: Stack, models: dict[str, Any]
) -> None:
    """50 random texts and tasks."""
    dice = random.Random(2)
    for _ in range(50):
        text = " ".join(dice.choices(WORDS, k=dice.randint(1, 30)))
        name = dice.choice(sorted(models))
        body = {"model": name, "prompt": text, "max_tokens": 1, "echo": True, "logprobs": 2, "temperature": 0}
        choice = client.post("/v1/completions", json=body).json()["choices"][0]
        ids = stack.tokenizer(text)["input_ids"]
        scores = choice["logprobs"]["token_logprobs"]
        assert (len(scores), scores[0]) == (len(ids) + 1, None)
        assert np.allclose(scores[1:-1], own_logprobs(models[name], ids), atol=1e-4)
        assert choice["text"].startswith(text)
        for score, top in zip(scores[1:], choice["logprobs"]["top_logprobs"][1:], strict=True):
            assert score <= max(top.values()) + 1e-4


def test_prefill_details_are_the_same(client: httpx.Client, stack: Stack) -> None:
    text = "the film was great and the food was cold " * 8
    body = {"inputs": text, "parameters": {"max_new_tokens": 1, "decoder_input_details": True}}
    prefill = client.post("/generate", json=body).json()["details"]["prefill"]
    ids = stack.tokenizer(text)["input_ids"]
    assert [token["id"] for token in prefill] == ids
    assert prefill[0]["logprob"] is None
    assert np.allclose([token["logprob"] for token in prefill[1:]], own_logprobs(stack.base, ids), atol=1e-4)


@pytest.mark.parametrize("score_eos", [True, False])
@pytest.mark.parametrize("length_normalized", [True, False])
def test_choices_are_the_softmax_of_the_labels_log_probabilities(
    client: httpx.Client, stack: Stack, models: dict[str, Any], score_eos: bool, length_normalized: bool
) -> None:
    labels = ["great", " cold food", {"value": "third", "text": "é"}]
    texts = ["great", " cold food", "é"]
    eos = [stack.tokenizer.eos_token_id] if score_eos else []
    for name, model in models.items():
        for text in ("the film was", "a"):
            prompt = stack.tokenizer(text)["input_ids"]
            totals = []
            for label in texts:
                ids = stack.tokenizer(label, add_special_tokens=False)["input_ids"] + eos
                scores = own_logprobs(model, prompt + ids)[-len(ids) :]
                totals.append(scores.mean() if length_normalized else scores.sum())
            expected = torch.tensor(np.array(totals)).softmax(0).numpy()
            parameters = {"choices": labels, "score_eos": score_eos, "length_normalized": length_normalized}
            answer = client.post(
                "/generate", json={"task_id": name, "inputs": text, "parameters": parameters}
            ).json()
            choice = answer["choice"]
            assert [each["value"] for each in choice["probabilities"]] == ["great", " cold food", "third"]
            assert np.allclose([each["probability"] for each in choice["probabilities"]], expected, atol=1e-4)
            best = int(expected.argmax())
            assert choice["value"] == answer["generated_text"] == ("great", " cold food", "third")[best]
            assert choice["confidence"] == choice["probabilities"][best]["probability"]
            if not length_normalized:
                assert choice["label_mass"] == pytest.approx(np.exp(totals).sum(), rel=1e-3, abs=1e-6)
    assert stack.engine.stats().num_running == 0


def test_a_task_brings_its_own_choices(client: httpx.Client) -> None:
    publish_text(client, "with-choices", "{text}", choices=["yes", {"value": "no", "text": " no"}])
    ask = {"task_id": "with-choices", "inputs": "the film", "parameters": {"choices": True}}
    response = client.post("/generate", json=ask)
    assert response.status_code == 200, response.text
    answer = response.json()
    assert {each["value"] for each in answer["choice"]["probabilities"]} == {"yes", "no"}
    assert sum(each["probability"] for each in answer["choice"]["probabilities"]) == pytest.approx(1)
    assert client.get("/tasks/with-choices").json()["requests_served"] == 1
    error_of(client.post("/generate", json=ask | {"task_id": BASE_NAME}), 422)


def test_a_calibrated_task_divides_log_probabilities(client: httpx.Client) -> None:
    labels = ["great", " cold food", "é"]
    asked = {"inputs": "the film", "parameters": {"choices": labels}}
    for name, temperature in (("as-it-is", 1.0), ("calibrated", 3.0)):
        publish_text(client, name, "{text}", calibration={"temperature": temperature})
    plain, calibrated = (
        client.post("/generate", json=asked | {"task_id": name}).json()["choice"]
        for name in ("as-it-is", "calibrated")
    )
    powers = np.array([each["probability"] for each in plain["probabilities"]]) ** (1 / 3)
    found = [each["probability"] for each in calibrated["probabilities"]]
    assert np.allclose(found, powers / powers.sum(), atol=1e-4)
    assert calibrated["label_mass"] == pytest.approx(plain["label_mass"], rel=1e-3)
    assert calibrated["confidence"] == max(found)


@pytest.mark.parametrize(
    "more",
    [
        {"parameters": {"choices": ["a", "b"], "do_sample": True}},
        {"parameters": {"choices": ["a", "b"]}, "stream": True},
        {"parameters": {"choices": ["a"]}},
        {"parameters": {"choices": ["a", "a"]}},
        {"parameters": {"choices": []}},
        {"parameters": {"choices": ["a", ""]}},
        {"parameters": {"choices": False}},
        {"parameters": {"choices": [{"value": "a"}, "b"]}},
        {"parameters": {"choices": ["a", "b" * 2000]}},
    ],
)
def test_choices_that_make_no_sense(client: httpx.Client, more: dict[str, Any]) -> None:
    error = error_of(client.post("/generate", json={"inputs": "x"} | more), 422)
    assert "choices" in f"{error['message']} {error['param']}"
