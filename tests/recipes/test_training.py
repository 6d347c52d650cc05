"""Prompt training moves the prompt and nothing else; pretraining can be stopped and goes on."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from app.serving.publishing.bundle import read_bundle
from app.store.importers import import_prompt
from app.training.base import training_base
from app.training.prompted_model import PromptedModel
from app.training.prompts import new_prompt
from demo.recipes import pretrain, three_sites
from demo.recipes.bases import BASES
from demo.recipes.prompts import examples, save, settings, train
from demo.recipes.schedule import PretrainConfig, batches_of, learning_rate
from demo.recipes.seq2seq_tasks import BART_TASKS, T5_TASKS
from demo.recipes.tasks import learned
from tests.recipes.test_shipped import ROOT


def shrunk(name):
    """A base of the same family, too small to learn anything."""
    torch.manual_seed(0)
    shape = BASES[name].make_model().config
    for key in ("hidden_size", "d_model"):
        if hasattr(shape, key):
            setattr(shape, key, 16)
    small = {"intermediate_size": 32, "d_ff": 32, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
    for key, value in (small | {"head_dim": 4, "d_kv": 4, "num_layers": 3, "num_hidden_layers": 2}).items():
        if key in shape.to_dict():
            setattr(shape, key, value)
    return type(BASES[name].make_model())(shape)


def base_of(recipe, model):
    """What training takes, of a model that never was a file."""
    folder = ROOT / recipe.base
    return training_base(
        "another name",
        model.eval().requires_grad_(False),
        AutoTokenizer.from_pretrained(folder),
        eos_ids=frozenset({0}),
        fingerprint="",
        decoder_start_id=getattr(model.config, "decoder_start_token_id", None),
    )


RECIPES = [
    *(learned(name) for name in ("sentiment", "intent", "table-to-text")),
    *(task for task in T5_TASKS if task.name in ("when", "table-to-text")),
    BART_TASKS[0],
]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: f"{Path(recipe.base).name}-{recipe.name}")
def test_what_a_recipe_keeps_is_what_it_trained(recipe, tmp_path):
    recipe = replace(recipe, steps=2, num_examples=8, batch_size=4)
    base = base_of(recipe, shrunk(Path(recipe.base).name))
    before = {key: value.clone() for key, value in base.model.state_dict().items()}
    prompt = train(recipe, base)
    assert all(torch.equal(before[key], value) for key, value in base.model.state_dict().items())
    save(recipe, prompt, base, tmp_path)
    bundle = read_bundle(tmp_path)
    assert import_prompt(bundle.files, base.geometry).prompt.digest == prompt.digest
    assert {"README.md"}.isdisjoint(file.name for file in tmp_path.iterdir())
    for config in tmp_path.glob("*.json"):
        assert f'"base_model_name_or_path": "{recipe.base}"' in config.read_text()


def test_the_oracle_of_three_sites_reads_what_was_trained():
    recipe = replace(BART_TASKS[0], steps=1, num_examples=8, batch_size=4)
    model = shrunk("seq2seq-bart")
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.25)
    base = base_of(recipe, model)
    learned = new_prompt(settings(recipe), base)
    (example,) = examples(recipe, base)[:1]
    prefix = {name: tensor.detach() for name, tensor in learned.tensors().items()}
    source = torch.tensor([example.source])
    target = torch.tensor([[base.decoder_start_id, *example.target[:-1]]])
    with torch.no_grad():
        memory = three_sites.encode(base.model, source, torch.ones_like(source), prefix)
        theirs = three_sites.decode(base.model, target, memory, torch.ones_like(source), prefix)[0]
        ours = PromptedModel(base, learned).logits([example])
    torch.testing.assert_close(ours.log_softmax(-1), theirs.log_softmax(-1), rtol=0, atol=1e-4)


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
