"""No step of a busy engine takes more memory than the trials did, by the bytes of all live tensors."""

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from app.engine.engine import Engine, EngineConfig
from app.engine.memory.device import DeviceMemory, device_memory
from app.engine.memory.trial_steps import Trials, measure_steps, trial_cache
from app.engine.plan import Plan
from app.engine.runner import LateInputs, Launched, Runner
from app.models.decoder_only import DecoderOnly
from app.request import SamplingParams
from benchmarks.completions import submit_all
from tests.engine.conftest import Bench


class LiveBytes(TorchDispatchMode):
    """Counts what tensors hold that operations return, as a meter of what work takes at most."""

    def __init__(self) -> None:
        super().__init__()
        self._known: Any = WeakIdKeyDictionary()
        self._live = self._most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._note(tensor.untyped_storage())
        return result

    def _note(self, storage: torch.UntypedStorage) -> None:
        if storage not in self._known:
            self._known[storage] = True
            self._live += storage.nbytes()
            self._most = max(self._most, self._live)
            weakref.finalize(storage, self._forget, storage.nbytes())

    def _forget(self, num_bytes: int) -> None:
        self._live -= num_bytes

    def peak(self, work: Callable[[], object]) -> int:
        before = self._most = self._live
        with self:
            work()
        return self._most - before

    def memory(self) -> DeviceMemory:
        return device_memory(torch.device("cpu"))


def test_no_step_takes_more_than_the_largest_trial(
    bench: Bench, llama_backbone: DecoderOnly, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = EngineConfig(max_rows=6, token_budget=300, kv_cache_bytes=4 << 20)
    trials = Trials(
        llama_backbone.geometry,
        llama_backbone.kv_groups,
        config.bounds(llama_backbone.device),
        max_slots=10_000,
    )
    runner = Runner(llama_backbone, trial_cache(llama_backbone))
    trial_meter, step_meter = LiveBytes(), LiveBytes()
    with trial_meter:  # what views show of weights is no step's
        runner.run(trials.largest()[0], dict).result()
    peaks = measure_steps(lambda plan: runner.run(plan, dict).result(), trial_meter, trials)
    step_peaks: list[int] = []
    run = Runner.run

    def measured(self: Runner, plan: Plan, late: LateInputs) -> Launched:
        launched: list[Launched] = []
        step_peaks.append(step_meter.peak(lambda: launched.append(run(self, plan, late))))
        return launched[0]

    monkeypatch.setattr(Runner, "run", measured)
    engine = Engine(llama_backbone, bench.source, config)
    engine.start()
    drawn = SamplingParams(do_sample=True, top_p=0.9, typical_p=0.9, top_h=0.8, repetition_penalty=1.2)
    requests = [
        bench.request(f"{kind} {number}", token_ids=(5, number + 1) * (20 * number + 10), **settings)
        for number in range(6)
        for kind, settings in {
            "drawn": {"sampling": drawn, "num_top": 5},
            "scored": {"num_scored": 40 * number + 10, "num_top": 5},
            "beams": {"sampling": SamplingParams(num_beams=2), "text": (3,) * 30},
        }.items()
    ]
    for future in submit_all(engine, requests):
        future.result(60)
    engine.stop()
    most = sorted(step_peaks[1:])  # the first one sees the weights
    assert len(most) > 20
    assert 0.2 * peaks.largest < most[-1] <= peaks.largest
    assert 0 < peaks.decode < peaks.largest
