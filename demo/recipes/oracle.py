"""What PEFT itself generates: greedy, at batch size 1, unpadded. Nothing of the server is involved.

Where PEFT has no such prompt, ``three_sites`` reads it instead, without a cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import cast

import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from demo.recipes import three_sites
from demo.recipes.tasks import THREE_SITES, Program, Task, TaskRecipe, leading, read, template

PROMPT_FILE = "prompt.safetensors"  # of a prompt that PEFT has no format for: the canonical file
Model = PreTrainedModel | PeftModel | three_sites.Steered


def load_base(path: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The shipped bf16 weights, computed in fp32."""
    is_seq2seq = AutoConfig.from_pretrained(path).is_encoder_decoder
    kind = AutoModelForSeq2SeqLM if is_seq2seq else AutoModelForCausalLM
    model = kind.from_pretrained(path, dtype=torch.float32)
    return model, AutoTokenizer.from_pretrained(path)


def load_task(task: Task, base_path: Path, prompts: Path) -> tuple[Model, PreTrainedTokenizerBase]:
    """The base with a task's trained prompt; the bare base where the task has none."""
    base, tokenizer = load_base(base_path)
    base.eval()
    if not isinstance(task, TaskRecipe):
        return base, tokenizer
    if task.kind == THREE_SITES:
        return three_sites.Steered(base, load_file(prompts / task.name / PROMPT_FILE)), tokenizer
    return PeftModel.from_pretrained(base, prompts / task.name).eval(), tokenizer


@torch.no_grad()
def greedy(model: Model, tokenizer: PreTrainedTokenizerBase, text: str, max_new_tokens: int) -> str:
    """What follows ``text``, or is made of it, without special tokens."""
    ids = tokenizer(text, return_tensors="pt").input_ids  # only an encoder's tokenizer adds anything: eos
    generate = cast(Callable[..., torch.Tensor], model.generate)
    made = generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_new_tokens, do_sample=False
    )
    start = 1 if model.config.is_encoder_decoder else ids.shape[1]
    return str(tokenizer.decode(made[0, start:], skip_special_tokens=True))


def answers(task: Task, model: Model, tokenizer: PreTrainedTokenizerBase, inputs: Iterable[str]) -> list[str]:
    """What the task answers to each input, put into its template: after its steps, where it has some."""
    before, words = leading(task), template(task)

    def say(text: str) -> str:
        return greedy(model, tokenizer, before + words.replace("{text}", text), task.max_new_tokens)

    return [read(task, solved(say, text, task.program.get("chain"))) for text in inputs]


def solved(say: Callable[[str], str], text: str, chain: Program | None) -> str:
    """The output for a text; the last step's of a chain, by hand: each output is the next input."""
    output = say(text)
    if chain is None:
        return output
    for _ in range(chain["max_steps"] - 1):
        if chain["done"] in output:
            break
        output = say(output)
    return output
