"""What each request gives alone: PEFT at batch size 1, unpadded; transformers where no prompt is."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import (
    CartridgeConfig,
    PeftConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
)
from transformers import PreTrainedModel

from app.prompt import Prompt
from app.request import Segment, segments_of
from app.store.importers import import_prompt
from app.store.source_files import CONFIG, PROMPT


@dataclass(frozen=True)
class Expected:
    tokens: list[int]
    logprobs: list[float]


def soft_config(num_virtual_tokens: int) -> PeftConfig:
    return PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=num_virtual_tokens)


def p_tuning_config(num_virtual_tokens: int) -> PeftConfig:
    return PromptEncoderConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=num_virtual_tokens, encoder_hidden_size=16
    )


def prefix_config(num_virtual_tokens: int) -> PeftConfig:
    return PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=num_virtual_tokens)


def cartridge_config(num_virtual_tokens: int) -> PeftConfig:
    return CartridgeConfig(task_type="CAUSAL_LM", num_virtual_tokens=num_virtual_tokens)


def tuned(base: PreTrainedModel, config: PeftConfig, *, seed: int) -> PeftModel:
    """A PEFT model whose prompt is random and strong enough to change what the base says."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = get_peft_model(base, config)
        for parameter in model.prompt_encoder.parameters():
            parameter.normal_(std=1.0)
    return model.eval()


def saved(model: PeftModel, directory: Path) -> tuple[bytes, bytes]:
    """What `save_pretrained` writes: (adapter_model.safetensors, adapter_config.json)."""
    model.save_pretrained(directory)
    return (directory / "adapter_model.safetensors").read_bytes(), (
        directory / "adapter_config.json"
    ).read_bytes()


def as_prompt(model: PeftModel, directory: Path) -> Prompt:
    weights, config = saved(model, directory)
    return import_prompt({PROMPT: weights, CONFIG: config}).prompt


def segments(prompt: Prompt | None = None, text: tuple[int, ...] = ()) -> tuple[Segment, ...]:
    """A learned prompt, then leading text, as far as they are there."""
    learned = Segment()
    if prompt is not None:
        learned = Segment(prompt_digest=prompt.digest, num_virtual_tokens=prompt.num_virtual_tokens)
    return segments_of(learned, Segment(token_ids=text))


def greedy(model: Any, token_ids: list[int], num_tokens: int) -> Expected:
    """Greedy tokens and their log-probabilities by the model's own `generate`, alone."""
    ids = torch.tensor([token_ids])
    output = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=num_tokens,
        do_sample=False,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
    )
    tokens = output.sequences[0, len(token_ids) :].tolist()
    logprobs = [
        float(logits[0].float().log_softmax(-1)[token])
        for logits, token in zip(output.logits, tokens, strict=True)
    ]
    return Expected(tokens, logprobs)
