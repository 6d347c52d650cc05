"""BART by hand, without a cache: every layer's keys and values begin with a prefix's. An independent oracle.

Only the weights are transformers'. B = 1; H heads, D width of a head, T tokens, S tokens of the source.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import gelu, layer_norm, linear
from transformers import BartForConditionalGeneration

from app.sites import Site

# Of each site and layer: keys and values [H, p, D].
Prefix = Mapping[tuple[Site, int], tuple[Tensor, Tensor]]
_POSITION_OFFSET = 2  # BART's tables of positions begin with two rows that no token has


@dataclass(frozen=True)
class HandmadeBart:
    model: BartForConditionalGeneration
    prefix: Prefix = field(default_factory=dict)
    offset: int = 0  # the decoder's first position

    @torch.no_grad()
    def logits(self, source_ids: list[int], decoder_ids: list[int]) -> Tensor:
        """Return [T, V]."""
        state = self.model.state_dict()
        source = self._stack("encoder", self._embed("encoder", source_ids, 0), None)
        hidden = self._embed("decoder", decoder_ids, self.offset)
        hidden = self._stack("decoder", hidden, source)
        return linear(hidden, state["lm_head.weight"]) + state["final_logits_bias"][0]

    def greedy(self, source_ids: list[int], num_tokens: int) -> tuple[list[int], list[float]]:
        """Return so many tokens after the start token, with their log-probabilities."""
        ids, logprobs = [self.model.config.decoder_start_token_id], []
        for _ in range(num_tokens):
            scores = self.logits(source_ids, ids)[-1].log_softmax(-1)
            ids.append(int(scores.argmax()))
            logprobs.append(float(scores.max()))
        return ids[1:], logprobs

    def _weight(self, name: str) -> tuple[Tensor, Tensor]:
        state = self.model.state_dict()
        return state[f"model.{name}.weight"], state[f"model.{name}.bias"]

    def _norm(self, name: str, hidden: Tensor) -> Tensor:
        return layer_norm(hidden, hidden.shape[-1:], *self._weight(name))

    def _embed(self, stack: str, ids: list[int], offset: int) -> Tensor:
        state = self.model.state_dict()
        positions = torch.arange(len(ids)) + offset + _POSITION_OFFSET
        scale = self.model.config.d_model**0.5 if self.model.config.scale_embedding else 1.0
        embeds = state["model.shared.weight"][ids] * scale
        embeds = embeds + state[f"model.{stack}.embed_positions.weight"][positions]
        return self._norm(f"{stack}.layernorm_embedding", embeds)

    def _stack(self, stack: str, hidden: Tensor, source: Tensor | None) -> Tensor:
        num_layers = getattr(self.model.config, f"{stack}_layers")
        for layer in range(num_layers):
            name = f"{stack}.layers.{layer}"
            site = Site.ENCODER_SELF if source is None else Site.DECODER_SELF
            hidden = self._attend(f"{name}.self_attn", (site, layer), hidden, hidden)
            if source is not None:
                cross = (Site.DECODER_CROSS, layer)
                hidden = self._attend(f"{name}.encoder_attn", cross, hidden, source)
            inner = gelu(linear(hidden, *self._weight(f"{name}.fc1")))
            hidden = self._norm(
                f"{name}.final_layer_norm", hidden + linear(inner, *self._weight(f"{name}.fc2"))
            )
        return hidden

    def _attend(self, name: str, place: tuple[Site, int], hidden: Tensor, seen: Tensor) -> Tensor:
        """Return [T, d]: queries of `hidden` [T, d] over a prefix, then `seen` [S, d]."""
        config = self.model.config
        is_encoder = place[0] is Site.ENCODER_SELF
        num_heads = config.encoder_attention_heads if is_encoder else config.decoder_attention_heads
        query, key, value = (
            linear(each, *self._weight(f"{name}.{side}_proj")).unflatten(-1, (num_heads, -1)).transpose(0, 1)
            for side, each in (("q", hidden), ("k", seen), ("v", seen))
        )
        p = 0
        if place in self.prefix:
            keys, values = self.prefix[place]
            key, value, p = torch.cat([keys, key], 1), torch.cat([values, value], 1), keys.shape[1]
        scores = query @ key.transpose(1, 2) / query.shape[-1] ** 0.5
        if place[0] is Site.DECODER_SELF:
            later = torch.ones(len(hidden), len(seen), dtype=torch.bool).triu(1)
            scores[:, :, p:] = scores[:, :, p:].masked_fill(later, -torch.inf)
        mixed = (scores.softmax(-1) @ value).transpose(0, 1).flatten(1)
        out = linear(mixed, *self._weight(f"{name}.out_proj"))
        norm = name.replace("self_attn", "self_attn_layer_norm").replace(
            "encoder_attn", "encoder_attn_layer_norm"
        )
        return self._norm(norm, hidden + out)
