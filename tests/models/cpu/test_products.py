"""Our products against torch in float32, on shapes of all kinds, by every kind of instructions."""

import ctypes
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from app.models.cpu import building, products
from app.models.cpu.building import NotBuilt
from app.models.cpu.products import Activation, Panels, product_kind
from tests.models.cpu.test_packed_linear import FUNCTIONS

BF16 = torch.bfloat16
TILES = "-DPROMPTPLEX_EMULATE_TILES"


def compiled(flag: str, cache: Path) -> ctypes.CDLL:
    """The library as the compiler makes it with a flag."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(building, "_FLAGS", (*building._FLAGS, flag))
        needed = [each for each in building.SOURCES if each.stem in ("products", "decoder")]
        patch.setattr(building, "SOURCES", needed)
        patch.setenv("XDG_CACHE_HOME", str(cache))
        return ctypes.CDLL(str(building.build()))


# What the compiler makes for this processor; AMX's tiles, emulated by loops.
@pytest.fixture(scope="module", params=["", TILES], ids=["this processor", "tiles"])
def library(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> None:
    with pytest.MonkeyPatch.context() as patch:
        try:
            if request.param:
                made = products.bound(compiled(request.param, tmp_path_factory.mktemp("cache")))
                patch.setattr(products, "_products", lambda: made)
            elif product_kind() is None:
                pytest.skip("this processor has no instructions for products")
        except NotBuilt as reason:
            pytest.skip(f"no kernels here: {reason}")
        yield


SIZES = st.tuples(
    st.sampled_from([1, 2, 13, 14, 15, 16, 17, 29, 32, 33, 64, 460]),  # rows
    st.sampled_from([1, 16, 17, 31, 32, 48, 50, 96]),  # outputs
    st.sampled_from([1, 2, 31, 32, 33, 64, 130]),  # inputs
)


def randoms(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=BF16)


def assert_close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found.float(), expected, rtol=1e-2, atol=1e-2 * float(expected.abs().max()))


@given(sizes=SIZES, is_biased=st.booleans(), activation=st.sampled_from(Activation), seed=st.integers(0, 99))
@settings(max_examples=120, deadline=None)
def test_a_product_is_torchs(
    library: None, sizes: tuple[int, int, int], is_biased: bool, activation: Activation, seed: int
) -> None:
    torch.manual_seed(seed)
    count, outputs, inputs = sizes
    weight, bias = randoms(outputs, inputs), randoms(outputs) if is_biased else None
    rows = randoms(count, inputs + 3)[:, 1 : inputs + 1]  # a part of wider rows
    panels = Panels.pack(weight, bias)
    assert torch.equal(panels.plain(), weight)
    expected = functional.linear(rows.float(), weight.float(), None if bias is None else bias.float())
    assert_close(panels.multiply(rows, activation), FUNCTIONS[activation](expected))


@given(
    count=st.sampled_from([1, 14, 33, 100]),
    outputs=st.sampled_from([16, 32, 48]),
    biases=st.sampled_from([(False, False), (True, False), (True, True)]),
)
@settings(max_examples=30, deadline=None)
def test_gate_and_up_are_one_product(
    library: None, count: int, outputs: int, biases: tuple[bool, bool]
) -> None:
    torch.manual_seed(count)
    gate, up = randoms(outputs, 40), randoms(outputs, 40)
    gate_bias, up_bias = (randoms(outputs) if has else None for has in biases)
    rows = randoms(count, 40)
    wide = [
        functional.linear(rows.float(), weight.float(), None if bias is None else bias.float())
        for weight, bias in ((gate, gate_bias), (up, up_bias))
    ]
    panels = Panels.pack_gated((gate, up), (gate_bias, up_bias))
    assert_close(panels.multiply(rows, Activation.SILU), functional.silu(wide[0]) * wide[1])


def test_a_row_is_the_same_whatever_stands_beside_it(library: None) -> None:
    """Its sums are added up in one order, so that a batch's company changes nothing."""
    rows, panels = randoms(70, 96), Panels.pack(randoms(48, 96))
    everything = panels.multiply(rows)
    for begin, end in ((0, 1), (3, 20), (40, 70)):
        assert torch.equal(panels.multiply(rows[begin:end]), everything[begin:end])


def test_nan_stays_in_its_row(library: None) -> None:
    rows, panels = randoms(20, 64), Panels.pack(randoms(33, 64))
    rows[7, 5] = float("nan")
    found = panels.multiply(rows, Activation.SILU).isnan()
    assert found[7].all()
    assert found.sum() == 33


def test_no_rows_are_no_product(library: None) -> None:
    assert Panels.pack(randoms(16, 32)).multiply(randoms(0, 32)).shape == (0, 16)


def test_an_older_processor_has_none(tmp_path: Path) -> None:
    try:
        old = compiled("-U__AVX512BF16__", tmp_path)
    except NotBuilt as reason:
        pytest.skip(f"no kernels here: {reason}")
    with pytest.raises(NotBuilt, match="neither AVX-512 bf16 nor AMX"):
        products.bound(old)
