"""torch's attention in fixed shapes: what graphs of decode steps need of a backend, and quick on a CPU."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from app.models.attention.backend import Context
from app.models.attention.position_bias import RowDistances
from app.models.attention.torch import RowBucket, TorchBackend, TorchLayout
from app.models.packed_model import PackedModel

WIDTH = 1024  # slots of a row, padding included


class PaddedBackend(TorchBackend):
    """Every row of a static layout is padded to the same width."""

    def static_layouts(self, num_rows: Sequence[int], max_slots: int) -> list["PaddedLayout"]:
        slots = torch.zeros(max(num_rows), WIDTH, dtype=torch.int64)
        mask = torch.full((max(num_rows), 1, 1, WIDTH), float("-inf"))
        mask[..., 0] = 0
        distances = torch.zeros(max(num_rows), WIDTH, dtype=torch.int64)
        return [
            PaddedLayout(slots[:rows], mask[:rows], distances[:rows], self._has_position_bias)
            for rows in num_rows
        ]


@dataclass
class PaddedLayout:
    slots: Tensor
    mask: Tensor
    distances: Tensor
    has_bias: bool

    @property
    def layout(self) -> TorchLayout:
        distances = RowDistances(self.distances) if self.has_bias else None
        return TorchLayout((RowBucket(slice(0, len(self.slots)), self.slots, self.mask, distances),), ())

    def fits(self, contexts: Sequence[Context]) -> bool:
        return all(len(context.slots) <= WIDTH for context in contexts)

    def fill(self, contexts: Sequence[Context]) -> None:
        lengths = torch.ones(len(self.slots), dtype=torch.int64)
        self.slots.zero_()
        for row, context in enumerate(contexts):
            lengths[row] = len(context.slots)
            self.slots[row, : len(context.slots)] = torch.from_numpy(context.slots)
        places = torch.arange(WIDTH)
        self.mask.zero_().masked_fill_((places >= lengths[:, None])[:, None, None], float("-inf"))
        self.distances.copy_(places - (lengths[:, None] - 1))


def use_padded_backends(backbone: PackedModel) -> None:
    backbone.backends = [
        PaddedBackend(group.geometry, backbone.dtype, backbone.device) for group in backbone.kv_groups
    ]
