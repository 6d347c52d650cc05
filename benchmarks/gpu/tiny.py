"""Tiny random models of real architectures with trained prompts of each kind, and what each gives alone.

The oracle is PEFT's own `generate` at batch size 1, unpadded; transformers' where there is no prompt.
"""

import copy
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from torch import nn
from transformers import PreTrainedModel
from transformers.configuration_utils import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from app.models.attention.packed import register
from app.models.backbones import AnyBackbone, backbone_of
from app.models.geometry import model_geometry
from app.models.twin import TWIN_VOCABULARY, build_twin
from app.prompt import Prompt
from app.request import Request, Segment, Source, segments_of
from app.sites import Embedding, Site
from app.store.importers import import_prompt
from app.store.source_files import CONFIG, PROMPT
from benchmarks.shared_engine import MemorySource

# Head widths stay in a twin: 64 and 128 are the usual ones, 256 is Gemma's.
_WIDE = {"hidden_size": 512, "num_attention_heads": 8, "num_key_value_heads": 2}
SHAPES: dict[str, dict[str, Any]] = {
    "llama": _WIDE | {"hidden_size": 1024},
    "qwen2": _WIDE,
    "gpt2": {},
    "gemma2": {"num_attention_heads": 8, "num_key_value_heads": 4},
    "gemma3_text": {"num_attention_heads": 8, "num_key_value_heads": 4},
    "t5": {"decoder_start_token_id": 0},
    "bart": {"encoder_attention_heads": 8, "decoder_attention_heads": 8, "d_model": 512},
}
_SMALL = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
_TINY: dict[str, dict[str, Any]] = {  # for an interpreter
    "llama": _SMALL,
    "bart": {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "d_model": 64},
}
_FILES = {PROMPT: "adapter_model.safetensors", CONFIG: "adapter_config.json"}  # as PEFT saves them
_LENGTHS = (1, 2, 5, 17, 40, 90)  # of requests


@dataclass(frozen=True)
class Task:
    """A task, and the model that is its oracle."""

    name: str
    model: Any
    prompt: Prompt | None = None

    def request(self, name: str, ids: tuple[int, ...], new_tokens: int, start_id: int | None) -> Request:
        """Return a request about `ids`; with a `start_id` an encoder reads them."""
        source: Source | None = None
        segments: tuple[Segment, ...] = (self._segment(),)
        if start_id is not None:
            source = Source(id=name, token_ids=ids)
            ids = (start_id,)
            if self.prompt is not None and (rows := self.prompt.length(Embedding.ENCODER)):
                source = replace(source, prompt_digest=self.prompt.digest, num_virtual_tokens=rows)
                segments = ()
        return Request(
            id=name,
            token_ids=ids,
            segments=segments_of(*segments),
            source=source,
            max_new_tokens=new_tokens,
            task=self.name,
        )

    def _segment(self) -> Segment:
        if self.prompt is None:
            return Segment()
        slots = self.prompt.length(Site.DECODER_SELF) or self.prompt.length(Embedding.DECODER)
        return Segment(prompt_digest=self.prompt.digest, num_virtual_tokens=slots)


@dataclass(frozen=True)
class World:
    """A model behind our attention, and its tasks."""

    backbone: AnyBackbone
    tasks: Sequence[Task]
    start_id: int | None
    source: MemorySource = field(default_factory=MemorySource)

    def requests(self, number: int, new_tokens: int, longest: int) -> list[tuple[Task, Request]]:
        """Return requests over all tasks in a random order, of very different lengths."""
        rng, lengths = random.Random(0), [each for each in _LENGTHS if each <= longest]
        asked = []
        for index in range(number):
            task = self.tasks[index % len(self.tasks)]
            ids = tuple(rng.randrange(3, TWIN_VOCABULARY) for _ in range(rng.choice(lengths)))
            asked.append((task, task.request(f"{index}-{task.name}", ids, new_tokens, self.start_id)))
        rng.shuffle(asked)
        return asked


def build_world(architecture: str, device: str, folder: Path, *, is_tiny: bool = False) -> World:
    """Return a float32 twin of an architecture with a task of each kind. Raise UnsupportedModel."""
    register()
    settings = (_TINY if is_tiny else SHAPES)[architecture]
    config = CONFIG_MAPPING[architecture](**settings | {"eos_token_id": None})
    packed = _packed(config)
    nn.Module.to(packed, device)  # not the model's own `to`, whose annotations mislead mypy
    base = copy.deepcopy(packed)  # now: a backbone changes what it is made of
    base.set_attn_implementation("eager")
    backbone = backbone_of(packed, model_geometry(packed, "twin"))
    for name in ("eos_token_id", "forced_eos_token_id", "forced_bos_token_id"):
        setattr(base.generation_config, name, None)
    world = World(backbone, tuple(_tasks(base, backbone, folder)), _start_id(base))
    for task in world.tasks:
        if task.prompt is not None:
            world.source.keep(task.prompt)
    return world


@torch.no_grad()
def _packed(config: PreTrainedConfig) -> PreTrainedModel:
    torch.manual_seed(0)
    twin = build_twin(config).requires_grad_(False)
    for name, parameter in twin.named_parameters():
        if parameter.ndim >= 2 and "shared" not in name:
            parameter.mul_(2.5 if config.is_encoder_decoder else 1.5)  # so that answers vary
    return twin


def _start_id(base: PreTrainedModel) -> int | None:
    if not base.config.is_encoder_decoder:
        return None
    start: int = base.generation_config.decoder_start_token_id
    return start


def _tasks(base: PreTrainedModel, backbone: AnyBackbone, folder: Path) -> Iterator[Task]:
    yield Task("none", base)
    for seed, (name, config) in enumerate(_prompts(base, backbone).items()):
        model = _tuned(base, config, seed)
        model.save_pretrained(str(folder / name))
        files = {part: (folder / name / file).read_bytes() for part, file in _FILES.items()}
        yield Task(name, model, import_prompt(files, backbone.geometry).prompt)


def _prompts(base: PreTrainedModel, backbone: AnyBackbone) -> dict[str, PeftConfig]:
    kind: dict[str, Any] = {"task_type": "CAUSAL_LM"}
    shape: dict[str, Any] = {}
    if base.config.is_encoder_decoder:
        layer = backbone.geometry.layers[Site.DECODER_SELF][0]
        kind = {"task_type": "SEQ_2_SEQ_LM"}
        shape = {"token_dim": layer.num_kv_heads * layer.key_dim, "num_attention_heads": layer.num_kv_heads}
    soft = {f"soft-{p}": PromptTuningConfig(num_virtual_tokens=p, **kind) for p in (1, 20)}
    return soft | {"prefix-9": PrefixTuningConfig(num_virtual_tokens=9, **kind, **shape)}


def _tuned(base: PreTrainedModel, config: PeftConfig, seed: int) -> Any:
    """Return a PEFT model whose prompt is random, and strong enough to change what the base says."""
    torch.manual_seed(seed)
    model = get_peft_model(base, config)
    with torch.no_grad():
        for parameter in model.prompt_encoder.parameters():
            parameter.normal_(std=1.0)
    return model.eval()


@dataclass(frozen=True, slots=True)
class Expected:
    """An answer and its log-probabilities."""

    token_ids: list[int]
    logprobs: list[float]


@torch.inference_mode()
def alone(task: Task, request: Request) -> Expected:
    """Return the greedy answer to a request by `generate`, at batch size 1."""
    read = request.token_ids if request.source is None else request.source.token_ids
    ids = torch.tensor([read], device=task.model.device)
    output = task.model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=request.max_new_tokens,
        do_sample=False,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
    )
    rows = torch.cat(output.logits).float().log_softmax(-1)
    tokens = output.sequences[0, -len(rows) :]
    return Expected(tokens.tolist(), rows.gather(1, tokens[:, None])[:, 0].tolist())
