"""Our attention against torch in float32, on shapes and layouts of all kinds, by every kind of product."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from app.models.cpu import attention_kernel
from app.models.cpu.attention_kernel import AttentionKernel, PackedContexts, load_attention
from app.models.cpu.building import NotBuilt
from tests.models.cpu.conftest import Compiled
from tests.models.cpu.test_products import OLDER, TILES

BF16 = torch.bfloat16


# What the compiler makes for this processor; AMX's tiles, emulated by loops; float vectors.
@pytest.fixture(scope="module", params=[(), TILES, OLDER], ids=["this processor", "tiles", "vectors"])
def attend(request: pytest.FixtureRequest, compiled: Compiled) -> AttentionKernel:
    try:
        return AttentionKernel(compiled(*request.param)) if request.param else load_attention()
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
        attend: AttentionKernel,
        window: int | None = None,
        *,
        is_causal: bool = True,
        bias: Tensor | None = None,
    ) -> Tensor:
        return attend(
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
    attend: AttentionKernel, heads: int, kv_heads: int, width: int, values: int, window: int | None
) -> None:
    lengths, new = [1, 5, 300, 16, 17, 40, 600, 33], [1, 1, 1, 1, 1, 40, 130, 2]
    layout = Layout(lengths, new, heads=heads, kv_heads=kv_heads, width=width, values=values)
    ours, theirs = layout.attend(attend, window), layout.expected(window)
    torch.testing.assert_close(ours.float(), theirs, rtol=1e-2, atol=1e-2)


LENGTHS = [1, 2, 15, 16, 17, 31, 256, 257, 300, 3000]


@pytest.mark.parametrize("reach", [1, 7, 128])
@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize(("heads", "kv_heads", "width"), [(3, 3, 64), (2, 2, 32), (4, 2, 16), (2, 1, 128)])
def test_a_position_bias_is_a_table_by_clamped_distance(
    attend: AttentionKernel, heads: int, kv_heads: int, width: int, is_causal: bool, reach: int
) -> None:
    """Decoding rows and chunks, contexts much longer than the table reaches, and blocks of 256 slots."""
    new = [1, 2, 1, 16, 9, 1, 200, 1, 300, 70]
    layout = Layout(LENGTHS, new, heads=heads, kv_heads=kv_heads, width=width, values=width)
    bias = torch.randn(heads, 2 * reach + 1) * 2
    ours = layout.attend(attend, is_causal=is_causal, bias=bias)
    theirs = layout.expected(is_causal=is_causal, bias=bias)
    torch.testing.assert_close(ours.float(), theirs, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(("heads", "width", "values"), [(3, 64, 64), (2, 80, 80), (2, 32, 48), (1, 128, 128)])
def test_without_causality_all_tokens_see_all_slots(
    attend: AttentionKernel, heads: int, width: int, values: int
) -> None:
    """Cross-attention too: there may be more tokens than slots."""
    new = [1, 9, 1, 16, 70, 1, 200, 1, 300, 3]
    layout = Layout(LENGTHS, new, heads=heads, kv_heads=heads, width=width, values=values)
    ours, theirs = layout.attend(attend, is_causal=False), layout.expected(is_causal=False)
    torch.testing.assert_close(ours.float(), theirs, rtol=1e-2, atol=1e-2)


def test_a_later_slot_is_seen_without_causality(attend: AttentionKernel) -> None:
    layout = Layout([40, 20], [40, 1], heads=2, kv_heads=2, width=32, values=32)
    layout.values[layout.contexts.slots[39]] = float("nan")
    assert layout.attend(attend)[:39].isfinite().all()
    after = layout.attend(attend, is_causal=False)
    assert after[:40].isnan().all()
    assert after[40].isfinite().all()


def test_what_a_row_does_not_see_does_not_matter(attend: AttentionKernel) -> None:
    """NaN in other slots of the pool, in slots that left the window, and in another sequence."""
    layout = Layout([40, 20, 30], [1, 1, 5], heads=4, kv_heads=2, width=32, values=32)
    before = layout.attend(attend, window=8)
    slots = layout.contexts.slots
    unused = [slot for slot in range(len(layout.keys)) if slot not in slots]
    hidden = [*slots[:32], *slots[60 : 60 + 18], *unused]
    layout.keys[hidden] = layout.values[hidden] = float("nan")
    assert torch.equal(layout.attend(attend, window=8), before)
    layout.values[slots[59]] = float("nan")  # the last one of the second sequence
    after = layout.attend(attend, window=8)
    assert after[1].isnan().all()
    assert torch.equal(after[[0, 2, 3, 4, 5, 6]], before[[0, 2, 3, 4, 5, 6]])


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_scores_that_are_no_numbers_are_not_hidden(attend: AttentionKernel, poison: float) -> None:
    layout = Layout([10, 10], [1, 1], heads=2, kv_heads=2, width=16, values=16)
    layout.keys[layout.contexts.slots[3]] = poison
    out = layout.attend(attend)
    assert out[0].isnan().all()
    assert out[1].isfinite().all()


def test_large_scores_do_not_overflow(attend: AttentionKernel) -> None:
    layout = Layout([50], [3], heads=2, kv_heads=1, width=16, values=16)
    layout.query *= 100
    torch.testing.assert_close(layout.attend(attend).float(), layout.expected(), rtol=1e-2, atol=1e-2)


def test_sizes_that_do_not_fit_are_left_to_torch(attend: AttentionKernel) -> None:
    assert attend.takes(7, 64, 128)
    assert not attend.takes(7, 72, 64)
    assert not attend.takes(7, 64, 40)
    assert not attend.takes(64, 64, 64)


def test_a_kernel_that_computes_something_else_is_refused() -> None:
    def nothing(query: Tensor, *_: object, **__: object) -> Tensor:
        return torch.zeros(query.shape[1], len(query), 48, dtype=BF16)

    with pytest.raises(NotBuilt, match="differs"):
        attention_kernel._check(nothing)  # type: ignore[arg-type]


@st.composite
def layouts(draw: st.DrawFn) -> tuple[Layout, int | None, bool, Tensor | None]:
    """Items of all lengths and any number of new tokens, with a window or a bias, or neither."""
    lengths = draw(st.lists(st.integers(1, 400), min_size=1, max_size=4))
    new = [draw(st.integers(1, length) | st.just(1)) for length in lengths]
    kv_heads, group = draw(st.integers(1, 3)), draw(st.sampled_from([1, 2, 3, 7, 20]))
    width, values = (draw(st.sampled_from([16, 32, 48, 64, 80])) for _ in range(2))
    layout = Layout(lengths, new, heads=kv_heads * group, kv_heads=kv_heads, width=width, values=values)
    is_causal = draw(st.booleans())
    window = draw(st.none() | st.integers(1, 300)) if is_causal else None
    reach = draw(st.none() | st.integers(1, 200))
    return layout, window, is_causal, None if reach is None else torch.randn(kv_heads * group, 2 * reach + 1)


@settings(max_examples=25, deadline=None)
@given(given_layout=layouts())
def test_any_layout_is_torchs(
    attend: AttentionKernel, given_layout: tuple[Layout, int | None, bool, Tensor | None]
) -> None:
    layout, window, is_causal, bias = given_layout
    ours = layout.attend(attend, window, is_causal=is_causal, bias=bias)
    theirs = layout.expected(window, is_causal=is_causal, bias=bias)
    torch.testing.assert_close(ours.float(), theirs, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(("heads", "kv_heads"), [(14, 2), (3, 3)])
def test_rows_that_begin_with_the_same_slots_are_torchs(
    attend: AttentionKernel, heads: int, kv_heads: int
) -> None:
    """Rows of two prompts in turn, some with more in common, beside strangers and a chunk."""
    lengths = [400, 310, 331, 450, 420, 600, 470, 302, 500, 170, 90, 301] * 4 + [340]
    new = [1] * 48 + [30]
    layout = Layout(lengths, new, heads=heads, kv_heads=kv_heads, width=48, values=32)
    slots, begin = layout.contexts.slots, layout.contexts.slot_begin.tolist()
    for number, (item, shared) in enumerate(
        (i, s) for i in range(48) for s in (300, 140) if i % 3 == s // 200
    ):
        source = begin[48] if shared == 300 else begin[5]
        shared = min(shared + number % 5, lengths[item] - 1)
        slots[begin[item] : begin[item] + shared] = slots[source : source + shared].clone()
    torch.testing.assert_close(layout.attend(attend).float(), layout.expected(), rtol=1e-2, atol=1e-2)
    layout.values[slots[begin[4] - 1]] = float("nan")  # a row's own token is seen by no other
    after = layout.attend(attend)
    assert after[3].isnan().all()
    assert after[torch.arange(len(after)) != 3].isfinite().all()


@pytest.mark.parametrize("window", [None, 20])
def test_no_number_reaches_only_the_rows_that_see_it(attend: AttentionKernel, window: int | None) -> None:
    """A chunk's rows share a block, and only some of them see a value that is NaN or infinite."""
    layout = Layout([300], [200], heads=4, kv_heads=2, width=32, values=32)
    before = layout.attend(attend, window)
    for slot, poison in ((110, float("nan")), (250, float("inf"))):
        layout.values[layout.contexts.slots[slot]] = poison
    after = layout.attend(attend, window)
    tokens = torch.arange(100, 300)
    sees = torch.zeros(200, dtype=torch.bool)
    for slot in (110, 250):
        sees |= (tokens >= slot) & (tokens < slot + (window or 300))
    assert not after[sees].isfinite().any()
    torch.testing.assert_close(after[~sees], before[~sees], rtol=1e-2, atol=1e-3)
