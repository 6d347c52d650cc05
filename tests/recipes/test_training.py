"""Prompt training moves the prompt and nothing else; pretraining can be stopped and goes on."""

from dataclasses import replace

import pytest
import torch
from transformers import AutoTokenizer

from demo.recipes import pretrain
from demo.recipes.bases import BASES
from demo.recipes.batches import Encoded
from demo.recipes.prompts import causal_batch, save, train
from demo.recipes.schedule import PretrainConfig, batches_of, learning_rate
from demo.recipes.tasks import BASE_NAME, learned
from tests.recipes.test_shipped import ROOT


def shrunk(name):
    """A base of the same family, too small to learn anything."""
    torch.manual_seed(0)
    shape = BASES[name].make_model().config
    for key in ("hidden_size", "d_model"):
        if hasattr(shape, key):
            setattr(shape, key, 16)
    small = {"intermediate_size": 32, "d_ff": 32, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
    for key, value in (small | {"head_dim": 4, "d_kv": 4, "num_layers": 2, "num_hidden_layers": 2}).items():
        if key in shape.to_dict():
            setattr(shape, key, value)
    return type(BASES[name].make_model())(shape)


@pytest.fixture
def tiny():
    return shrunk("demo-causal")


@pytest.mark.parametrize("name", ["sentiment", "intent", "table-to-text"])
def test_the_base_stays_frozen(tiny, name, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(ROOT / BASE_NAME)
    before = {key: value.clone() for key, value in tiny.state_dict().items()}
    recipe = replace(learned(name), steps=2, num_examples=8, batch_size=4)
    model = train(recipe, tiny, tokenizer)
    after = model.get_base_model().state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)
    save(recipe, model, tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    assert f'"base_model_name_or_path": "{BASE_NAME}"' in (tmp_path / "adapter_config.json").read_text()


def test_only_outputs_are_scored():
    batch = causal_batch([Encoded([5, 6, 7], [], [8, 0], 1.0), Encoded([5], [], [9, 0], 1.0)])
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 0], [5, 9, 0, 1, 1]]
    assert batch["labels"].tolist() == [[-100, -100, -100, 8, 0], [-100, 9, 0, -100, -100]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]


def test_learning_rate_warms_up_and_decays():
    config = PretrainConfig(steps=1000)
    rates = [learning_rate(config, step) for step in range(config.steps)]
    assert rates[config.warmup - 1] == config.learning_rate == max(rates)
    assert rates[-1] == pytest.approx(config.learning_rate * config.final_share, rel=0.01)


def test_every_row_is_taken_once_an_epoch():
    order = batches_of(12, PretrainConfig(steps=6, rows_per_step=4))
    assert sorted(order.flatten()[:12].tolist()) == list(range(12))
    assert torch.equal(order, batches_of(12, PretrainConfig(steps=6, rows_per_step=4)))


@pytest.mark.parametrize("name", BASES)
def test_a_stopped_pretraining_goes_on_where_it_was(name, tmp_path, monkeypatch):
    base = replace(BASES[name], make_model=lambda: shrunk(name))
    config = PretrainConfig(steps=4, rows_per_step=4, num_documents=200, checkpoint_every=2)
    for folder in ("whole", "stopped"):
        (tmp_path / folder).mkdir()
    whole = pretrain.pretrain(base, config, tmp_path / "whole")

    class Stopped(Exception):
        pass

    def fail(*arguments):
        if arguments[1] == 2:
            raise Stopped
        return learning_rate(*arguments)

    monkeypatch.setattr(pretrain, "learning_rate", fail)
    with pytest.raises(Stopped):
        pretrain.pretrain(base, config, tmp_path / "stopped")
    monkeypatch.setattr(pretrain, "learning_rate", learning_rate)
    resumed = pretrain.pretrain(base, config, tmp_path / "stopped")
    for key, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[key]), key
