"""On a GPU: memory is measured and divided, and a request that exhausts it ends alone."""

import pytest
import torch
from torch import Tensor

from app.engine.engine import Engine, EngineConfig
from app.engine.memory.device import CudaMeter, device_memory
from app.errors import RequestFailed
from app.models.cuda.summary import missing, read_facts
from app.models.decoder_only import DecoderOnly
from app.models.limits import measure_hardware
from benchmarks.completions import submit, submit_all
from tests.engine.conftest import Bench
from tests.engine.test_isolation import NEIGHBOURS, tokens_of
from tests.tiny_models import packed_backbone, tiny_model

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no GPU")

MIB = 1 << 20
DEVICE = torch.device("cuda")
LARGE = 40  # tokens that a pass refuses


@pytest.fixture(scope="module")
def backbone() -> DecoderOnly:
    return packed_backbone(tiny_model("llama").to("cuda"))


def test_a_peak_is_measured_and_given_back() -> None:
    meter = CudaMeter(DEVICE)
    before = meter.memory()
    assert (
        256 * MIB <= meter.peak(lambda: torch.empty(256 * MIB, dtype=torch.uint8, device=DEVICE)) < 300 * MIB
    )
    assert meter.memory().reserved == before.reserved


def test_an_engine_takes_its_share_and_no_more(backbone: DecoderOnly, bench: Bench) -> None:
    total = device_memory(DEVICE).total
    config = EngineConfig(max_rows=8, token_budget=256, gpu_memory_utilization=0.25)
    engine = Engine(backbone, bench.source, config)
    assert device_memory(DEVICE).allocated <= 0.25 * total
    engine.start()
    futures = submit_all(engine, [bench.request(str(ids), token_ids=ids) for ids in NEIGHBOURS])
    assert all(len(tokens_of(future)) == 8 for future in futures)
    engine.stop()
    with pytest.raises(ValueError, match="doesn't fit on the GPU"):
        Engine(backbone, bench.source, EngineConfig(kv_cache_bytes=2 * total))


def test_a_request_that_exhausts_the_gpu_ends_alone(backbone: DecoderOnly, bench: Bench) -> None:
    total = device_memory(DEVICE).total

    def exhaust(module: torch.nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if inputs[0].numel() > LARGE:
            torch.empty(2 * total, dtype=torch.uint8, device=DEVICE)

    engine = Engine(
        backbone, bench.source, EngineConfig(max_rows=16, token_budget=64, kv_cache_bytes=8 * MIB)
    )
    engine.start()
    futures = submit_all(engine, [bench.request(str(ids), token_ids=ids) for ids in NEIGHBOURS])
    expected = [tokens_of(future) for future in futures]
    handle = backbone.model.get_input_embeddings().register_forward_pre_hook(exhaust)
    try:
        futures = submit_all(engine, [bench.request(f"again {ids}", token_ids=ids) for ids in NEIGHBOURS])
        large = submit(engine, bench.request("large", token_ids=(5,) * (LARGE + 1)))
        with pytest.raises(RequestFailed, match="even alone"):
            large.result(60)
        assert [tokens_of(future) for future in futures] == expected
    finally:
        handle.remove()
    assert engine.is_accepting
    engine.stop()


def test_limits_are_those_of_a_gpu() -> None:
    hardware = measure_hardware("cuda")
    assert hardware.bandwidth > 1e11
    assert hardware.throughput > 1e12


def test_the_doctor_finds_what_kernels_need() -> None:
    assert missing(read_facts(DEVICE)) == []
