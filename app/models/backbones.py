"""Which backbone runs a model."""

from transformers import PreTrainedModel

from app.models.decoder_only import DecoderOnly
from app.models.encoder_decoder import EncoderDecoder
from app.prompt import ModelGeometry

AnyBackbone = DecoderOnly | EncoderDecoder


def backbone_of(model: PreTrainedModel, geometry: ModelGeometry) -> AnyBackbone:
    """Return the backbone of a model; `geometry` was recorded from it.

    Raise UnsupportedModel: an encoder-decoder can't be taken over exactly.
    """
    return EncoderDecoder(model, geometry) if geometry.has_encoder else DecoderOnly(model, geometry)
