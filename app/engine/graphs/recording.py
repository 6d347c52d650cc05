"""Recording the graphs of decode steps, before the first request. Each is compared with an eager step.

Shapes: n rows of an example, V vocabulary.
"""

import time
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from app.engine.graphs.capture import Capture
from app.engine.graphs.decode_graphs import DecodeGraphs, bucket_sizes
from app.engine.graphs.decode_inputs import DecodeInputs
from app.engine.memory.device import device_memory
from app.engine.memory.exhaustion import forget_step, is_out_of_memory
from app.engine.plan import PlanItem
from app.engine.sampling.torch_sampler import greedy
from app.models.attention.backend import GraphBackend, Head
from app.models.attention.kv_cache import PADDING_SLOT, TRASH_SLOT, KVCache
from app.models.attention.metadata import PackedItem
from app.models.backbone import Backbone
from app.models.probe import WEIGHTS_TOLERANCE
from app.models.transfer import to_device
from app.models.weights import in_one_line
from app.sites import Site

_PRIME = 7919  # neighbouring rows of an example have distant tokens
_FAR, _LONGEST = 411, 1000  # and contexts of other lengths, up to those that attention splits
_SHARED = 512  # slots of a head

Progress = Callable[[str], None]


class NotRecorded(Exception):
    """Decode steps of this base can't be recorded; the message says why."""


def record_decode_steps(
    backbone: Backbone, cache: KVCache, *, max_rows: int, capture: Capture, progress: Progress
) -> DecodeGraphs | None:
    """Record steps of up to `max_rows` rows; None where they can't be recorded, for a reason that is shown.

    Nothing of the cache may be in use. `progress` gets lines for the operator.
    """
    began, free = time.monotonic(), device_memory(backbone.device).free
    progress(f"recording graphs of decode steps, for up to {max_rows} rows")
    try:
        graphs = _recorded(backbone, cache, bucket_sizes(max_rows), capture, progress)
    except Exception as error:  # models, libraries and drivers raise whatever they like
        forget_step(error)
        progress(f"decode steps run without graphs: {in_one_line(error)}")
        return None
    seconds, used = time.monotonic() - began, free - device_memory(backbone.device).free
    progress(
        f"{len(graphs.sizes)} graphs of decode steps, for up to {graphs.sizes[-1]} rows: "
        f"{seconds:.1f} s, {used / 2**20:.0f} MiB"
    )
    return graphs


def why_unrecordable(backbone: Backbone) -> str | None:
    """Return why a base's decode steps can't be recorded, if that is known before it is tried."""
    for group, backend in zip(backbone.kv_groups, backbone.backends, strict=True):
        if group.site is not Site.ENCODER_SELF and not isinstance(backend, GraphBackend):
            return f"the shapes of {type(backend).__name__} change with every step"
    return None


def _recorded(
    backbone: Backbone, cache: KVCache, sizes: Sequence[int], capture: Capture, progress: Progress
) -> DecodeGraphs:
    """Record the largest first. Those that memory doesn't hold are left out."""
    reason = why_unrecordable(backbone)
    if reason is not None:
        raise NotRecorded(reason)
    graphs = DecodeGraphs(backbone, DecodeInputs(backbone, cache, sizes))
    for size in reversed(sizes):
        try:
            _record(graphs, backbone, cache, size, capture)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            forget_step(error)
            progress(f"no memory for the graph of {size} rows")
    if not graphs.sizes:
        raise NotRecorded("memory holds none")
    return graphs


@torch.inference_mode()
def _record(graphs: DecodeGraphs, backbone: Backbone, cache: KVCache, size: int, capture: Capture) -> None:
    """Record steps of up to `size` rows. Raise NotRecorded: they differ from eager steps."""
    items = [_example_item(backbone, cache, row, size) for row in range(max(1, size - 1))]
    expected = _eager_logits(backbone, cache, items)
    graphs.inputs.fill([], None, size)  # what is recorded gives other logits than are compared
    graphs.record(size, capture, expected)
    replayed = graphs.replay(items, None)
    assert replayed is not None, "an example fits"
    error = float((replayed.logits - expected).float().norm() / expected.float().norm())
    if not error <= WEIGHTS_TOLERANCE[backbone.dtype]:  # a NaN fails too
        raise NotRecorded(f"with {size} rows, logits differ by {error:.1e} from an eager step's")
    if not torch.equal(replayed.choose().ids, greedy(replayed.logits).ids):
        raise NotRecorded(f"with {size} rows, tokens differ from an eager step's")


def _example_item(backbone: Backbone, cache: KVCache, row: int, size: int) -> PlanItem:
    """Return a token that sees the padding slot, again and again, and itself.

    All rows differ in token, position and slot. Some contexts are long, and those share a head.
    """
    geometry = backbone.geometry
    before = 1 + row * _FAR % max(1, min(_LONGEST, geometry.max_positions - 1))
    slots = []
    for group in cache.groups:
        if group.site is Site.DECODER_SELF:
            num_slots = len(cache.pools((group.site, group.layers[0]))[0])
            own = TRASH_SLOT + 1 + row % (num_slots - TRASH_SLOT - 1)
            slots.append(np.append(np.full(before, PADDING_SLOT), own))
        elif group.site is Site.DECODER_CROSS:
            slots.append(np.array([PADDING_SLOT]))
    heads = (Head(0, _SHARED),) if before >= _SHARED else ()
    return PlanItem(
        id=row,
        kv=PackedItem(before, 1, tuple(slots), heads),
        position=row * geometry.max_positions // size,
        token_ids=(_PRIME * row % geometry.vocab_size,),
    )


def _eager_logits(backbone: Backbone, cache: KVCache, items: Sequence[PlanItem]) -> Tensor:
    """Return logits `[n, V]`."""
    ids = to_device(np.array([item.token_ids[0] for item in items]), backbone.device)
    positions = to_device(np.array([item.position for item in items]), backbone.device)
    metadata = backbone.plan(cache, [item.kv for item in items], np.arange(len(items)))
    return backbone.forward(backbone.embed(ids), positions, metadata)
