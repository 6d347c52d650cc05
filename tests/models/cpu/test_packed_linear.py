"""Packed weights give the products that plain ones give."""

import random
import resource
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from app.models.cpu.packed_linear import FastestPacker, PackedLinear, Packer, pack_linears, packers
from app.models.cpu.products import Activation

FUNCTIONS = {
    Activation.NONE: lambda x: x,
    Activation.SILU: functional.silu,
    Activation.RELU: functional.relu,
    Activation.GELU: functional.gelu,
    Activation.GELU_TANH: lambda x: functional.gelu(x, approximate="tanh"),
}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 48), (2, 5, 48), (1, 300, 48), (1, 65, 48), (2, 65, 48)])
def test_products_are_the_same(bias: bool, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(48, 33, bias=bias, dtype=torch.bfloat16).requires_grad_(False)
    holder = nn.Sequential(linear)
    assert pack_linears(holder) in (0, 1)
    inputs = torch.randn(shape, dtype=torch.bfloat16)
    with torch.inference_mode():
        torch.testing.assert_close(holder(inputs), linear(inputs), rtol=2e-2, atol=2e-2)


def test_float32_and_layers_of_other_kinds_are_left_alone() -> None:
    class Special(nn.Linear):
        pass

    holder = nn.Sequential(nn.Linear(8, 8), Special(8, 8, dtype=torch.bfloat16), nn.LayerNorm(8))
    assert pack_linears(holder) == 0
    assert not any(isinstance(module, PackedLinear) for module in holder.modules())


def test_the_weight_can_be_had_as_it_was() -> None:
    """Adapters bring copies of the head, which are compared with it."""
    linear = nn.Linear(48, 33, dtype=torch.bfloat16).requires_grad_(False)
    holder = nn.Sequential(linear)
    if not pack_linears(holder):
        pytest.skip("no bf16 in this processor")
    assert isinstance(holder[0], PackedLinear)
    assert torch.equal(holder[0].weight, linear.weight)
    assert holder[0].bias is linear.bias


def test_a_replacement_that_differs_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PackedLinear, "forward", lambda _, inputs: inputs * 0)
    assert pack_linears(nn.Sequential(nn.Linear(8, 8, dtype=torch.bfloat16))) == 0


def test_quantized_layers_are_left_alone() -> None:
    """torchao puts tensors of its own into plain layers, compressed-tensors another forward."""

    class Quantized(nn.Parameter):
        pass

    other_weight, other_forward = (
        nn.Linear(8, 8, dtype=torch.bfloat16).requires_grad_(False) for _ in range(2)
    )
    other_weight.weight = Quantized(other_weight.weight.data, requires_grad=False)
    other_forward.forward = lambda inputs: nn.Linear.forward(other_forward, inputs)
    assert pack_linears(nn.Sequential(other_weight, other_forward)) == 0


@pytest.mark.parametrize("packer", [each for each in packers() if each])
def test_every_way_of_packing_gives_the_same(packer: Packer) -> None:
    torch.manual_seed(0)
    weight, bias = torch.randn(70, 48, dtype=torch.bfloat16), torch.randn(70, dtype=torch.bfloat16)
    packed = packer(weight, bias)
    assert torch.equal(packed.plain(), weight)
    for count in (1, 65, 300):
        rows = torch.randn(count, 48, dtype=torch.bfloat16)
        expected = functional.linear(rows.float(), weight.float(), bias.float())
        for activation, function in FUNCTIONS.items():
            found = packed.multiply(rows, activation).float()
            torch.testing.assert_close(found, function(expected), rtol=2e-2, atol=6e-2)


def test_the_fastest_is_taken_unless_ours_is_nearly_as_fast() -> None:
    class Slow:
        def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
            self.weight = weight

        def multiply(self, rows: Tensor) -> Tensor:
            for _ in range(50):
                product = functional.linear(rows, self.weight)
            return product

    class Fast(Slow):
        def multiply(self, rows: Tensor) -> Tensor:
            return functional.linear(rows, self.weight)

    weight = torch.randn(256, 256)
    assert FastestPacker(Slow, Fast)(weight) is Fast
    assert FastestPacker(Fast, Slow)(weight) is Fast
    assert FastestPacker(Slow, None)(weight) is Slow
    assert FastestPacker(None, Slow)(weight) is Slow
    choice = FastestPacker(Slow, Fast)
    choice._leads[256, 256] = -0.01  # within the margin
    assert choice(weight) is Slow


def test_any_number_of_rows_takes_bounded_memory() -> None:
    """oneDNN and torch keep what they compile for each number of rows, about half a megabyte a time."""
    holder = nn.Sequential(nn.Linear(256, 512, dtype=torch.bfloat16).requires_grad_(False))
    if not pack_linears(holder):
        pytest.skip("no bf16 in this processor")
    counts = list(range(1, 2049))
    random.Random(0).shuffle(counts)
    inputs = torch.randn(2048, 256, dtype=torch.bfloat16)
    before = _resident_megabytes()
    with torch.inference_mode():
        for count in counts:
            assert holder(inputs[:count]).shape == (count, 512)
    assert _resident_megabytes() - before < 200, "it was 830 when every number had its own"


def _resident_megabytes() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 1e6
