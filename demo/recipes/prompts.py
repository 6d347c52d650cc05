"""Train prompts with PEFT on the frozen base; write what ``promptplex push`` and ``promptplex eval`` take.

A training example is ``virtual tokens`` + ``input\\n`` + ``output<eos>``; only the output is scored. The
inputs come from a split that pretraining never saw.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import Any, cast

import torch
from peft import (
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptLearningConfig,
    PromptTuningConfig,
    get_peft_model,
)
from torch.optim.lr_scheduler import CosineAnnealingLR
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from demo.recipes import heldout
from demo.recipes.oracle import answers, load_base
from demo.recipes.splits import Split, distinct
from demo.recipes.tasks import BASE_NAME, TASKS, Task, TaskRecipe, manifest

SEED = 7
PROMPTS = Path("demo/prompts")


def peft_config(recipe: TaskRecipe) -> PromptLearningConfig:
    """The PEFT configuration of a recipe."""
    common: dict[str, Any] = {
        "task_type": "CAUSAL_LM",
        "num_virtual_tokens": recipe.num_virtual_tokens,
    }
    if recipe.kind == "prompt-tuning":
        return PromptTuningConfig(**common)
    if recipe.kind == "p-tuning":
        return PromptEncoderConfig(encoder_hidden_size=256, **common)
    return PrefixTuningConfig(prefix_projection=True, encoder_hidden_size=256, **common)


def start_from_text(model: PeftModel, tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    """Let a soft prompt begin as the embeddings of ``text``, repeated to its length.

    PEFT's own text initialisation would record the tokenizer's path in the adapter's configuration.
    """
    encoder = model.prompt_encoder["default"]
    table = cast(torch.nn.Embedding, encoder.embedding).weight
    words = cast(PreTrainedModel, model.get_base_model()).get_input_embeddings()
    ids = tokenizer(text, add_special_tokens=False).input_ids
    ids = (ids * (len(table) // len(ids) + 1))[: len(table)]
    with torch.no_grad():
        table.copy_(words(torch.tensor(ids)))


def encode(
    recipe: TaskRecipe, tokenizer: PreTrainedTokenizerBase, seed: int
) -> list[tuple[list[int], list[int]]]:
    """(prompt ids, output ids with eos) of the training examples, tokenized apart, as when serving."""
    examples = distinct(recipe.make, Split.PROMPT, recipe.num_examples, seed)
    encoded = []
    for example in examples:
        prompt = tokenizer(f"{example.text}\n", add_special_tokens=False).input_ids
        output = tokenizer(recipe.expected(example), add_special_tokens=False).input_ids
        encoded.append((prompt, [*output, tokenizer.eos_token_id]))
    return encoded


def collate(batch: list[tuple[list[int], list[int]]], pad_id: int) -> dict[str, torch.Tensor]:
    """Right-padded ``[batch, longest]``; labels are -100 outside the outputs."""
    longest = max(len(prompt) + len(output) for prompt, output in batch)
    ids = torch.full((len(batch), longest), pad_id)
    labels = torch.full((len(batch), longest), -100)
    mask = torch.zeros((len(batch), longest), dtype=torch.long)
    for row, (prompt, output) in enumerate(batch):
        length = len(prompt) + len(output)
        ids[row, :length] = torch.tensor(prompt + output)
        labels[row, len(prompt) : length] = torch.tensor(output)
        mask[row, :length] = 1
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def train(
    recipe: TaskRecipe, base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, seed: int = SEED
) -> PeftModel:
    """Train one prompt. The base's own weights take no gradient."""
    torch.manual_seed(seed)
    model = get_peft_model(base, peft_config(recipe))
    assert isinstance(model, PeftModel)
    if recipe.start:
        start_from_text(model, tokenizer, recipe.start)
    data = encode(recipe, tokenizer, seed)
    order = random.Random(seed)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=recipe.learning_rate, weight_decay=0.0)
    schedule = CosineAnnealingLR(optimizer, recipe.steps)
    model.train()
    bar = tqdm(range(recipe.steps), recipe.name, mininterval=5)
    for step in bar:
        batch = collate(order.sample(data, recipe.batch_size), int(tokenizer.pad_token_id))
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trainable, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 10 == 0:
            bar.set_postfix(loss=f"{loss.item():.4f}")
    return model.eval()


def save(model: PeftModel, target: Path) -> None:
    """``adapter_config.json`` and ``adapter_model.safetensors``, and no model card.

    The base is recorded by its name: PEFT would write where it was loaded from on this machine.
    """
    model.peft_config["default"].base_model_name_or_path = BASE_NAME
    model.save_pretrained(str(target))
    (target / "README.md").unlink(missing_ok=True)


def build(task: Task, base_path: Path, target: Path) -> None:
    """Train and write one task. ValueError where an example of its ``task.json`` is not met."""
    model: PreTrainedModel | PeftModel
    model, tokenizer = load_base(base_path)
    target.mkdir(parents=True, exist_ok=True)
    if isinstance(task, TaskRecipe):
        model = train(task, model, tokenizer)
        save(model, target)
    (target / "task.json").write_text(json.dumps(manifest(task), indent=2, ensure_ascii=False) + "\n")
    given = answers(task, model, tokenizer, [text for text, _ in task.examples])
    for (text, expected), output in zip(task.examples, given, strict=True):
        if output != expected:
            raise ValueError(f"{task.name}: {text!r} gave {output!r}, expected {expected!r}")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", type=Path, default=Path(BASE_NAME))
    parser.add_argument("--out", type=Path, default=PROMPTS)
    parser.add_argument("tasks", nargs="*", help="default: all of them")
    arguments = parser.parse_args()
    for task in TASKS:
        if not arguments.tasks or task.name in arguments.tasks:
            build(task, arguments.base, arguments.out / task.name)
    heldout.write_all()


if __name__ == "__main__":
    main()
