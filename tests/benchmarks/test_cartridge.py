"""The benchmark of cartridges: its documents, its base before and after some steps, and a whole run."""

import argparse
import random
from pathlib import Path

import pytest
import torch

from app.training.base import load_training_base
from benchmarks.cartridge import trials
from benchmarks.cartridge.__main__ import measure
from benchmarks.cartridge.reading_base import Stage, make_model, make_reading_base
from benchmarks.cartridge.registers import TEMPLATE, WORDINGS, document_of, make_register, make_tokenizer

SHORT = (Stage(12, 12, 16, 120, 1.0),)


def test_a_line_is_seven_tokens_and_every_text_comes_back() -> None:
    tokenizer = make_tokenizer()
    facts = make_register(random.Random(0), 60)
    text = document_of(facts)
    assert len({(fact.role, fact.town) for fact in facts}) == 60
    assert len(tokenizer(text).input_ids) == 7 * 60
    for shown in (text, *(TEMPLATE.format(question=facts[0].question(each)) for each in WORDINGS)):
        assert tokenizer.decode(tokenizer(shown).input_ids) == shown


def test_the_heads_that_training_starts_from_look_at_the_right_person() -> None:
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    model = make_model(len(tokenizer)).eval()
    model.set_attn_implementation("eager")
    facts = make_register(random.Random(1), 20)
    found = []
    for number, fact in enumerate(facts):
        question = TEMPLATE.format(question=fact.question(WORDINGS[0]))
        ids = torch.tensor([tokenizer(document_of(facts) + question).input_ids])
        attention = model(input_ids=ids, output_attentions=True).attentions[1][0, :3, -1]
        found.append(attention[:, 7 * number + 5].max().item())
    assert sum(weight > 0.2 for weight in found) > 15


@pytest.mark.soak
def test_a_run_from_end_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trials, "_FACTS", 12)
    make_reading_base(tmp_path / "base", lambda _: None, SHORT)
    assert load_training_base(str(tmp_path / "base"), progress=lambda _: None).geometry.max_positions == 4096
    options = argparse.Namespace(
        base=tmp_path / "base", lengths=[8], questions=40, held_out=3, steps=2, learning_rate=0.02, seed=0
    )
    result = measure(options, tmp_path / "store")
    assert result["document_tokens"] == 84
    [cartridge] = result["cartridges"]
    assert cartridge["kv_bytes"]["cartridge"] * 84 == cartridge["kv_bytes"]["document"] * 8
    assert cartridge["first_token"]["ratio"] > 0
