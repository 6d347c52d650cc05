"""Random encoder-decoders of the usual shapes, and what is asked of them."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

from benchmarks.work import Shape, Work, embedding_width


@dataclass(frozen=True, slots=True, kw_only=True)
class EncoderDecoderShape(Shape):
    """An encoder and a decoder of `layers` each."""

    family: str  # "t5" (relative positions, relu) or "bart" (learned positions, gelu)
    start_id: int  # what the decoder begins with


def _shape(family: str, layers: int, hidden: int, heads: int, vocabulary: int) -> EncoderDecoderShape:
    return EncoderDecoderShape(
        family=family,
        layers=layers,
        hidden=hidden,
        heads=heads,
        kv_heads=heads,
        intermediate=4 * hidden,
        vocabulary=vocabulary,
        start_id=0 if family == "t5" else 2,
    )


SHAPES = {
    "t5-base": _shape("t5", layers=12, hidden=768, heads=12, vocabulary=32_128),
    "bart-base": _shape("bart", layers=6, hidden=768, heads=12, vocabulary=50_265),
    "tiny-t5": _shape("t5", layers=2, hidden=64, heads=4, vocabulary=256),
    "tiny-bart": _shape("bart", layers=2, hidden=64, heads=4, vocabulary=256),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceWork(Work):
    """Texts of `prompt_tokens` for the encoder, after the `virtual_tokens` of a task's soft prompt."""

    shape: EncoderDecoderShape
    num_beams: int = 1  # 1: greedy

    @property
    def description(self) -> str:
        """What is asked, in a phrase."""
        decoding = "greedy" if self.num_beams == 1 else f"{self.num_beams} beams"
        return f"{Work.description.fget(self)}, {decoding}"  # type: ignore[attr-defined]

    @property
    def rows(self) -> int:
        """Sequences that run at once."""
        return self.requests * self.num_beams

    @property
    def slots(self) -> int:
        """Slots of the K/V cache: in cross-attention those of the text and its prompt."""
        return self.requests * (self.virtual_tokens + self.prompt_tokens + self.num_beams * self.new_tokens)


def random_encoder_decoder(shape: EncoderDecoderShape) -> PreTrainedModel:
    """Random bf16 weights, frozen, without special tokens that would end or force anything."""
    torch.manual_seed(0)
    model = _t5(shape) if shape.family == "t5" else _bart(shape)
    nn.Module.to(model, torch.bfloat16)
    model.train(False).requires_grad_(False)
    settings = model.generation_config
    assert settings is not None
    settings.eos_token_id = settings.forced_eos_token_id = settings.forced_bos_token_id = None
    settings.decoder_start_token_id, settings.pad_token_id = shape.start_id, 0
    return model


def _t5(shape: EncoderDecoderShape) -> PreTrainedModel:
    return T5ForConditionalGeneration(
        T5Config(
            d_model=shape.hidden,
            d_kv=shape.hidden // shape.heads,
            d_ff=shape.intermediate,
            num_layers=shape.layers,
            num_heads=shape.heads,
            vocab_size=shape.vocabulary,
        )
    )


def _bart(shape: EncoderDecoderShape) -> PreTrainedModel:
    return BartForConditionalGeneration(
        BartConfig(
            d_model=shape.hidden,
            encoder_layers=shape.layers,
            decoder_layers=shape.layers,
            encoder_attention_heads=shape.heads,
            decoder_attention_heads=shape.heads,
            encoder_ffn_dim=shape.intermediate,
            decoder_ffn_dim=shape.intermediate,
            vocab_size=shape.vocabulary,
            decoder_start_token_id=shape.start_id,
        )
    )


def encoder_prompts(model: PreTrainedModel, work: SourceWork) -> list[Tensor]:
    """Return a soft prompt `[p, d]` for each task, as wide as the model's own embeddings."""
    generator = torch.Generator().manual_seed(work.seed)
    rows = torch.randn(work.tasks, work.virtual_tokens, work.shape.hidden, generator=generator)
    return list((rows * embedding_width(model)).to(torch.bfloat16))
