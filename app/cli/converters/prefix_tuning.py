"""BART prefixes of XiangLi1999/PrefixTuning: keys and values at three attention sites.

A directory of `save_pretrained`: `config.json`, and a state dict with an embedding `[p, d]` and a network for
each site. Linear-Tanh-Linear(-Tanh-Linear) of the embedding is `[p, 2L * d]`, viewed as `[p, 2L, H, D]`:
layer l has its keys in row 2l, its values in row 2l + 1. All stand before the tokens,
which begin at position 0.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from app.cli.converters.tensors import raw_tensor, read_state_dict
from app.prompt import Prompt, PromptKind, TaskType
from app.sites import SIDES, Site
from app.store.bounded import read_bounded
from app.store.prompt_file import make_prompt
from app.store.safetensors_file import RawTensor
from app.strict_json import JsonError, parse_json

DESCRIPTION = "a BART directory of PrefixTuning with its config.json and pytorch_model.bin"
_WEIGHTS = ("pytorch_model.bin", "model.safetensors")
_MAX_CONFIG_BYTES = 1 << 20
# Of each site: the embedding and the network.
_PARTS = {
    Site.DECODER_SELF: ("wte", "control_trans"),
    Site.DECODER_CROSS: ("wte2", "control_trans2"),
    Site.ENCODER_SELF: ("wte_enc", "control_trans_enc"),
}
_NUMBERS = ([0, 2], [0, 2, 4])  # of the linear modules between the Tanh of a network


@dataclass(frozen=True, slots=True)
class _Config:
    """What the prefix's own config.json says of its base."""

    num_heads: int
    num_layers: int  # that the networks make: as many as the decoder has
    num_encoder_layers: int

    def layers_at(self, site: Site) -> int:
        """Return how many layers the base has at a site."""
        return self.num_encoder_layers if site is Site.ENCODER_SELF else self.num_layers


def recognises(source: Path) -> bool:
    """Return whether a directory holds a config and a state dict."""
    return (source / "config.json").is_file() and _weights(source) is not None


def read(source: Path, task_type: TaskType | None) -> Prompt:
    """Bake the networks in float32. Raise ValueError, PromptRejected, OSError."""
    if task_type is TaskType.CAUSAL_LM:
        raise ValueError(
            f"{source} is a prefix for BART, which is an encoder-decoder; expected: SEQ_2_SEQ_LM"
        )
    weights = _weights(source)
    assert weights is not None
    state = {name: tensor.float() for name, tensor in read_state_dict(weights).items()}
    missing = {"wte.weight", "control_trans.0.weight"} - state.keys()
    if missing:
        raise ValueError(f"{weights} holds no {min(missing)}: it is no prefix of PrefixTuning")
    config = _read_config(source / "config.json", len(state["wte.weight"]))
    tensors: dict[str, RawTensor] = {}
    for site, (embedding, network) in _PARTS.items():
        if f"{embedding}.weight" in state:
            baked = _bake(state[f"{embedding}.weight"], _linears(state, network))
            tensors |= _split_layers(baked, site, config)
    return make_prompt(PromptKind.PREFIX, tensors, task_type=TaskType.SEQ_2_SEQ_LM, position_offset=0)


def _weights(source: Path) -> Path | None:
    return next((source / name for name in _WEIGHTS if (source / name).is_file()), None)


def _read_config(path: Path, num_virtual_tokens: int) -> _Config:
    try:
        fields = parse_json(read_bounded(path, _MAX_CONFIG_BYTES))
    except JsonError as error:
        raise ValueError(f"{path} is refused: {error}") from None
    if not isinstance(fields, dict):
        raise ValueError(f"{path} must hold a JSON object")
    if _is_on(fields.get("use_infix")):
        raise ValueError(f"{path}: an infix depends on the input, which no prompt can express (use_infix)")
    if fields.get("preseqlen", num_virtual_tokens) != num_virtual_tokens:
        raise ValueError(
            f"{path}: the prefix depends on the input, which no prompt can express; expected: an embedding "
            f"of preseqlen = {fields['preseqlen']} rows, found: {num_virtual_tokens}"
        )
    names = ("decoder_attention_heads", "decoder_layers", "encoder_layers")
    for name in names:
        if type(fields.get(name)) is not int or fields[name] < 1:
            raise ValueError(f"{path}: {name} is wrong; expected: BART's, a whole number from 1")
    config = _Config(*(fields[name] for name in names))
    if config.num_encoder_layers > config.num_layers:
        raise ValueError(
            f"{path}: PrefixTuning makes as many layers as the decoder has, {config.num_layers}, and the "
            f"encoder has {config.num_encoder_layers}: some would be without a prefix"
        )
    return config


def _is_on(value: Any) -> bool:
    return bool(value) and value != "no"


def _linears(state: Mapping[str, Tensor], network: str) -> list[tuple[Tensor, Tensor]]:
    """Return weights and biases of a network's linear modules, in order."""
    parsed = (re.fullmatch(rf"{network}\.([0-9]+)\.weight", name) for name in state)
    numbers = sorted(int(match[1]) for match in parsed if match)
    if numbers not in _NUMBERS or any(f"{network}.{number}.bias" not in state for number in numbers):
        found = ", ".join(sorted(name for name in state if name.startswith(f"{network}."))[:8]) or "nothing"
        raise ValueError(
            f"The network {network} is not Linear-Tanh-Linear; expected: weights and biases 0, 2 (and 4), "
            f"found: {found}"
        )
    return [(state[f"{network}.{number}.weight"], state[f"{network}.{number}.bias"]) for number in numbers]


def _bake(embedding: Tensor, linears: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Return `[p, 2L * d]` of the embedding `[p, d]`."""
    hidden = embedding
    try:
        for number, (weight, bias) in enumerate(linears):
            hidden = linear(torch.tanh(hidden) if number else hidden, weight, bias)
    except RuntimeError as error:
        raise ValueError(f"The shapes of the network don't fit each other: {error}") from None
    return hidden


def _split_layers(baked: Tensor, site: Site, config: _Config) -> dict[str, RawTensor]:
    """Return K and V `[H, p, D]` of each layer of a site."""
    p, width = baked.shape
    num_rows = 2 * config.num_layers
    if width % (num_rows * config.num_heads):
        raise ValueError(
            f"The network makes {width} numbers a virtual token; expected: a multiple of 2 * decoder_layers "
            f"* decoder_attention_heads = {num_rows * config.num_heads}"
        )
    rows = baked.view(p, num_rows, config.num_heads, -1).permute(1, 2, 0, 3)
    return {
        site.tensor(layer, side): raw_tensor(rows[2 * layer + number], site)
        for layer in range(config.layers_at(site))
        for number, side in enumerate(SIDES)
    }
