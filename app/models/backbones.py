"""Which backbone runs a model."""

from transformers import PreTrainedModel

from app.models.decoder_only import DecoderOnly
from app.models.encoder_decoder import EncoderDecoder
from app.models.geometry import model_geometry


def backbone_of(
    model: PreTrainedModel, fingerprint: str, max_context: int | None = None
) -> DecoderOnly | EncoderDecoder:
    """Record the geometry of a model that was loaded with our attention implementation; return its backbone.

    Raise UnsupportedModel: it can't be served exactly.
    """
    geometry = model_geometry(model, fingerprint, max_context)
    return EncoderDecoder(model, geometry) if geometry.has_encoder else DecoderOnly(model, geometry)
