"""Nothing between a plan's launch and its result waits for a GPU."""

from collections.abc import Sequence as Many
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from app.engine.graphs.capture import Repetition
from app.engine.graphs.decode_graphs import DecodeGraphs, bucket_sizes, is_decode
from app.engine.graphs.decode_inputs import DecodeInputs
from app.engine.plan import Plan
from app.engine.prefixes import prefix_keys
from app.engine.runner import Runner
from app.engine.scheduler import Scheduler, SchedulerConfig
from app.engine.sequence import Phase, Sequence
from app.models.attention.backend import AttentionBackend
from app.models.attention.kv_cache import KVCache
from app.models.attention.torch import TorchBackend
from app.models.decoder_only import DecoderOnly
from app.models.encoder_decoder import EncoderDecoder
from app.prompt import Prompt
from app.request import Request
from app.sites import Site
from tests import oracle
from tests.engine.no_syncs import DEVICE, no_syncs, pinning
from tests.engine.seq2seq import Task, prefix_task
from tests.engine.test_plan import MAX_ROWS, TOKEN_BUDGET, causal_requests, runner
from tests.tiny_models import packed_backbone, packed_seq2seq, tiny_model, tiny_seq2seq

Requests = list[tuple[Request, Prompt | None]]


class AnyAttention:
    """Stands for a backend with graphs, with its shapes alone."""

    def __init__(self, *_: object) -> None:
        """Keep nothing."""

    @staticmethod
    def supports(*_: object) -> bool:
        return True

    def plan(self, contexts: object) -> None:
        """Lay out nothing."""

    def static_layouts(self, num_rows: list[int], max_slots: int) -> list["NoLayout"]:
        return [NoLayout() for _ in num_rows]

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, pools: object, layout: None, **_: Any
    ) -> Tensor:
        return value.new_empty(query.shape[1], query.shape[0], value.shape[2])


class NoLayout:
    """Stands for a layout at fixed addresses."""

    layout = None

    def fits(self, contexts: object) -> bool:
        return True

    def fill(self, contexts: object) -> None:
        """Fill in nothing."""


def plans_of(architecture: str, requests: Requests) -> list[Plan]:
    """Run requests to their ends on the CPU; return the plans."""
    here, blocks, geometry = runner(architecture)
    scheduler = Scheduler(blocks, SchedulerConfig(max_rows=MAX_ROWS, token_budget=TOKEN_BUDGET))
    sequences = [Sequence(request, prefix_keys(request, geometry)) for request, _ in requests]
    for sequence, (_, prompt) in zip(sequences, requests, strict=True):
        scheduler.add(sequence)
        for parked in scheduler.take_loads():
            assert prompt is not None
            scheduler.loaded(parked, prompt)
    plans: list[Plan] = []
    while any(sequence.phase is not Phase.FINISHED for sequence in sequences):
        step = scheduler.schedule()
        plans.append(step.plan())
        scheduler.update(step, here.run(plans[-1], dict).result(), 0.0)
    return plans


def on_device(
    backbone: DecoderOnly | EncoderDecoder, attention: type[AttentionBackend[Any]] = TorchBackend
) -> Runner:
    """A runner of the base's shapes."""
    backbone.model.to(DEVICE)
    if isinstance(backbone, EncoderDecoder):
        backbone._unread = backbone._unread.to(DEVICE)
        for layer in backbone._encoded_before.cross_attention_cache.layers:
            layer.keys, layer.values = layer.keys.to(DEVICE), layer.values.to(DEVICE)
    backbone.device = DEVICE
    groups = backbone.kv_groups
    backbone.backends = [attention(group.geometry, backbone.dtype, DEVICE) for group in groups]
    return Runner(backbone, KVCache(groups, [64] * len(groups), dtype=backbone.dtype, device=DEVICE))


def record(there: Runner) -> list[Tensor]:
    """Give a runner graphs, which here can't be compared with eager steps; return what is pinned."""
    sizes = bucket_sizes(MAX_ROWS)
    with pinning() as pinned:
        graphs = DecodeGraphs(there._backbone, DecodeInputs(there._backbone, there._cache, sizes))
        example = torch.empty(1, there._backbone.geometry.vocab_size, device=DEVICE)
        for size in reversed(sizes):
            graphs.record(size, Repetition(), example)
    there._graphs = graphs
    return pinned


def following(plan: Plan, before: Plan | None) -> Plan:
    """Return a plan of which tokens that the one before chose are on the device alone."""
    chosen = {item.id for item in before.items if item.sampling} if before else set()
    items = (
        item._replace(token_ids=(), follows=True) if item.id in chosen and item.kv.num_tokens == 1 else item
        for item in plan.items
    )
    return replace(plan, items=tuple(items))


def run(there: Runner, plans: list[Plan], pinned: Many[Tensor] = ()) -> None:
    for before, plan in zip([None, *plans], plans, strict=False):
        with no_syncs(pinned):
            launched = there.run(following(plan, before), dict)
        assert launched.result().tokens.keys() == {item.id for item in plan.items if item.sampling}


@pytest.mark.parametrize("has_graphs", [False, True])
def test_a_decoders_steps_are_launched_without_waiting(has_graphs: bool, tmp_path: Path) -> None:
    base = tiny_model("gemma2")
    soft = oracle.as_prompt(oracle.tuned(base, oracle.soft_config(6), seed=1), tmp_path / "soft")
    prefix = oracle.as_prompt(oracle.tuned(base, oracle.prefix_config(9), seed=2), tmp_path / "prefix")
    plans = plans_of("gemma2", causal_requests(soft, prefix))
    there = on_device(packed_backbone(base), AnyAttention if has_graphs else TorchBackend)
    run(there, plans, record(there) if has_graphs else ())
    assert not has_graphs or sum(map(is_decode, plans)) > 4
    items = [item for plan in plans for item in plan.items]
    assert any(plan.writes for plan in plans)
    assert any(item.soft_prompt is not None for item in items)
    assert any(item.score_ids for item in items)


def test_an_encoder_decoders_steps_are_launched_without_waiting() -> None:
    base = tiny_seq2seq("bart")
    tasks = (Task("none"), prefix_task("prefix", base, dict.fromkeys(Site, 3)))
    requests = [
        (task.request(task.name, tuple(range(3, 40)), max_new_tokens=4), task.prompt) for task in tasks
    ]
    plans = plans_of("bart", requests)
    run(on_device(packed_seq2seq(base)), plans)
    assert any(source.kv.prefix_slots for plan in plans for source in plan.sources)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gpt_neox", "opt"])
def test_modules_of_transformers_do_not_wait(architecture: str) -> None:
    plans = plans_of(architecture, [(Request(id="r", token_ids=(5, 6, 7), max_new_tokens=3), None)])
    run(on_device(packed_backbone(tiny_model(architecture))), plans)
