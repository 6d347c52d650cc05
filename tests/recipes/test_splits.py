"""Held-out inputs appear in neither of the other sets, and everything is decided by its seed."""

import random
import re

import pytest

from demo.recipes.corpus import SOURCES, documents
from demo.recipes.demos import DEMOS
from demo.recipes.instructions import TEMPLATES, phrasings
from demo.recipes.pairs import PAIR_SOURCES, pairs
from demo.recipes.splits import Split, distinct, draw, split_of

SEED = 7
TASKS = {task.name: task for demo in DEMOS.values() for task in demo.tasks}.values()
CORPUS = [document.text for document in documents(6000, seed=20260)]
PAIRS = [pair.leading + pair.source + pair.target for pair in pairs(6000, seed=20260)]
each_task = pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)


@each_task
def test_three_sets_of_a_task_share_no_input(task):
    sets = {split: distinct(task.make, split, 200, SEED) for split in Split}
    texts = {split: {example.text for example in examples} for split, examples in sets.items()}
    keys = {split: {example.key for example in examples} for split, examples in sets.items()}
    for one, other in (
        (Split.HELDOUT, Split.PROMPT),
        (Split.HELDOUT, Split.PRETRAIN),
        (Split.PROMPT, Split.PRETRAIN),
    ):
        assert not texts[one] & texts[other]
        assert not keys[one] & keys[other]


@each_task
def test_no_line_of_the_corpus_is_a_heldout_or_prompt_training_input(task):
    lines = {line for text in CORPUS + PAIRS for line in text.split("\n")}
    for split in (Split.HELDOUT, Split.PROMPT):
        assert not lines & {example.text for example in distinct(task.make, split, 300, SEED)}


def test_no_heldout_name_is_in_the_corpus():
    """Also not as a neighbour (`near[...]`), which is drawn from the pretraining names."""
    names = {name for text in CORPUS + PAIRS for name in re.findall(r"(?:name|near)\[([^\]]*)\]", text)}
    assert len(names) > 800
    assert {split_of("record", name) for name in names} == {Split.PRETRAIN}


@pytest.mark.parametrize("source", [PAIR_SOURCES[0], *SOURCES], ids=lambda source: source.make.__name__)
def test_a_seed_decides_the_examples(source):
    def drawn(seed):
        rng = random.Random(seed)
        return [draw(rng, source.make, Split.PRETRAIN) for _ in range(20)]

    assert drawn(1) == drawn(1)
    assert drawn(1) != drawn(2)


def test_a_seed_decides_the_corpus():
    assert list(documents(300, seed=20260)) == list(documents(300, seed=20260))
    assert list(documents(300, seed=1)) != list(documents(300, seed=2))
    assert list(pairs(300, seed=1)) == list(pairs(300, seed=1))


def test_about_the_promised_share_is_held_out():
    share = sum(split_of("review", f"text {number}") is Split.HELDOUT for number in range(4000)) / 4000
    assert 0.08 < share < 0.12


@pytest.mark.parametrize("variant", [name for name in TEMPLATES if name != "record_field"])
def test_some_phrasings_of_every_task_are_held_out(variant):
    pretrained, heldout = set(phrasings(variant)), set(phrasings(variant, heldout=True))
    assert pretrained
    assert heldout
    assert not pretrained & heldout


def test_heldout_phrasings_do_not_start_a_document():
    firsts = {text.split("\n")[0] for text in CORPUS + PAIRS}
    for variant in TEMPLATES:
        assert not firsts & set(phrasings(variant, heldout=True))
