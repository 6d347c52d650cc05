"""Proof, without a GPU, that code never waits for one: what would wait raises `WouldSync`.

The `meta` device stands for the GPU: it has no numbers that could be looked at, and tensors have to get there
and back as they get to a GPU. On tensors of a CPU the same calls are refused, but copies aren't seen.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

DEVICE = torch.device("meta")

# Operations that look at numbers to know what to do, or how much of it.
_LOOKS = {
    "_local_scalar_dense", "item", "is_nonzero", "equal", "allclose", "nonzero", "nonzero_numpy", "argwhere",
    "masked_select", "_unique", "_unique2", "unique_dim", "unique_consecutive", "bincount",
    "one_hot", "multinomial",
}  # fmt: skip
_READS = {
    "tolist", "item", "numpy", "cpu", "__array__", "__bool__", "__int__", "__float__", "__index__",
    "__contains__", "__repr__", "__format__",
}  # fmt: skip
_BY_INDICES = {"index", "index_put", "index_put_", "_index_put_impl_"}
_INDEXES = {"__getitem__", "__setitem__"}
_UPLOADS = {"tensor", "as_tensor", "asarray"}


class WouldSync(AssertionError):
    """The host would wait for the device here."""


@contextmanager
def pinning() -> Iterator[list[Tensor]]:
    """Let the body pin memory and make events, as where there is a GPU; yield what it pins."""
    pinned: list[Tensor] = []

    def pin_memory(tensor: Tensor, *_: object) -> Tensor:
        pinned.append(tensor.clone())
        return pinned[-1]

    with (
        mock.patch.object(Tensor, "pin_memory", pin_memory),
        mock.patch.object(torch.cuda, "Event", mock.Mock),
    ):
        yield pinned


@contextmanager
def no_syncs(pinned_before: Sequence[Tensor] = ()) -> Iterator[None]:
    """Raise WouldSync where the body would wait for the device."""
    with pinning() as pinned:
        pinned += pinned_before
        with _Calls(), _Operations(pinned):
            yield


class _Calls(TorchFunctionMode):
    """Refuses to read tensors, and to index a device's by lists or arrays, which are copied there first."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        name = func.__name__
        if name in _READS:
            raise WouldSync(f"Tensor.{name}")
        if name in _INDEXES and any(map(_is_copied_first, _parts(args[1]))):
            raise WouldSync(f"an index that is no tensor of the device: {args[1]!r}")
        if name in _UPLOADS and torch.device((kwargs or {}).get("device") or "cpu").type != "cpu":
            raise WouldSync(f"torch.{name}(..., device=...) waits for its copy")
        return func(*args, **(kwargs or {}))


class _Operations(TorchDispatchMode):
    """Refuses operations that look at numbers, and copies that block."""

    def __init__(self, pinned: list[Tensor]) -> None:
        super().__init__()
        self._pinned = pinned

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        given, name = dict(kwargs or {}), func.overloadpacket.__name__
        if name in _LOOKS or (name == "repeat_interleave" and given.get("output_size") is None):
            raise WouldSync(f"aten.{name}")
        if name in _BY_INDICES and any(map(_is_mask, _tensors(args[1]))):
            raise WouldSync(f"aten.{name} by a mask: how many it chooses has to be known")
        if name in _BY_INDICES and _is_checked_sum(func, args, given):
            raise WouldSync(f"aten.{name} that accumulates and checks the range of its indices")
        if name == "copy_" and args[0].device != args[1].device:
            named = {"non_blocking": args[2] if len(args) > 2 else given.get("non_blocking")}
            return self._copied(lambda: func(*args, **given), args[1], args[0].device, named)
        devices = {tensor.device.type for tensor in _tensors(args) if tensor.dim()}
        if len(devices) > 1:
            raise WouldSync(f"aten.{name} of tensors on several devices: {devices}")
        if name in ("to", "_to_copy"):
            named = _named(func, args, given)
            if (device := _target(named)) != args[0].device:
                return self._copied(lambda: func(*args, **given), args[0], device, named)
        return func(*args, **given)

    def _copied(
        self, copy: Callable[[], Tensor], tensor: Tensor, device: torch.device, named: dict[str, Any]
    ) -> Tensor:
        if not named.get("non_blocking"):
            raise WouldSync(f"a copy from {tensor.device} to {device} that blocks")
        if device.type == "cpu":  # what comes back is memory without a meaning
            return torch.zeros(tensor.shape, dtype=named.get("dtype") or tensor.dtype)
        if not any(_memory(tensor) == _memory(each) for each in self._pinned):
            raise WouldSync("a copy from memory that isn't pinned")
        return copy()


def _named(func: Any, args: Sequence[Any], given: Mapping[str, Any]) -> dict[str, Any]:
    return dict(zip((each.name for each in func._schema.arguments), args, strict=False)) | dict(given)


def _is_checked_sum(func: Any, args: Sequence[Any], given: Mapping[str, Any]) -> bool:
    named = _named(func, args, given)
    return bool(named.get("accumulate")) and not named.get("unsafe")


def _target(named: Mapping[str, Any]) -> torch.device:
    """The device of a copy."""
    device = named["other"].device if "other" in named else named.get("device")
    return named["self"].device if device is None else torch.device(device)


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _parts(index: Any) -> Sequence[Any]:
    return index if isinstance(index, tuple) else (index,)


def _is_copied_first(part: Any) -> bool:
    return isinstance(part, list | np.ndarray)


def _is_mask(tensor: Tensor) -> bool:
    return tensor.dtype in (torch.bool, torch.uint8)


def _tensors(args: Sequence[Any]) -> Iterator[Tensor]:
    for each in args:
        if isinstance(each, Tensor):
            yield each
        elif isinstance(each, list | tuple):
            yield from _tensors(each)
