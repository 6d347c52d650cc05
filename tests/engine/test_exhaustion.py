"""A step that memory doesn't hold runs in parts; a request too large for it even alone ends, and no other."""

import contextlib
import gc
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from torch import Tensor

from app.engine.engine import Engine, EngineConfig
from app.engine.memory.exhaustion import forget_step, is_out_of_memory
from app.errors import RequestFailed
from app.models.decoder_only import DecoderOnly
from benchmarks.completions import submit, submit_all
from tests.engine.conftest import Bench
from tests.engine.test_isolation import NEIGHBOURS, alone, check_conserved, tokens_of

HOLDS = 30  # tokens of a step that memory has room for
NO_MACHINE_HAS = 1 << 60  # bytes


@dataclass
class SmallMemory:
    """Memory for `HOLDS` tokens at once: beyond it torch's own allocator fails, on a size no machine has."""

    failures: list["weakref.ref[Tensor]"] = field(default_factory=list)  # a tensor of each failed step
    left_behind: int = 0  # that were still there when the next step began

    def take(self, module: torch.nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self.left_behind += sum(tensor() is not None for tensor in self.failures)
        activations = torch.empty(inputs[0].numel())
        if len(activations) > HOLDS:
            self.failures.append(weakref.ref(activations))
            try:
                torch.empty(NO_MACHINE_HAS, dtype=torch.uint8)
            except RuntimeError as error:
                raise torch.OutOfMemoryError(str(error)) from error


@contextlib.contextmanager
def small_memory(backbone: DecoderOnly) -> Iterator[SmallMemory]:
    memory = SmallMemory()
    handle = backbone.model.get_input_embeddings().register_forward_pre_hook(memory.take)
    gc.disable()  # what only cycles hold counts as left behind
    try:
        yield memory
    finally:
        gc.enable()
        handle.remove()


def test_with_two_steps_in_flight_nothing_of_the_failed_ones_stays(
    bench: Bench, llama_backbone: DecoderOnly
) -> None:
    config = EngineConfig(max_rows=16, token_budget=64, kv_cache_bytes=1 << 20, steps_in_flight=2)
    engine = Engine(llama_backbone, bench.source, config)
    engine.start()
    long = [(number + 20,) * (HOLDS - 5) for number in range(8)]
    with small_memory(llama_backbone) as memory:
        futures = submit_all(engine, [bench.request(str(ids), token_ids=ids) for ids in long])
        assert [tokens_of(future) for future in futures] == [alone(bench, ids) for ids in long]
        large = submit(engine, bench.request("large", token_ids=(5,) * 100))  # both of its chunks fail
        with pytest.raises(RequestFailed, match="even alone"):
            large.result(60)
        check_conserved(bench, engine)
        assert memory.failures
        assert not any(tensor() is not None for tensor in memory.failures)
    engine.stop()


def test_a_request_that_memory_does_not_hold_ends_alone_and_neighbours_go_on(bench: Bench) -> None:
    large = bench.request("large", token_ids=(5,) * (HOLDS + 1))
    with small_memory(bench.backbone) as memory:
        futures = submit_all(bench.engine, [bench.request(str(ids), token_ids=ids) for ids in NEIGHBOURS[:8]])
        broken = submit(bench.engine, large)
        futures += submit_all(
            bench.engine, [bench.request(str(ids), token_ids=ids) for ids in NEIGHBOURS[8:]]
        )
        with pytest.raises(RequestFailed, match=r"even alone.*send less text.*--token-budget"):
            broken.result(60)
        assert [tokens_of(future) for future in futures] == [alone(bench, ids) for ids in NEIGHBOURS]
        check_conserved(bench)
    assert memory.failures
    assert not memory.left_behind, "a failed step's tensors would stand beside the parts"
    assert bench.engine.failure is None


def test_a_prefix_that_memory_does_not_hold_is_refused_for_a_while(bench: Bench) -> None:
    with small_memory(bench.backbone):
        for name in ("first", "second"):
            with pytest.raises(RequestFailed, match=r"prompt or leading text.*refused for 30 seconds"):
                submit(bench.engine, bench.request(name, text=(5,) * (HOLDS + 1))).result(60)
        check_conserved(bench)


def failure_of(work: object) -> Exception:
    try:
        work()  # type: ignore[operator]
    except Exception as error:
        return error
    raise AssertionError("it must fail")


def test_failed_allocations_are_told_from_other_failures() -> None:
    assert is_out_of_memory(failure_of(lambda: torch.empty(NO_MACHINE_HAS, dtype=torch.uint8)))
    assert is_out_of_memory(failure_of(lambda: np.empty(NO_MACHINE_HAS, np.uint8)))
    assert is_out_of_memory(failure_of(lambda: bytearray(NO_MACHINE_HAS)))
    assert is_out_of_memory(RuntimeError("CUDA error: out of memory"))
    assert is_out_of_memory(RuntimeError("Triton Error [CUDA]: out of memory"))
    assert not is_out_of_memory(failure_of(lambda: torch.ones(2) + torch.ones(3)))
    assert not is_out_of_memory(ValueError("out of memory"))


def test_tensors_of_an_error_that_another_replaced_are_given_up() -> None:
    refs = []

    def run() -> None:
        rows = torch.ones(3)
        refs.append(weakref.ref(rows))
        raise ValueError("first")

    def replaced() -> None:
        more = torch.ones(3)
        refs.append(weakref.ref(more))
        try:
            run()
        except ValueError:
            raise MemoryError("second")  # noqa: B904 - as libraries do

    error = failure_of(replaced)
    forget_step(error)
    assert [ref() for ref in refs] == [None, None]
