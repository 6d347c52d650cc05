"""What ships: the bases load and are small, and PEFT's own generation meets the examples of every task."""

import json
import re
from pathlib import Path

import pytest
from safetensors import safe_open

from app.serving.publishing.bundle import read_bundle
from app.store.importers import import_prompt
from app.store.prompt_store import open_store
from app.store.traffic_split import EnsembleTarget
from app.training.readers import read_examples
from demo.recipes import heldout, more
from demo.recipes.demos import DEMOS
from demo.recipes.measure import WITHOUT_BELOW, table_row
from demo.recipes.oracle import answers, greedy, load_base, load_task
from demo.recipes.pretrain import SIZE_LIMIT
from demo.recipes.program_tables import tables
from demo.recipes.tasks import BASE_NAME, TASKS, TaskRecipe, manifest, template

ROOT = Path(__file__).parents[2]
HELDOUT = ROOT / heldout.HELDOUT
CAUSAL = DEMOS["demo-causal"]
EVERY = [(demo, task) for demo in DEMOS.values() for task in demo.tasks]
each_demo = pytest.mark.parametrize("demo", DEMOS.values(), ids=DEMOS)
each_task = pytest.mark.parametrize(
    ("demo", "task"), EVERY, ids=[f"{demo.path.name}-{task.name}" for demo, task in EVERY]
)


@each_demo
def test_base_is_small_and_in_bf16(demo):
    base = ROOT / demo.path
    assert sum(file.stat().st_size for file in base.iterdir()) <= SIZE_LIMIT
    with safe_open(base / "model.safetensors", "pt") as weights:
        assert {weights.get_slice(name).get_dtype() for name in weights.keys()} == {"BF16"}  # noqa: SIM118  # not a mapping


@each_demo
def test_base_without_a_prompt_does_no_task(demo):
    model, tokenizer = load_base(ROOT / demo.path)
    for recipe in demo.tasks:
        if isinstance(recipe, TaskRecipe):
            for text, right in recipe.examples:
                assert greedy(model, tokenizer, f"{text}\n", 24) not in ("", right)


@each_task
def test_peft_meets_the_examples(demo, task):
    """For a three-site prefix the reference implementation does."""
    directory = ROOT / demo.prompts / task.name
    assert json.loads((directory / "task.json").read_text()) == manifest(task)
    model, tokenizer = load_task(task, ROOT / demo.path, ROOT / demo.prompts)
    assert answers(task, model, tokenizer, [text for text, _ in task.examples]) == [
        output for _, output in task.examples
    ]


@each_demo
def test_a_prompt_does_not_name_the_machine_it_was_trained_on(demo):
    files = [*(ROOT / demo.path).glob("*.json"), *(ROOT / demo.prompts).rglob("*.json")]
    assert len(files) >= 4 + len(demo.tasks)
    for file in files:
        assert not re.search(r'"(/|[A-Z]:\\)[\w./\\-]+', file.read_text()), file


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_the_store_serves_what_was_trained(task):
    """The store that ships is the causal base's."""
    bundle = read_bundle(ROOT / CAUSAL.prompts / task.name)
    live = open_store(ROOT / CAUSAL.store).resolve(task.name)
    if isinstance(task, TaskRecipe):
        assert live.prompt_digest == import_prompt(bundle.files).prompt.digest
    else:
        assert live.prompt_digest is None
    assert live.template == template(task)
    assert len(live.examples) == len(task.examples)
    assert list(live.choices) == list(task.choices)
    assert live.provenance["uploader"] == "make demo"
    assert live.base == {"name": BASE_NAME}


def test_the_ensemble_is_the_live_version_and_all_members():
    history = open_store(ROOT / CAUSAL.store).history(more.TASK)
    target = history.aliases[more.ALIAS]
    assert isinstance(target, EnsembleTarget)
    versions = [history.version(number) for number in sorted(target.weights)]
    trained = [CAUSAL.prompts / more.TASK, *(more.DIRECTORY / name for name in more.MEMBERS)]
    digests = [import_prompt(read_bundle(ROOT / path).files).prompt.digest for path in trained]
    assert [version.prompt_digest for version in versions] == digests
    assert history.aliases["live"] == 1


def test_the_version_that_a_chain_is_compared_with_is_shipped():
    version = open_store(ROOT / CAUSAL.store).resolve(f"{more.ONE_PASS.name}@{more.ONE_PASS_ALIAS}")
    trained = import_prompt(read_bundle(ROOT / more.ONE_PASS_DIRECTORY).files).prompt
    assert version.prompt_digest == trained.digest
    assert trained.num_virtual_tokens == more.ONE_PASS.num_virtual_tokens


def test_the_figures_of_programs_are_of_300_inputs_each():
    measured = json.loads((ROOT / CAUSAL.path / "programs.json").read_text())
    assert set(measured) == {"chains", "votes", "ensembles", "instructions", "decisions"}
    totals = re.findall(r'"total": (\d+)', json.dumps(measured))
    assert set(totals) == {"300", "30"}  # thirty reviews are written by hand
    lines = (ROOT / CAUSAL.path / "README.md").read_text().splitlines()
    assert all(line in lines for table in tables(measured).values() for line in table)
    assert set(tables(measured)["chains"]) <= {*(ROOT / "README.md").read_text().splitlines()}


@each_demo
def test_every_shipped_prompt_is_a_task_and_the_other_way_round(demo):
    assert {path.name for path in (ROOT / demo.prompts).iterdir()} == {task.name for task in demo.tasks}


@each_task
def test_every_shipped_prompt_can_be_imported(demo, task):
    bundle = read_bundle(ROOT / demo.prompts / task.name)
    if isinstance(task, TaskRecipe):
        assert import_prompt(bundle.files).prompt.num_virtual_tokens == task.num_virtual_tokens
    assert bool(bundle.files) is isinstance(task, TaskRecipe)


@each_task
def test_the_heldout_files_are_what_the_recipe_makes(demo, task):
    for name, text in heldout.files(task).items():
        assert (HELDOUT / name).read_text() == text
        assert len(read_examples(HELDOUT / name)) == text.count("\n")


@each_task
def test_the_measured_figures_pass_the_bars(demo, task):
    """They are `make demo`'s own; these are the figures that the documents quote."""
    measured = json.loads((ROOT / demo.path / "results.json").read_text())[task.name]
    assert measured["with task"][task.bar]["total"] >= 200
    assert measured["with task"][task.bar]["share"] >= task.at_least
    assert measured["without"][task.bar]["share"] < WITHOUT_BELOW
    assert measured["outputs_that_differ_from_peft"] == 0
    documents = [ROOT / demo.path / "README.md", *([ROOT / "README.md"] if demo is CAUSAL else [])]
    for document in documents:
        assert table_row(task.name, measured) in document.read_text().splitlines(), document
