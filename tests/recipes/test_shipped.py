"""What ships: the base loads and is small, and PEFT's own generation meets the examples of every task."""

import json
import re
from pathlib import Path

import pytest
from safetensors import safe_open

from app.cli.scoring import read_items
from app.serving.publishing.bundle import read_bundle
from app.store.importers import import_prompt
from app.store.prompt_store import open_store
from demo.recipes import heldout
from demo.recipes.demos import DEMOS
from demo.recipes.measure import WITH_AT_LEAST, WITHOUT_BELOW, table_row
from demo.recipes.oracle import answers, greedy, load_base, load_task
from demo.recipes.pretrain import SIZE_LIMIT
from demo.recipes.tasks import BASE_NAME, LEARNED, TASKS, TaskRecipe, manifest, template

ROOT = Path(__file__).parents[2]
BASE = ROOT / BASE_NAME
PROMPTS = ROOT / DEMOS["demo-causal"].prompts
HELDOUT = ROOT / heldout.HELDOUT
each_task = pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)


def test_base_is_small_and_in_bf16():
    assert sum(file.stat().st_size for file in BASE.iterdir()) <= SIZE_LIMIT
    with safe_open(BASE / "model.safetensors", "pt") as weights:
        assert {weights.get_slice(name).get_dtype() for name in weights.keys()} == {"BF16"}  # noqa: SIM118  # not a mapping


def test_base_without_a_prompt_just_continues():
    model, tokenizer = load_base(BASE)
    for recipe in LEARNED:
        for text, right in recipe.examples:
            output = greedy(model, tokenizer, f"{text}\n", 24)
            assert output
            assert output != right


@each_task
def test_peft_meets_the_examples(task):
    assert json.loads((PROMPTS / task.name / "task.json").read_text()) == manifest(task)
    model, tokenizer = load_task(task, BASE, PROMPTS)
    assert answers(task, model, tokenizer, [text for text, _ in task.examples]) == [
        output for _, output in task.examples
    ]


def test_a_prompt_does_not_name_the_machine_it_was_trained_on():
    files = [*BASE.glob("*.json"), *PROMPTS.rglob("*.json")]
    assert len(files) >= 4 + 2 * len(LEARNED) + (len(TASKS) - len(LEARNED))
    for file in files:
        assert not re.search(r'"(/|[A-Z]:\\)[\w./\\-]+', file.read_text()), file


@each_task
def test_the_store_serves_what_was_trained(task):
    bundle = read_bundle(PROMPTS / task.name)
    live = open_store(ROOT / "prompts_store").resolve(task.name)
    if isinstance(task, TaskRecipe):
        assert live.prompt_digest == import_prompt(bundle.files).prompt.digest
    else:
        assert live.prompt_digest is None
    assert live.template == template(task)
    assert len(live.examples) == len(task.examples)
    assert list(live.choices) == list(task.choices)
    assert live.provenance["uploader"] == "make demo"
    assert live.base == {"name": BASE_NAME}


def test_every_shipped_prompt_is_a_task_and_the_other_way_round():
    assert {path.name for path in PROMPTS.iterdir()} == {task.name for task in TASKS}


@each_task
def test_the_heldout_files_are_what_the_recipe_makes(task):
    for name, text in heldout.files(task).items():
        assert (HELDOUT / name).read_text() == text
        assert len(read_items(HELDOUT / name)) == text.count("\n")


@each_task
def test_the_measured_figures_pass_the_bars(task):
    """They are `make demo`'s own; these are the figures that the documents quote."""
    measured = json.loads((BASE / "results.json").read_text())[task.name]
    assert measured["with task"][task.bar]["total"] >= 200
    assert measured["with task"][task.bar]["share"] >= WITH_AT_LEAST
    assert measured["without"][task.bar]["share"] < WITHOUT_BELOW
    assert measured["outputs_that_differ_from_peft"] == 0
    for document in (ROOT / "README.md", BASE / "README.md"):
        assert table_row(task.name, measured) in document.read_text().splitlines(), document
