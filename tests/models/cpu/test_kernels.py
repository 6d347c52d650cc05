"""The library of our kernels, and norms against torch in float32."""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from app.models.cpu import building
from app.models.cpu.building import NotBuilt
from app.models.cpu.library import Kernels, kernels_for, load_kernels
from app.models.cpu.openmp import release_workers
from app.models.fingerprint import _weights_digest

BF16 = torch.bfloat16


@pytest.fixture(scope="module")
def kernels() -> Kernels:
    try:
        return load_kernels()
    except NotBuilt as reason:
        pytest.skip(f"no kernels here: {reason}")  # torch's are used then, as the other tests show


@pytest.mark.parametrize("shape", [(1, 16), (2, 3, 64), (33, 896)])
def test_rms_norm_rounds_as_transformers_does(kernels: Kernels, shape: tuple[int, ...]) -> None:
    inputs, weight = torch.randn(shape).to(BF16), torch.randn(shape[-1]).to(BF16)
    wide = inputs.float()
    scaled = (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(BF16)
    ours = kernels.rms_norm(inputs, weight, 1e-6)
    assert (ours == weight * scaled).float().mean() > 0.99  # sums in another order may round otherwise
    torch.testing.assert_close(ours, weight * scaled, rtol=1e-2, atol=1e-3)


def test_only_bf16_on_a_cpu_has_kernels(kernels: Kernels) -> None:
    assert kernels_for(BF16, torch.device("cpu")) is kernels
    assert kernels_for(torch.float32, torch.device("cpu")) is None
    assert kernels_for(BF16, torch.device("cuda")) is None


@pytest.fixture
def small_library(kernels: Kernels, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a library comes to lie doesn't depend on what is in it; all of it takes 10 s to compile."""
    monkeypatch.setattr(building, "SOURCES", [each for each in building.SOURCES if each.stem == "norms"])


def test_a_library_is_built_once(small_library: None, tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    first = building.build()
    assert first.parent == tmp_path / "promptplex"
    written = first.stat().st_mtime_ns
    assert building.build() == first
    assert first.stat().st_mtime_ns == written
    assert [path.name for path in first.parent.iterdir()] == [first.name]


def test_those_who_build_at_once_compile_once(
    small_library: None, tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    compile_, compiled = building._compile, list[Path]()

    def counted(compiler: str, openmp: str, target: Path) -> None:
        compiled.append(target)
        compile_(compiler, openmp, target)

    monkeypatch.setattr(building, "_compile", counted)
    with ThreadPoolExecutor(4) as pool:
        libraries = list(pool.map(lambda _: building.build(), range(4)))
    assert libraries == compiled * 4


def test_a_directory_that_others_can_write_to_is_not_trusted(
    small_library: None, tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "promptplex").mkdir(mode=0o777)
    (tmp_path / "promptplex").chmod(0o777)
    assert building.build().parent != tmp_path / "promptplex"


def test_the_first_start_makes_the_cache_its_owners_alone(
    small_library: None, tmp_path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Whatever the umask is, and whichever part of the load comes first."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    file = tmp_path / "model.safetensors"
    save_file({"weight": torch.ones(2)}, file)
    before = os.umask(0o002)
    try:
        _weights_digest([file], lambda _: None)
        first = building.build()
    finally:
        os.umask(before)
    assert first.parent == tmp_path / "cache" / "promptplex"
    assert building.build() == first
    assert not caplog.records


def test_a_cache_that_cannot_be_used_is_told(
    small_library: None, tmp_path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "promptplex").mkdir()
    (tmp_path / "promptplex").chmod(0o770)
    for cache, advice in ((tmp_path / "file", "XDG_CACHE_HOME"), (tmp_path, "chmod 700")):
        monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
        building.build()
        assert "compiled at every start" in caplog.text
        assert advice in caplog.text
        caplog.clear()


def test_without_a_compiler_there_are_no_kernels(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(NotBuilt, match=r"no C\+\+ compiler"):
        building.build()


def test_a_compiler_that_fails_is_quoted(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "g++"
    broken.write_text("#!/bin/sh\necho 'no such option' >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(NotBuilt, match="no such option"):
        building.build()


def test_products_go_on_after_the_workers_were_released() -> None:
    square = torch.ones(300, 300)
    before = square @ square
    release_workers()
    assert torch.equal(square @ square, before)
