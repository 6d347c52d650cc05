"""What ships: the base loads and is small, and PEFT's own generation meets the examples of every task."""

import json
import re
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from app.store.importers import import_prompt
from app.store.local import LocalStore
from models.recipes.build import SIZE_LIMIT
from models.recipes.evaluate import greedy
from models.recipes.tasks import BASE_NAME, LEARNED, manifest

ROOT = Path(__file__).parents[2]
BASE = ROOT / BASE_NAME
PROMPTS = ROOT / "models" / "demo-prompts"
SHIPPED = [recipe for recipe in LEARNED if recipe.ships]


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(BASE)


def base_model():
    return AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)


def test_base_is_small_and_in_bf16():
    assert sum(file.stat().st_size for file in BASE.iterdir()) <= SIZE_LIMIT
    with safe_open(BASE / "model.safetensors", "pt") as weights:
        assert {weights.get_slice(name).get_dtype() for name in weights.keys()} == {"BF16"}  # noqa: SIM118


def test_base_without_a_prompt_just_continues(tokenizer):
    inputs = [f"{text}\n" for recipe in SHIPPED for text, _ in recipe.examples]
    expected = [output for recipe in SHIPPED for _, output in recipe.examples]
    outputs = greedy(base_model(), tokenizer, inputs, 24)
    assert all(output and output != right for output, right in zip(outputs, expected, strict=True))


@pytest.mark.parametrize("recipe", SHIPPED, ids=lambda recipe: recipe.name)
def test_peft_meets_the_examples(recipe, tokenizer):
    directory = PROMPTS / recipe.name
    task = json.loads((directory / "task.json").read_text())
    assert task == manifest(recipe)
    model = PeftModel.from_pretrained(base_model(), directory).eval()
    for example in task["examples"]:
        text = task["template"].format(text=example["inputs"])
        assert greedy(model, tokenizer, [text], task["defaults"]["max_new_tokens"]) == [example["expected"]]


def test_a_prompt_does_not_name_the_machine_it_was_trained_on():
    files = [*BASE.glob("*.json"), *PROMPTS.rglob("*.json")]
    assert len(files) >= 4 + 2 * len(SHIPPED)
    for file in files:
        assert not re.search(r'"(/|[A-Z]:\\)[\w./\\-]+', file.read_text()), file


@pytest.mark.parametrize("recipe", SHIPPED, ids=lambda recipe: recipe.name)
def test_the_store_serves_what_was_trained(recipe):
    directory = PROMPTS / recipe.name
    files = [(directory / name).read_bytes() for name in ("adapter_model.safetensors", "adapter_config.json")]
    trained, _ = import_prompt(*files)
    live = LocalStore(ROOT / "prompts_store").resolve(recipe.name)
    assert live.prompt_digest == trained.digest
    assert live.template == manifest(recipe)["template"]


def test_every_shipped_prompt_is_a_task_and_the_other_way_round():
    assert {path.name for path in PROMPTS.iterdir()} == {recipe.name for recipe in SHIPPED}
