"""The doctor's words on a GPU follow from the facts; here from given ones, and from this machine's."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from app.models.cuda import summary
from app.models.cuda.summary import Gpu, GpuFacts, gpu_in_words, missing, read_facts

H100 = Gpu(name="NVIDIA H100", capability=(9, 0), total_bytes=80 << 30, free_bytes=79 << 30)
GOOD = GpuFacts(
    gpu=H100,
    driver="570.86.10",
    torch_cuda="12.8",
    triton="3.6.0",
    compiler="/usr/bin/gcc",
    has_headers=True,
    cache=Path("/cache/triton"),
    is_cache_writable=True,
)


def test_a_gpu_with_all_that_it_needs() -> None:
    assert missing(GOOD) == []
    lines = gpu_in_words(GOOD)
    assert lines["found"] == "NVIDIA H100"
    assert lines["compute_capability"] == "9.0"
    assert lines["memory_gib"] == "80.0, 79.0 of it free"
    assert (lines["driver"], lines["cuda_of_torch"], lines["triton"]) == ("570.86.10", "12.8", "3.6.0")
    assert "CUDA graphs" in lines["kernels"]
    assert "missing" not in lines


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"gpu": replace(H100, capability=(7, 5))}, "compute capability 8.0"),
        ({"triton": None}, "pip install triton"),
        ({"compiler": None}, "install gcc"),
        ({"has_headers": False}, "python3-dev"),
        ({"is_cache_writable": False}, "TRITON_CACHE_DIR"),
        ({"fault": "libcuda.so cannot found!"}, "can't launch kernels: libcuda.so"),
        ({"gpu": None}, "driver may be older"),
        ({"gpu": None, "torch_cuda": None}, "torch is built for CPUs"),
    ],
    ids=lambda value: "" if isinstance(value, str) else next(iter(value)),
)
def test_what_is_missing_is_said_with_what_to_do(change: dict[str, object], words: str) -> None:
    facts = replace(GOOD, **change)  # type: ignore[arg-type]
    (problem,) = missing(facts)
    assert words in problem
    assert gpu_in_words(facts)["missing"] == problem
    assert "CUDA graphs" not in gpu_in_words(facts).get("kernels", "").removesuffix("without CUDA graphs")


def test_a_machine_without_gpu_and_driver_lacks_nothing() -> None:
    lines = gpu_in_words(replace(GOOD, gpu=None, driver=None))
    assert lines["found"] == lines["driver"] == "none"
    assert "missing" not in lines
    assert "--gpus" in missing(replace(GOOD, gpu=None, driver=None))[0]


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_the_facts_of_a_machine_without_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    version = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue Mar  5 22:23:56 UTC 2024\n"
    (tmp_path / "version").write_text(version)
    monkeypatch.setattr(summary, "_DRIVER", tmp_path / "version")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "not" / "yet"))
    facts = read_facts(torch.device("cpu"))
    assert facts.gpu is None
    assert facts.driver == "550.54.15"
    assert facts.is_cache_writable
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "version" / "below a file"))
    assert not read_facts(torch.device("cpu")).is_cache_writable
