"""Real architectures over Triton's kernels choose the tokens that transformers and PEFT choose alone."""

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from app.models.attention import kv_cache, registry
from app.models.attention.packed import register
from app.models.attention.torch import TorchBackend
from app.models.attention.triton import TritonBackend
from app.models.probe import probe_architecture
from app.prompt import LayerGeometry
from app.store.cache.prompt_cache import PromptCache
from app.store.prompt_store import open_store
from benchmarks.completions import submit_all
from tests.engine import seq2seq
from tests.engine.test_encoder_decoder import engine_of, ids, nan_pool, wrong
from tests.engine.test_exactness import (
    TinyTask,
    World,
    build_world,
    crowded_engine,
    difference,
    expected_of,
    random_request,
)
from tests.tiny_models import packed_backbone, tiny_model

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="these models are on the CPU, the kernels not"
)


class Anywhere(TritonBackend):
    """Serves on every device, without a comparison first."""

    @staticmethod
    def supports(geometry: LayerGeometry, dtype: torch.dtype, device: torch.device) -> bool:
        return True


def use_kernels(backbone: Any) -> None:
    backbone.backends = [
        TritonBackend(group.geometry, backbone.dtype, backbone.device) for group in backbone.kv_groups
    ]


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gpt_oss"])
def test_a_mixed_batch_equals_each_request_alone(architecture: str, tmp_path: Path) -> None:
    """Chunks beside rows, over prefixes, soft prompts and text."""
    check(build_world(architecture, tmp_path, num_hidden_layers=2), ("prefix-30", "soft-20", "text", "none"))


def test_keys_may_be_wider_than_values(tmp_path: Path) -> None:
    base = tiny_model("deepseek_v3", num_hidden_layers=2)
    tasks = [TinyTask("none", base), TinyTask("text", base, resident_ids=tuple(range(3, 40)))]
    source = PromptCache(open_store(tmp_path / "store"), host_bytes=1 << 20)
    world = World(tasks, packed_backbone(base), source)
    assert {(group.geometry.key_dim, group.geometry.value_dim) for group in world.backbone.kv_groups} == {
        (24, 16)
    }
    check(world, ("text", "none", "text"))


def check(world: World, names: Sequence[str]) -> None:
    """Compare a few requests; memory is NaN at first."""
    use_kernels(world.backbone)
    rng = random.Random(3)
    named = {task.name: task for task in world.tasks}
    tasks = [named[name] for name in names]
    requests = [
        replace(random_request(number, task, rng, (2, 19)), max_new_tokens=3)
        for number, task in enumerate(tasks)
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kv_cache, "_pool", nan_pool)
        with crowded_engine(world, []) as engine:
            found = [future.result(120) for future in submit_all(engine, requests)]
    expected = [expected_of(task, request) for task, request in zip(tasks, requests, strict=True)]
    assert [difference(*each) for each in zip(found, expected, strict=True)] == [None] * len(found)


def test_encoder_decoders_equal_each_request_alone(tmp_path: Path) -> None:
    """Biases by distance, encoders and cross-attention."""
    world = seq2seq.build_world("t5-gated", tmp_path)
    use_kernels(world.backbone)
    rng = random.Random(7)
    tasks = world.tasks[:2]
    requests = [
        replace(task.request(f"{number}", ids(rng, 9 + 14 * number)), max_new_tokens=3)
        for number, task in enumerate(tasks)
    ]
    expected = [world.expected(task, request) for task, request in zip(tasks, requests, strict=True)]
    with engine_of(world) as engine:
        found = [future.result(120) for future in submit_all(engine, requests)]
    world.source.close()
    assert not wrong(found, list(zip(requests, expected, strict=True)))


@pytest.mark.soak
@pytest.mark.parametrize("architecture", ["deepseek_v3", "gemma2", "gpt_oss", "phi3", "t5", "bart"])
def test_architectures_pass_the_probe(architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "BACKENDS", (Anywhere, TorchBackend))
    register()
    probe_architecture(CONFIG_MAPPING[architecture]())
