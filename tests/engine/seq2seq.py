"""Tiny encoder-decoders with tasks of every kind, and what each request gives alone.

PEFT's and transformers' own `generate` where they can express a task; else the reference without a cache.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from peft import PrefixTuningConfig, PromptTuningConfig
from torch import Tensor
from transformers import PreTrainedModel

from app.models.encoder_decoder import EncoderDecoder
from app.prompt import Prompt, PromptKind, TaskType, VersionDraft
from app.request import Request, Segment, Source
from app.sites import SIDES, Embedding, Site
from app.store.cache.prompt_cache import PromptCache
from app.store.importers import import_prompt
from app.store.prompt_file import make_prompt
from app.store.prompt_store import open_store
from app.store.safetensors_file import RawTensor
from app.store.source_files import CONFIG, PROMPT
from tests import oracle
from tests.oracle import Expected
from tests.seq2seq import Learned, next_logits, random_decoder_rows, random_prefix, seeing
from tests.tiny_models import packed_seq2seq, tiny_seq2seq

START = 2  # the decoder's first token


@dataclass(frozen=True)
class Task:
    """A task, and the model or the tensors that tell what it says."""

    name: str
    prompt: Prompt | None = None
    model: Any = None  # None: the base with what was learned
    learned: Learned = field(default_factory=Learned)

    def request(self, name: str, ids: tuple[int, ...], **settings: Any) -> Request:
        """Return a request about `ids`, which all of the task's prompt goes with."""
        prompt, segments = self.prompt, []
        source = Source(id=name, token_ids=ids)
        if prompt is not None:
            at = Segment(
                prompt_digest=prompt.digest,
                num_virtual_tokens=prompt.length(Site.DECODER_SELF),
                num_cross_tokens=prompt.length(Site.DECODER_CROSS),
                num_encoder_tokens=prompt.length(Site.ENCODER_SELF),
            )
            rows = prompt.length(Embedding.DECODER)
            soft = Segment(prompt_digest=prompt.digest, num_virtual_tokens=rows, is_kept=False)
            segments = [at] * (prompt.kind is PromptKind.PREFIX) + [soft] * (rows > 0)
            if before := prompt.length(Embedding.ENCODER):
                source = replace(source, prompt_digest=prompt.digest, num_virtual_tokens=before)
        given = {"max_new_tokens": 20, "token_ids": (START,)} | settings
        return Request(id=name, segments=tuple(segments), source=source, task=self.name, **given)


@dataclass(frozen=True)
class World:
    base: PreTrainedModel
    backbone: EncoderDecoder
    tasks: tuple[Task, ...]
    source: PromptCache

    def task(self, name: str) -> Task:
        return next(task for task in self.tasks if task.name == name)

    def expected(self, task: Task, request: Request) -> Expected:
        """What the request gets alone."""
        assert request.source is not None
        ids = request.source.token_ids
        if task.model is None:
            return uncached(self.base, task.learned, ids, request.max_new_tokens)
        return generated(task.model, ids, request.max_new_tokens)


def build_world(architecture: str, root: Path) -> World:
    """A task of each kind: base, soft prompts in both stacks, PEFT's prefix, prefixes at other sites."""
    base = tiny_seq2seq(architecture)
    base.generation_config.forced_eos_token_id = None
    backbone = packed_seq2seq(base)
    layer = backbone.geometry.layers[Site.ENCODER_SELF][0]
    heads, width = layer.num_kv_heads, layer.key_dim
    kind = {"task_type": "SEQ_2_SEQ_LM"}
    shape = {"token_dim": heads * width, "num_attention_heads": heads}
    models = {
        f"soft-{p}": oracle.tuned(base, PromptTuningConfig(num_virtual_tokens=p, **kind), seed=p)
        for p in (1, 9)
    }
    prefix = PrefixTuningConfig(num_virtual_tokens=6, **kind, **shape)
    models["peft-prefix"] = oracle.tuned(base, prefix, seed=5)
    tasks = [Task("none", model=base)]
    for name, model in models.items():
        weights, config = oracle.saved(model, root / name)
        files = {PROMPT: weights, CONFIG: config}
        tasks.append(Task(name, import_prompt(files, backbone.geometry).prompt, model))
    tasks.append(prefix_task("cross", base, {Site.DECODER_CROSS: 5}))
    tasks.append(_decoder_soft_task(base))
    if not layer.has_position_bias:
        tasks.append(prefix_task("three-site", base, dict(zip(Site, (7, 3, 4), strict=True))))
    store = open_store(root / "store")
    for task in tasks:
        if task.prompt is not None:
            store.publish(task.name, VersionDraft(prompt=task.prompt))
    return World(base, backbone, tuple(tasks), PromptCache(store, host_bytes=1 << 20))


def prefix_task(name: str, base: PreTrainedModel, lengths: Mapping[Site, int]) -> Task:
    learned = random_prefix(base, lengths, seed=len(name))
    raw = {
        site.tensor(layer, side): _raw(tensor)
        for (site, layer), sides in learned.sites.items()
        for side, tensor in zip(SIDES, sides, strict=True)
    }
    prompt = make_prompt(PromptKind.PREFIX, raw, task_type=TaskType.SEQ_2_SEQ_LM, position_offset=0)
    return Task(name, prompt, learned=learned)


def _decoder_soft_task(base: PreTrainedModel) -> Task:
    learned = random_decoder_rows(base, 4, seed=1)
    assert learned.decoder_rows is not None
    raw = {Embedding.DECODER: _raw(learned.decoder_rows)}
    return Task(
        "decoder-soft", make_prompt(PromptKind.SOFT, raw, task_type=TaskType.SEQ_2_SEQ_LM), learned=learned
    )


def _raw(tensor: Tensor) -> RawTensor:
    return RawTensor("F32", tuple(tensor.shape), memoryview(tensor.contiguous().numpy().tobytes()))


def generated(model: Any, ids: tuple[int, ...], num_tokens: int) -> Expected:
    """Greedy tokens and their log-probabilities by the model's own `generate`, alone."""
    output = model.generate(
        input_ids=torch.tensor([ids]),
        attention_mask=torch.ones(1, len(ids), dtype=torch.long),
        max_new_tokens=num_tokens,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    tokens = output.sequences[0, 1:].tolist()
    rows = [logits[0].float().log_softmax(-1) for logits in output.logits]
    return Expected(tokens, [float(row[token]) for row, token in zip(rows, tokens, strict=True)])


@torch.inference_mode()
def uncached(base: PreTrainedModel, learned: Learned, ids: tuple[int, ...], num_tokens: int) -> Expected:
    """The same without a cache, for what PEFT can't express."""
    said, logprobs = [START], []
    with seeing(base, learned.sites) as model:
        encoded = model.get_encoder()(input_ids=torch.tensor([ids])).last_hidden_state
        for _ in range(num_tokens):
            row = next_logits(model, learned, encoded, said).log_softmax(-1)
            said.append(int(row.argmax()))
            logprobs.append(float(row.max()))
    return Expected(said[1:], logprobs)
