"""The frozen base model that prompts are trained on: as transformers runs it, with the texts of serving."""

from collections.abc import Callable
from dataclasses import dataclass

from transformers import PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from app.errors import UnsupportedModel
from app.models.attention.packed import register
from app.models.attention.prefixed import PREFIXED, register_prefixed
from app.models.base_name import base_name
from app.models.geometry import model_geometry
from app.models.placement import check_dtype, choose_device, choose_dtype
from app.models.pretrained import load_pretrained, read_config
from app.prompt import ModelGeometry
from app.text.prompt_encoder import PromptEncoder
from app.text.truncation import TruncationSide


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingBase:
    """A frozen base model; the encoder gives the very ids that serving gives it."""

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast
    encoder: PromptEncoder
    geometry: ModelGeometry
    eos_ids: frozenset[int]  # any of them ends an answer
    eos_id: int | None  # the one that ends an answer in training; None: the base has none
    decoder_start_id: int | None = None  # with which an encoder-decoder's decoder begins
    forced_bos_id: int | None = None  # the first token of every answer, where the generation config has one
    truncate: int | None = None  # tokens of an input to which longer ones are cut; None: they are refused

    @property
    def is_encoder_decoder(self) -> bool:
        """Whether an encoder reads the source, and a decoder writes the target."""
        return self.geometry.has_encoder


def load_training_base(
    reference: str,
    *,
    dtype: str = "auto",
    device: str = "auto",
    max_context: int | None = None,
    progress: Callable[[str], None] = print,
) -> TrainingBase:
    """Load a language model from a local path or hub id, frozen; `max_context` bounds its positions.

    Whether it can be served exactly isn't asked here: the probes of serving answer that.

    Raise UnsupportedModel: no language model, no safetensors, no fast tokenizer, or attention that no prompt
    reaches. Raise ValueError: `dtype` or `device` name nothing that this machine has.
    """
    register()
    target = choose_device(device)
    load_dtype = choose_dtype(dtype, target)
    config = read_config(reference)
    check_dtype(config, load_dtype)
    progress(f"loading {reference}")
    loaded = load_pretrained(reference, config, dtype=load_dtype, device=target, progress=progress)
    return training_base(
        base_name(reference),
        loaded.model,
        loaded.tokenizer,
        eos_ids=loaded.eos_ids,
        fingerprint=loaded.fingerprint,
        decoder_start_id=loaded.decoder_start_id,
        max_context=max_context,
    )


def training_base(
    name: str,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    eos_ids: frozenset[int],
    fingerprint: str,
    decoder_start_id: int | None = None,
    max_context: int | None = None,
) -> TrainingBase:
    """Wrap a loaded, frozen model. Raise UnsupportedModel as `load_training_base`."""
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise UnsupportedModel("this base has no fast tokenizer (tokenizer.json), which training needs")
    geometry = _measured(model, fingerprint, max_context)
    encoder = PromptEncoder(
        tokenizer,
        max_positions=geometry.max_source_positions or geometry.max_positions,
        vocab_size=geometry.vocab_size,
        side=TruncationSide.RIGHT if geometry.has_encoder else TruncationSide.LEFT,
    )
    return TrainingBase(
        name=name,
        model=model,
        tokenizer=tokenizer,
        encoder=encoder,
        geometry=geometry,
        eos_ids=eos_ids,
        eos_id=encoder.end_id(eos_ids),
        decoder_start_id=decoder_start_id,
        forced_bos_id=getattr(model.generation_config, "forced_bos_token_id", None),
    )


def _measured(model: PreTrainedModel, fingerprint: str, max_context: int | None) -> ModelGeometry:
    """Return the geometry. Attention is what it was then; an encoder-decoder's takes prefixes at any site."""
    register()
    attention = model.config._attn_implementation
    geometry = model_geometry(model, fingerprint, max_context)
    if geometry.has_encoder:
        register_prefixed()
        attention = PREFIXED
    model.set_attn_implementation(attention)
    return geometry
