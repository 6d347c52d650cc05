"""Tiny random encoder-decoders of real families, and what each request gives alone.

The oracles are PEFT's and transformers' own `generate` at batch size 1, and, for prompts that PEFT can't
express, a reference without a cache: the whole decoder runs for every token, keys and values stand before a
layer's own. Legend: p virtual tokens, d embedding width, Hk heads, D their width.
"""

import copy
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from peft import (
    CartridgeConfig,
    PeftConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
)
from tokenizers import processors
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AutoModelForSeq2SeqLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.masking_utils import AttentionMaskInterface
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from app.models.attention.packed import IMPLEMENTATION, register
from app.sites import Site
from tests.oracle import Expected
from tests.text.tokenizer_zoo import tokenizer_of

BOS, EOS, PAD = 0, 1, 2  # of every tokenizer here
POSITIONS = 192
_T5 = {
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_heads": 4,
    "num_layers": 3,
    "num_decoder_layers": 2,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 20,
    "decoder_start_token_id": PAD,
}
_BART = {
    "d_model": 32,
    "encoder_layers": 3,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": POSITIONS,
    "bos_token_id": BOS,
    "decoder_start_token_id": PAD,
    "forced_eos_token_id": EOS,
}
_FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "t5": ("t5", _T5 | {"feed_forward_proj": "relu"}),
    "t5_gated": (
        "t5",
        _T5 | {"d_kv": 6, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    ),
    "mt5": ("mt5", _T5),
    "umt5": ("umt5", _T5),
    "bart": ("bart", _BART | {"decoder_start_token_id": EOS}),
    "mbart": ("mbart", _BART | {"scale_embedding": True}),
    "pegasus": ("pegasus", _BART | {"scale_embedding": True}),
    "marian": ("marian", _BART | {"scale_embedding": True, "forced_eos_token_id": None}),
}
FAMILIES = tuple(_FAMILIES)
T5_LIKE = tuple(name for name in FAMILIES if "t5" in name)
BART_LIKE = tuple(name for name in FAMILIES if "t5" not in name)


@cache
def source_tokenizer(family: str) -> PreTrainedTokenizerFast:
    """A byte-level BPE that marks a source as the family does: with EOS, and BOS or a language around it."""
    tokenizer = copy.deepcopy(tokenizer_of("byte_level_bos"))
    shape = {"bart": "<s> $A </s>", "mbart": "$A </s> <s>"}.get(family, "$A </s>")
    names = ("<s>", "</s>", "<turn>")
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=shape, special_tokens=[(name, tokenizer.convert_tokens_to_ids(name)) for name in names]
    )
    tokenizer.pad_token = "<turn>"
    assert tokenizer.convert_tokens_to_ids(list(names)) == [BOS, EOS, PAD]
    return tokenizer


def tiny_seq2seq(family: str, *, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """A float32 model as its users have it, with transformers' own eager attention."""
    architecture, shape = _FAMILIES[family]
    settings = {"vocab_size": len(source_tokenizer(family)), "pad_token_id": PAD, "eos_token_id": EOS}
    config = CONFIG_MAPPING[architecture](**settings | shape | overrides)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = AutoModelForSeq2SeqLM.from_config(config, attn_implementation="eager", dtype=torch.float32)
        for name, parameter in model.named_parameters():
            if "embed_positions" in name and family in ("marian", "pegasus"):
                continue  # sinusoids
            if parameter.ndim >= 2:
                is_vocabulary = "shared" in name or "lm_head" in name
                scale = 2.5 if not is_vocabulary else 0.3 if family in (*T5_LIKE, "mbart") else 1.0
                parameter.normal_(std=scale * parameter.shape[-1] ** -0.5)
            else:
                parameter.add_(0.1 * torch.randn_like(parameter))
    rules = model.generation_config  # as those of real checkpoints
    rules.forced_bos_token_id = BOS if family == "bart" else None
    rules.bad_words_ids = [[PAD]] if family == "marian" else None
    return model.eval().requires_grad_(False)


def packed_copy(model: PreTrainedModel) -> PreTrainedModel:
    """The same weights behind our attention."""
    register()
    packed = AutoModelForSeq2SeqLM.from_config(
        copy.deepcopy(model.config), attn_implementation=IMPLEMENTATION, dtype=torch.float32
    )
    packed.load_state_dict(model.state_dict())
    return packed.eval().requires_grad_(False)


def peft_configs(model: PreTrainedModel) -> dict[str, PeftConfig]:
    """Each kind of prompt that PEFT has for encoder-decoders."""
    encoder = model.get_encoder()
    heads = getattr(model.config, "encoder_attention_heads", None) or model.config.num_heads
    width = heads * getattr(model.config, "d_kv", encoder.config.hidden_size // heads)
    shape = {"task_type": "SEQ_2_SEQ_LM", "token_dim": width, "num_attention_heads": heads}
    return {
        "soft": PromptTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=5),
        "p-tuning": PromptEncoderConfig(
            task_type="SEQ_2_SEQ_LM", num_virtual_tokens=7, encoder_hidden_size=16
        ),
        "prefix": PrefixTuningConfig(num_virtual_tokens=4, **shape),
        "cartridge": CartridgeConfig(num_virtual_tokens=6, **shape),
    }


def greedy_seq2seq(model: Any, source: Sequence[int], num_tokens: int | None) -> Expected:
    """Greedy tokens and their log-probabilities by the model's own `generate`, alone; None: as it likes."""
    ids = torch.tensor([source])
    output = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
        **({} if num_tokens is None else {"max_new_tokens": num_tokens}),
    )
    tokens = output.sequences[0, 1:].tolist()
    logprobs = [
        float(logits[0].float().log_softmax(-1)[token])
        for logits, token in zip(output.logits, tokens, strict=True)
    ]
    return Expected(tokens, logprobs)


@dataclass(frozen=True)
class Learned:
    """A canonical prompt's tensors, wherever they go."""

    sites: Mapping[tuple[Site, int], tuple[Tensor, Tensor]] = field(default_factory=dict)  # [Hk, p, D] each
    decoder_rows: Tensor | None = None  # [p, d]


def random_prefix(model: PreTrainedModel, lengths: Mapping[Site, int], seed: int) -> Learned:
    """Keys and values at these sites, of as many tokens each."""
    config, generator = model.config, torch.Generator().manual_seed(seed)
    depths = {Site.ENCODER_SELF: 3, Site.DECODER_SELF: 2, Site.DECODER_CROSS: 2}
    heads = getattr(config, "num_heads", None) or config.encoder_attention_heads
    width = getattr(config, "d_kv", None) or config.d_model // heads
    sites = {
        (site, layer): tuple(torch.randn(heads, p, width, generator=generator) for _ in "kv")
        for site, p in lengths.items()
        for layer in range(depths[site])
    }
    return Learned(sites=sites)  # type: ignore[arg-type]  # pairs


def random_decoder_rows(model: PreTrainedModel, p: int, seed: int) -> Learned:
    """Rows before the decoder's first token."""
    rows = torch.randn(p, model.config.d_model, generator=torch.Generator().manual_seed(seed))
    return Learned(decoder_rows=rows)


def reference(model: PreTrainedModel, learned: Learned, source: Sequence[int], num_tokens: int) -> Expected:
    """Greedy tokens of a canonical prompt, without a cache; positions start at 0 beside keys and values."""
    config = model.generation_config
    with seeing(model, learned.sites) as prefixed, torch.inference_mode():
        encoded = prefixed.get_encoder()(input_ids=torch.tensor([source])).last_hidden_state
        ids, logprobs = [config.decoder_start_token_id], []
        for number in range(num_tokens):
            logprob = next_logits(prefixed, learned, encoded, ids).log_softmax(-1)
            token = _chosen(config, logprob, number, num_tokens)
            ids.append(token)
            logprobs.append(float(logprob[token]))
            if token == EOS:
                break
    return Expected(ids[1:], logprobs)


def next_logits(model: PreTrainedModel, learned: Learned, encoded: Tensor, ids: list[int]) -> Tensor:
    embeds = model.get_decoder().get_input_embeddings()(torch.tensor([ids]))
    if learned.decoder_rows is not None:
        embeds = torch.cat([learned.decoder_rows[None], embeds], 1)
    logits: Tensor = model(encoder_outputs=(encoded,), decoder_inputs_embeds=embeds, use_cache=False).logits[
        0, -1
    ]
    return logits


def _chosen(config: Any, logprob: Tensor, number: int, num_tokens: int) -> int:
    if number == 0 and config.forced_bos_token_id is not None:
        return int(config.forced_bos_token_id)
    if number == num_tokens - 1 and config.forced_eos_token_id is not None:
        return int(config.forced_eos_token_id)
    allowed = logprob.clone()
    for (banned,) in config.bad_words_ids or ():
        allowed[banned] = -torch.inf
    return int(allowed.argmax())


@contextmanager
def seeing(model: PreTrainedModel, sites: Mapping[tuple[Site, int], tuple[Tensor, Tensor]]) -> Any:
    """Yield a copy in which attention sees these keys and values first."""
    AttentionInterface.register("reference", _attend)
    AttentionMaskInterface.register("reference", lambda *_, **__: None)
    prefixed = copy.deepcopy(model)
    prefixed.set_attn_implementation("reference")
    for site, stack, names in (
        (Site.ENCODER_SELF, prefixed.get_encoder(), ("self_attn", "SelfAttention")),
        (Site.DECODER_SELF, prefixed.get_decoder(), ("self_attn", "SelfAttention")),
        (Site.DECODER_CROSS, prefixed.get_decoder(), ("encoder_attn", "EncDecAttention")),
    ):
        modules = [module for name, module in stack.named_modules() if name.split(".")[-1] in names]
        for layer, module in enumerate(modules):
            module.seen_first = sites.get((site, layer))  # type: ignore[assignment]
            module.sees_past = site is Site.DECODER_SELF  # type: ignore[assignment]
    yield prefixed


def _attend(
    module: nn.Module,
    query: Tensor,  # [1, H, T, D]
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    position_bias: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    scores = query @ key.transpose(2, 3) * scaling
    if position_bias is not None:
        scores = scores + position_bias
    if module.sees_past:
        future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        scores = scores.masked_fill(future, -torch.inf)
    if module.seen_first is not None:
        keys, values = module.seen_first  # type: ignore[misc]
        scores = torch.cat([query @ keys[None].transpose(2, 3) * scaling, scores], -1)
        value = torch.cat([values[None], value], 2)
    return (scores.softmax(-1) @ value).transpose(1, 2).contiguous(), None
