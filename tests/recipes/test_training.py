"""Prompt training moves the prompt and nothing else; pretraining can be stopped and goes on."""

from dataclasses import replace

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from demo.recipes import pretrain
from demo.recipes.pretrain import PretrainConfig, batches_of, learning_rate
from demo.recipes.prompts import collate, save, train
from demo.recipes.rows import Rows
from demo.recipes.tasks import BASE_NAME, learned
from tests.recipes.test_shipped import ROOT


@pytest.fixture
def tiny():
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=1024,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            bos_token_id=None,
            eos_token_id=0,
            pad_token_id=1,
        )
    )


@pytest.mark.parametrize("name", ["sentiment", "intent", "table-to-text"])
def test_the_base_stays_frozen(tiny, name, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(ROOT / BASE_NAME)
    before = {key: value.clone() for key, value in tiny.state_dict().items()}
    recipe = replace(learned(name), steps=2, num_examples=8, batch_size=4)
    model = train(recipe, tiny, tokenizer)
    after = model.get_base_model().state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)
    save(model, tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    assert f'"base_model_name_or_path": "{BASE_NAME}"' in (tmp_path / "adapter_config.json").read_text()


def test_only_outputs_are_scored():
    batch = collate([([5, 6, 7], [8, 0]), ([5], [9, 0])], pad_id=1)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 0], [5, 9, 0, 1, 1]]
    assert batch["labels"].tolist() == [[-100, -100, -100, 8, 0], [-100, 9, 0, -100, -100]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]


def test_learning_rate_warms_up_and_decays():
    config = PretrainConfig(steps=1000)
    rates = [learning_rate(config, step) for step in range(config.steps)]
    assert rates[config.warmup - 1] == config.learning_rate == max(rates)
    assert rates[-1] == pytest.approx(config.learning_rate * config.final_share, rel=0.01)


def test_every_row_is_taken_once_an_epoch():
    rows = Rows(torch.zeros(12, 4, dtype=torch.int16), torch.ones(12, 4))
    order = batches_of(rows, PretrainConfig(steps=6, rows_per_step=4))
    assert sorted(order.flatten()[:12].tolist()) == list(range(12))
    assert torch.equal(order, batches_of(rows, PretrainConfig(steps=6, rows_per_step=4)))


def test_a_stopped_pretraining_goes_on_where_it_was(tmp_path, monkeypatch, tiny):
    monkeypatch.setattr(pretrain, "model_config", lambda: tiny.config)
    config = PretrainConfig(steps=4, rows_per_step=2, num_documents=200, checkpoint_every=2)
    for folder in ("whole", "stopped"):
        (tmp_path / folder).mkdir()
    whole = pretrain.pretrain(config, tmp_path / "whole")

    class Stopped(Exception):
        pass

    def fail(*arguments):
        if arguments[1] == 2:
            raise Stopped
        return learning_rate(*arguments)

    monkeypatch.setattr(pretrain, "learning_rate", fail)
    with pytest.raises(Stopped):
        pretrain.pretrain(config, tmp_path / "stopped")
    monkeypatch.setattr(pretrain, "learning_rate", learning_rate)
    resumed = pretrain.pretrain(config, tmp_path / "stopped")
    for key, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[key]), key
