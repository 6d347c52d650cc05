"""Our products against torch in float32, on shapes of all kinds, by every kind of instructions."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from app.models.cpu import products
from app.models.cpu.building import NotBuilt
from app.models.cpu.products import Activation, Panels, product_kind
from tests.models.cpu.conftest import Compiled
from tests.models.cpu.test_packed_linear import FUNCTIONS

BF16 = torch.bfloat16
OLDER = ("-U__AVX512BF16__", "products", "attention")
TILES = ("-DPROMPTPLEX_EMULATE_TILES", "products", "decoder", "attention")


# What the compiler makes for this processor; AMX's tiles, emulated by loops.
@pytest.fixture(scope="module", params=[(), TILES], ids=["this processor", "tiles"])
def library(request: pytest.FixtureRequest, compiled: Compiled) -> None:
    with pytest.MonkeyPatch.context() as patch:
        try:
            if request.param:
                made = products.bound(compiled(*request.param))
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
    most = float(expected.abs().max())  # 0 where an activation's tail is below the least float
    torch.testing.assert_close(found.float(), expected, rtol=1e-2, atol=max(1e-2 * most, 1e-30))


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
    panels = Panels.gated(Panels.pack(gate, gate_bias), Panels.pack(up, up_bias))
    assert_close(panels.multiply(rows, Activation.SILU), functional.silu(wide[0]) * wide[1])


def as_integers(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Each row as integers of 8 bits, and its scale."""
    most = rows.float().abs().amax(1, keepdim=True)
    inverse = torch.where(most > 0, torch.full_like(most, 127) / most, 0.0)  # `127 / most` is rounded twice
    return (rows.double() * inverse.double()).round().to(torch.int32), most / 127


@given(sizes=SIZES, has_zeros=st.booleans(), seed=st.integers(0, 99))
@settings(max_examples=120, deadline=None)
def test_a_product_of_integers_is_exact(
    library: None, sizes: tuple[int, int, int], has_zeros: bool, seed: int
) -> None:
    """The sums are integers; what they are worth is rounded to bf16 once."""
    torch.manual_seed(seed)
    count, outputs, inputs = sizes
    weight, rows = randoms(outputs, inputs), randoms(count, inputs + 3)[:, 1 : inputs + 1]
    if has_zeros:
        weight[0], rows[-1] = 0, 0
    scales = weight.float().abs().amax(1) / 127
    integers = (weight.float() / scales.where(scales > 0, 1.0).unsqueeze(1)).round().to(torch.int32)
    rounded, row_scales = as_integers(rows)
    sums = rounded @ integers.T
    panels = Panels.quantise(weight)
    assert torch.equal(panels.plain(), (integers * scales.unsqueeze(1)).to(BF16))
    assert torch.equal(panels.multiply(rows), (sums.float() * scales * row_scales).to(BF16))


@given(sizes=SIZES, is_biased=st.booleans(), is_gated=st.booleans(), activation=st.sampled_from(Activation))
@settings(max_examples=60, deadline=None)
def test_integers_go_through_bias_activation_and_gate(
    library: None, sizes: tuple[int, int, int], is_biased: bool, is_gated: bool, activation: Activation
) -> None:
    torch.manual_seed(0)
    count, outputs, inputs = sizes
    outputs = -(-outputs // 16) * 16
    biases = [randoms(outputs) if is_biased else None for _ in range(2)]
    gate, up = (Panels.quantise(randoms(outputs, inputs), bias) for bias in biases)
    rows = randoms(count, inputs)
    integers, scales = as_integers(rows)
    plain, other = (
        functional.linear(integers * scales, each.plain().float(), None if bias is None else bias.float())
        for each, bias in zip((gate, up), biases, strict=True)
    )
    expected = FUNCTIONS[activation](plain) * (other if is_gated else 1)
    assert_close((Panels.gated(gate, up) if is_gated else gate).multiply(rows, activation), expected)


def test_products_of_integers_are_checked_at_load(library: None) -> None:
    assert products._is_int8_right()


@pytest.mark.parametrize("pack", [Panels.pack, Panels.quantise])
def test_a_row_is_the_same_whatever_stands_beside_it(library: None, pack: Callable[[Tensor], Panels]) -> None:
    """Its sums are added up in one order, so that a batch's company changes nothing."""
    rows, panels = randoms(70, 96), pack(randoms(48, 96))
    everything = panels.multiply(rows)
    for begin, end in ((0, 1), (3, 20), (40, 70)):
        assert torch.equal(panels.multiply(rows[begin:end]), everything[begin:end])


@pytest.mark.parametrize("pack", [Panels.pack, Panels.quantise])
def test_nan_stays_in_its_row(library: None, pack: Callable[[Tensor], Panels]) -> None:
    rows, panels = randoms(20, 64), pack(randoms(33, 64))
    rows[7, 5] = float("nan")
    found = panels.multiply(rows, Activation.SILU).isnan()
    assert found[7].all()
    assert found.sum() == 33


def test_no_rows_are_no_product(library: None) -> None:
    assert Panels.pack(randoms(16, 32)).multiply(randoms(0, 32)).shape == (0, 16)


def test_an_older_processor_has_none(compiled: Compiled) -> None:
    try:
        old = compiled(*OLDER)
    except NotBuilt as reason:
        pytest.skip(f"no kernels here: {reason}")
    with pytest.raises(NotBuilt, match="neither AVX-512 bf16 nor AMX"):
        products.bound(old)


def test_a_processor_without_products_of_integers_says_so(
    monkeypatch: pytest.MonkeyPatch, compiled: Compiled
) -> None:
    try:
        old = products.bound(compiled("-U__AVX512VNNI__", "products"))
    except NotBuilt as reason:
        pytest.skip(f"no kernels here: {reason}")
    monkeypatch.setattr(products, "product_kind", lambda: "AVX-512 bf16")
    monkeypatch.setattr(products, "_products", lambda: old)
    assert "neither AVX-512 VNNI" in (products.why_no_int8.__wrapped__() or "AMX has them")
