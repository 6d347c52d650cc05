"""What PEFT itself generates: greedy, at batch size 1, unpadded. Nothing of the server is involved."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import cast

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from demo.recipes.tasks import Task, TaskRecipe, template


def load_base(path: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The shipped bf16 weights, computed in fp32."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    return model, AutoTokenizer.from_pretrained(path)


def load_task(
    task: Task, base_path: Path, prompts: Path
) -> tuple[PreTrainedModel | PeftModel, PreTrainedTokenizerBase]:
    """The base with a task's trained prompt; the bare base where the task has none."""
    base, tokenizer = load_base(base_path)
    if isinstance(task, TaskRecipe):
        return PeftModel.from_pretrained(base, prompts / task.name).eval(), tokenizer
    return base.eval(), tokenizer


@torch.no_grad()
def greedy(
    model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase, text: str, max_new_tokens: int
) -> str:
    """The continuation of ``text``, without special tokens."""
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
    generate = cast(Callable[..., torch.Tensor], model.generate)
    made = generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_new_tokens, do_sample=False
    )
    return str(tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True))


def answers(
    task: Task, model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase, inputs: Iterable[str]
) -> list[str]:
    """What the task answers to each input, put into its template."""
    words = template(task)
    return [greedy(model, tokenizer, words.replace("{text}", text), task.max_new_tokens) for text in inputs]
