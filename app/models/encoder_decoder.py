"""An encoder-decoder of transformers as a Backbone.

The model's own modules run. What assumes one sequence per row is replaced, and found by what it does:
position embeddings and biases (positions.py), projections of sources that were encoded before, and tokens
without wanted logits. T tokens and S source rows of a step, d embedding width.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, EncoderDecoderCache, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from app.errors import UnsupportedModel
from app.models.attention.metadata import StepMetadata
from app.models.attention.packed import IMPLEMENTATION
from app.models.own_tensors import embedding_after_prompts
from app.models.packed_model import PackedModel
from app.models.positions import EXAMPLE_ROWS, take_biases, take_positions
from app.prompt import LayerGeometry, ModelGeometry
from app.sites import Site


class EncoderDecoder(PackedModel):
    """Encodes the sources of a step together, then runs its tokens, each of which reads one source."""

    def __init__(self, model: PreTrainedModel, geometry: ModelGeometry) -> None:
        """Change `model` for packed rows: from now on it runs only with a step's metadata.

        Raise UnsupportedModel: something in it can't be taken over exactly.
        """
        super().__init__(model, geometry)
        self._encoder, self._decoder = model.get_encoder(), model.get_decoder()
        self._source_embedding = self._encoder.get_input_embeddings()
        self._embedding_after_prompt = embedding_after_prompts(model)
        self._embedding = self._decoder.get_input_embeddings()
        # Some encoders multiply the embeddings of ids by it, but none that they are given.
        self._source_scale = float(getattr(self._encoder, "embed_scale", 1.0))
        self._encoded_before = _EncodedBefore(
            geometry.layers[Site.DECODER_CROSS], dtype=self.dtype, device=self.device
        )
        self._unread = torch.zeros(1, 1, geometry.hidden_size, dtype=self.dtype, device=self.device)
        self._take_over()

    @torch.inference_mode()
    def _take_over(self) -> None:
        example = torch.linspace(-1, 1, EXAMPLE_ROWS * self.geometry.hidden_size)
        rows = example.view(1, EXAMPLE_ROWS, -1).to(self.device, self.dtype)
        self.model.set_attn_implementation("eager")
        try:
            has_positions = [
                take_positions(
                    self._encoder,
                    lambda: self._encoder(inputs_embeds=rows),
                    self.geometry.max_source_positions,
                ),
                take_positions(
                    self._decoder,
                    lambda: self._decoder(inputs_embeds=rows, encoder_hidden_states=rows, use_cache=False),
                    self.geometry.max_positions,
                ),
            ]
        finally:
            self.model.set_attn_implementation(IMPLEMENTATION)
        has_biases = [take_biases(stack) for stack in (self._encoder, self._decoder)]
        if not all(map(any, zip(has_positions, has_biases, strict=True))):
            raise UnsupportedModel(
                f"the architecture '{self.geometry.architecture}' can't be served exactly: it has neither "
                "tables of positions nor biases by distance, which packed rows could be given"
            )
        self._decoder.register_forward_hook(_keep_wanted_rows, with_kwargs=True)

    def embed(self, token_ids: Tensor) -> Tensor:
        embeds: Tensor = self._embedding(token_ids)
        return embeds

    def embed_source(self, token_ids: Tensor, *, follows_soft_prompt: bool) -> Tensor:
        embedding = self._embedding_after_prompt if follows_soft_prompt else self._source_embedding
        embeds: Tensor = embedding(token_ids)
        return embeds if follows_soft_prompt else embeds * self._source_scale

    @torch.inference_mode()
    def forward(
        self, embeds: Tensor, positions: Tensor, metadata: StepMetadata, source_embeds: Tensor | None = None
    ) -> Tensor:
        has_new = source_embeds is not None
        encoded = self._encode(source_embeds, metadata) if source_embeds is not None else self._unread
        outputs = self.model(
            encoder_outputs=BaseModelOutput(last_hidden_state=encoded),
            decoder_inputs_embeds=embeds.unsqueeze(0),
            past_key_values=None if has_new else self._encoded_before,
            use_cache=False,
            metadata=metadata,
            positions=positions,
        )
        logits: Tensor = outputs.logits[0]
        return logits

    def _encode(self, source_embeds: Tensor, metadata: StepMetadata) -> Tensor:
        """Return hidden states `[1, S, d]`."""
        encoded: Tensor = self._encoder(
            inputs_embeds=source_embeds.unsqueeze(0), metadata=metadata, positions=metadata.source_positions
        ).last_hidden_state
        return encoded


def _keep_wanted_rows(stack: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    """Leave only the tokens with wanted logits to the head, which takes no selection."""
    output.last_hidden_state = output.last_hidden_state[:, kwargs["metadata"].logit_rows]
    return output


class _EncodedBefore(EncoderDecoderCache):
    """Tells a decoder that no source is new, so that its layers project none: ours are in the K/V cache."""

    def __init__(self, layers: Sequence[LayerGeometry], *, dtype: torch.dtype, device: torch.device) -> None:
        nothing = DynamicCache()
        for number, layer in enumerate(layers):
            keys, values = (
                torch.empty(1, layer.num_kv_heads, 0, width, dtype=dtype, device=device)
                for width in (layer.key_dim, layer.value_dim)
            )
            nothing.update(keys, values, number)
        super().__init__(_Passing(), nothing)
        self.is_updated = dict.fromkeys(range(len(layers)), True)


class _Passing(DynamicCache):
    """Keeps nothing: attention puts a step's keys and values where they belong."""

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        return key_states, value_states
