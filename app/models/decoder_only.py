"""A causal transformers model as a Backbone."""

import torch
from torch import Tensor
from transformers import PreTrainedModel

from app.models.attention.metadata import StepMetadata
from app.models.packed_model import PackedModel
from app.prompt import ModelGeometry


class DecoderOnly(PackedModel):
    """Runs a plain decoder, whose prompts are all resident keys and values."""

    def __init__(self, model: PreTrainedModel, geometry: ModelGeometry) -> None:
        super().__init__(model, geometry)
        self._embedding = model.get_input_embeddings()

    def embed(self, token_ids: Tensor) -> Tensor:
        embeds: Tensor = self._embedding(token_ids)
        return embeds

    def embed_source(self, token_ids: Tensor, *, follows_soft_prompt: bool) -> Tensor:
        raise NotImplementedError("there is no encoder")

    @torch.inference_mode()
    def forward(
        self, embeds: Tensor, positions: Tensor, metadata: StepMetadata, source_embeds: Tensor | None = None
    ) -> Tensor:
        outputs = self.model(
            inputs_embeds=embeds.unsqueeze(0),
            position_ids=positions.unsqueeze(0),
            use_cache=False,
            logits_to_keep=metadata.logit_rows,
            metadata=metadata,
        )
        logits: Tensor = outputs.logits[0]
        return logits
