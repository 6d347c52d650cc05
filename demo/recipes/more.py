"""What the demo has beside its tasks: versions that answer together, and a task for any question.

    python -m demo.recipes.more demo-causal

More prompts for ``sentiment``, each of another method or length, from another seed, on other examples: they
become versions of it, and its alias ``ensemble`` means all of them, while ``live`` stays where it is. ``ask``
takes its instruction from each request, which is how ``/v1/decisions`` puts questions to it. A version of
``arithmetic`` was trained on the expressions of ``reduce``, in one pass: what a chain must be compared with.
"""

from __future__ import annotations

import argparse
import asyncio
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from app.main import assemble
from app.serving.publishing.bundle import read_bundle
from app.serving.publishing.publisher import PublishingService
from app.serving.publishing.upload import NO_ALIAS, Upload
from app.settings import Settings
from app.store.prompt_store import open_store
from app.store.traffic_split import EnsembleTarget
from app.training.base import load_training_base
from demo.recipes.demos import DEMOS, Demo
from demo.recipes.prompts import save, train
from demo.recipes.tasks import BASE_NAME, TaskRecipe, learned, manifest

DIRECTORY = Path("demo/ensemble")
TASK = "sentiment"
ALIAS = "ensemble"
_SHIPPED = learned(TASK)
MEMBERS: dict[str, TaskRecipe] = {
    "prefix": replace(_SHIPPED, kind="prefix-tuning", learning_rate=0.003, steps=300, start="", seed=101),
    "p-tuning": replace(_SHIPPED, kind="p-tuning", learning_rate=0.005, steps=300, start="", seed=102),
    "short": replace(_SHIPPED, num_virtual_tokens=8, start="Did the writer like it? Yes or no.", seed=103),
    "long": replace(_SHIPPED, num_virtual_tokens=32, start="Sentiment analysis:", seed=104),
}
ONE_PASS_DIRECTORY = Path("demo/one-pass")
ONE_PASS_ALIAS = "deep"
_REDUCE = learned("reduce")
ONE_PASS = replace(
    learned("arithmetic"),
    make=_REDUCE.make,
    kind=_REDUCE.kind,
    learning_rate=_REDUCE.learning_rate,
    steps=_REDUCE.steps,
    num_virtual_tokens=_REDUCE.num_virtual_tokens,
    num_examples=_REDUCE.num_examples,
    start="",
)
ASK = "ask"
_ASKED: dict[str, Any] = {
    "template": "{instructions}\n{text}\n",
    "defaults": {"max_new_tokens": 16},
    "examples": [
        {
            "inputs": {
                "instructions": "Which aspect does the review talk about?",
                "text": "The waiter was rude.",
            },
            "expected": "service",
        },
        {
            "inputs": {
                "instructions": "Is this review positive or negative?",
                "text": "The waiter was rude.",
            },
            "expected": "negative",
        },
    ],
    "notes": "An instruction of the request's own, and no tensors. Recipe: demo/recipes/more.py.",
    "base": {"name": BASE_NAME, "revision": None},
}


def build(target: Path, recipe: TaskRecipe) -> None:
    """Train one and write what ``promptplex push`` takes."""
    target.mkdir(parents=True, exist_ok=True)
    base = load_training_base(recipe.base, dtype="float32")
    save(recipe, train(recipe, base), base, target)
    (target / "task.json").write_text(json.dumps(manifest(recipe), indent=2, ensure_ascii=False) + "\n")


async def publish(publishing: PublishingService, live: int) -> list[int]:
    """Publish all; return the versions that answer together: the live one, then the members."""
    await publishing.upload(ASK, Upload(files={}, task=_ASKED, who="make demo"))
    deep = replace(read_bundle(ONE_PASS_DIRECTORY), who="make demo", alias=ONE_PASS_ALIAS)
    await publishing.upload(ONE_PASS.name, deep)
    numbers = [live]
    for name in MEMBERS:
        upload = replace(read_bundle(DIRECTORY / name), who="make demo", alias=NO_ALIAS)
        numbers.append((await publishing.upload(TASK, upload)).version.version)
    target = EnsembleTarget(dict.fromkeys(numbers, 1))
    await publishing.change(lambda store: store.move_alias(TASK, ALIAS, target, who="make demo"))
    return numbers


def publish_all(demo: Demo) -> None:
    """Publish into the demo's store, in float32, where the served numbers are PEFT's own."""
    live = open_store(demo.store).resolve(TASK).version
    settings = Settings(model=str(demo.path), store=demo.store, dtype="float32", device="cpu")
    services = assemble(settings, progress=print, on_failure=lambda _: None)
    try:
        print(f"{TASK}@{ALIAS} is versions {asyncio.run(publish(services.publishing, live))}")
    finally:
        services.close()


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("demo", choices=["demo-causal"])
    demo = DEMOS[parser.parse_args().demo]
    for name, recipe in MEMBERS.items():
        build(DIRECTORY / name, recipe)
    build(ONE_PASS_DIRECTORY, ONE_PASS)
    publish_all(demo)


if __name__ == "__main__":
    main()
