"""`/v1/decisions`: the model's own probabilities, nothing is ignored, hundreds of questions at once."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
import torch
from openai.lib.decisions_tool_runner import DecisionsToolRunner
from openai.types import Decision
from peft import PeftModel
from transformers import PreTrainedModel

from app.api.schemas.decisions import MAX_JSON_BYTES, MAX_JSON_LEVELS, MAX_JSON_VALUES
from app.api.state import ServerState
from app.serving.decisions import MAX_LABELS
from app.store.traffic_split import EnsembleTarget
from tests.api.server import client_of, services_of, serving
from tests.api.test_generate import error_of, publish_text
from tests.api.test_scores import own_logprobs
from tests.api.test_seq2seq import server_of
from tests.oracle import soft_config
from tests.serving.stack import BASE_NAME, Stack, running_stack, stack_of
from tests.text.tokenizer_zoo import tokenizer_of
from tests.tiny_models import packed_backbone, tiny_model
from tests.waiting import wait_until

INPUT = "the film was great"
PREDICATE = {"type": "predicate", "instructions": "It is about a film."}
CHOICE = {
    "type": "choice",
    "name": "which",
    "instructions": "What is it about?",
    "choices": [{"value": "film"}, {"value": "film food"}, {"value": "é", "description": "a letter"}],
}
SCORE = {
    "type": "score",
    "name": "stars",
    "instructions": "How good is it?",
    "levels": [{"label": "cold"}, {"label": "name"}, {"label": "great"}],
}
QUESTIONS = [PREDICATE, CHOICE, SCORE]
LISTED = [
    ["true", "false"],
    ["film", "film food", "é: a letter"],
    ["cold", "name", "great"],
]
LABELS = [["true", "false"], ["film", "film food", "é"], ["cold", "name", "great"]]
Totals = Callable[[str, str], float]


def decide(client: httpx.Client, **body: Any) -> dict[str, Any]:
    answer = client.post("/v1/decisions", json={"model": BASE_NAME, "input": INPUT} | body)
    assert answer.status_code == 200, answer.text
    found = dict(answer.json())
    Decision.model_validate(found)
    return found


def in_words(question: dict[str, Any], listed: Sequence[str], text: str = INPUT) -> str:
    """The plain text that a base without a chat template reads, written out once more."""
    options = "\n".join(f"- {option}" for option in listed)
    return f"{text}\n\nQuestion: {question['instructions']}\nOptions:\n{options}\nAnswer:"


def totals_of(stack: Stack, model: PreTrainedModel | PeftModel) -> Totals:
    """Log-probabilities of a label and EOS after a text, alone, at batch size 1."""

    def total(text: str, label: str) -> float:
        ids = stack.tokenizer(label, add_special_tokens=False)["input_ids"] + [stack.tokenizer.eos_token_id]
        return float(own_logprobs(model, stack.tokenizer(text)["input_ids"] + ids)[-len(ids) :].sum())

    return total


def check(answers: list[dict[str, Any]], totals: Sequence[Sequence[float]]) -> None:
    """Compare the answers to QUESTIONS with the log-probabilities of their labels."""
    expected = [torch.tensor(each).softmax(0).numpy() for each in totals]
    predicate, choice, score = answers
    assert predicate["probability"] == pytest.approx(expected[0][0], abs=1e-4)
    assert (predicate["type"], predicate["name"]) == ("predicate", None)
    assert [each["value"] for each in choice["probabilities"]] == ["film", "film food", "é"]
    assert [(each["value"], each["label"]) for each in score["probabilities"]] == [
        (0, "cold"),
        (1, "name"),
        (2, "great"),
    ]
    for answer, found in zip((choice, score), expected[1:], strict=True):
        assert np.allclose([each["probability"] for each in answer["probabilities"]], found, atol=1e-4)
        assert answer["confidence"] == max(each["probability"] for each in answer["probabilities"])
    assert choice["choice"] == LABELS[1][int(expected[1].argmax())]
    assert score["score"] == pytest.approx(expected[2] @ np.arange(3), abs=3e-4)
    for answer, each in zip(answers, totals, strict=True):
        assert answer["label_mass"] == pytest.approx(math.fsum(map(math.exp, each)), rel=1e-3, abs=1e-9)


@pytest.fixture(scope="module")
def soft(stack: Stack, url: str, tmp_path_factory: pytest.TempPathFactory) -> PeftModel:
    model, weights, config = stack.adapter(soft_config(5), tmp_path_factory.mktemp("peft"), seed=3)
    with client_of(url) as http:
        files = {"prompt": ("p", weights), "config": ("c", config)}
        assert http.post("/tasks/decided/versions", files=files).status_code == 201
    return model


def test_a_base_and_a_soft_prompt_decide_as_transformers_and_peft_say(
    client: httpx.Client, stack: Stack, soft: PeftModel
) -> None:
    for name, model in ((BASE_NAME, stack.base), ("decided", soft)):
        total = totals_of(stack, model)
        found = decide(client, model=name, questions=QUESTIONS)
        assert found["model"] == name
        texts = [in_words(*each) for each in zip(QUESTIONS, LISTED, strict=True)]
        check(
            found["answers"],
            [[total(text, f" {label}") for label in some] for text, some in zip(texts, LABELS, strict=True)],
        )


@contextmanager
def gpt2(root: Path) -> Iterator[tuple[Stack, httpx.Client]]:
    tokenizer = tokenizer_of("byte_level_bos")
    base = tiny_model("gpt2", vocab_size=len(tokenizer))
    with (
        stack_of(base, packed_backbone(base), tokenizer, root) as stack,
        serving(ServerState(services=services_of(stack))) as url,
        client_of(url) as client,
    ):
        yield stack, client


def test_gpt2_decides_as_transformers_says(tmp_path: Path) -> None:
    with gpt2(tmp_path) as (stack, client):
        total = totals_of(stack, stack.base)
        texts = [in_words(*each) for each in zip(QUESTIONS, LISTED, strict=True)]
        expected = [
            [total(text, f" {label}") for label in some] for text, some in zip(texts, LABELS, strict=True)
        ]
        check(decide(client, questions=QUESTIONS)["answers"], expected)


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_an_encoder_decoder_decides_as_transformers_says(family: str, tmp_path: Path) -> None:
    with server_of(family, tmp_path, token_budget=160) as (stack, client):
        rules = stack.base.generation_config
        start = [rules.decoder_start_token_id, *([rules.forced_bos_token_id] if family == "bart" else [])]

        def total(text: str, label: str) -> float:
            ids = [*stack.tokenizer(label, add_special_tokens=False)["input_ids"], rules.eos_token_id]
            ids = [id_ for id_ in ids if id_ is not None]
            source = torch.tensor([stack.tokenizer(text)["input_ids"]])
            with torch.no_grad():
                logits = stack.base(input_ids=source, decoder_input_ids=torch.tensor([start + ids])).logits[0]
            rows = logits.log_softmax(-1)[len(start) - 1 : -1]
            return float(rows.gather(1, torch.tensor(ids)[:, None]).sum())

        texts = [in_words(*each) for each in zip(QUESTIONS, LISTED, strict=True)]
        expected = [[total(text, label) for label in some] for text, some in zip(texts, LABELS, strict=True)]
        found = decide(client, questions=QUESTIONS)
        check(found["answers"], expected)
        assert found["usage"]["input_tokens_details"]["cached_tokens"] == 0


CHAT = (
    "{% for message in messages %}{% if loop.index0 and messages[loop.index0 - 1].role == message.role %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}[{{ message.role }}]{{ message.content }}\n"
    "{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)


def test_a_base_with_a_chat_template_reads_messages(tmp_path: Path) -> None:
    messages = [
        {"role": "developer", "content": "be brief"},
        {
            "role": "user",
            "content": [{"type": "input_text", "text": "a"}, {"type": "input_json", "data": {}}],
        },
        {"role": "assistant", "content": [{"type": "output_text", "text": "é"}], "phase": "commentary"},
        {"type": "function_call", "call_id": "1", "name": "f", "arguments": "{}", "id": "x", "status": None},
        {"type": "function_call_output", "call_id": "1", "output": [{"type": "input_text", "text": "x"}]},
    ]
    question = PREDICATE | {"instructions": [{"type": "input_text", "text": "Is it?"}]}
    rendered = (
        "[system]be brief\n[user]a\n{}\n[assistant]é\n\nCall of f: {}\n[user]Output of f: x\n\nIs it?\n\n"
        "Options:\n- true\n- false\n\nAnswer with one of the options and nothing else.\n[assistant]"
    )
    with (
        running_stack(tmp_path, chat_template=CHAT) as stack,
        serving(ServerState(services=services_of(stack))) as url,
        client_of(url) as client,
    ):
        found = decide(client, input=messages, questions=[question])
        total = totals_of(stack, stack.base)
        totals = torch.tensor([total(rendered, label) for label in ("true", "false")])
        assert found["answers"][0]["probability"] == pytest.approx(float(totals.softmax(0)[0]), abs=1e-4)
        assert decide(client, questions=[PREDICATE])["answers"]


def test_a_task_with_instructions_puts_questions_by_its_template(client: httpx.Client, stack: Stack) -> None:
    publish_text(client, "asks", "Q: {instructions} {options}|{review}:")
    publish_text(client, "asks-briefly", "{review} {instructions}")
    total = totals_of(stack, stack.base)
    rendered = "Q: It is about a film. - true\n- false|the film was great:"
    expected = torch.tensor([total(rendered, label) for label in ("true", "false")]).softmax(0)
    [answer] = decide(client, model="asks", questions=[PREDICATE])["answers"]
    assert answer["probability"] == pytest.approx(float(expected[0]), abs=1e-4)
    described = {"model": "asks-briefly", "input": INPUT, "questions": [CHOICE]}
    error = error_of(client.post("/v1/decisions", json=described), 422)
    assert (error["param"], "descriptions would be ignored" in error["message"]) == (
        "questions.0.choices",
        True,
    )
    assert decide(client, model="asks-briefly", questions=[PREDICATE, SCORE])["answers"]


def test_a_task_of_one_question_answers_with_its_choices(client: httpx.Client) -> None:
    choices = ["good", {"value": "bad", "text": "cold"}, "fair"]
    publish_text(client, "opinions", "Review: {text}\n", choices=choices, calibration={"temperature": 2.0})
    parameters = {"choices": True}
    generated = client.post(
        "/generate", json={"task_id": "opinions", "inputs": INPUT, "parameters": parameters}
    ).json()["choice"]
    question = {
        "type": "choice",
        "instructions": "",
        "choices": [{"value": v} for v in ("good", "bad", "fair")],
    }
    [answer] = decide(client, model="opinions", questions=[question])["answers"]
    assert [each["probability"] for each in answer["probabilities"]] == pytest.approx(
        [each["probability"] for each in generated["probabilities"]], abs=1e-4
    )
    assert answer["label_mass"] == pytest.approx(generated["label_mass"], rel=1e-3)
    some = {"type": "score", "instructions": "", "levels": [{"label": "bad"}, {"label": "good"}]}
    [scored] = decide(client, model="opinions", questions=[some])["answers"]
    good, bad, _ = (each["probability"] for each in generated["probabilities"])
    assert scored["score"] == pytest.approx(good / (good + bad), abs=1e-4)
    publish_text(client, "either", "{text}", choices=["No", "Yes"])
    [either] = decide(client, model="either", questions=[PREDICATE | {"instructions": ""}])["answers"]
    asked = {"task_id": "either", "inputs": INPUT, "parameters": parameters}
    no_and_yes = client.post("/generate", json=asked).json()["choice"]["probabilities"]
    assert either["probability"] == pytest.approx(no_and_yes[1]["probability"], abs=1e-4)


def test_an_ensemble_decides_by_the_weighted_mean(client: httpx.Client, stack: Stack) -> None:
    for word in ("Is it?", "Read:"):
        publish_text(client, "deciders", word + " {text}", choices=["good", "bad"])
    stack.store.move_alias("deciders", "live", EnsembleTarget({1: 3, 2: 1}))
    question = {"type": "choice", "instructions": "", "choices": [{"value": "good"}, {"value": "bad"}]}
    by_name = {
        name: decide(client, model=name, questions=[question])
        for name in ("deciders", "deciders@1", "deciders@2")
    }
    found, first, second = (
        [each["probability"] for each in answer["answers"][0]["probabilities"]] for answer in by_name.values()
    )
    assert np.allclose(found, np.array(first) * 0.75 + np.array(second) * 0.25, atol=1e-4)
    both, *each = (answer["usage"]["total_tokens"] for answer in by_name.values())
    assert both == sum(each)


def test_what_a_task_would_ignore_is_refused(client: httpx.Client) -> None:
    publish_text(client, "one-question", "Review: {text}\n", choices=["good", "bad"])
    publish_text(client, "no-question", "Review: {text}\n")
    publish_text(client, "two-fields", "{a} {b} {instructions}")
    publish_text(client, "steps", "{text}", reasoning={"answer_after": "answer:"})
    asked = {"type": "choice", "instructions": "", "choices": [{"value": "good"}, {"value": "bad"}]}
    described = [{"value": "good", "description": "x"}, {"value": "bad"}]
    for model, question, param, words in (
        ("one-question", asked | {"instructions": "Is it?"}, "questions.0.instructions", "{instructions}"),
        ("one-question", asked | {"choices": described}, "questions.0.choices", "descriptions"),
        (
            "one-question",
            asked | {"choices": [{"value": "x"}, {"value": "bad"}]},
            "questions.0.choices",
            "'x'",
        ),
        ("one-question", PREDICATE | {"instructions": ""}, "questions.0.type", "true or false"),
        ("no-question", PREDICATE, "model", "no choices"),
        ("two-fields", PREDICATE, "model", "a, b"),
        ("steps", PREDICATE, "model", "steps"),
        (
            BASE_NAME,
            PREDICATE | {"instructions": " "},
            "questions.0.instructions",
            "it is empty; write the question",
        ),
    ):
        body = {"model": model, "input": INPUT, "questions": [question]}
        error = error_of(client.post("/v1/decisions", json=body), 422)
        assert (error["param"], words in error["message"]) == (param, True), error
    missing = client.post("/v1/decisions", json={"model": "none", "input": "a", "questions": [PREDICATE]})
    assert error_of(missing, 404)["code"] == "model_not_found"


def test_too_much_to_read_says_what_to_shorten(client: httpx.Client) -> None:
    body = {"model": BASE_NAME, "input": "film " * 3000, "questions": [PREDICATE]}
    error = error_of(client.post("/v1/decisions", json=body), 400)
    assert (error["param"], error["code"]) == ("input", "context_length_exceeded")
    assert error["message"].endswith("Please reduce the length of the input, or of the questions.")


def test_truth_and_the_word_for_it_are_two_values(client: httpx.Client, stack: Stack) -> None:
    choices = [{"value": True}, {"value": "True"}, {"value": False}]
    [answer] = decide(client, questions=[CHOICE | {"choices": choices}])["answers"]
    assert [each["value"] for each in answer["probabilities"]] == [True, "True", False]
    total = totals_of(stack, stack.base)
    text = in_words(CHOICE, ["true", '"True"', "false"])
    expected = torch.tensor([total(text, label) for label in (" true", ' "True"', " false")]).softmax(0)
    assert np.allclose([each["probability"] for each in answer["probabilities"]], expected, atol=1e-4)


def test_one_question_that_the_model_cannot_take_is_refused_alone(client: httpx.Client, stack: Stack) -> None:
    token = stack.tokenizer("漢", add_special_tokens=False)["input_ids"][0]
    seen = {
        id_
        for each in zip(QUESTIONS, LISTED, strict=True)
        for id_ in stack.tokenizer(in_words(*each))["input_ids"]
    }
    assert token not in seen
    rows = stack.engine.backbone.model.get_input_embeddings().weight
    kept = rows[token].clone()
    rows[token] = torch.nan
    try:
        bad = PREDICATE | {"instructions": "漢", "name": "bad"}
        answers = decide(client, questions=[PREDICATE, bad, SCORE])["answers"]
    finally:
        rows[token] = kept
    assert [each["type"] for each in answers] == ["predicate", "refusal", "score"]
    assert answers[1] == {"type": "refusal", "name": "bad"}
    alone = decide(client, questions=[PREDICATE])["answers"][0]
    assert answers[0]["probability"] == pytest.approx(alone["probability"], abs=1e-4)


def test_a_tasks_own_text_counts_for_each_question(
    client: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish_text(client, "wordy", "word " * 20 + "{text} {instructions}:")
    body = {"model": "wordy", "input": "film", "questions": [PREDICATE | {"instructions": "Good?"}] * 2}
    own = len("word " * 20 + " :")
    monkeypatch.setattr("app.serving.programs.decide.MAX_RENDERED_CHARS", 2 * (own + len("film")) - 1)
    assert "the task's own text included" in error_of(client.post("/v1/decisions", json=body), 422)["message"]
    monkeypatch.setattr("app.serving.programs.decide.MAX_RENDERED_CHARS", 2 * (own + len("film")))
    assert client.post("/v1/decisions", json=body).status_code == 200


def test_400_questions_answer_in_order_and_share_the_input(client: httpx.Client, stack: Stack) -> None:
    text = "the film was great and the food was cold " * 3
    questions = [
        PREDICATE | {"instructions": f"Number {number}.", "name": str(number)} for number in range(400)
    ]
    before, ends = stack.generation.limiter.taken, len(stack.outcomes)
    stack.steps.clear()
    found = decide(client, input=text, questions=questions)
    wait_until(stack.is_idle)
    forward = sum(step.num_prefill_tokens + step.num_prefix_tokens for step in [*stack.steps])
    assert [each["name"] for each in found["answers"]] == [str(number) for number in range(400)]
    for number in (0, 7, 399):
        [alone] = decide(client, input=text, questions=[questions[number]])["answers"]
        assert found["answers"][number]["probability"] == pytest.approx(alone["probability"], abs=1e-4)
    usage = found["usage"]
    shared = len(stack.tokenizer(text)["input_ids"])
    assert usage["input_tokens_details"]["cached_tokens"] >= 399 * (shared - 1)
    assert usage["total_tokens"] == usage["input_tokens"] + usage["output_tokens"]
    assert stack.generation.limiter.taken == before
    computed = usage["input_tokens"] - usage["input_tokens_details"]["cached_tokens"]
    assert forward <= shared + 1.2 * (computed - shared + usage["output_tokens"])
    assert stack.outcomes[ends].prompt_tokens == computed
    assert stack.outcomes[ends].generated_tokens == usage["output_tokens"]


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"questions": []}, "questions"),
        ({"questions": [PREDICATE] * 401}, "questions"),
        ({"questions": [PREDICATE | {"instructions": None}]}, "instructions"),
        ({"questions": [PREDICATE | {"choices": []}]}, "questions.0.choices"),
        ({"questions": [{"type": "rank", "instructions": "a"}]}, "predicate"),
        ({"questions": [CHOICE | {"choices": [{"value": "a"}]}]}, "choices"),
        ({"questions": [CHOICE | {"choices": [{"value": "a"}] * 2}]}, "unique"),
        ({"questions": [CHOICE | {"choices": [{"value": 1}, {"value": 2}]}]}, "true or false"),
        ({"questions": [SCORE | {"levels": [{"label": str(n)} for n in range(11)]}]}, "levels"),
        (
            {"questions": [CHOICE | {"choices": [{"value": f"{n}"} for n in range(255)]}] * 17},
            f"{MAX_LABELS}",
        ),
        ({"temperature": 1}, "temperature"),
        ({"input": ""}, "empty"),
        ({"input": []}, "input"),
        ({"input": 5}, "input"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, "an image"),
        ({"input": [{"role": "system", "content": [{"type": "input_json", "data": {}}]}]}, "input_text"),
        ({"input": [{"role": "tool", "content": "x"}]}, "must be a message"),
        ({"input": [{"type": "function_call_output", "call_id": "1", "output": "x"}]}, "call_id"),
        ({"input": [{"type": "function_call", "call_id": "1", "name": "f", "input": "x"}]}, "arguments"),
        ({"input": "film " * 3000, "questions": [PREDICATE] * 400}, "at most 4000000"),
        ({"input": "film " * 300}, "358 tokens"),
    ],
)
def test_bodies_that_make_no_sense(client: httpx.Client, body: dict[str, Any], words: str) -> None:
    whole = {"model": BASE_NAME, "input": INPUT, "questions": [PREDICATE]} | body
    answer = client.post("/v1/decisions", json=whole)
    error = error_of(answer, 400 if words == "358 tokens" else 422)
    assert words in f"{error['message']} {error['param']}"


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ([0] * 5, "object"),
        ({"a": [0] * MAX_JSON_VALUES}, "values"),
        ({"a": "x" * MAX_JSON_BYTES}, "bytes"),
        (eval('{"a":' * MAX_JSON_LEVELS + "{}" + "}" * MAX_JSON_LEVELS), "levels"),
    ],
)
def test_json_is_bounded(client: httpx.Client, data: Any, words: str) -> None:
    content = [{"type": "input_json", "data": data}]
    body = {"model": BASE_NAME, "input": [{"role": "user", "content": content}], "questions": [PREDICATE]}
    assert words in error_of(client.post("/v1/decisions", json=body), 422)["message"]


def test_what_openai_knows_of_caches_is_ignored(client: httpx.Client) -> None:
    part = {"type": "input_text", "text": INPUT, "prompt_cache_breakpoint": {"mode": "explicit"}}
    found = decide(
        client,
        input=[{"role": "user", "content": [part]}],
        questions=[PREDICATE],
        prompt_cache_key="k",
        prompt_cache_options={"mode": "implicit", "ttl": "30m"},
        safety_identifier="s",
        user="u",
    )
    assert found["answers"] == decide(client, questions=[PREDICATE])["answers"]


def test_openais_client_parses_every_answer_and_its_tool_runner_runs(url: str) -> None:
    http = httpx.Client(trust_env=False)
    done: list[str] = []

    def candidates(_: Any) -> list[Any]:
        action = {"id": "film", "description": "look", "execute": lambda: done.append("film")}
        other = {"id": "food", "description": "eat", "execute": lambda: done.append("food")}
        finish: Any = {"id": "é", "description": "end", "done": True}
        return [*((action, other) if len(done) < 2 else ()), finish]

    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", http_client=http) as client:
        questions: Any = [*QUESTIONS, PREDICATE]
        decision = client.decisions.create(model=BASE_NAME, input=INPUT, questions=questions)
        assert [answer.type for answer in decision.answers] == ["predicate", "choice", "score", "predicate"]
        assert [answer.name for answer in decision.answers] == [None, "which", "stars", None]
        assert decision.usage.total_tokens > 0
        runner = DecisionsToolRunner(observe=lambda: "a", candidates=candidates, verify=lambda _: True)
        found = runner.run(client, {"model": BASE_NAME, "input": "go"})
        assert found["status"] == "verified"
        assert found["completed_candidate_ids"] == done
