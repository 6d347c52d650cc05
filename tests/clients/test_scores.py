"""lm-evaluation-harness and GuideLLM, unchanged: they measure what PEFT says, and what was asked for."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from tests.clients.conftest import SOFT_TASK, TEXT_TASK, Served
from tests.clients.environments import command_of, python_program, run
from tests.clients.test_clients import PROMPT, TURNS, Client, expected_turns

pytestmark = pytest.mark.soak

PAIRS = [
    ("the film was", " great"),
    ("name: Blue Door | food:", " Thai | area"),
    ("a", " b c d e f"),
]


def log_likelihood(model: PeftModel, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    """What PEFT gives the continuation at batch size 1, and whether greedy decoding would say it."""
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([context + continuation])).logits[0]
    rows = logits[-len(continuation) - 1 : -1].log_softmax(-1)
    ids = torch.tensor(continuation)
    return float(rows.gather(1, ids[:, None]).sum()), bool((rows.argmax(-1) == ids).all())


def test_lm_evaluation_harness_scores_as_peft_does(served: Served) -> None:
    arguments = (served.url, SOFT_TASK, PROMPT, json.dumps(TURNS), str(served.tokenizer), json.dumps(PAIRS))
    done = run(python_program("lm_eval", "lm_evaluation_harness", *arguments))
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    for (context, continuation), told in zip(PAIRS, found["loglikelihoods"], strict=True):
        before = served.stack.tokenizer(context, add_special_tokens=False)["input_ids"]  # as the harness does
        whole = served.stack.tokenizer(context + continuation, add_special_tokens=False)["input_ids"]
        expected = log_likelihood(served.soft, before, whole[len(before) :])
        assert told[0] == pytest.approx(expected[0], abs=1e-4)
        assert told[1] == expected[1]
    ids = served.stack.tokenizer(PROMPT, add_special_tokens=False)["input_ids"]
    body = {"model": SOFT_TASK, "prompt": ids, "max_tokens": 8, "temperature": 0, "stop": ["\n"]}
    assert found["generate"] == [served.post("/v1/completions", body).json()["choices"][0]["text"]]
    assert "404" in found["error"][1]
    assert found["turns"] == expected_turns(served, Client(python_program, (), SOFT_TASK, True, ("", "")))


def benchmark(
    served: Served, folder: Path, backend: str, data: str = "", model: str = TEXT_TASK
) -> dict[str, Any]:
    """What GuideLLM reports of two requests of about 16 tokens, each to be answered with exactly 8."""
    report = folder / "report.json"
    done = run(
        [
            *(command_of("guidellm", "guidellm"), "run", "--disable-console"),
            *("--backend", f"kind=openai_http,target={served.url},model={model}{backend}"),
            *("--profile", "kind=synchronous", "--constraint", "kind=max_requests,count=2"),
            *("--tokenizer", f"kind=hf_auto,model={served.tokenizer}"),
            *("--data", f"kind=synthetic_text,prompt_tokens=16,output_tokens=8{data}"),
            *("--output", f"kind=json,path={report}"),
        ]
    )
    assert done.returncode == 0, done.stderr[-3000:]
    measured: dict[str, Any] = json.loads(report.read_text())["benchmarks"][0]["requests"]
    return measured


@pytest.mark.parametrize(
    ("backend", "data"),
    [("", ""), (",stream=false", ""), (",request_format=/v1/completions", ""), ("", ",turns=2")],
    ids=["stream", "whole", "completions", "turns"],
)
def test_guidellm_gets_what_it_asks_for(served: Served, tmp_path: Path, backend: str, data: str) -> None:
    """It sends `ignore_eos`, and counts by the usage that chunks carry."""
    measured = benchmark(served, tmp_path, backend, data)
    assert len(measured["successful"]) == 2, measured["errored"]
    assert not measured["errored"]
    assert [request["output_metrics"]["text_tokens"] for request in measured["successful"]] == [8, 8]


def test_guidellm_counts_errors(served: Served, tmp_path: Path) -> None:
    measured = benchmark(served, tmp_path, ",validate_backend=false", model="nothing")
    assert not measured["successful"]
    assert "404" in measured["errored"][0]["info"]["error"]
