"""Prefixes: keys and values of every layer, at one attention site or several.

A prefix of a site is one matrix `[p, width]` in training, PEFT's layout: in a row layer after layer, the keys
of all its heads, then the values. p virtual tokens, Hk heads of keys and values, Dk and Dv their widths.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from app.errors import InvalidRequest
from app.prompt import LayerGeometry, TaskType
from app.sites import SIDES, Site
from app.training.prompts.learned import LearnedPrompt

Layers = Mapping[Site, Sequence[LayerGeometry]]


def joined(pairs: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Return the matrix `[p, width]` of each layer's keys `[Hk, p, Dk]` and values `[Hk, p, Dv]`."""
    return torch.cat([side.transpose(0, 1).flatten(1) for pair in pairs for side in pair], dim=1)


def split(matrix: Tensor, site: Site, layers: Sequence[LayerGeometry]) -> dict[str, Tensor]:
    """Return the keys and values of a matrix, by canonical names."""
    widths = [(layer.key_dim, layer.value_dim) for layer in layers]
    sizes = [layer.num_kv_heads * width for layer, pair in zip(layers, widths, strict=True) for width in pair]
    columns = iter(torch.split(matrix, sizes, dim=1))
    return {
        site.tensor(number, side): next(columns).reshape(len(matrix), layer.num_kv_heads, -1).transpose(0, 1)
        for number, layer in enumerate(layers)
        for side in SIDES
    }


def check_frozen(frozen_tokens: int, num_tokens: int) -> None:
    """Raise InvalidRequest: nothing would be left to learn."""
    if frozen_tokens >= num_tokens:
        raise InvalidRequest(
            f"{frozen_tokens} of {num_tokens} virtual tokens frozen leave none to learn",
            param="frozen_tokens",
        )


class _AtSites(LearnedPrompt):
    """A matrix of each site."""

    def __init__(self, task_type: TaskType, position_offset: int, layers: Layers) -> None:
        super().__init__(task_type, position_offset)
        self._layers = dict(layers)

    def matrix(self, site: Site) -> Tensor:
        """Return `[p, width]`, with gradients."""
        raise NotImplementedError

    def tensors(self, task: int = 0) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for site, layers in self._layers.items():
            found |= split(self.matrix(site), site, layers)
        return found


class Prefix(_AtSites):
    """Keys and values themselves; the first tokens may be frozen (a cartridge's are)."""

    def __init__(
        self,
        task_type: TaskType,
        position_offset: int,
        layers: Layers,
        starts: Mapping[Site, Tensor],
        frozen_tokens: int = 0,
    ) -> None:
        """`starts` are matrices `[p, width]`."""
        super().__init__(task_type, position_offset, layers)
        self._is_frozen = frozen_tokens > 0
        for site, start in starts.items():
            self.register_parameter(_learned(site), nn.Parameter(start[frozen_tokens:].clone()))
            if self._is_frozen:
                self.register_buffer(_frozen(site), start[:frozen_tokens].clone())

    def matrix(self, site: Site) -> Tensor:
        learned: Tensor = getattr(self, _learned(site))
        return torch.cat([getattr(self, _frozen(site)), learned]) if self._is_frozen else learned


def _frozen(site: Site) -> str:
    return f"frozen_{site.name.lower()}"


def _learned(site: Site) -> str:
    return f"learned_{site.name.lower()}"


class WrittenPrefix(_AtSites):
    """Keys and values that an MLP of each site writes; the file has what it wrote (Li and Liang, 2021)."""

    def __init__(
        self,
        task_type: TaskType,
        position_offset: int,
        layers: Layers,
        num_tokens: int,
        hidden_size: int,
        *,
        is_zero: bool = False,
    ) -> None:
        """`is_zero`: what is written at the start is zero."""
        super().__init__(task_type, position_offset, layers)
        self._networks = nn.ModuleDict(
            {
                site.name: nn.Sequential(
                    nn.Linear(_width(site_layers[0]), hidden_size),
                    nn.Tanh(),
                    nn.Linear(hidden_size, sum(layer.kv_width for layer in site_layers)),
                )
                for site, site_layers in layers.items()
            }
        )
        self._inputs = nn.ParameterDict(
            {site.name: torch.randn(num_tokens, _width(each[0])) for site, each in layers.items()}
        )
        if is_zero:
            for network in self._networks.values():
                for parameter in network[-1].parameters():  # type: ignore[index]  # a Sequential
                    nn.init.zeros_(parameter)

    def matrix(self, site: Site) -> Tensor:
        written: Tensor = self._networks[site.name](self._inputs[site.name])
        return written


def _width(layer: LayerGeometry) -> int:
    return layer.num_kv_heads * layer.key_dim
