"""The probe passes what is exact, refuses what isn't, and its comparisons have teeth."""

import re
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from app.errors import PromptRejected, UnsupportedModel
from app.models import probe
from app.models.attention.packed import register
from app.models.attention.torch import TorchBackend
from app.models.geometry import model_geometry
from app.models.probe import TWIN_TOLERANCE, own_logits, probe_architecture, probe_weights
from app.models.twin import build_twin, twin_config
from app.prompt import ModelGeometry
from app.sites import Site
from app.store.validation import validate_prompt
from tests.store import builders
from tests.tiny_models import ARCHITECTURES, SEQ2SEQ_ARCHITECTURES, packed_backbone, tiny_model

# With their default shapes, as big as their first releases: the twin makes them small.
DEFAULTS = (*ARCHITECTURES, "gemma", "gemma3_text", "qwen3", "phi", "phi3", "cohere2", "olmo2", "granite")
DEFAULTS += ("qwen3_moe", "starcoder2", "smollm3", "glm4", "ernie4_5", "gpt_bigcode", "persimmon")
DEFAULTS += ("ministral", "hunyuan_v1_dense")


@pytest.fixture(autouse=True)
def _registered() -> None:
    register()


@pytest.mark.parametrize("architecture", DEFAULTS)
def test_supported_architectures_pass(architecture: str) -> None:
    assert probe_architecture(CONFIG_MAPPING[architecture]()) <= TWIN_TOLERANCE


REFUSED = ("falcon", "bloom", "mpt", "gptj", "codegen", "mamba", "llama4_text", "stablelm")


@pytest.mark.parametrize("architecture", REFUSED)
def test_architectures_with_their_own_attention_are_refused_by_name(architecture: str) -> None:
    with pytest.raises(UnsupportedModel, match=f"the architecture '{architecture}'"):
        probe_architecture(CONFIG_MAPPING[architecture]())


def test_the_documents_table_names_what_is_shown_here() -> None:
    table = (Path(__file__).parents[2] / "docs" / "models.md").read_text().splitlines()
    names = [set(re.findall(r"`([\w-]+)`", row)) for row in table if row.startswith("| `")]
    exact, probed, refused, served, packed, _ = names
    assert exact == set(ARCHITECTURES)
    assert probed == set(DEFAULTS) - set(ARCHITECTURES)
    assert refused == set(REFUSED)
    assert served | packed == {each.removesuffix("-gated") for each in SEQ2SEQ_ARCHITECTURES} | {
        "d_model",
        "generate",
    }


def test_the_refusal_says_why() -> None:
    with pytest.raises(UnsupportedModel, match="a table of its own"):
        probe_architecture(CONFIG_MAPPING["falcon"]())
    with pytest.raises(UnsupportedModel, match="no attention layers"):
        probe_architecture(CONFIG_MAPPING["rwkv"]())
    with pytest.raises(UnsupportedModel, match="layers of kind chunked_attention"):
        probe_architecture(CONFIG_MAPPING["llama4_text"]())


MISLEADING = {
    "gemma3n_text": "from embeddings it computes something else than from token ids",  # per-layer inputs
    "gemma4_text": "doesn't run from embeddings that are no token's",
    "roberta": "it computes something else than from token ids",  # positions follow the padding id
    "xlm-roberta": "it computes something else than from token ids",
    "bert": "one token at a time it computes something else",  # every token sees every other one
    "moshi": "one token at a time it computes something else",  # only its cache has a window
}


@pytest.mark.parametrize("architecture", MISLEADING)
def test_what_token_ids_alone_give_is_the_reference(architecture: str) -> None:
    """Packed rows equal these models' own forward pass from embeddings; their users run another one."""
    with pytest.raises(UnsupportedModel, match=MISLEADING[architecture]) as refusal:
        probe_architecture(CONFIG_MAPPING[architecture]())
    assert "\n" not in refusal.value.message


@pytest.mark.parametrize("architecture", ["cwm", "modernbert-decoder", "jetmoe", "minicpm3", "deepseek_v3"])
def test_the_twin_does_not_break_what_it_copies(architecture: str) -> None:
    """Fields that must be set, heads that are tied to experts, heads of two widths."""
    assert probe_architecture(CONFIG_MAPPING[architecture]()) <= TWIN_TOLERANCE


@pytest.mark.parametrize(("architecture", "takes"), [("llama", True), ("jetmoe", False), ("minicpm3", False)])
def test_prefixes_are_for_bases_that_keep_keys_and_values(architecture: str, takes: bool) -> None:
    with torch.inference_mode():
        twin = build_twin(CONFIG_MAPPING[architecture]())
    geometry = model_geometry(twin, "twin")
    assert geometry.takes_prefixes is takes
    fitting = replace(builders.geometry(), takes_prefixes=geometry.takes_prefixes)
    validate_prompt(builders.soft(), fitting)
    with nullcontext() if takes else pytest.raises(PromptRejected, match="train a soft prompt"):
        validate_prompt(builders.prefix(), fitting)


def test_embeddings_that_are_not_what_ids_become_are_noticed_on_the_real_weights_too() -> None:
    backbone = packed_backbone(tiny_model("llama"))
    own = own_logits(backbone.model)
    table = backbone.model.get_input_embeddings()
    backbone.embed = lambda ids: table(ids) * 1.5  # as if ids were scaled elsewhere
    with pytest.raises(UnsupportedModel, match="differ by"):
        probe_weights(backbone, own)


def test_wrong_attention_is_refused_with_its_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that is off by little is still refused, and the message names the figure."""
    exact = TorchBackend.forward

    def slightly_wrong(self: TorchBackend, *inputs: Any, **settings: Any) -> Tensor:
        return exact(self, *inputs, **settings) * 1.002

    monkeypatch.setattr(TorchBackend, "forward", slightly_wrong)
    with pytest.raises(UnsupportedModel, match=r"'llama' differs .* by \d\.\d+e-\d\d .* \(tolerance 1e-04\)"):
        probe_architecture(CONFIG_MAPPING["llama"]())


def test_a_window_that_is_off_by_one_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    real = probe.model_geometry

    def wider(*arguments: Any) -> ModelGeometry:
        geometry = real(*arguments)
        layers = tuple(
            replace(layer, window=layer.window and layer.window + 1)
            for layer in geometry.layers[Site.DECODER_SELF]
        )
        return replace(geometry, layers={Site.DECODER_SELF: layers})

    monkeypatch.setattr(probe, "model_geometry", wider)
    with pytest.raises(UnsupportedModel, match="'mistral' differs"):
        probe_architecture(CONFIG_MAPPING["mistral"]())


def test_the_real_weights_are_checked_too() -> None:
    model = tiny_model("llama")
    backbone = packed_backbone(model)
    own = own_logits(backbone.model)
    assert probe_weights(backbone, own) < 1e-5
    with torch.no_grad():
        backbone.model.lm_head.weight.mul_(1.01)
    with pytest.raises(UnsupportedModel, match="try --dtype float32"):
        probe_weights(backbone, own)


def test_the_twin_keeps_what_may_make_a_base_differ() -> None:
    roberta, smollm, gemma3n = (CONFIG_MAPPING[name]() for name in ("roberta", "smollm3", "gemma3n_text"))
    assert twin_config(roberta).pad_token_id == roberta.pad_token_id
    assert set(twin_config(smollm).no_rope_layers) == set(smollm.no_rope_layers)
    small = twin_config(gemma3n)
    assert len(small.layer_types) == small.num_hidden_layers == len(small.activation_sparsity_pattern)
    assert 0 < small.num_kv_shared_layers < small.num_hidden_layers
    assert set(small.activation_sparsity_pattern) == set(gemma3n.activation_sparsity_pattern)


def test_the_twin_keeps_every_kind_of_layer() -> None:
    config = CONFIG_MAPPING["gemma3_text"]()
    small = twin_config(config)
    assert set(small.layer_types) == set(config.layer_types)
    assert small.num_hidden_layers < config.num_hidden_layers
    assert small.sliding_window < config.sliding_window
    assert config.hidden_size != small.hidden_size, "the original is left alone"
