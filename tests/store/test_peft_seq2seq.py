"""PEFT's adapters of encoder-decoders: number for number what PEFT itself feeds the model."""

import json
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import (
    CartridgeConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
)
from transformers import (
    AutoModelForSeq2SeqLM,
    BartConfig,
    DynamicCache,
    EncoderDecoderCache,
    PreTrainedModel,
    T5Config,
)

from app.errors import PromptRejected
from app.prompt import LayerGeometry, ModelGeometry, Prompt, PromptKind, TaskType
from app.sites import Embedding, Site
from app.store.importers import import_prompt
from app.store.source_files import CONFIG, PROMPT
from app.store.validation import validate_prompt
from tests.store.builders import peft_files, refusal_of, seq2seq_geometry
from tests.store.test_peft_importer import as_torch

NUM_TOKENS = 5
START = 0


def t5(encoder: int = 3, decoder: int = 2) -> T5Config:
    """Heads and d_kv don't make up d_model."""
    return T5Config(
        d_model=32,
        d_kv=6,
        num_heads=4,
        d_ff=32,
        num_layers=encoder,
        num_decoder_layers=decoder,
        vocab_size=64,
        decoder_start_token_id=START,
        initializer_factor=4.0,
    )


def bart(encoder: int = 2, decoder: int = 2) -> BartConfig:
    return BartConfig(
        d_model=32,
        encoder_layers=encoder,
        decoder_layers=decoder,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        vocab_size=64,
        max_position_embeddings=64,
        decoder_start_token_id=START,
        init_std=0.25,
        dropout=0.0,
        attention_dropout=0.0,
    )


BASES: dict[str, Any] = {"t5": t5, "bart": bart}
_COMMON: dict[str, Any] = {"task_type": "SEQ_2_SEQ_LM", "num_virtual_tokens": NUM_TOKENS}
SOFT: dict[str, Any] = {
    "prompt_tuning": lambda: PromptTuningConfig(**_COMMON),
    "prompt_tuning_1": lambda: PromptTuningConfig(**_COMMON, num_transformer_submodules=1),
    "p_tuning": lambda: PromptEncoderConfig(**_COMMON, encoder_hidden_size=8),
}
PREFIX: dict[str, Any] = {
    "prefix": lambda **more: PrefixTuningConfig(**_COMMON, **more),
    "prefix_projected": lambda **more: PrefixTuningConfig(
        **_COMMON, **more, prefix_projection=True, encoder_hidden_size=8
    ),
    "cartridge": lambda **more: CartridgeConfig(**_COMMON, **more, num_frozen_tokens=1),
}


@dataclass(frozen=True)
class Adapter:
    model: PeftModel
    base: ModelGeometry
    files: dict[str, bytes]

    @property
    def inner(self) -> PreTrainedModel:
        return self.model.get_base_model()

    def imported(self, **changes: Any) -> Prompt:
        """As publishing imports it, with changes to the config."""
        config = json.dumps(json.loads(self.files[CONFIG]) | changes).encode()
        return import_prompt({**self.files, CONFIG: config}, self.base).prompt


def geometry_of(config: T5Config | BartConfig, **changes: Any) -> ModelGeometry:
    is_t5 = isinstance(config, T5Config)
    layer = LayerGeometry(4, 6, 6, has_position_bias=True) if is_t5 else LayerGeometry(4, 8, 8)
    num_decoder = config.num_decoder_layers if is_t5 else config.decoder_layers
    layers = {
        "encoder": (layer,) * config.num_hidden_layers,
        "decoder": (layer,) * num_decoder,
        "cross": (replace(layer, has_position_bias=False),) * num_decoder,
    }
    return seq2seq_geometry(**layers, hidden_size=config.d_model, **changes)


def adapt(config: T5Config | BartConfig, tuning: Any, directory: Path) -> Adapter:
    """Let PEFT make, save and load an adapter of random numbers."""
    torch.manual_seed(0)
    base = AutoModelForSeq2SeqLM.from_config(config).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = get_peft_model(base, tuning).eval()
        for parameter in made.prompt_encoder.parameters():
            torch.nn.init.normal_(parameter)
        made.save_pretrained(directory)
        model = PeftModel.from_pretrained(made.get_base_model(), directory).eval()
    files = {
        PROMPT: (directory / "adapter_model.safetensors").read_bytes(),
        CONFIG: (directory / "adapter_config.json").read_bytes(),
    }
    return Adapter(model, geometry_of(config), files)


def prefix_of(base: str, kind: str, directory: Path) -> Adapter:
    token_dim = {"token_dim": 24} if base == "t5" else {}  # PEFT's default is d_model, and fails
    return adapt(BASES[base](), PREFIX[kind](**token_dim), directory)


@torch.no_grad()
def logits(model: Any, **inputs: Any) -> torch.Tensor:
    found: torch.Tensor = model(decoder_input_ids=torch.tensor([[START, 7, 9]]), **inputs).logits
    return found


SOURCE = torch.tensor([[5, 6, 11, 30, 1]])


@pytest.mark.parametrize("kind", SOFT)
@pytest.mark.parametrize("base", BASES)
def test_soft_prompts_are_the_first_rows_of_the_encoder(base: str, kind: str, tmp_path: Path) -> None:
    adapter = adapt(BASES[base](), SOFT[kind](), tmp_path)
    prompt = adapter.imported()
    assert prompt.tensors.keys() == {"enc.embeds"}
    assert (prompt.kind, prompt.task_type) == (PromptKind.SOFT, TaskType.SEQ_2_SEQ_LM)
    assert (prompt.length(Embedding.ENCODER), prompt.position_offset) == (NUM_TOKENS, 0)
    rows = as_torch(prompt, "enc.embeds")
    with torch.no_grad():
        assert torch.equal(rows, adapter.model.get_prompt(1)[0][:NUM_TOKENS])
    words = adapter.model.word_embeddings(SOURCE)
    ours = logits(adapter.inner, inputs_embeds=torch.cat([rows[None], words], 1))
    assert torch.equal(ours, logits(adapter.model, input_ids=SOURCE))
    validate_prompt(prompt, adapter.base)
    # What a converter's config leaves out follows from the tensor.
    assert adapter.imported(num_virtual_tokens=NUM_TOKENS, token_dim=None).digest == prompt.digest


@pytest.mark.parametrize("kind", PREFIX)
@pytest.mark.parametrize("base", BASES)
def test_prefixes_have_pefts_map_of_rows(base: str, kind: str, tmp_path: Path) -> None:
    adapter = prefix_of(base, kind, tmp_path)
    prompt = adapter.imported()
    layers = range(len(adapter.base.layers[Site.DECODER_SELF]))
    assert prompt.tensors.keys() == {f"dec.self.{layer}.{side}" for layer in layers for side in "kv"}
    assert prompt.length(Site.DECODER_SELF) == prompt.position_offset == NUM_TOKENS
    with torch.no_grad():
        cache = adapter.model.get_prompt(1).self_attention_cache
    for layer in layers:
        assert torch.equal(as_torch(prompt, f"dec.self.{layer}.k"), cache.layers[layer].keys[0])
        assert torch.equal(as_torch(prompt, f"dec.self.{layer}.v"), cache.layers[layer].values[0])
    theirs = logits(adapter.model, input_ids=SOURCE)
    assert torch.equal(with_prefix(adapter, prompt), theirs)
    validate_prompt(prompt, adapter.base)


def with_prefix(adapter: Adapter, prompt: Prompt) -> torch.Tensor:
    """Logits of the bare model after the prompt's keys and values."""
    cache = DynamicCache()
    for layer in range(len(adapter.base.layers[Site.DECODER_SELF])):
        names = (f"dec.self.{layer}.{side}" for side in "kv")
        cache.update(*(as_torch(prompt, name)[None] for name in names), layer)
    return logits(adapter.inner, input_ids=SOURCE, past_key_values=EncoderDecoderCache(cache, DynamicCache()))


@pytest.mark.parametrize("base", BASES)
def test_the_natural_map_of_rows_is_another_prompt(base: str, tmp_path: Path) -> None:
    """As of a causal adapter of the same numbers."""
    adapter = prefix_of(base, "prefix", tmp_path)
    natural = adapter.imported(task_type="CAUSAL_LM", num_transformer_submodules=1)
    difference = (with_prefix(adapter, natural) - logits(adapter.model, input_ids=SOURCE)).abs().max()
    assert difference > 0.1


def test_an_offset_of_p_matters(tmp_path: Path) -> None:
    """BART's learned positions: the same keys and values, with tokens that begin at 0."""
    adapter = prefix_of("bart", "prefix", tmp_path)
    positions = adapter.inner.model.decoder.embed_positions
    shifted = positions.weight.data.clone()
    at_p = with_prefix(adapter, adapter.imported())
    positions.weight.data = shifted.roll(NUM_TOKENS, 0)  # position p is now what position 0 was
    assert (with_prefix(adapter, adapter.imported()) - at_p).abs().max() > 0.1


def test_layers_of_encoder_and_decoder(tmp_path: Path) -> None:
    adapter = adapt(bart(encoder=3, decoder=2), PREFIX["prefix"](), tmp_path)
    assert max(adapter.imported().tensors) == "dec.self.1.v"
    # Without a base, the decoder is taken to be as long as the encoder.
    alone = import_prompt(adapter.files).prompt
    assert max(alone.tensors) == "dec.self.2.v"
    assert as_torch(alone, "dec.self.1.v").equal(as_torch(adapter.imported(), "dec.self.1.v"))
    other = replace(adapter, base=geometry_of(bart(encoder=4, decoder=2)))
    with pytest.raises(PromptRejected, match=r"num_layers is wrong; expected: 4, the layers .* encoder"):
        other.imported()


def test_an_encoder_shorter_than_the_decoder(tmp_path: Path) -> None:
    """PEFT fails there, unless the config names as many layers as the decoder has."""
    short = bart(encoder=2, decoder=3)
    adapter = adapt(short, PREFIX["prefix"](), tmp_path)
    with pytest.raises(IndexError):
        logits(adapter.model, input_ids=SOURCE)
    with pytest.raises(PromptRejected, match=r"encoder has 2 layers and its decoder 3.*num_layers=3"):
        adapter.imported()
    whole = adapt(short, PREFIX["prefix"](num_layers=3), tmp_path)
    assert torch.equal(with_prefix(whole, whole.imported()), logits(whole.model, input_ids=SOURCE))


def test_one_submodule_puts_a_prefix_where_no_prompt_is(tmp_path: Path) -> None:
    adapter = adapt(bart(), PREFIX["prefix"](num_transformer_submodules=1), tmp_path)
    for changes in ({"num_transformer_submodules": 2}, {"task_type": "CAUSAL_LM"}):
        guessed = adapter.imported(**changes)
        difference = with_prefix(adapter, guessed) - logits(adapter.model, input_ids=SOURCE)
        assert difference.abs().max() > 0.1
    with pytest.raises(PromptRejected, match="cross-attention too"):
        adapter.imported()


def files(values: np.ndarray | None = None, **changes: Any) -> dict[str, bytes]:
    """A hand-made soft prompt of an encoder-decoder: six rows, of which three are used."""
    values = np.arange(6 * 16, dtype="<f4").reshape(6, 16) if values is None else values
    fields = {"task_type": "SEQ_2_SEQ_LM", "num_transformer_submodules": 2}
    weights, config = peft_files(values, **(fields | changes))
    return {PROMPT: weights, CONFIG: config}


def test_what_a_config_leaves_out() -> None:
    whole = import_prompt(files()).prompt
    for missing in (
        {"num_transformer_submodules": None},
        {"num_virtual_tokens": 3, "token_dim": None, "num_transformer_submodules": None},
    ):
        assert import_prompt(files(**missing)).prompt.digest == whole.digest
    config = json.dumps({"peft_type": "PROMPT_TUNING", "task_type": "SEQ_2_SEQ_LM"}).encode()
    assert import_prompt(files() | {CONFIG: config}).prompt.digest == whole.digest


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"peft_type": "MULTITASK_PROMPT_TUNING"}, "its forward and generate disagree"),
        ({"modules_to_save": ["lm_head"]}, "its forward and generate disagree"),
        ({"num_transformer_submodules": 3}, "expected: 1 or 2; found: '3'"),
        ({"num_transformer_submodules": True}, "expected: 1 or 2; found: 'True'"),
        ({"num_transformer_submodules": 1}, "[num_virtual_tokens, token_dim] = [3, 16]; found: [6, 16]"),
        ({"num_virtual_tokens": 6}, "[2 * num_virtual_tokens, token_dim] = [12, 16]; found: [6, 16]"),
        ({"token_dim": 8}, "= [6, 8]; found: [6, 16]"),
        ({"peft_type": "PREFIX_TUNING", "num_transformer_submodules": 1}, "cross-attention too"),
        ({"peft_type": "PREFIX_TUNING"}, "2 * num_layers * token_dim] = [3, 64]"),
        ({"peft_type": "LORA"}, "not a prompt-learning kind"),
    ],
)
def test_refuses(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(PromptRejected) as caught:
        import_prompt(files(**changes))
    assert reason in caught.value.message


def test_an_odd_number_of_rows_is_no_soft_prompt() -> None:
    for rows in (1, 5):
        config = {"num_virtual_tokens": None}
        values = np.ones((rows, 16), dtype="<f4")
        uploaded = files(values, **config)
        fields = json.loads(uploaded[CONFIG])
        del fields["num_virtual_tokens"]
        refusal = refusal_of(import_prompt, uploaded | {CONFIG: json.dumps(fields).encode()})
        assert refusal is not None
        assert "2 * num_virtual_tokens" in refusal.message
