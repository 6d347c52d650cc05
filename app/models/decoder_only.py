"""A causal transformers model as a Backbone."""

import torch
from torch import Tensor
from transformers import PreTrainedModel

from app.models.attention.kv_cache import KVCache, group_layers
from app.models.attention.metadata import AttentionStep
from app.models.cpu.sampled_rows import SampledRows
from app.models.own_tensors import DTYPES, own_tensor
from app.prompt import ModelGeometry, Prompt
from app.sites import SIDES, Embedding, Site


def tensor_of(prompt: Prompt, name: str) -> Tensor:
    """A prompt's tensor in its stored dtype, on the CPU."""
    info = prompt.tensors[name]
    raw = torch.frombuffer(bytearray(prompt.tensor_bytes(name)), dtype=DTYPES[info.dtype])
    return raw.view(info.shape)


class DecoderOnly:
    """Runs a model that was loaded with our attention implementation (attention/packed.py)."""

    def __init__(self, model: PreTrainedModel, geometry: ModelGeometry) -> None:
        self.geometry = geometry
        self.kv_groups = group_layers(geometry.layers)
        self.device = model.device
        self.dtype = model.dtype
        self.model = model
        self.sampled_rows = SampledRows()
        self._embedding = model.get_input_embeddings()

    def embed(self, token_ids: Tensor) -> Tensor:
        embeds: Tensor = self._embedding(token_ids)
        return embeds

    @torch.inference_mode()
    def forward(self, embeds: Tensor, positions: Tensor, step: AttentionStep, logit_rows: Tensor) -> Tensor:
        self.sampled_rows.current = logit_rows
        outputs = self.model(
            inputs_embeds=embeds.unsqueeze(0),
            position_ids=positions.unsqueeze(0),
            use_cache=False,
            logits_to_keep=logit_rows,
            step=step,
        )
        logits: Tensor = outputs.logits[0].float()
        return logits

    def prompt_embeddings(self, prompt: Prompt) -> Tensor:
        return tensor_of(prompt, Embedding.DECODER).to(self.device, self.dtype)

    def own_tensor(self, name: str) -> Tensor | None:
        return own_tensor(self.model, name)

    def write_prefix(self, prompt: Prompt, cache: KVCache, slots: tuple[Tensor, ...]) -> None:
        for layer, group in cache.group_of_layer.items():
            keys, values = (
                tensor_of(prompt, Site.DECODER_SELF.tensor(layer, side))
                .to(self.device, self.dtype)
                .transpose(0, 1)
                for side in SIDES
            )
            cache.write(layer, slots[group], keys, values)
