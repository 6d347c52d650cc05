"""An encoder-decoder through the command line: served, pushed to, evaluated, validated."""

import json
from collections.abc import Callable
from pathlib import Path

import httpx2
import pytest
import torch
from transformers import AutoModelForSeq2SeqLM

from tests.api.server import hosted
from tests.oracle import tuned
from tests.seq2seq import greedy_seq2seq, peft_configs, source_tokenizer, tiny_seq2seq

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def t5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny T5 as a directory, with weights small enough for bfloat16."""
    directory = tmp_path_factory.mktemp("base") / "tiny-t5"
    model = tiny_seq2seq("t5_gated")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.4 if parameter.ndim > 1 else 1)
    model.save_pretrained(directory)
    source_tokenizer("t5_gated").save_pretrained(directory)
    return directory


def test_push_eval_and_validate(t5: Path, promptplex: Run, tmp_path: Path) -> None:
    base = AutoModelForSeq2SeqLM.from_pretrained(t5)
    model = tuned(base, peft_configs(base)["prefix"], seed=3)
    model.save_pretrained(tmp_path / "steered")
    data = tmp_path / "held-out.jsonl"
    lines = []
    for text in ("the film was great", "what a film"):
        tokens = greedy_seq2seq(model, source_tokenizer("t5_gated")(text)["input_ids"], 6).tokens
        expected = source_tokenizer("t5_gated").decode(tokens, skip_special_tokens=True)
        lines.append(json.dumps({"inputs": text, "expected": expected}))
    data.write_text("\n".join(lines))
    with hosted(model=str(t5), store=tmp_path / "store", dtype="float32") as url:
        status, out, err = promptplex("push", str(tmp_path / "steered"), "--server", url)
        assert status == 0, out + err
        evaluated = ("eval", "--task", "steered", "--data", str(data), "--max-new-tokens", "6")
        status, out, err = promptplex(*evaluated, "--server", url)
        assert (status, "2 of 2" in out) == (0, True), out + err
        info = httpx2.get(f"{url}/info", trust_env=False).json()
        assert (info["model_architecture"], info["num_encoder_layers"]) == ("t5", 3)
    status, out, err = promptplex("validate", str(tmp_path / "steered"), "--model", str(t5))
    assert status == 0, out + err
    assert "prefix of dec.self 4 virtual tokens" in out
    assert "fits tiny-t5" in out


def test_a_causal_adapter_is_refused(
    t5: Path, promptplex: Run, save_peft: Callable[..., Path], tmp_path: Path
) -> None:
    status, out, err = promptplex("validate", str(save_peft(tmp_path / "causal")), "--model", str(t5))
    assert status != 0
    assert "CAUSAL_LM" in out + err
