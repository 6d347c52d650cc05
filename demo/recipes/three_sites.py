"""The prefix of Li and Liang (2021) for BART, at three attention sites, read without a cache: the oracle.

PEFT's prefixes reach the decoder's self-attention only. Here the encoder's self-attention, the decoder's
self-attention and the cross-attention each see ``p`` virtual keys and values before the real ones, from
every query; positions of tokens stay as they were (offset 0), as in XiangLi1999/PrefixTuning. The forward
pass is written out below, on BART's own weights, and shares nothing with the server or the trainer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from app.sites import SIDES, Site

Prefix = Mapping[str, Tensor]  # tensor name of a canonical file (app/sites.py) -> [heads, p, head width]
_MASKED = -1e9


def encode(model: Any, ids: Tensor, visible: Tensor, prefix: Prefix) -> Tensor:
    """Encoder states ``[B, n, d]`` of ``ids [B, n]``; ``visible [B, n]`` is 0 at padding."""
    encoder = model.get_encoder()
    states = _embed(encoder, ids)
    mask = torch.where(visible.bool(), 0.0, _MASKED)[:, None, None, :]
    for number, layer in enumerate(encoder.layers):
        added = _attend(layer.self_attn, states, states, mask, _sides(prefix, Site.ENCODER_SELF, number))
        states = _feed(layer, layer.self_attn_layer_norm(states + added))
    return states


def decode(model: Any, ids: Tensor, memory: Tensor, visible: Tensor, prefix: Prefix) -> Tensor:
    """Logits ``[B, m, vocabulary]`` of decoder input ``ids [B, m]`` over encoder states ``memory``."""
    decoder = model.get_decoder()
    states = _embed(decoder, ids)
    length = ids.shape[1]
    causal = torch.full((length, length), _MASKED).triu(1)[None, None]
    mask = torch.where(visible.bool(), 0.0, _MASKED)[:, None, None, :]
    for number, layer in enumerate(decoder.layers):
        added = _attend(layer.self_attn, states, states, causal, _sides(prefix, Site.DECODER_SELF, number))
        states = layer.self_attn_layer_norm(states + added)
        added = _attend(layer.encoder_attn, states, memory, mask, _sides(prefix, Site.DECODER_CROSS, number))
        states = _feed(layer, layer.encoder_attn_layer_norm(states + added))
    logits: Tensor = model.lm_head(states) + model.final_logits_bias
    return logits


def _embed(stack: Any, ids: Tensor) -> Tensor:
    table = stack.embed_positions
    positions = table.weight[torch.arange(ids.shape[1]) + table.offset]
    states: Tensor = stack.layernorm_embedding(stack.embed_tokens(ids) + positions)
    return states


def _feed(layer: Any, states: Tensor) -> Tensor:
    added = layer.fc2(layer.activation_fn(layer.fc1(states)))
    fed: Tensor = layer.final_layer_norm(states + added)
    return fed


def _sides(prefix: Prefix, site: Site, layer: int) -> tuple[Tensor, Tensor] | None:
    keys, values = (prefix.get(site.tensor(layer, side)) for side in SIDES)
    return None if keys is None or values is None else (keys, values)


def _attend(
    attention: Any, states: Tensor, memory: Tensor, mask: Tensor, prefix: tuple[Tensor, Tensor] | None
) -> Tensor:
    """Attention of ``states`` over the prefix, all of it visible, and ``memory`` under an additive mask."""

    def heads(rows: Tensor) -> Tensor:
        return rows.view(*rows.shape[:2], attention.num_heads, -1).transpose(1, 2)

    queries, keys, values = (
        heads(project(rows))
        for project, rows in (
            (attention.q_proj, states),
            (attention.k_proj, memory),
            (attention.v_proj, memory),
        )
    )
    if prefix is not None:
        keys, values = (
            torch.cat([part.expand(len(rows), -1, -1, -1), rows], dim=2)
            for part, rows in zip(prefix, (keys, values), strict=True)
        )
        mask = functional.pad(mask, (prefix[0].shape[1], 0))
    scores = queries @ keys.transpose(2, 3) * attention.head_dim**-0.5 + mask
    read: Tensor = attention.out_proj((scores.softmax(-1) @ values).transpose(1, 2).flatten(2))
    return read


class Steered:
    """A BART under a prefix: what PEFT's model is to other prompts."""

    def __init__(self, model: PreTrainedModel, prefix: Prefix) -> None:
        self.model = model
        self.config = model.config
        self._prefix = prefix

    @torch.no_grad()
    def generate(
        self, input_ids: Tensor, attention_mask: Tensor, max_new_tokens: int, do_sample: bool = False
    ) -> Tensor:
        """Greedy ids ``[1, m]`` for one source ``[1, n]``: the whole decoder input is read for each token."""
        if do_sample:
            raise ValueError("only greedy decoding is written here")
        memory = encode(self.model, input_ids, attention_mask, self._prefix)
        ids = torch.tensor([[self.config.decoder_start_token_id]])
        while ids.shape[1] <= max_new_tokens and int(ids[0, -1]) != self.config.eos_token_id:
            logits = decode(self.model, ids, memory, attention_mask, self._prefix)
            ids = torch.cat([ids, logits[:, -1].argmax(-1, keepdim=True)], dim=1)
        return ids
