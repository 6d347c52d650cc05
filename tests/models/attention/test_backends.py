"""Backends are chosen once for each KV group, plan before they compute, and give what the model gives."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from app.models.attention import registry
from app.models.attention.backend import Context
from app.models.attention.cpu import CPUBackend
from app.models.attention.kv_cache import KVCache
from app.models.attention.metadata import PackedItem
from app.models.attention.packed import IMPLEMENTATION
from app.models.attention.registry import choose_backend
from app.models.attention.torch import TorchBackend
from app.models.cpu.attention_kernel import attention_for
from app.models.decoder_only import DecoderOnly
from app.models.geometry import model_geometry
from app.models.probe import probe_architecture
from app.prompt import LayerGeometry
from tests.tiny_models import VOCABULARY, WINDOW, packed_backbone, tiny_model

CPU = torch.device("cpu")
BF16 = torch.bfloat16
PLAIN = LayerGeometry(2, 16, 16, queries_per_kv=2)
HAS_KERNELS = attention_for(BF16, CPU) is not None
needs_kernels = pytest.mark.skipif(not HAS_KERNELS, reason="no kernels can be compiled here")


def backbone_in(dtype: torch.dtype, architecture: str, **shape: Any) -> DecoderOnly:
    model: Any = packed_backbone(tiny_model(architecture, **shape)).model.to(dtype)
    return DecoderOnly(model, model_geometry(model, "tiny"))


def backends_of(backbone: DecoderOnly) -> set[type[Any]]:
    return {type(backend) for backend in backbone.backends}


class Delegating(TorchBackend):
    """A whole backend, as a module of its own would hold it."""

    planned = 0

    @staticmethod
    def supports(geometry: LayerGeometry, dtype: torch.dtype, device: torch.device) -> bool:
        return geometry.window is not None

    def plan(self, contexts: Sequence[Context]) -> Any:
        type(self).planned += 1
        return super().plan(contexts)


def test_a_new_backend_is_a_class_and_a_line_in_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "BACKENDS", (Delegating, *registry.BACKENDS))
    backbone = packed_backbone(tiny_model("gemma2"))
    assert backends_of(backbone) == {Delegating, TorchBackend}, "one has the windows, one the rest"
    probe_architecture(backbone.model.config)
    assert Delegating.planned


@needs_kernels
@pytest.mark.parametrize(
    ("geometry", "dtype", "backend"),
    [
        (PLAIN, BF16, CPUBackend),
        (LayerGeometry(2, 16, 32, window=8), BF16, CPUBackend),
        (LayerGeometry(2, 16, 16, has_position_bias=True), BF16, CPUBackend),
        (LayerGeometry(2, 16, 16, is_causal=False, has_position_bias=True), BF16, CPUBackend),
        (LayerGeometry(2, 16, 16, is_causal=False, window=8), BF16, TorchBackend),
        (PLAIN, torch.float32, TorchBackend),
        (LayerGeometry(2, 12, 12), BF16, TorchBackend),
        (LayerGeometry(1, 16, 16, queries_per_kv=64), BF16, TorchBackend),
        (LayerGeometry(2, 16, 16, softcap=50.0), BF16, TorchBackend),
        (LayerGeometry(2, 16, 16, has_sinks=True), BF16, TorchBackend),
    ],
)
def test_kernels_take_what_they_can(geometry: LayerGeometry, dtype: torch.dtype, backend: type[Any]) -> None:
    assert type(choose_backend(geometry, dtype, CPU)) is backend


def test_caps_and_sinks_are_recorded() -> None:
    recorded = {name: packed_backbone(tiny_model(name)).kv_groups for name in ("gemma2", "gpt_oss", "llama")}
    asked = {
        name: {(group.geometry.softcap, group.geometry.has_sinks) for group in groups}
        for name, groups in recorded.items()
    }
    assert asked == {"gemma2": {(50.0, False)}, "gpt_oss": {(None, True)}, "llama": {(None, False)}}


WINDOWED = [
    ("mistral", {"head_dim": 16}, torch.float32, TorchBackend),
    ("gemma2", {}, torch.float32, TorchBackend),
    ("gpt_oss", {}, torch.float32, TorchBackend),
    pytest.param("mistral", {"head_dim": 16}, BF16, CPUBackend, marks=needs_kernels),
    ("gemma2", {}, BF16, TorchBackend),
    ("gpt_oss", {}, BF16, TorchBackend),
]
CHUNKS = [WINDOW + 9, WINDOW - 3, *[1] * (WINDOW + 5), 7, 1]


@pytest.mark.parametrize(("architecture", "shape", "dtype", "backend"), WINDOWED)
def test_windows_are_exact_without_what_left_them(
    architecture: str, shape: dict[str, Any], dtype: torch.dtype, backend: type[Any]
) -> None:
    """Slots that left a window are not named any more, and others may have written to them."""
    backbone = backbone_in(dtype, architecture, **shape)
    assert backends_of(backbone) == {backend}
    rng = np.random.default_rng(1)
    sequences = [rng.integers(0, VOCABULARY, sum(CHUNKS)) for _ in range(3)]
    kept, freed = (list(packed_steps(backbone, sequences, is_freed)) for is_freed in (False, True))
    assert all(torch.equal(left, right) for left, right in zip(kept, freed, strict=True))
    tolerance = 1e-4 if dtype == torch.float32 else 8e-2
    ends = np.cumsum(CHUNKS) - 1
    for number, ids in enumerate(sequences):
        expected = own_logits(backbone.model, ids)[ends]
        found = torch.stack([logits[number] for logits in freed])
        assert (found - expected).norm() / expected.norm() < tolerance


def packed_steps(
    backbone: DecoderOnly, sequences: list[np.ndarray[Any, Any]], is_freed: bool
) -> Iterator[Tensor]:
    """Logits `[sequences, V]` after each chunk; with `is_freed`, window groups forget what left them."""
    length = sum(CHUNKS)
    num_slots = 1 + length * len(sequences)
    cache = KVCache(
        backbone.kv_groups, [num_slots] * len(backbone.kv_groups), dtype=backbone.dtype, device=CPU
    )
    tables = [np.arange(length) * len(sequences) + 1 + number for number in range(len(sequences))]
    begin = 0
    for count in CHUNKS:
        end = begin + count
        firsts = [
            max(0, begin + 1 - group.geometry.window) if is_freed and group.geometry.window else 0
            for group in backbone.kv_groups
        ]
        items = [PackedItem(begin, count, tuple(table[first:end] for first in firsts)) for table in tables]
        for group, first in zip(backbone.kv_groups, firsts, strict=True):
            forgotten = torch.from_numpy(np.concatenate([table[:first] for table in tables]))
            for layer in group.layers:
                for pool in cache.pools((group.site, layer)):
                    pool[forgotten] = float("nan")
        metadata = backbone.plan(cache, items, np.arange(1, 1 + len(items)) * count - 1)
        ids = torch.from_numpy(np.concatenate([ids[begin:end] for ids in sequences]))
        positions = torch.arange(begin, end).repeat(len(items))
        yield backbone.forward(backbone.embed(ids), positions, metadata)
        begin = end


def own_logits(model: Any, ids: np.ndarray[Any, Any]) -> Tensor:
    model.set_attn_implementation("eager")
    try:
        with torch.inference_mode():
            return model(torch.from_numpy(ids)[None]).logits[0].float()
    finally:
        model.set_attn_implementation(IMPLEMENTATION)


class NoFactories(TorchDispatchMode):
    """Refuses operators that make a tensor out of numbers on the host."""

    REFUSED = ("arange", "zeros", "ones", "full", "scalar_tensor", "lift_fresh", "_to_copy", "tril", "triu")

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert operator.overloadpacket.__name__ not in self.REFUSED, f"{operator} inside a forward pass"
        return operator(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("geometry", "dtype"),
    [
        (PLAIN, torch.float32),
        (LayerGeometry(2, 16, 16, window=4, queries_per_kv=2, softcap=30.0), torch.float32),
        (LayerGeometry(2, 16, 16, queries_per_kv=2, has_position_bias=True), torch.float32),
        (LayerGeometry(2, 16, 16, queries_per_kv=2, is_causal=False), torch.float32),
        pytest.param(PLAIN, BF16, marks=needs_kernels),
        pytest.param(
            LayerGeometry(2, 16, 16, queries_per_kv=2, is_causal=False, has_position_bias=True),
            BF16,
            marks=needs_kernels,
        ),
    ],
    ids=["torch", "by hand", "biased", "not causal", "cpu", "cpu for encoders"],
)
def test_every_tensor_of_a_step_exists_before_its_forward_pass(
    geometry: LayerGeometry, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = choose_backend(geometry, dtype, CPU)
    lengths = [(1, 3), (1, 5), (6, 6), (4, 9)]  # tokens, slots
    contexts = [Context(tokens, np.arange(1, 1 + slots)) for tokens, slots in lengths]
    layout = backend.plan(contexts)
    query, key, value = (torch.randn(heads, 12, 16).to(dtype) for heads in (4, 2, 2))
    pools = torch.randn(10, 32).to(dtype), torch.randn(10, 32).to(dtype)
    monkeypatch.setattr(torch, "from_numpy", None)
    with torch.inference_mode(), NoFactories():
        out = backend.forward(
            query,
            key,
            value,
            pools,
            layout,
            scaling=0.2,
            softcap=geometry.softcap,
            sinks=None,
            position_bias=torch.randn(4, 9) if geometry.has_position_bias else None,
        )
    assert out.shape == (12, 4, 16)


ENCODER = [(1, 1), (1, 300), (40, 40), (300, 300), (7, 9)]  # tokens, slots
DECODER = [(1, 1), (1, 700), (1, 20), (33, 33), (270, 400), (5, 6)]
CROSS = [(1, 1), (1, 300), (1, 300), (1, 300), (1, 40), (9, 3), (20, 40)]


@needs_kernels
@pytest.mark.parametrize(
    ("geometry", "lengths", "has_own"),
    [
        (LayerGeometry(2, 16, 32, is_causal=False), ENCODER, True),
        (LayerGeometry(4, 32, 32, is_causal=False, has_position_bias=True), ENCODER, True),
        (LayerGeometry(4, 32, 32, has_position_bias=True), DECODER, True),
        (LayerGeometry(2, 32, 16, is_causal=False, queries_per_kv=2), CROSS, False),
    ],
    ids=["encoder", "biased encoder", "biased decoder", "cross"],
)
def test_both_backends_agree_on_encoder_decoders(
    geometry: LayerGeometry, lengths: list[tuple[int, int]], has_own: bool
) -> None:
    """Permuted slots; in cross-attention neighbours that read the same source, and more tokens than slots."""
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    slots = [1 + rng.permutation(700)[:number] for _, number in lengths]
    slots = [slots[lengths.index(each)] for each in lengths]  # equal lengths are of one source
    contexts = [Context(num, own, has_own) for (num, _), own in zip(lengths, slots, strict=True)]
    kv_heads, heads = geometry.num_kv_heads, geometry.num_kv_heads * geometry.queries_per_kv
    num_tokens = sum(num for num, _ in lengths)
    query = torch.randn(heads, num_tokens, geometry.key_dim)
    keys, values = (torch.randn(701, kv_heads * width) for width in (geometry.key_dim, geometry.value_dim))
    if has_own:  # a chunk that sees itself only is computed from its own keys and values
        written = torch.from_numpy(np.concatenate([each.slots[-each.num_tokens :] for each in contexts]))
        own_keys, own_values = (pool[written].view(num_tokens, kv_heads, -1) for pool in (keys, values))
    else:
        own_keys = own_values = torch.empty(0, kv_heads, 16)
    table = torch.randn(heads, 2 * 9 + 1) if geometry.has_position_bias else None
    found = []
    for backend in (TorchBackend(geometry, torch.float32, CPU), CPUBackend(geometry, BF16, CPU)):
        dtype = torch.float32 if isinstance(backend, TorchBackend) else BF16
        given = [
            each.to(BF16).to(dtype) for each in (query, own_keys.transpose(0, 1), own_values.transpose(0, 1))
        ]
        pools = keys.to(BF16).to(dtype), values.to(BF16).to(dtype)
        layout = backend.plan(contexts)
        found.append(
            backend.forward(
                *given, pools, layout, scaling=0.3, softcap=None, sinks=None, position_bias=table
            ).float()
        )
    torch.testing.assert_close(*found, rtol=1e-2, atol=1e-2)
