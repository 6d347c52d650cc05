"""Greedy exact match on held-out inputs: with the prompt, without, and with a text instruction instead.

The instructions are phrasings that pretraining did not see either.
"""

from __future__ import annotations

import argparse
import json
import math
import random
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import cast

import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from models.recipes.handwritten import BY_VARIANT
from models.recipes.instructions import phrasings
from models.recipes.prompts import load_base
from models.recipes.splits import Example, Split, distinct
from models.recipes.tasks import BASE_NAME, LEARNED, TEXT_ONLY, TaskRecipe, TextTask, learned

HELDOUT_SEED = 99
_LARGEST_BATCH = 32


@dataclass(frozen=True, slots=True)
class Score:
    """``exact`` of ``total`` outputs are right; ``low`` and ``high`` bound the share (Wilson, 95%)."""

    exact: int
    total: int
    covered: int | None  # outputs that hold every slot value; None where inputs have no slots

    @property
    def share(self) -> float:
        return self.exact / self.total

    def interval(self) -> tuple[float, float]:
        z, share = 1.96, self.share
        centre = share + z * z / (2 * self.total)
        spread = z * math.sqrt(share * (1 - share) / self.total + z * z / (4 * self.total**2))
        scale = 1 + z * z / self.total
        return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)


def heldout(task: TaskRecipe | TextTask, count: int) -> list[Example]:
    """``count`` inputs that neither pretraining nor prompt training saw."""
    return distinct(task.make, Split.HELDOUT, count, HELDOUT_SEED)


@torch.no_grad()
def greedy(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: list[str],
    max_new_tokens: int,
) -> list[str]:
    """Outputs in the order of ``texts``. Only inputs of equal length share a batch, so nothing is padded."""
    groups: dict[int, list[tuple[int, list[int]]]] = defaultdict(list)
    for index, text in enumerate(texts):
        ids = tokenizer(text, add_special_tokens=False).input_ids
        groups[len(ids)].append((index, ids))
    outputs = [""] * len(texts)
    for group in groups.values():
        for begin in range(0, len(group), _LARGEST_BATCH):
            part = group[begin : begin + _LARGEST_BATCH]
            for (index, _), text in zip(part, _generate(model, tokenizer, part, max_new_tokens), strict=True):
                outputs[index] = text
    return outputs


def _generate(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    part: list[tuple[int, list[int]]],
    max_new_tokens: int,
) -> list[str]:
    ids = torch.tensor([row for _, row in part])
    generate = cast(Callable[..., torch.Tensor], model.generate)
    made = generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_new_tokens, do_sample=False
    )
    return [str(tokenizer.decode(row, skip_special_tokens=True)) for row in made[:, ids.shape[1] :]]


def score(task: TaskRecipe | TextTask, examples: list[Example], outputs: list[str]) -> Score:
    """Count exact outputs, and outputs that hold every slot value."""
    exact = sum(
        output == example.answers[task.variant] for example, output in zip(examples, outputs, strict=True)
    )
    covered = sum(
        all(slot in output for slot in example.slots)
        for example, output in zip(examples, outputs, strict=True)
    )
    return Score(exact, len(examples), covered if any(example.slots for example in examples) else None)


def report(
    recipe: TaskRecipe,
    base: PreTrainedModel,
    prompted: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    count: int,
) -> dict[str, Score]:
    """Scores with the prompt, without, with a text instruction; with the prompt on hand-written inputs.

    ``base`` must be another copy than the one in ``prompted``.
    """
    examples = heldout(recipe, count)
    bare = [f"{example.text}\n" for example in examples]
    rng = random.Random(HELDOUT_SEED)
    instructed = [f"{rng.choice(phrasings(recipe.variant, heldout=True))}\n{text}" for text in bare]
    outputs = {
        "with prompt": greedy(prompted, tokenizer, bare, recipe.max_new_tokens),
        "without": greedy(base, tokenizer, bare, recipe.max_new_tokens),
        "instruction": greedy(base, tokenizer, instructed, recipe.max_new_tokens),
    }
    scores = {name: score(recipe, examples, texts) for name, texts in outputs.items()}
    if recipe.variant in BY_VARIANT:
        foreign = BY_VARIANT[recipe.variant]()
        texts = [f"{example.text}\n" for example in foreign]
        scores["handwritten"] = score(
            recipe, foreign, greedy(prompted, tokenizer, texts, recipe.max_new_tokens)
        )
    return scores


def report_text_task(
    task: TextTask, base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, count: int
) -> dict[str, Score]:
    """The same of a task that is an instruction alone."""
    examples = heldout(task, count)
    bare = [f"{example.text}\n" for example in examples]
    instructed = [f"{task.instruction}\n{text}" for text in bare]
    return {
        "with prompt": score(task, examples, greedy(base, tokenizer, instructed, task.max_new_tokens)),
        "without": score(task, examples, greedy(base, tokenizer, bare, task.max_new_tokens)),
    }


def show(name: str, scores: dict[str, Score]) -> str:
    """One line of a task: shares, intervals and coverage."""
    cells = []
    for label, result in scores.items():
        low, high = result.interval()
        slots = "" if result.covered is None else f", slots {result.covered}"
        cells.append(f"{label} {result.exact}/{result.total} [{low:.1%}, {high:.1%}]{slots}")
    return f"{name:14} " + "; ".join(cells)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", type=Path, default=Path(BASE_NAME))
    parser.add_argument("--prompts", type=Path, default=Path("build/demo/prompts"))
    parser.add_argument("--count", type=int, default=300)
    parser.add_argument("--json", type=Path)
    parser.add_argument("tasks", nargs="*", help="default: all of them")
    arguments = parser.parse_args()
    base, tokenizer = load_base(arguments.base)
    results: dict[str, dict[str, Score]] = {}
    for name in arguments.tasks or [recipe.name for recipe in LEARNED]:
        prompted = PeftModel.from_pretrained(load_base(arguments.base)[0], arguments.prompts / name).eval()
        results[name] = report(learned(name), base, prompted, tokenizer, arguments.count)
        print(show(name, results[name]), flush=True)
    for task in () if arguments.tasks else TEXT_ONLY:
        results[task.name] = report_text_task(task, base, tokenizer, arguments.count)
        print(show(task.name, results[task.name]), flush=True)
    if arguments.json:
        shown = {
            name: {label: asdict(value) for label, value in scores.items()}
            for name, scores in results.items()
        }
        arguments.json.write_text(json.dumps(shown, indent=2) + "\n")


if __name__ == "__main__":
    main()
