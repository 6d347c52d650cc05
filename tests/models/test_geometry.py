"""Geometry is recorded from the running model, layer by layer, and limits come from its config."""

import pytest
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from app.models.attention.kv_cache import group_layers
from app.models.geometry import max_positions
from app.prompt import LayerGeometry
from app.sites import Site
from tests.tiny_models import WINDOW, packed_backbone, tiny_model


def test_shared_heads_and_explicit_widths_are_seen() -> None:
    geometry = packed_backbone(tiny_model("mistral")).geometry
    assert geometry.layers[Site.DECODER_SELF] == (LayerGeometry(2, 12, 12, WINDOW, queries_per_kv=2),) * 3
    assert (geometry.hidden_size, geometry.vocab_size, geometry.max_positions) == (48, 211, 320)
    assert (geometry.architecture, geometry.dtype) == ("mistral", "float32")


def test_mixed_windows_make_two_kv_groups() -> None:
    groups = group_layers(packed_backbone(tiny_model("gemma2")).geometry.layers)
    assert [(group.geometry.window, group.layers) for group in groups] == [(WINDOW, (0, 2)), (None, (1,))]


def test_sites_have_groups_of_their_own_where_their_layers_are_equal() -> None:
    layers = (LayerGeometry(2, 16, 16),) * 2
    groups = group_layers({Site.DECODER_SELF: layers, Site.DECODER_CROSS: layers})
    assert [(group.site, group.layers) for group in groups] == [
        (Site.DECODER_SELF, (0, 1)),
        (Site.DECODER_CROSS, (0, 1)),
    ]


def test_opt_takes_prompts_as_wide_as_its_embeddings() -> None:
    model = tiny_model("opt", word_embed_proj_dim=32)
    assert packed_backbone(model).geometry.hidden_size == 32


@pytest.mark.parametrize(
    ("rope", "limit"),
    [
        ({"rope_type": "default", "rope_theta": 1e4}, 4096),
        ({"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}, 4096),
        ({"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}, 4096),
        (
            {
                "rope_type": "longrope",
                "short_factor": [1.0] * 64,
                "long_factor": [2.0] * 64,
                "original_max_position_embeddings": 1024,
                "rope_theta": 1e4,
            },
            1024,
        ),
    ],
    ids=lambda value: value["rope_type"] if isinstance(value, dict) else "",
)
def test_length_dependent_rotary_scaling_caps_the_context(rope: dict[str, object], limit: int) -> None:
    """Past the original length a long row would change its packed neighbours."""
    config = CONFIG_MAPPING["llama"](max_position_embeddings=4096, rope_parameters=rope)
    assert max_positions(config) == limit
