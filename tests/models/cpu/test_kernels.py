"""Our kernels against torch in float32, on shapes and layouts of all kinds."""

import os

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional

from app.models.cpu import building, library
from app.models.cpu.building import NotBuilt
from app.models.cpu.library import Kernels, PackedContexts, kernels_for, load_kernels
from app.models.cpu.openmp import release_workers
from app.models.fingerprint import _weights_digest

BF16 = torch.bfloat16


@pytest.fixture(scope="module")
def kernels() -> Kernels:
    try:
        return load_kernels()
    except NotBuilt as reason:
        pytest.skip(f"no kernels here: {reason}")  # torch's are used then, as the other tests show


class Layout:
    """Sequences in random slots of a pool; each has some new tokens, which are its last ones."""

    def __init__(
        self, lengths: list[int], new: list[int], *, heads: int, kv_heads: int, width: int, values: int
    ):
        torch.manual_seed(sum(lengths) + heads)
        num_slots = sum(lengths) + 7
        self.kv_heads = kv_heads
        self.query = torch.randn(sum(new), heads, width, dtype=BF16).transpose(0, 1)
        self.keys = torch.randn(num_slots, kv_heads * width, dtype=BF16)
        self.values = torch.randn(num_slots, kv_heads * values, dtype=BF16)
        self.contexts = PackedContexts(
            torch.randperm(num_slots)[: sum(lengths)],
            torch.tensor([0, *lengths]).cumsum(0),
            torch.tensor([0, *new]).cumsum(0),
        )

    def attend(
        self,
        kernels: Kernels,
        window: int | None = None,
        *,
        is_causal: bool = True,
        bias: Tensor | None = None,
    ) -> Tensor:
        return kernels.attention(
            self.query,
            self.keys,
            self.values,
            self.contexts,
            num_kv_heads=self.kv_heads,
            window=window,
            scaling=0.3,
            is_causal=is_causal,
            position_bias=bias,
        )

    def expected(
        self, window: int | None = None, *, is_causal: bool = True, bias: Tensor | None = None
    ) -> Tensor:
        """Each sequence alone, in float32, with a dense mask."""
        parts = []
        begin, tokens = self.contexts.slot_begin, self.contexts.token_begin
        for item in range(len(begin) - 1):
            slots = self.contexts.slots[begin[item] : begin[item + 1]]
            query = self.query[:, tokens[item] : tokens[item + 1]].float()
            last, new = len(slots), query.shape[1]
            keys, values = (
                pool[slots].view(last, self.kv_heads, -1).transpose(0, 1).float()
                for pool in (self.keys, self.values)
            )
            distance = torch.arange(last) - torch.arange(last - new, last)[:, None]
            mask = torch.zeros(len(query), new, last)
            if bias is not None:
                reach = bias.shape[1] // 2
                mask += bias[:, distance.clamp(-reach, reach) + reach]
            if is_causal:
                mask.masked_fill_(distance > 0, float("-inf"))
            if window is not None:
                mask.masked_fill_(distance <= -window, float("-inf"))
            attended = functional.scaled_dot_product_attention(
                query[None], keys[None], values[None], attn_mask=mask[None], scale=0.3, enable_gqa=True
            )
            parts.append(attended[0].transpose(0, 1))
        return torch.cat(parts)


@pytest.mark.parametrize("window", [None, 1, 16, 300])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "width", "values"),
    [(14, 2, 64, 64), (4, 4, 32, 48), (8, 1, 128, 128), (6, 3, 16, 80), (56, 1, 16, 16)],
)
def test_attention_is_torchs(
    kernels: Kernels, heads: int, kv_heads: int, width: int, values: int, window: int | None
) -> None:
    lengths, new = [1, 5, 300, 16, 17, 40, 600, 33], [1, 1, 1, 1, 1, 40, 130, 2]
    layout = Layout(lengths, new, heads=heads, kv_heads=kv_heads, width=width, values=values)
    ours, theirs = layout.attend(kernels, window), layout.expected(window)
    torch.testing.assert_close(ours.float(), theirs, rtol=1e-2, atol=1e-2)


LENGTHS = [1, 2, 15, 16, 17, 31, 256, 257, 300, 3000]


@pytest.mark.parametrize("reach", [1, 7, 128])
@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize(("heads", "kv_heads", "width"), [(3, 3, 64), (2, 2, 32), (4, 2, 16), (2, 1, 128)])
def test_a_position_bias_is_a_table_by_clamped_distance(
    kernels: Kernels, heads: int, kv_heads: int, width: int, is_causal: bool, reach: int
) -> None:
    """Decoding rows and chunks, contexts much longer than the table reaches, and blocks of 256 slots."""
    new = [1, 2, 1, 16, 9, 1, 200, 1, 300, 70]
    layout = Layout(LENGTHS, new, heads=heads, kv_heads=kv_heads, width=width, values=width)
    bias = torch.randn(heads, 2 * reach + 1) * 2
    ours = layout.attend(kernels, is_causal=is_causal, bias=bias)
    theirs = layout.expected(is_causal=is_causal, bias=bias)
    torch.testing.assert_close(ours.float(), theirs, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(("heads", "width", "values"), [(3, 64, 64), (2, 80, 80), (2, 32, 48), (1, 128, 128)])
def test_without_causality_all_tokens_see_all_slots(
    kernels: Kernels, heads: int, width: int, values: int
) -> None:
    """Cross-attention too: there may be more tokens than slots."""
    new = [1, 9, 1, 16, 70, 1, 200, 1, 300, 3]
    layout = Layout(LENGTHS, new, heads=heads, kv_heads=heads, width=width, values=values)
    ours, theirs = layout.attend(kernels, is_causal=False), layout.expected(is_causal=False)
    torch.testing.assert_close(ours.float(), theirs, rtol=1e-2, atol=1e-2)


def test_a_later_slot_is_seen_without_causality(kernels: Kernels) -> None:
    layout = Layout([40, 20], [40, 1], heads=2, kv_heads=2, width=32, values=32)
    layout.values[layout.contexts.slots[39]] = float("nan")
    assert layout.attend(kernels)[:39].isfinite().all()
    after = layout.attend(kernels, is_causal=False)
    assert after[:40].isnan().all()
    assert after[40].isfinite().all()


def test_what_a_row_does_not_see_does_not_matter(kernels: Kernels) -> None:
    """NaN in other slots of the pool, in slots that left the window, and in another sequence."""
    layout = Layout([40, 20, 30], [1, 1, 5], heads=4, kv_heads=2, width=32, values=32)
    before = layout.attend(kernels, window=8)
    slots = layout.contexts.slots
    unused = [slot for slot in range(len(layout.keys)) if slot not in slots]
    hidden = [*slots[:32], *slots[60 : 60 + 18], *unused]
    layout.keys[hidden] = layout.values[hidden] = float("nan")
    assert torch.equal(layout.attend(kernels, window=8), before)
    layout.values[slots[59]] = float("nan")  # the last one of the second sequence
    after = layout.attend(kernels, window=8)
    assert after[1].isnan().all()
    assert torch.equal(after[[0, 2, 3, 4, 5, 6]], before[[0, 2, 3, 4, 5, 6]])


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_scores_that_are_no_numbers_are_not_hidden(kernels: Kernels, poison: float) -> None:
    layout = Layout([10, 10], [1, 1], heads=2, kv_heads=2, width=16, values=16)
    layout.keys[layout.contexts.slots[3]] = poison
    out = layout.attend(kernels)
    assert out[0].isnan().all()
    assert out[1].isfinite().all()


def test_large_scores_do_not_overflow(kernels: Kernels) -> None:
    layout = Layout([50], [3], heads=2, kv_heads=1, width=16, values=16)
    layout.query *= 100
    torch.testing.assert_close(layout.attend(kernels).float(), layout.expected(), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("shape", [(1, 16), (3, 5), (32, 4864), (2, 1000)])
def test_silu_times_is_torchs(kernels: Kernels, shape: tuple[int, int]) -> None:
    gate, up = torch.randn(shape).mul(6).to(BF16), torch.randn(shape).to(BF16)
    gate.view(-1)[:4] = torch.tensor([-100.0, 100.0, 0.0, -0.0]).to(BF16)
    expected = functional.silu(gate.float()) * up.float()
    torch.testing.assert_close(kernels.silu_times_(gate, up).float(), expected, rtol=8e-3, atol=1e-5)


def test_silu_times_keeps_nan_where_it_is(kernels: Kernels) -> None:
    gate, up = torch.ones(40, dtype=BF16), torch.ones(40, dtype=BF16)
    gate[3] = up[20] = gate[39] = float("nan")
    nan = kernels.silu_times_(gate, up).isnan()
    assert nan.nonzero().flatten().tolist() == [3, 20, 39]


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


def test_sizes_that_do_not_fit_are_left_to_torch(kernels: Kernels) -> None:
    assert kernels.can_attend(7, 64, 128)
    assert not kernels.can_attend(7, 72, 64)
    assert not kernels.can_attend(7, 64, 40)
    assert not kernels.can_attend(64, 64, 64)


def test_a_library_is_built_once(kernels: Kernels, tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    first = building.build()
    assert first.parent == tmp_path / "promptplex"
    written = first.stat().st_mtime_ns
    assert building.build() == first
    assert first.stat().st_mtime_ns == written
    assert [path.name for path in first.parent.iterdir()] == [first.name]


def test_a_directory_that_others_can_write_to_is_not_trusted(
    kernels: Kernels, tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "promptplex").mkdir(mode=0o777)
    (tmp_path / "promptplex").chmod(0o777)
    assert building.build().parent != tmp_path / "promptplex"


def test_the_first_start_makes_the_cache_its_owners_alone(
    kernels: Kernels, tmp_path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
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
    kernels: Kernels, tmp_path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
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


def test_kernels_that_compute_something_else_are_refused(
    kernels: Kernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Kernels, "attention", lambda *_, **__: torch.zeros(9, 2, 32, dtype=BF16))
    with pytest.raises(NotBuilt, match="differs"):
        library._check(kernels)


def test_products_go_on_after_the_workers_were_released() -> None:
    square = torch.ones(300, 300)
    before = square @ square
    release_workers()
    assert torch.equal(square @ square, before)
