"""Train prompts with PEFT on the frozen base; write what ``promptplex push`` and ``promptplex eval`` take.

A training example is ``virtual tokens`` + ``input\\n`` + ``output<eos>``; only the output is scored. The
inputs come from a split that pretraining never saw.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Sequence
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
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from app.prompt import PromptKind, TaskType
from app.store.prompt_file import make_prompt
from app.store.safetensors_file import RawTensor
from demo.recipes import heldout, three_sites
from demo.recipes.batches import IGNORED, PAD_ID, Encoded, encode, padded
from demo.recipes.batches import collate as seq2seq_batch
from demo.recipes.demos import DEMOS
from demo.recipes.oracle import PROMPT_FILE, Model, answers, load_base
from demo.recipes.pairs import Pair
from demo.recipes.splits import Split, distinct
from demo.recipes.tasks import THREE_SITES, Task, TaskRecipe, manifest

SEED = 7


def peft_config(recipe: TaskRecipe, *, is_encoder_decoder: bool) -> PromptLearningConfig:
    """The PEFT configuration of a recipe."""
    common: dict[str, Any] = {
        "task_type": "SEQ_2_SEQ_LM" if is_encoder_decoder else "CAUSAL_LM",
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


def causal_batch(batch: Sequence[Encoded]) -> dict[str, torch.Tensor]:
    """Right-padded ``[batch, longest]``; labels are -100 outside the outputs."""
    ids = padded([[*pair.source, *pair.target] for pair in batch], PAD_ID)
    labels = padded([[*[IGNORED] * len(pair.source), *pair.target] for pair in batch], IGNORED)
    mask = padded([[1] * (len(pair.source) + len(pair.target)) for pair in batch], 0)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def examples(recipe: TaskRecipe, tokenizer: PreTrainedTokenizerBase, seed: int) -> list[Encoded]:
    """The training examples, prompt and output tokenized apart, as when serving."""
    pairs = [
        Pair(f"{example.text}\n", recipe.expected(example))
        for example in distinct(recipe.make, Split.PROMPT, recipe.num_examples, seed)
    ]
    return list(encode(pairs, cast(PreTrainedTokenizerFast, tokenizer)))


def train(
    recipe: TaskRecipe, base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, seed: int = SEED
) -> Model:
    """Train one prompt. The base's own weights take no gradient."""
    torch.manual_seed(seed)
    model = _untrained(recipe, base, tokenizer)
    batch_of = seq2seq_batch if base.config.is_encoder_decoder else causal_batch
    data = examples(recipe, tokenizer, seed)
    order = random.Random(seed)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=recipe.learning_rate, weight_decay=0.0)
    schedule = CosineAnnealingLR(optimizer, recipe.steps)
    model.train()
    bar = tqdm(range(recipe.steps), recipe.name, mininterval=5)
    for step in bar:
        batch = batch_of(order.sample(data, recipe.batch_size))
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


def _untrained(recipe: TaskRecipe, base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Model:
    if recipe.kind == THREE_SITES:
        return three_sites.Learned(base, recipe.num_virtual_tokens)
    config = peft_config(recipe, is_encoder_decoder=base.config.is_encoder_decoder)
    model = get_peft_model(base, config)
    assert isinstance(model, PeftModel)
    if recipe.start:
        start_from_text(model, tokenizer, recipe.start)
    return model


def save(recipe: TaskRecipe, model: Model, target: Path) -> None:
    """What PEFT writes, without a model card; the canonical file where PEFT has no format for the prompt.

    The base is recorded by its name: PEFT would write where it was loaded from on this machine.
    """
    if isinstance(model, three_sites.Steered):
        (target / PROMPT_FILE).write_bytes(canonical(model.prefix()))
        return
    assert isinstance(model, PeftModel)
    model.peft_config["default"].base_model_name_or_path = recipe.base
    model.save_pretrained(str(target))
    (target / "README.md").unlink(missing_ok=True)


def canonical(prefix: three_sites.Prefix) -> bytes:
    """The canonical file (docs/formats.md) of a prefix that leaves positions as they are."""
    tensors = {}
    for name, tensor in prefix.items():
        kept = tensor.detach().float().contiguous()
        tensors[name] = RawTensor("F32", tuple(kept.shape), memoryview(kept.numpy().tobytes()))
    prompt = make_prompt(PromptKind.PREFIX, tensors, task_type=TaskType.SEQ_2_SEQ_LM, position_offset=0)
    return bytes(prompt.data)


def build(task: Task, target: Path) -> None:
    """Train and write one task. ValueError where an example of its ``task.json`` is not met."""
    model: Model
    model, tokenizer = load_base(Path(task.base))
    target.mkdir(parents=True, exist_ok=True)
    if isinstance(task, TaskRecipe):
        model = train(task, model, tokenizer)
        save(task, model, target)
    (target / "task.json").write_text(json.dumps(manifest(task), indent=2, ensure_ascii=False) + "\n")
    given = answers(task, model, tokenizer, [text for text, _ in task.examples])
    for (text, expected), output in zip(task.examples, given, strict=True):
        if output != expected:
            raise ValueError(f"{task.name}: {text!r} gave {output!r}, expected {expected!r}")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("demo", choices=DEMOS)
    parser.add_argument("tasks", nargs="*", help="default: all of them")
    arguments = parser.parse_args()
    demo = DEMOS[arguments.demo]
    for task in demo.tasks:
        if not arguments.tasks or task.name in arguments.tasks:
            build(task, demo.prompts / task.name)
    heldout.write_all(demo.tasks)


if __name__ == "__main__":
    main()
