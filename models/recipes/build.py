"""Make the demo from nothing: ``python -m models.recipes.build``, 30 to 40 minutes on two quiet cores.

It writes ``models/demo-causal`` and ``models/demo-prompts/<task>``, measures them on
held-out inputs, and publishes the prompts in ``prompts_store``.
Work files and checkpoints stay in ``build/demo``: a build that was stopped goes on where it was. The seed
is fixed, but the bytes differ from processor to processor: floating-point sums are taken in other orders.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

from models.recipes.evaluate import Score, greedy, report, report_text_task, show
from models.recipes.pretrain import PretrainConfig, export
from models.recipes.prompts import load_base, save, train
from models.recipes.publish import PROMPTS, STORE, publish_all
from models.recipes.tasks import BASE_NAME, LEARNED, TEXT_ONLY, TaskRecipe, manifest

SIZE_LIMIT = 12_000_000  # bytes of the base in the tree
# Keep freed pages instead of returning them to the system after each step: 15% more tokens per second.
_ALLOCATOR = {
    "MALLOC_MMAP_THRESHOLD_": str(2**32),
    "MALLOC_TRIM_THRESHOLD_": str(2**33),
    "MALLOC_TOP_PAD_": str(2**28),
    "OMP_WAIT_POLICY": "passive",
}


def run_pretraining(work: Path, steps: int) -> None:
    """In a process of its own: the allocator reads its settings once, when a process starts."""
    command = [sys.executable, "-m", "models.recipes.pretrain", "--work", str(work), "--steps", str(steps)]
    subprocess.run(command, check=True, env={**os.environ, **_ALLOCATOR})


def build_prompt(recipe: TaskRecipe, base_path: Path, target: Path, count: int) -> dict[str, Score]:
    """Train, write, and measure one prompt. ValueError where an example of its ``task.json`` is not met."""
    model, tokenizer = load_base(base_path)
    prompted = train(recipe, model, tokenizer)
    save(prompted, target)
    (target / "task.json").write_text(json.dumps(manifest(recipe), indent=2, ensure_ascii=False) + "\n")
    inputs = [f"{text}\n" for text, _ in recipe.examples]
    for (text, expected), output in zip(
        recipe.examples, greedy(prompted, tokenizer, inputs, recipe.max_new_tokens), strict=True
    ):
        if output != expected:
            raise ValueError(f"{recipe.name}: {text!r} gave {output!r}, expected {expected!r}")
    return report(recipe, load_base(base_path)[0], prompted, tokenizer, count)


def build_prompts(base_path: Path, work: Path, count: int, every: bool) -> dict[str, dict[str, Score]]:
    """All learned tasks (those that do not ship go to ``work``), then the text-only ones."""
    results: dict[str, dict[str, Score]] = {}
    for recipe in LEARNED:
        if not (every or recipe.ships):
            continue
        target = (PROMPTS if recipe.ships else work / "prompts") / recipe.name
        began = time.monotonic()
        results[recipe.name] = build_prompt(recipe, base_path, target, count)
        print(show(recipe.name, results[recipe.name]), f" {time.monotonic() - began:.0f} s", flush=True)
    if every:
        base, tokenizer = load_base(base_path)
        for task in TEXT_ONLY:
            results[task.name] = report_text_task(task, base, tokenizer, count)
            print(show(task.name, results[task.name]), flush=True)
    return results


def check_size(base_path: Path) -> int:
    """Bytes of the base; ValueError above the limit."""
    size = sum(file.stat().st_size for file in base_path.iterdir())
    if size > SIZE_LIMIT:
        raise ValueError(f"{base_path} takes {size} bytes, at most {SIZE_LIMIT} are allowed")
    return size


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("build/demo"))
    parser.add_argument("--base", type=Path, default=Path(BASE_NAME))
    parser.add_argument("--steps", type=int, default=PretrainConfig().steps)
    parser.add_argument("--count", type=int, default=300, help="held-out inputs per task")
    parser.add_argument("--only-prompts", action="store_true", help="keep the base, train the prompts again")
    parser.add_argument("--all-tasks", action="store_true", help="also the tasks that do not ship yet")
    arguments = parser.parse_args()
    began = time.monotonic()
    arguments.work.mkdir(parents=True, exist_ok=True)
    if not arguments.only_prompts:
        print(
            "Expected: 1 minute of corpus, 25 of pretraining, 1 to 2 per prompt on two quiet cores.",
            flush=True,
        )
        run_pretraining(arguments.work, arguments.steps)
        export(arguments.work, arguments.base)
        print(f"{arguments.base}: {check_size(arguments.base):,} bytes", flush=True)
    results = build_prompts(arguments.base, arguments.work, arguments.count, arguments.all_tasks)
    shown = {
        task: {label: asdict(value) for label, value in scores.items()} for task, scores in results.items()
    }
    (arguments.work / "results.json").write_text(json.dumps(shown, indent=2) + "\n")
    publish_all(arguments.base, PROMPTS, STORE)
    print(f"{time.monotonic() - began:.0f} s in all", flush=True)


if __name__ == "__main__":
    main()
